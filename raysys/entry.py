"""What all jobs share: `--config FILE`, one line for an error, an exit code that says what it was.

ray job submit -- python jobs/update.py --config shop.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from raysys.config import load_config
from raysys.errors import RaysysError


def run_job(
    description: str,
    action: Callable[..., None],
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """Parses the command line, runs the job and returns its exit code.

    A `RaysysError` is one line on standard error: 1 if it will fail again, 75 (EX_TEMPFAIL) if a
    retry may help. Anything else is our bug and keeps its traceback.

    Args:
      action: Gets the config, and the job's own options by name.
      add_options: Adds those options.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="the shop's YAML file")
    add_options(parser)
    options = vars(parser.parse_args())
    try:
        action(load_config(options.pop("config")), **options)
    except RaysysError as error:
        print(f"raysys: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0
