"""Catches up history: `ray job submit -- python jobs/backfill.py --config shop.yaml`.

python jobs/backfill.py --config shop.yaml --first 2017-01-01 --last 2017-06-30 --max-partitions 14
"""

import argparse
import datetime
import functools
import sys

import ray

from raysys.backfill import run_backfill
from raysys.config import Config
from raysys.entry import run_job
from raysys.ledger.records import UpdateCommitted
from raysys.partitions.discover import PartitionRange
from raysys.update import run_update


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what a backfill can be told."""
    day = datetime.date.fromisoformat
    parser.add_argument("--first", type=day, help="first day, YYYY-MM-DD; the oldest by default")
    parser.add_argument("--last", type=day, help="last day; the newest by default")
    parser.add_argument(
        "--max-partitions", type=int, default=0, metavar="N",
        help="at most so many partitions an update; partitions.max_partitions by default",
    )  # fmt: skip


def backfill(
    config: Config,
    *,
    first: datetime.date | None,
    last: datetime.date | None,
    max_partitions: int,
) -> None:
    """Updates the model until nothing in the range is new."""
    days = PartitionRange(first=first, last=last, max_partitions=max_partitions)
    run_backfill(config, days, functools.partial(update, config), say)


def update(config: Config, within: PartitionRange) -> UpdateCommitted:
    """Runs one update on the cluster that the job was submitted to."""
    return run_update(config, on_progress=say, start_ray=start_ray, within=within)


def start_ray() -> None:
    """Connects before the first update that is not refused."""
    if not ray.is_initialized():
        ray.init(log_to_driver=True)
        ray.data.DataContext.get_current().enable_progress_bars = False


def say(line: str) -> None:
    """Prints progress."""
    print(f"[backfill] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(run_job("Train on history in several updates.", backfill, add_options))
