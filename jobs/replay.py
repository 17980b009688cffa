"""Makes a version's examples again, from the same partitions, config and seeds.

python jobs/replay.py --config shop.yaml --version v0003-1a2b3c

Without privacy it trains again too, and compares the weights bit for bit.
"""

import argparse
import sys

import ray

from raysys.config import Config
from raysys.entry import run_job
from raysys.replay import replay


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what a replay can be told."""
    parser.add_argument("--version", required=True, help="a version, or the id of an update")


def replay_version(config: Config, *, version: str) -> None:
    """Replays on the cluster that the job was submitted to."""
    done = replay(config, version, on_progress=say, start_ray=start_ray)
    weights = "and weights " if done.weights else ""
    say(f"{version}: examples {weights}are the same, bit for bit")


def start_ray() -> None:
    """Connects, once all that can be refused was."""
    ray.init(log_to_driver=True)
    ray.data.DataContext.get_current().enable_progress_bars = False


def say(line: str) -> None:
    """Prints progress."""
    print(f"[replay] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(run_job("Make a committed update again, and compare.", replay_version, add_options))
