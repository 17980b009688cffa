"""Runs one update: `ray job submit -- python jobs/update.py --config shop.yaml`."""

import sys

import ray

from raysys.config import Config
from raysys.entry import run_job
from raysys.update import run_update


def update(config: Config) -> None:
    """Updates the model once, on the cluster that the job was submitted to."""
    run_update(
        config,
        on_progress=lambda line: print(f"[update] {line}", flush=True),
        start_ray=start_ray,
    )


def start_ray() -> None:
    """Connects, and shows what the workers print."""
    ray.init(log_to_driver=True)
    ray.data.DataContext.get_current().enable_progress_bars = False


if __name__ == "__main__":
    sys.exit(run_job("Train on what is new and commit a version.", update))
