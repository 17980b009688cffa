"""Chooses hyperparameters: `ray job submit -- python jobs/tune.py --config shop.yaml`.

An update whose model is the best of several trials; the config's `tune` says what is tried.
"""

import sys

import ray

from raysys.config import Config
from raysys.entry import run_job
from raysys.select import run_selection


def tune(config: Config) -> None:
    """Updates the model once, by selection, on the cluster that the job was submitted to."""

    def start_ray() -> None:
        # Under privacy nothing that a trial's process prints may be shown.
        ray.init(log_to_driver=not config.privacy.enabled)
        ray.data.DataContext.get_current().enable_progress_bars = False

    run_selection(
        config, on_progress=lambda line: print(f"[tune] {line}", flush=True), start_ray=start_ray
    )


if __name__ == "__main__":
    sys.exit(run_job("Try hyperparameters, and commit the best trial as a version.", tune))
