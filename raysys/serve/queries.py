"""Encodes the queries that wait, several at once and each once.

    RankService -> ready(version, query) -> embed_queries() in a thread -> score() knows the query

While a batch is encoded, the queries that come are collected for the next one; so batches are small
when there is little to do, and large when there is much. A query that waits already is not encoded
a second time, whichever request or version of the same encoder asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Protocol


class Encoding(Protocol):
    """What a version gives for this; `ranker.Servable` has it."""

    @property
    def encoder_key(self) -> str: ...
    def knows_query(self, query: str) -> bool: ...
    def embed_queries(self, queries: Sequence[str]) -> None: ...


class QueryBatcher:
    """Has versions know queries before they score with them. For one event loop."""

    def __init__(self, *, max_batch: int = 16, wait_s: float = 0.0) -> None:
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._lines: dict[str, _Line] = {}

    async def ready(self, version: Encoding, query: str) -> None:
        """Returns once the version knows the query: its `score` then runs no encoder.

        Raises:
          Exception: Whatever the version's encoder raised for this very query.
        """
        if version.knows_query(query):
            return
        key = version.encoder_key
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(self._max_batch, self._wait_s)
        # Shielded: a client that goes away takes its own request along, and no one else's.
        await asyncio.shield(line.join(version, query))

    def forget(self, versions: Sequence[Encoding]) -> None:
        """Drops what it keeps for encoders that none of these versions has."""
        keys = {version.encoder_key for version in versions}
        self._lines = {key: line for key, line in self._lines.items() if key in keys or line.waits}


class _Line:
    """Queries that wait for one encoder."""

    def __init__(self, max_batch: int, wait_s: float) -> None:
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._waiting: dict[str, tuple[Encoding, asyncio.Future[None]]] = {}
        self._running: dict[str, asyncio.Future[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._is_full = asyncio.Event()

    @property
    def waits(self) -> bool:
        return bool(self._waiting or self._running)

    def join(self, version: Encoding, query: str) -> asyncio.Future[None]:
        if query in self._running:
            return self._running[query]
        if query not in self._waiting:
            future = asyncio.get_running_loop().create_future()
            future.add_done_callback(_seen)
            self._waiting[query] = (version, future)
            if len(self._waiting) >= self._max_batch:
                self._is_full.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return self._waiting[query][1]

    async def _run(self) -> None:
        if self._wait_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait_s):
                    await self._is_full.wait()
        self._is_full.clear()
        while self._waiting:
            queries = list(self._waiting)[: self._max_batch]
            batch = {query: self._waiting.pop(query) for query in queries}
            self._running = {query: future for query, (_, future) in batch.items()}
            try:
                await self._encode({query: version for query, (version, _) in batch.items()})
            finally:
                for future in self._running.values():
                    if not future.done():
                        future.cancel()
                self._running = {}

    async def _encode(self, batch: dict[str, Encoding]) -> None:
        version = next(iter(batch.values()))
        try:
            await asyncio.to_thread(version.embed_queries, list(batch))
        except Exception as error:
            if len(batch) == 1:
                self._running[next(iter(batch))].set_exception(error)
                return
            # One query that cannot be encoded must not cost the others theirs.
            for query, own in batch.items():
                await self._encode({query: own})
            return
        for query in batch:
            self._running[query].set_result(None)


def _seen(future: asyncio.Future[None]) -> None:
    """Keeps asyncio quiet about an error whose only waiter has gone."""
    if not future.cancelled():
        future.exception()
