"""Goes over to a new key: `ray job submit -- python jobs/rotate_key.py --config shop.yaml`.

Add the key to the key file or the environment first (docs/operations.md, User keys).
"""

import sys

from raysys.config import Config
from raysys.entry import run_job
from raysys.rotate import rotate_key


def rotate(config: Config) -> None:
    """Carries all pseudonyms forward to the newest key. It needs no cluster."""
    rotate_key(config, on_progress=lambda line: print(f"[rotate] {line}", flush=True))


if __name__ == "__main__":
    sys.exit(run_job("Carry all pseudonyms forward to the newest key.", rotate))
