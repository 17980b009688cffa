"""One task of an update's first stage: files in, clean rows split by user shard out.

    files -> clean -> staging/UPDATE/clean/<task>-<n>.arrow
                      quarantine/UPDATE/rows-<task>-<n>.parquet

A file that cannot be read is named and left out; rows that cannot be used go to quarantine. What
was read is written in parts, so that a large file needs no more memory than a small one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from raysys.config import Config
from raysys.errors import DataError
from raysys.ingest.clean import CLEAN_COLUMNS, clean_events, conform, read_parquet_file
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.shards import write_sharded
from raysys.ledger.records import FileRef
from raysys.partitions.layout import partition_date, quarantine, staging
from raysys.storage import Root
from raysys.storage.parquet import to_parquet

CLEAN_SCHEMA = {
    name: {"ts": pl.Float64(), "position": pl.Int32()}.get(name, pl.String())
    for name in CLEAN_COLUMNS
}
PART_ROWS = 2_000_000
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
) -> dict[str, Any]:
    """Cleans the files of one task.

    Args:
      files: Partition key and file of each.
      task: Its number, which names what it writes.

    Returns:
      `num_rows` read, `row_counts` of those refused, `bad_files` with reasons, and the `paths` of
      what was written, in order.
    """
    pseudonymizer = Pseudonymizer.from_file(config.pseudonyms.key_file)
    bad_files: dict[str, str] = {}
    paths: list[str] = []
    counts: Counter[str] = Counter(quarantined=0)
    num_rows = 0
    for part, (usable, refused) in enumerate(_parts(files, source, pseudonymizer, bad_files)):
        name = f"{task:06}-{part:04}"
        num_rows += len(usable) + len(refused)
        counts["quarantined"] += len(refused)
        if len(refused):
            target.put(f"{quarantine(update_id)}/rows-{name}.parquet", to_parquet(refused))
        if len(usable):
            paths.append(f"{staging(update_id)}/clean/{name}.arrow")
            target.put(paths[-1], write_sharded(usable, num_shards))
    return {
        "num_rows": num_rows,
        "row_counts": dict(counts),
        "bad_files": bad_files,
        "paths": paths,
    }


def _parts(
    files: Sequence[tuple[str, FileRef]],
    source: Root,
    pseudonymizer: Pseudonymizer,
    bad_files: dict[str, str],
) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Yields usable and refused rows, of several small files or of a part of a large one."""
    usable: list[pl.DataFrame] = []
    refused: list[pl.DataFrame] = []
    for key, file in files:
        try:
            frame = conform(read_parquet_file(source.read_bytes(file.path), file.path), file.path)
        except DataError as error:
            bad_files[file.path] = str(error)
            continue
        good, bad = clean_events(frame, pseudonymizer, date=partition_date(key))
        usable.append(good)
        refused.append(bad.with_columns(path=pl.lit(file.path)))
        if sum(map(len, usable)) >= PART_ROWS:
            yield pl.concat(usable), pl.concat(refused)
            usable, refused = [], []
    if usable:
        yield pl.concat(usable), pl.concat(refused)
