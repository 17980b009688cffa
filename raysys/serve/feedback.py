"""Impressions and feedback become event files again, which the next update trains on.

    rows -> EventWriter: one file a second and day -> events/dt=DATE/feedback-<uuid>.parquet

Whoever writes with `write` waits until the rows are in the object store, together with everyone
else of that second (group commit). `add` does not wait: impressions may be lost with their replica,
at most those of one interval. A row that was written twice, because an answer got lost, has the
same `event_id` twice, and ingest keeps one. Users are pseudonyms; raw ids never come here.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import logging
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from raysys.partitions.layout import events_prefix
from raysys.partitions.schema import EVENT_SCHEMA
from raysys.serve.request_id import RequestTag
from raysys.serve.schema import FeedbackRequest
from raysys.storage import Root
from raysys.storage.parquet import to_parquet

MAX_BATCH_ROWS = 20_000
"""A file is written early when so many rows wait for it."""
MAX_WAITING_ROWS = 500_000
"""Impressions kept while the object store is away, about 200 MB; older ones are dropped first."""

Row = Mapping[str, Any]
"""Values by column of `EVENT_SCHEMA`; absent columns are null."""

_logger = logging.getLogger(__name__)


def impression_rows(
    tag: RequestTag,
    request_id: str,
    item_ids: Sequence[str],
    *,
    ts: float,
    query: str | None,
    user_key_id: str,
) -> list[Row]:
    """Returns one row for each item of an answer, in the order in which they are shown."""
    common = _common(tag, request_id, user_key_id) | {"event_type": "impression", "query": query}
    when = _time(ts)
    return [
        {
            **common,
            "event_id": f"{tag.nonce}-{position}",
            "item_id": item_id,
            "ts": when,
            "position": position,
        }
        for position, item_id in enumerate(item_ids, 1)
    ]


def feedback_rows(
    tag: RequestTag, feedback: FeedbackRequest, *, now: float, user_key_id: str
) -> list[Row]:
    """Returns one row for each event. What is sent again gets the same `event_id` again."""
    common = _common(tag, feedback.request_id, user_key_id)
    return [
        {
            **common,
            "event_id": _event_id(tag.nonce, event.event_type, event.item_id, event.ts),
            "event_type": event.event_type,
            "item_id": event.item_id,
            "ts": _time(now if event.ts is None else event.ts),
            "price": event.price,
            "quantity": event.quantity,
        }
        for event in feedback.events
    ]


def _common(tag: RequestTag, request_id: str, user_key_id: str) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "user_id": tag.pseudonym,
        "user_key_id": user_key_id,
        "surface": tag.surface,
        "version": tag.version,
    }


def _event_id(nonce: str, *parts: object) -> str:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
    return f"{nonce}-{digest}"


def _time(ts: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(ts, datetime.UTC)


class EventWriter:
    """Groups rows into files. For one event loop; the object store is spoken to in threads."""

    def __init__(
        self,
        root: Root,
        prefix: str,
        *,
        interval_s: float,
        on_drop: Callable[[int], None] = lambda num_rows: None,
        max_waiting_rows: int = MAX_WAITING_ROWS,
    ) -> None:
        """Makes a writer of files `<prefix>-<uuid>.parquet`, at most one a day and interval."""
        self._root = root
        self._prefix = prefix
        self._interval_s = interval_s
        self._on_drop = on_drop
        self._max_waiting_rows = max_waiting_rows
        self._unacknowledged: list[Row] = []
        self._waiting: list[tuple[Sequence[Row], asyncio.Future[None]]] = []
        self._has_rows = asyncio.Event()
        self._is_full = asyncio.Event()
        self._is_closing = False

    def add(self, rows: Sequence[Row]) -> None:
        """Has rows written in the background."""
        self._unacknowledged.extend(rows)
        self._drop_oldest()
        self._wake()

    async def write(self, rows: Sequence[Row]) -> None:
        """Returns once the rows are durable.

        Raises:
          RaysysError: They are not; send them again.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, done))
        self._wake()
        await done

    async def run(self) -> None:
        """Writes until `close`: the first rows at once, further ones an interval later."""
        while not self._is_closing:
            await self._has_rows.wait()
            await self.flush()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._is_full.wait()
        await self.flush()

    def close(self) -> None:
        """Has `run` write what waits, and end."""
        self._is_closing = True
        self._has_rows.set()
        self._is_full.set()

    async def flush(self) -> None:
        """Writes all rows that wait now."""
        background, self._unacknowledged = self._unacknowledged, []
        waiting, self._waiting = self._waiting, []
        if not self._is_closing:
            self._has_rows.clear()
            self._is_full.clear()
        rows = [*background, *(row for rows, _ in waiting for row in rows)]
        try:
            await asyncio.to_thread(self._put, rows)
        except Exception as error:  # whatever it is, callers that wait have to be told
            _logger.warning("%d events were not stored: %s", len(rows), error)
            self._unacknowledged = background + self._unacknowledged
            self._drop_oldest()
            self._has_rows.set()
            _settle(waiting, error)
        else:
            _settle(waiting, None)

    def _put(self, rows: Sequence[Row]) -> None:
        for day, of_day in _by_day(rows):
            frame = pl.DataFrame(of_day, schema=EVENT_SCHEMA)
            name = f"{self._prefix}-{uuid.uuid4().hex}.parquet"
            self._root.put(f"{events_prefix(day)}/{name}", to_parquet(frame))

    def _wake(self) -> None:
        self._has_rows.set()
        num_rows = len(self._unacknowledged) + sum(len(rows) for rows, _ in self._waiting)
        if num_rows >= MAX_BATCH_ROWS:
            self._is_full.set()

    def _drop_oldest(self) -> None:
        num_dropped = len(self._unacknowledged) - self._max_waiting_rows
        if num_dropped > 0:
            del self._unacknowledged[:num_dropped]
            self._on_drop(num_dropped)


def _by_day(rows: Sequence[Row]) -> Iterator[tuple[datetime.date, list[Row]]]:
    days: defaultdict[datetime.date, list[Row]] = defaultdict(list)
    for row in rows:
        days[row["ts"].date()].append(row)
    yield from sorted(days.items())


def _settle(
    waiting: Sequence[tuple[Sequence[Row], asyncio.Future[None]]], error: Exception | None
) -> None:
    for _, done in waiting:
        if done.done():
            continue  # its caller has gone away
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
