"""Measures the ledger: appends, loading, races, and planning over many partitions.

    python benchmarks/ledger.py              # about two minutes; the last line is one JSON object
    python benchmarks/ledger.py --scale 0.01 # a hundredth of the work, to see that it runs

Appends and races run on a local folder and on a local S3 server (moto) over HTTP, which answers
slower than AWS S3 where it has to work and faster where only the network counts: compare its
figures with each other, not with a bucket's. Loading is timed as a user sees it, from the start of
a new Python process to the state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s3_server import s3_server
from shop_ledger import day_partition, records, write

from raysys.config import PartitionConfig
from raysys.ledger.log import Log
from raysys.ledger.snapshots import INTERVAL, SNAPSHOTS
from raysys.ledger.state import State
from raysys.partitions.discover import Discovered
from raysys.partitions.plan import plan_update
from raysys.storage import Root

NUM_APPENDS = 1000
NUM_RECORDS = 100_000
NUM_WRITERS = 16
NUM_ROUNDS = 100
NUM_PARTITIONS = 1_000_000
NUM_NEW = 30
NUM_REPEATS = 5
_YEAR_4000_S = 64_060_588_800.0
_LOAD = """
import sys
from raysys.ledger.log import Log
from raysys.storage import Root
print(Log(Root(sys.argv[1])).refresh().sequence)
"""


def main() -> None:
    """Runs all, prints each figure as it comes and all of them as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="Share of the work to do.")
    scale = parser.parse_args().scale
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, s3_server() as bucket:
        folder = Path(name)
        roots = {"local": (folder / "append").as_uri(), "s3": f"{bucket}/append"}
        for kind, uri in roots.items():
            _report(figures, _append(Root(uri), kind, _scaled(NUM_APPENDS, scale)))
        _report(figures, _load(folder / "load", _scaled(NUM_RECORDS, scale)))
        wins = [race(uri, _scaled(NUM_ROUNDS, scale)) for uri in roots.values()]
        _report(figures, {"races_with_one_winner_fraction": statistics.mean(wins)})
    _report(figures, {"plan_1m_s": plan(_scaled(NUM_PARTITIONS, scale))})
    print(json.dumps(figures))


def append_times(root: Root, num_appends: int) -> list[float]:
    """Returns the seconds that each append of one writer took."""
    log, source, times = Log(root), records(), []
    for _ in range(num_appends):
        record = next(source)
        times.append(_seconds(lambda record=record: log.transact(lambda state: record)))  # type: ignore[misc]
    return times


def load(root: Path) -> float:
    """Returns the seconds from the start of a new process until it has the state."""
    command = [sys.executable, "-c", _LOAD, root.as_uri()]
    return _seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))


def race(uri: str, num_rounds: int) -> float:
    """Returns the share of rounds in which exactly one of the writers created the object."""
    won = [0] * num_rounds
    barrier, lock = threading.Barrier(NUM_WRITERS), threading.Lock()

    def write_all(writer: int) -> None:
        root = Root(uri)
        for number in range(num_rounds):
            barrier.wait()
            if root.put_if_absent(f"race/{number}", str(writer).encode()):
                with lock:
                    won[number] += 1

    threads = [threading.Thread(target=write_all, args=(i,)) for i in range(NUM_WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(winners == 1 for winners in won) / num_rounds


def plan(num_partitions: int) -> float:
    """Returns the median seconds to plan the newest partitions of many, all others consumed."""
    partitions = tuple(day_partition(number) for number in range(num_partitions))
    old = partitions[:-NUM_NEW]
    state = State(
        consumed_files={file.path: file for part in old for file in part.files},
        consumed_partitions={part.key: "u0001-aaaaaa" for part in old},
    )
    found = Discovered(root_uri="file:///shop", partitions=partitions, item_files=())

    def run() -> None:
        planned = plan_update(found, state, PartitionConfig(), _YEAR_4000_S)
        assert len(planned.partitions) == NUM_NEW

    return statistics.median(_seconds(run) for _ in range(NUM_REPEATS))


def _append(root: Root, kind: str, num_appends: int) -> dict[str, float]:
    times = sorted(append_times(root, num_appends))
    return {
        f"append_{kind}_p50_ms": 1e3 * statistics.median(times),
        f"append_{kind}_p99_ms": 1e3 * times[int(0.99 * len(times))],
    }


def _load(root: Path, num_records: int) -> dict[str, float]:
    """The newest snapshot is half an interval old, as it is on the average."""
    (root / "ledger").mkdir(parents=True)
    source, num_after = records(), INTERVAL // 2
    num_before = num_records - num_after - 1
    write(root, 1, num_before, source, "")
    # The log sees that no snapshot is there, and writes one with its record.
    log = Log(Root(root.as_uri()))
    log.transact(lambda state: next(source))
    write(root, num_before + 2, num_after, source, log.refresh().hash)
    times = [load(root) for _ in range(NUM_REPEATS)]
    Root(root.as_uri()).delete_prefix(SNAPSHOTS)
    return {
        "load_100k_s": statistics.median(times),
        "load_100k_without_snapshot_s": load(root),
    }


def _seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _scaled(number: int, scale: float) -> int:
    return max(int(number * scale), 2 * INTERVAL if number == NUM_RECORDS else 2 * NUM_NEW)


def _report(figures: dict[str, float], new: dict[str, float]) -> None:
    for name, value in new.items():
        figures[name] = round(value, 4)
        print(f"{name:<32} {value:.4g}", flush=True)


if __name__ == "__main__":
    main()
