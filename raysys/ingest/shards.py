"""How an update's work is cut: files into tasks, users into shards, rows from one to the other.

    partitions -> group_files() -> tasks --write_sharded()--> one file a task, a batch a shard
                                                 read_shard() <-- one task a shard

Tasks and shards grow in number with the data, not in size, so ten times the data needs the memory
of one time. What a task writes is what a sort-based shuffle writes (Spark's, Exoshuffle's): one
object a task, from which each shard's task reads its own range.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from raysys.config import IngestConfig
from raysys.ingest.pseudonym import user_shard
from raysys.ledger.records import FileRef, PartitionRef
from raysys.storage import Root

_NAME = re.compile(r"(\d+)-of-(\d+)")


def group_files(
    partitions: Iterable[PartitionRef], task_bytes: int
) -> list[list[tuple[str, FileRef]]]:
    """Returns the partition keys and files of each task: neighbours, of about `task_bytes`.

    A larger file is a task of its own: its rows are read group by group.
    """
    tasks: list[list[tuple[str, FileRef]]] = []
    room = 0
    for partition in partitions:
        for file in partition.files:
            if not tasks or room < file.size_bytes:
                tasks.append([])
                room = task_bytes
            tasks[-1].append((partition.key, file))
            room -= file.size_bytes
    return tasks


def num_shards_for(partitions: Iterable[PartitionRef], config: IngestConfig) -> int:
    """Returns how many user shards an update has: a multiple of `num_shards`."""
    size_bytes = sum(file.size_bytes for partition in partitions for file in partition.files)
    return config.num_shards * max(math.ceil(size_bytes / config.task_bytes / config.num_shards), 1)


def shard_name(shard: int, num_shards: int) -> str:
    """Returns how a shard's file is called.

    >>> shard_name(3, 8)
    '0003-of-0008'
    """
    return f"{shard:04}-of-{num_shards:04}"


def overlapping(shard: int, num_shards: int, paths: Iterable[str]) -> list[str]:
    """Returns those files, named by `shard_name`, that can hold users of a shard.

    The numbers of shards may differ: user hashes that leave one rest also leave the same rest by
    every common divisor.

    >>> overlapping(3, 8, ["a/0000-of-0004.parquet", "a/0003-of-0004.parquet", "a/0001-of-0002.x"])
    ['a/0003-of-0004.parquet', 'a/0001-of-0002.x']
    """
    return [path for path in paths if _may_overlap(shard, num_shards, path)]


def _may_overlap(shard: int, num_shards: int, path: str) -> bool:
    match = _NAME.search(path.rpartition("/")[2])
    if match is None:
        return True  # raysys 0.1 did not say of how many: the rows are looked through
    other, num_others = int(match[1]), int(match[2])
    return (shard - other) % math.gcd(num_shards, num_others) == 0


def write_sharded(rows: pl.DataFrame, num_shards: int) -> bytes:
    """Returns an Arrow IPC file of `num_shards` record batches: batch i has the rows of shard i.

    Args:
      rows: Any columns, among them `user`.
    """
    shard = rows.select(user_shard(num_shards)).to_series().to_numpy()
    order = np.argsort(shard, kind="stable")
    table = rows[order].to_arrow(compat_level=pl.CompatLevel.oldest())
    bounds = np.searchsorted(shard[order], np.arange(num_shards + 1))
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        for start, end in itertools.pairwise(bounds):
            columns = [column.combine_chunks() for column in table.slice(start, end - start)]
            writer.write_batch(pa.record_batch(columns, schema=table.schema))
    return bytes(sink.getvalue())


def read_shard(root: Root, paths: Sequence[str], shard: int) -> list[pl.DataFrame]:
    """Returns a shard's rows of each file that `write_sharded` made, in order of the paths."""
    frames = []
    for path in paths:
        with root.open_input(path) as file:
            batch = pa.ipc.open_file(file).get_batch(shard)
        frame = pl.from_arrow(batch)
        assert isinstance(frame, pl.DataFrame)
        frames.append(frame)
    return frames
