"""Compares ingest with Polars in one process, at one and at ten times a real shop's year.

    python benchmarks/ingest.py              # ten minutes; the last line is one JSON object
    python benchmarks/ingest.py --copies 2   # two times instead of ten, to see that it runs

*Join*: 20.9 million placements (what stood where in which week) are joined to the 1.47 million
purchases of the same store, product and week, as impressions are to outcomes. raysys runs its own
parts: files in tasks of `task_bytes` on Ray Data, columns pushed down, `labels.attribute` inside.
Polars scans the same files and joins them by its streaming engine, in a process of its own with all
cores. Both read from disk, and their results are compared. The shop is copied with shifted stores.

*Examples*: all of `ingest()` on the year's purchases, to examples, histories and item counts.
Users, requests and events are shifted from copy to copy.

Memory is the largest sum of proportional set sizes (PSS) of all processes of a run, Ray's included.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pyarrow.parquet as pq
import ray

from raysys.config import Config, PrivacyConfig, PseudonymConfig
from raysys.ingest.completejourney import data_folder, load_products, load_transactions
from raysys.ingest.labels import attribute
from raysys.ingest.pipeline import IngestJob, ingest
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.shards import group_files
from raysys.ingest.tasks import run_tasks
from raysys.ledger.records import FileRef, PartitionRef
from raysys.partitions.discover import discover
from raysys.partitions.layout import events_prefix
from raysys.storage import Root
from raysys.storage.parquet import to_parquet

KEY = ["store", "product"]
WEEK_S = 7 * 86_400.0
STORE_SHIFT = 100_000
TASK_BYTES = 16_000_000
NUM_REPEATS = 3
_POLARS = """
import json, sys, time
import polars as pl
folder, copies = sys.argv[1], int(sys.argv[2])
shown, sold = (
    pl.scan_parquet([f"{folder}/{name}/copy={copy}/*.parquet" for copy in range(copies)])
    for name in ("shown", "sold")
)
key = ["store", "product", "week"]
best = sold.group_by(key).agg(pl.col("gain").max())
joined = shown.join(best, on=key, how="left").select(
    rows=pl.len(), hits=pl.col("gain").is_not_null().sum(), gain=pl.col("gain").sum()
)
start = time.perf_counter()
row = joined.collect(engine="streaming").row(0, named=True)
print(json.dumps({**row, "seconds": time.perf_counter() - start}))
"""


def main() -> None:
    """Runs all, prints each figure as it comes and all of them as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=10, help="Times the shop's year.")
    copies = parser.parse_args().copies
    with tempfile.TemporaryDirectory() as name, local_ray():
        folder = Path(name)
        write_weeks(folder, copies)
        small, large = (compare_join(folder, num) for num in (1, copies))
        examples = [build_examples(folder / f"shop{num}", num) for num in (1, copies)]
    figures = {
        "copies": copies,
        "rows_per_s": large["rows_per_s"],
        "ratio_vs_polars": large["ratio"],
        "ratio_1x": small["ratio"],
        "rss_growth_10x": large["pss_mb"] / small["pss_mb"],
        "peak_mb_1x": small["pss_mb"],
        "peak_mb_10x": large["pss_mb"],
        "polars_peak_mb_1x": small["polars_pss_mb"],
        "polars_peak_mb_10x": large["polars_pss_mb"],
        "examples_rows_per_s_1x": examples[0]["rows_per_s"],
        "examples_rows_per_s_10x": examples[1]["rows_per_s"],
        "examples_rss_growth_10x": examples[1]["pss_mb"] / examples[0]["pss_mb"],
    }
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of this machine's cores, for this process."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def write_weeks(folder: Path, copies: int) -> None:
    """Writes placements and purchases, a file for each week and copy of the shop."""
    of_shop = {
        "shown": (data_folder() / "promotions.parquet", ["display_location", "mailer_location"]),
        "sold": (data_folder() / "transactions.parquet", ["quantity"]),
    }
    for name, (path, others) in of_shop.items():
        rows = pl.read_parquet(path, columns=["store_id", "product_id", "week", *others])
        rows = rows.rename({"store_id": "store", "product_id": "product"}).with_columns(
            pl.col("store", "product", "week").cast(pl.Int32)
        )
        if name == "sold":
            rows = rows.with_columns(gain=1.0 + pl.col("quantity"))  # a sale of 0 is one too
        for (week,), part in rows.group_by("week"):
            for copy in range(copies):
                target = folder / name / f"copy={copy}" / f"week={week:02}.parquet"
                target.parent.mkdir(parents=True, exist_ok=True)
                shifted = part.with_columns(pl.col("store") + STORE_SHIFT * copy)
                shifted.write_parquet(target)


def compare_join(folder: Path, copies: int) -> dict[str, float]:
    """Runs both joins in turn and compares the medians."""
    theirs, ours = [], []
    for _ in range(NUM_REPEATS):
        theirs.append(measured(functools.partial(join_by_polars, folder, copies), own=False))
        ours.append(measured(functools.partial(join_by_raysys, folder, copies)))
    assert all(run["result"] == theirs[0]["result"] for run in [*theirs, *ours]), (theirs, ours)
    seconds, polars_seconds = (
        sorted(run["seconds"] for run in runs)[NUM_REPEATS // 2] for runs in (ours, theirs)
    )
    figures = {
        "rows_per_s": ours[0]["result"]["rows"] / seconds,
        "ratio": polars_seconds / seconds,
        "pss_mb": max(run["pss_mb"] for run in ours),
        "polars_pss_mb": max(run["pss_mb"] for run in theirs),
    }
    print(f"join {copies}x: {figures}", flush=True)
    return figures


def join_by_polars(folder: Path, copies: int) -> dict[str, Any]:
    """Joins in a process of its own; the start of Python does not count."""
    command = [sys.executable, "-c", _POLARS, str(folder), str(copies)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def join_by_raysys(folder: Path, copies: int) -> dict[str, Any]:
    """Joins as ingest does: tasks of neighbouring files, vectorised inside."""
    paths = [p for copy in range(copies) for p in sorted((folder / f"shown/copy={copy}").iterdir())]
    files = [FileRef(path=str(p), size_bytes=p.stat().st_size, etag="") for p in paths]
    tasks = group_files([PartitionRef(key="weeks", files=tuple(files))], TASK_BYTES)
    start = time.perf_counter()
    total = {"rows": 0, "hits": 0, "gain": 0.0}
    for done in run_tasks(_join_files, [[f.path for _, f in task] for task in tasks], num_cpus=1):
        total = {name: total[name] + done[name] for name in total}
    return {**total, "seconds": time.perf_counter() - start}


def _join_files(paths: list[str]) -> dict[str, Any]:
    total = {"rows": 0, "hits": 0, "gain": 0.0}
    for path in paths:
        shown, sold = (
            pl.DataFrame(pl.from_arrow(pq.ParquetFile(p, pre_buffer=True).read(columns)))
            for p, columns in ((path, KEY), (path.replace("shown", "sold"), [*KEY, "gain"]))
        )
        placed = shown.with_columns(ts=pl.lit(0.0), closes_at=pl.lit(WEEK_S))
        gain = attribute(placed, sold.with_columns(ts=pl.lit(1.0)), on=KEY)["gain"]
        total["rows"] += len(gain)
        total["hits"] += int((gain > 0).sum())
        total["gain"] += float(gain.sum())
    return total


def build_examples(folder: Path, copies: int) -> dict[str, float]:
    """Ingests the year's purchases of `copies` times the users."""
    folder.mkdir()
    (folder / "key").write_bytes(b"a benchmark's key, no secret at all")
    root = Root((folder / "root").as_uri())
    num_rows = _write_shop(root, copies)
    config = Config(
        root=root.uri,
        pseudonyms=PseudonymConfig(key_file=str(folder / "key")),
        privacy=PrivacyConfig(enabled=False),
    )
    found = discover(root)
    job = IngestJob(
        root=root, work=root, config=config, update_id="u0001-aaaaaa", base_state=None,
        partitions=found.partitions, read_before=(), seed=0, key_ids={},
        user_key_id=Pseudonymizer.from_config(config.pseudonyms).key_id,
    )  # fmt: skip

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        done = ingest(job, found.item_files)
        assert done.num_rows == num_rows
        return {"examples": done.num_examples, "seconds": time.perf_counter() - start}

    done = measured(run)
    figures = {"rows_per_s": num_rows / done["seconds"], "pss_mb": done["pss_mb"]}
    print(f"examples {copies}x: {figures}, {done['result']}", flush=True)
    return figures


def _write_shop(root: Root, copies: int) -> int:
    rows = load_transactions().drop("unit_price")
    products = load_products().join(rows.select("item_id").unique(), on="item_id", how="semi")
    listed = products.with_columns(price=pl.lit(1.0), updated_at=rows["ts"].min())
    root.put("items/dt=2017-01-01/all.parquet", to_parquet(listed))
    for (day,), part in rows.group_by(pl.col("ts").dt.date()):
        for copy in range(copies):
            shifted = part.with_columns(
                pl.concat_str(pl.lit(f"{copy}-"), name).alias(name)
                for name in ("user_id", "request_id", "event_id")
            )
            root.put(f"{events_prefix(day)}/copy{copy}.parquet", to_parquet(shifted))
    return len(rows) * copies


def measured(run: Callable[[], dict[str, Any]], *, own: bool = True) -> dict[str, Any]:
    """Returns what `run` returned, its seconds, and the peak memory meanwhile.

    Args:
      own: Whether this process and Ray count, or else only what they start meanwhile.
    """
    watch = _MemoryWatch(before=set() if own else _family())
    with watch:
        result = run()
    seconds = result.pop("seconds")
    return {"result": result, "seconds": seconds, "pss_mb": watch.peak_bytes / 1e6}


@dataclasses.dataclass
class _MemoryWatch:
    """Samples the memory of this process's family."""

    before: set[int]
    peak_bytes: int = 0
    _done: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            now = sum(_pss(pid) for pid in _family() - self.before)
            self.peak_bytes = max(self.peak_bytes, now)


def _family() -> set[int]:
    """This process and its children. Ray's workers keep its session, whoever their parent is."""
    session = os.getsid(0)
    pids = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == session and "ray" in process.name().lower():
                pids.add(process.pid)
    return pids


def _pss(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


if __name__ == "__main__":
    main()
