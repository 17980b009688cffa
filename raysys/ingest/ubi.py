"""Imports User Behavior Insights: a search engine's queries and its clients' events.

    ubi_queries, ubi_events (NDJSON or parquet) -> import_ubi() -> events/dt=…/ubi-….parquet

A query's hits become impressions, by their order, unless the shop logged impressions of that query
itself. Events become clicks, cart adds and purchases by their `action_name`. A client is a user, a
`query_id` is a request. Every line that was read is accounted for in the report.

The files are streamed, the events twice. What is kept in memory is a text for each query, and the
ids of the days that are being written: rows that are there already are not written again, so an
import may be repeated, and exports may overlap.
"""

from __future__ import annotations

import datetime
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from raysys.ingest.ubi_documents import (
    ACTIONS,
    EventRow,
    Reading,
    documents,
    event_rows,
    query_rows,
    query_text,
)
from raysys.partitions.layout import events_prefix
from raysys.partitions.schema import EVENT_SCHEMA, EventType
from raysys.storage import Root
from raysys.storage.parquet import to_parquet

BATCH_ROWS = 100_000
"""Rows that wait in memory until they are written."""
_SCHEMA = {name: EVENT_SCHEMA[name] for name in EventRow._fields}
_KEY = ["user_id", "event_id"]
_MAX_CACHED_DAYS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class UbiReport:
    """Where every line went, and every row that was made of one."""

    query_lines: Counter[str] = field(default_factory=Counter)
    """Lines by fate: `expanded` into impressions, `has impression events`, `no hits`, or the
    reason for which a line was refused."""
    event_lines: Counter[str] = field(default_factory=Counter)
    """Lines by fate: the event type, `ignored: NAME` and `unknown action: NAME`, or a reason."""
    rows: Counter[str] = field(default_factory=Counter)
    """Rows made, by event type."""
    num_written: int = 0
    num_present: int = 0
    """Rows that were there already, from an earlier import or a line that came twice."""
    num_without_query: int = 0
    """Rows of an event that names no query, or one that is in none of the files."""


def import_ubi(
    root: Root,
    queries: Sequence[Path],
    events: Sequence[Path],
    *,
    actions: Mapping[str, EventType | None] = ACTIONS,
    user_field: str = "client_id",
    on_partition: Callable[[str], None] = lambda key: None,
) -> UbiReport:
    """Writes the impressions and outcomes of these files, by the UTC day of their time.

    Args:
      queries: Files of query documents: `.ndjson`, also within `_source` or after bulk actions,
        also with `.gz`, or `.parquet`.
      events: Files of event documents.
      actions: Event type of each `action_name`; None ignores it. Others are counted and reported.
      user_field: Field of a document that tells the user. One that only some documents have would
        make two users of one person.
      on_partition: Called with the key of each partition that gets a file.

    Raises:
      DataError: A file cannot be read at all.
    """
    reading = Reading(actions=actions, user_field=user_field)
    logged = {
        row.request_id
        for document in documents(events)
        for row in event_rows(document, reading, {})[1]
        if row.event_type == "impression"
    }
    texts: dict[str | None, str | None] = {}
    query_lines, event_lines = Counter[str](), Counter[str]()
    num_without_query = 0
    writer = _Writer(root, on_partition)
    for document in documents(queries):
        fate, rows = query_rows(document, reading, logged)
        query_lines[fate] += 1
        texts.update(query_text(document))
        writer.add(rows)
    for document in documents(events):
        fate, rows = event_rows(document, reading, texts)
        event_lines[fate] += 1
        num_without_query += sum(row.request_id not in texts for row in rows)
        writer.add(rows)
    writer.flush()
    return UbiReport(
        query_lines=query_lines,
        event_lines=event_lines,
        rows=writer.rows,
        num_written=writer.num_written,
        num_present=writer.num_present,
        num_without_query=num_without_query,
    )


class _Writer:
    """Collects rows and writes those that are new, a file a day and flush."""

    def __init__(self, root: Root, on_partition: Callable[[str], None]) -> None:
        self.rows: Counter[str] = Counter()
        self.num_written = 0
        self.num_present = 0
        self._root = root
        self._on_partition = on_partition
        self._waiting: list[EventRow] = []
        self._keys: dict[datetime.date, pl.DataFrame] = {}

    def add(self, rows: list[EventRow]) -> None:
        self._waiting += rows
        if len(self._waiting) >= BATCH_ROWS:
            self.flush()

    def flush(self) -> None:
        by_day: defaultdict[datetime.date, list[EventRow]] = defaultdict(list)
        for row in self._waiting:
            by_day[row.ts.date()].append(row)
        self._waiting = []
        for day in sorted(by_day):
            frame = pl.DataFrame(by_day[day], schema=_SCHEMA, orient="row")
            self.rows.update(frame["event_type"].to_list())
            num_written = self._write(day, frame)
            self.num_written += num_written
            self.num_present += len(frame) - num_written

    def _write(self, day: datetime.date, frame: pl.DataFrame) -> int:
        keys = self._keys_of(day)
        distinct = frame.unique(_KEY, keep="first", maintain_order=True)
        new = distinct.join(keys, on=_KEY, how="anti", maintain_order="left")
        if new.is_empty():
            return 0
        self._keys[day] = pl.concat([keys, new.select(_KEY)])
        digest = hashlib.sha256(repr(new.select(_KEY).rows()).encode()).hexdigest()[:16]
        path = f"{events_prefix(day)}/ubi-{digest}.parquet"
        if not self._root.put_if_absent(path, to_parquet(new)):
            return 0
        self._on_partition(events_prefix(day))
        return len(new)

    def _keys_of(self, day: datetime.date) -> pl.DataFrame:
        """The rows of a day that are below the root."""
        if day not in self._keys:
            while len(self._keys) >= _MAX_CACHED_DAYS:
                del self._keys[next(iter(self._keys))]
            files = [f for f in self._root.list(events_prefix(day)) if "/ubi-" in f.path]
            frames = [
                pl.read_parquet(io.BytesIO(self._root.read_bytes(file.path)), columns=_KEY)
                for file in files
            ]
            empty = pl.DataFrame(schema={name: _SCHEMA[name] for name in _KEY})
            self._keys[day] = pl.concat([empty, *frames])
        return self._keys[day]
