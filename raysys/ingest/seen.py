"""Which events were read already: an index by day, so that an event counts once over all updates.

    rows of a shard -> seen_bytes() -> state/UPDATE/seen/0003-of-0008.parquet
    rows of a later update -> read_seen() -> the events of those days that earlier updates read

Each update writes the events that it read, once, and a later one reads the days that its own rows
fall into, so both cost as much as the increment. An event is told by user, `event_id` and the day
of its time, UTC: one that comes again with another day's time is another event, in one update too.
"""

from __future__ import annotations

import datetime
import io
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from raysys.ingest.features import DAY_S
from raysys.ledger.records import PartitionRef, UpdateCommitted
from raysys.partitions.layout import partition_date
from raysys.storage import Root

SEEN_SCHEMA = {"user": pl.String(), "event_id": pl.String(), "day": pl.Int32()}
_REACH = datetime.timedelta(days=2)
"""Two partitions so far apart share no day: a row is at most `MAX_CLOCK_SKEW` outside its own."""


def updates_to_ask(
    committed: Iterable[UpdateCommitted], partitions: Iterable[PartitionRef]
) -> tuple[str, ...]:
    """Returns the updates that may have read events of the same days as these partitions hold."""
    near = {
        partition_date(partition.key) + datetime.timedelta(days=days)
        for partition in partitions
        for days in range(-_REACH.days, _REACH.days + 1)
    }
    return tuple(
        update.update_id
        for update in committed
        if any(partition_date(partition.key) in near for partition in update.partitions)
    )


def key_ids(committed: Iterable[UpdateCommitted]) -> dict[str, str]:
    """Returns update -> the key of the pseudonyms in its index."""
    return {update.update_id: update.user_key_id or "" for update in committed}


def days_of(rows: pl.DataFrame) -> pl.Series:
    """Returns the day of each row, counted from 1970-01-01 UTC."""
    return rows.select(day=(pl.col("ts") / DAY_S).floor().cast(pl.Int32))["day"]


def seen_bytes(rows: pl.DataFrame) -> bytes:
    """Returns the index of these rows' events, a row group a day, as parquet.

    Args:
      rows: `user`, `event_id` and `ts`.
    """
    days = rows.select("user", "event_id").with_columns(days_of(rows))
    events = days.unique().sort("day", "user", "event_id")
    table = events.select("day", "user", "event_id").to_arrow(compat_level=pl.CompatLevel.oldest())
    day = events["day"].to_numpy()
    starts = np.flatnonzero(np.diff(day, prepend=day[:1] - 1))
    sink = io.BytesIO()
    # Statistics of the other columns would be most of the footer, and it is read each time.
    options = {"compression": "zstd", "write_statistics": ["day"]}
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        for start, end in itertools.pairwise([*starts.tolist(), len(events)]):
            writer.write_table(table.slice(start, end - start), row_group_size=end - start)
    return sink.getvalue()


def read_seen(root: Root, paths: Sequence[str], days: pl.Series) -> pl.DataFrame:
    """Returns SEEN_SCHEMA: the events of these days in these indexes. Other days are not read."""
    wanted = set(days.unique())
    frames = [pl.DataFrame(schema=SEEN_SCHEMA)]
    for path in paths:
        with root.open_input(path) as file, pq.ParquetFile(file, pre_buffer=True) as parquet:
            groups = [i for i in range(parquet.num_row_groups) if _day(parquet, i) in wanted]
            if groups:
                table = parquet.read_row_groups(groups, columns=list(SEEN_SCHEMA))
                frames.append(pl.DataFrame(pl.from_arrow(table)))
    return pl.concat(frames)


def _day(parquet: pq.ParquetFile, group: int) -> int:
    day: int = parquet.metadata.row_group(group).column(0).statistics.min
    return day
