"""One task of an update's first stage: files in, clean rows split by user shard out.

    files -> read.iter_events -> staging/UPDATE/clean/<task>-<n>.arrow
                                 quarantine/UPDATE/rows-<task>-<n>.parquet, rescued-…

A file that cannot be read is named and left out; rows that cannot be used go to quarantine. What
was read is written in parts, so that a large file needs no more memory than a small one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import polars as pl

from raysys.config import Config
from raysys.errors import DataError
from raysys.ingest.clean import Cleaned
from raysys.ingest.pseudonym import Pseudonymizer, no_values_in_errors
from raysys.ingest.read import iter_events
from raysys.ingest.shards import write_sharded
from raysys.ledger.records import FileRef, PartitionRef
from raysys.partitions.discover import require_as_planned
from raysys.partitions.layout import partition_span, quarantine, staging
from raysys.storage import Root
from raysys.storage.parquet import to_parquet

PART_ROWS = 500_000
"""Rows held before a part is written."""


def clean_task(
    files: Sequence[tuple[str, FileRef]],
    task: int,
    *,
    source: Root,
    target: Root,
    update_id: str,
    num_shards: int,
    config: Config,
    user_key_id: str,
) -> dict[str, Any]:
    """Cleans the files of one task.

    Args:
      files: Partition key and file of each.
      task: Its number, which names what it writes.
      user_key_id: The key of the pseudonyms to be made: a later one may be given meanwhile.

    Returns:
      `num_rows` read, `row_counts` of those refused, `column_counts`, `bad_files` with reasons, and
      the `paths` of what was written, in order.

    Raises:
      PartitionChangedError: A file is not what was planned any more.
    """
    pseudonymizer = Pseudonymizer.from_config(config.pseudonyms).until(user_key_id)
    parts = _Parts(target, update_id, task, num_shards)
    bad_files: dict[str, str] = {}
    for key, file in files:
        try:
            with no_values_in_errors(file.path), source.open_input(file.path) as opened:
                for part in iter_events(
                    opened,
                    file.path,
                    contract=config.schema,
                    pseudonymizer=pseudonymizer,
                    span=partition_span(key),
                ):
                    parts.add(part, file.path)
        except DataError as error:
            bad_files[file.path] = str(error)
            parts.discard_file()
        except FileNotFoundError:
            _require_as_planned(source, files)
            raise
        else:
            parts.keep_file()
    # After reading: whatever was read is then what was planned, unreadable files included.
    _require_as_planned(source, files)
    parts.close()
    return {
        "num_rows": parts.num_rows,
        "row_counts": dict(parts.row_counts),
        "column_counts": dict(parts.column_counts),
        "bad_files": bad_files,
        "paths": parts.paths,
    }


def _require_as_planned(root: Root, files: Sequence[tuple[str, FileRef]]) -> None:
    for key in dict.fromkeys(key for key, _ in files):
        own = tuple(file for of_key, file in files if of_key == key)
        require_as_planned(root, PartitionRef(key=key, files=own))


class _Parts:
    """Gathers the rows of small files, and writes those of large ones while they are read.

    A file can turn out to be corrupt at its end, so what it gave counts only once it is read whole.
    """

    def __init__(self, target: Root, update_id: str, task: int, num_shards: int) -> None:
        self.paths: list[str] = []
        self.num_rows = 0
        self.row_counts: Counter[str] = Counter()
        self.column_counts: Counter[str] = Counter()
        self._target, self._update_id, self._task = target, update_id, task
        self._num_shards = num_shards
        self._num_written = 0
        self._kept: list[Cleaned] = []
        self._held: list[Cleaned] = []
        self._written: list[str] = []
        self._tallies: list[tuple[int, Counter[str], Counter[str]]] = []

    def add(self, part: Cleaned, path: str) -> None:
        """Takes rows of the file that is being read."""
        self._tallies.append((part.num_rows, part.row_counts, part.column_counts))
        named = {
            name: getattr(part, name).with_columns(path=pl.lit(path))
            for name in ("refused", "rescued")
        }
        self._held.append(dataclasses.replace(part, **named))
        if _num_rows(self._held) >= PART_ROWS:
            self._written.append(self._write(self._held))
            self._held = []

    def keep_file(self) -> None:
        """Counts the file: it was read whole."""
        self._kept += self._held
        self.paths += [self._clean_path(name) for name in self._written]
        for num_rows, row_counts, column_counts in self._tallies:
            self.num_rows += num_rows
            self.row_counts.update(row_counts)
            self.column_counts.update(column_counts)
        self._held, self._written, self._tallies = [], [], []
        if _num_rows(self._kept) >= PART_ROWS:
            self.close()

    def discard_file(self) -> None:
        """Forgets the file, also what was written of it."""
        for name in self._written:
            for path in (self._clean_path(name), *self._quarantine_paths(name).values()):
                self._target.delete_prefix(path)
        self._held, self._written, self._tallies = [], [], []

    def close(self) -> None:
        """Writes what is left of the files that were kept."""
        if self._kept:
            self.paths.append(self._clean_path(self._write(self._kept)))
            self._kept = []

    def _write(self, parts: list[Cleaned]) -> str:
        name = f"{self._task:06}-{self._num_written:04}"
        self._num_written += 1
        for kind, path in self._quarantine_paths(name).items():
            rows = pl.concat(getattr(part, kind) for part in parts)
            if len(rows):
                self._target.put(path, to_parquet(rows))
        usable = pl.concat(part.usable for part in parts)
        self._target.put(self._clean_path(name), write_sharded(usable, self._num_shards))
        return name

    def _clean_path(self, name: str) -> str:
        return f"{staging(self._update_id)}/clean/{name}.arrow"

    def _quarantine_paths(self, name: str) -> dict[str, str]:
        folder = quarantine(self._update_id)
        return {
            "refused": f"{folder}/rows-{name}.parquet",
            "rescued": f"{folder}/rescued-{name}.parquet",
        }


def _num_rows(parts: Sequence[Cleaned]) -> int:
    return sum(part.num_rows for part in parts)
