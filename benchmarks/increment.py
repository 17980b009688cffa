"""Compares the ingest of one day with reading all days again, on day 300 of a real shop's year.

    python benchmarks/increment.py           # two minutes; the last line is one JSON object
    python benchmarks/increment.py --day 30  # an earlier day, to see that it runs

The increment starts from the state that the days before left, and reads one new partition. The
other arm is what a shop does without such a state: it reads everything up to that day. Both make
examples, histories and item counts by the same code, and end with the same histories, which is
checked. Bytes are those read below the root: events, items and state; what a run itself has written
to `staging/` and reads back is not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import io
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
from ingest import local_ray
from polars.testing import assert_frame_equal

from raysys.config import Config, PrivacyConfig, PseudonymConfig
from raysys.ingest.completejourney import import_days
from raysys.ingest.pipeline import IngestJob, ingest
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.shard_state import load_histories
from raysys.partitions.discover import discover
from raysys.storage import Root

FIRST = datetime.date(2017, 1, 1)
NUM_REPEATS = 3
COUNTED = ("events", "items", "state")


class CountingRoot(Root):
    """Notes what each process reads, in files of a folder beside the root."""

    def __init__(self, uri: str, folder: str) -> None:
        super().__init__(uri)
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return CountingRoot, (self.uri, self._folder)

    def read_bytes(self, path: str) -> bytes:
        """Reads an object, counted."""
        data = super().read_bytes(path)
        self.note(path, len(data))
        return data

    def open_input(self, path: str) -> BinaryIO:
        """Opens an object whose reads are counted."""
        return _CountingFile(super().open_input(path), self, path)  # type: ignore[return-value]

    def note(self, path: str, num_bytes: int) -> None:
        """Counts bytes of an object."""
        with open(Path(self._folder) / str(os.getpid()), "a") as file:
            file.write(f"{path.partition('/')[0]} {num_bytes}\n")


class _CountingFile(io.RawIOBase):
    def __init__(self, file: BinaryIO, root: CountingRoot, path: str) -> None:
        self._file, self._root, self._path = file, root, path

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._root.note(self._path, len(data))
        return len(data)

    def seek(self, place: int, whence: int = 0) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def main() -> None:
    """Runs both arms and prints their ratios as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--day", type=int, default=300, help="Day of the year that is new.")
    day = parser.parse_args().day
    with tempfile.TemporaryDirectory() as name, local_ray():
        folder = Path(name)
        config = _shop(folder, day)
        root = Root(config.root)
        found = discover(root)
        *before, new = found.partitions
        assert len(before) == day - 1
        base = _job(root, config, "u0001-aaaaaa", tuple(before), None)
        ingest(base, found.item_files)
        increment = _job(root, config, "u0002-bbbbbb", (new,), base.update_id)
        everything = _job(root, config, "u0003-cccccc", found.partitions, None)
        arms = {
            "increment": _measure(folder, increment, ()),
            "everything": _measure(folder, everything, found.item_files),
        }
        _require_same_histories(root, increment, everything)
    one, whole = arms["increment"], arms["everything"]
    figures = {
        "day": day,
        "bytes_ratio": one["bytes"] / whole["bytes"],
        "seconds_ratio": one["seconds"] / whole["seconds"],
        "increment_events_bytes": one["events"],
        "increment_state_bytes": one["state"],
        "everything_bytes": whole["bytes"],
        "rows_ratio": one["rows"] / whole["rows"],
    }

    print(json.dumps({key: round(value, 5) for key, value in figures.items()}))


def _shop(folder: Path, day: int) -> Config:
    (folder / "key").write_bytes(b"a benchmark's key, no secret at all")
    root = Root((folder / "root").as_uri())
    import_days(root, FIRST, FIRST + datetime.timedelta(days=day - 1))
    return Config(
        root=root.uri,
        pseudonyms=PseudonymConfig(key_file=str(folder / "key")),
        privacy=PrivacyConfig(enabled=False),
    )


def _job(
    root: Root, config: Config, update_id: str, partitions: Any, base_state: str | None
) -> IngestJob:
    key_id = Pseudonymizer.from_config(config.pseudonyms).key_id
    read_before = () if base_state is None else (base_state,)
    return IngestJob(
        root=root, work=root, config=config, update_id=update_id, base_state=base_state,
        partitions=partitions, read_before=read_before, user_key_id=key_id,
        key_ids=dict.fromkeys(read_before, key_id), seed=0,
    )  # fmt: skip


def _measure(folder: Path, job: IngestJob, item_files: Any) -> dict[str, float]:
    """Runs a job several times; returns its bytes and the median of its seconds."""
    seconds, counts, rows = [], Counter[str](), 0
    for repeat in range(NUM_REPEATS):
        notes = folder / f"notes-{job.update_id}-{repeat}"
        notes.mkdir()
        counting = CountingRoot(job.root.uri, str(notes))
        start = time.perf_counter()
        rows = ingest(dataclasses.replace(job, root=counting), item_files).num_rows
        seconds.append(time.perf_counter() - start)
        counts = Counter()
        for file in notes.iterdir():
            for line in file.read_text().splitlines():
                parent, num_bytes = line.split()
                counts[parent] += int(num_bytes)
    done = {name: float(counts[name]) for name in COUNTED}
    median = sorted(seconds)[NUM_REPEATS // 2]
    print(f"{job.update_id}: {done}, {median:.2f} s, {rows:,} rows", flush=True)
    return {**done, "bytes": sum(done.values()), "seconds": median, "rows": rows}


def _require_same_histories(root: Root, *jobs: IngestJob) -> None:
    """Users who have more items than a history keeps may have lost the count of an older one."""
    one, other = (load_histories(root, job.update_id) for job in jobs)
    most = jobs[0].config.ingest.max_history_items
    whole = other.filter(pl.len().over("user") < most).select("user").unique()
    assert len(whole) > 1_000, "most users have fewer items than that"
    kept = (frame.join(whole, on="user", how="semi").sort("user", "item") for frame in (one, other))
    assert_frame_equal(*kept, rel_tol=1e-6)


if __name__ == "__main__":
    main()
