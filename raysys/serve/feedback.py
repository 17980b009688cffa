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
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import polars as pl

from raysys.partitions.layout import events_prefix
from raysys.partitions.schema import EVENT_SCHEMA
from raysys.serve.impressions import Impressions, impressions_frame
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
Batch = Sequence[Row] | Impressions
"""What is added together, and dropped together."""

EventFile = Literal["impressions", "feedback"]

_logger = logging.getLogger(__name__)


class WriterMetrics(Protocol):
    """What a writer reports."""

    def written(self, file: EventFile, num_events: int) -> None: ...
    def dropped(self, file: EventFile, num_events: int) -> None: ...


def feedback_rows(
    tag: RequestTag, feedback: FeedbackRequest, *, now: float, user_key_id: str
) -> list[Row]:
    """Returns one row for each event. What is sent again gets the same `event_id` again."""
    common = {
        "request_id": feedback.request_id,
        "user_id": tag.pseudonym,
        "user_key_id": user_key_id,
        "surface": tag.surface,
        "version": tag.version,
        "propensity": tag.propensity,
        "sample_fraction": tag.sample_fraction,
    }
    return [
        {
            **common,
            "event_id": _event_id(tag.nonce, event.event_type, event.item_id, event.ts),
            "event_type": event.event_type,
            "item_id": event.item_id,
            "ts": _time(now if event.ts is None else event.ts),
            "position": event.rank,
            "price": event.price,
            "quantity": event.quantity,
        }
        for event in feedback.events
    ]


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
        prefix: EventFile,
        *,
        interval_s: float,
        metrics: WriterMetrics | None = None,
        max_waiting_rows: int = MAX_WAITING_ROWS,
    ) -> None:
        """Makes a writer of files `<prefix>-<uuid>.parquet`, at most one a day and interval."""
        self._root = root
        self._prefix = prefix
        self._interval_s = interval_s
        self._metrics = metrics
        self._max_waiting_rows = max_waiting_rows
        self._unacknowledged: deque[Batch] = deque()
        self._num_unacknowledged = 0
        self._waiting: list[tuple[Sequence[Row], asyncio.Future[None]]] = []
        self._has_rows = asyncio.Event()
        self._is_full = asyncio.Event()
        self._is_closing = False

    def add(self, batch: Batch) -> None:
        """Has rows written in the background."""
        self._unacknowledged.append(batch)
        self._num_unacknowledged += len(batch)
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
        background, self._unacknowledged = self._unacknowledged, deque()
        self._num_unacknowledged = 0
        waiting, self._waiting = self._waiting, []
        if not self._is_closing:
            self._has_rows.clear()
            self._is_full.clear()
        batches = [*background, *(rows for rows, _ in waiting)]
        try:
            await asyncio.to_thread(self._put, batches)
        except Exception as error:  # whatever it is, callers that wait have to be told
            _logger.warning("%d events were not stored: %s", sum(map(len, batches)), error)
            self._unacknowledged.extendleft(reversed(background))
            self._num_unacknowledged += sum(map(len, background))
            self._drop_oldest()
            self._has_rows.set()
            _settle(waiting, error)
        else:
            if self._metrics is not None:
                self._metrics.written(self._prefix, sum(map(len, batches)))
            _settle(waiting, None)

    def _put(self, batches: Sequence[Batch]) -> None:
        by_day = to_frame(batches).group_by(pl.col("ts").dt.date(), maintain_order=True)
        for (day,), frame in by_day:
            assert isinstance(day, datetime.date)
            name = f"{self._prefix}-{uuid.uuid4().hex}.parquet"
            self._root.put(f"{events_prefix(day)}/{name}", to_parquet(frame))

    def _wake(self) -> None:
        self._has_rows.set()
        num_rows = self._num_unacknowledged + sum(len(rows) for rows, _ in self._waiting)
        if num_rows >= MAX_BATCH_ROWS:
            self._is_full.set()

    def _drop_oldest(self) -> None:
        num_dropped = 0
        while self._num_unacknowledged - num_dropped > self._max_waiting_rows:
            num_dropped += len(self._unacknowledged.popleft())
        if num_dropped:
            self._num_unacknowledged -= num_dropped
            if self._metrics is not None:
                self._metrics.dropped(self._prefix, num_dropped)


def to_frame(batches: Sequence[Batch]) -> pl.DataFrame:
    """Returns all rows, with the columns of `EVENT_SCHEMA`."""
    shown = [batch for batch in batches if isinstance(batch, Impressions)]
    rows = [row for batch in batches if not isinstance(batch, Impressions) for row in batch]
    return pl.concat([impressions_frame(shown), pl.DataFrame(rows, schema=EVENT_SCHEMA)])


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
