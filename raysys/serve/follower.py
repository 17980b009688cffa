"""What a replica does beside answering: it follows the rollout, loads versions, sends its counts.

    Log (once, at the start) | Controller (long poll) -> RankService.adopt(), ResidentVersions
    Tally -> Controller.report(), each second

The first state comes from the ledger itself, so that a replica is ready without the controller. If
the controller is away, the replica goes on with the last view it got.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from raysys.errors import RaysysError
from raysys.ledger.log import Log
from raysys.rollout.reports import ReplicaReport
from raysys.rollout.view import RolloutView
from raysys.serve.service import RankService

POLL_TIMEOUT_S = 30.0
"""A long poll without news ends after this, so that a dead connection is noticed."""
ANSWER_TIMEOUT_S = 5.0
"""The controller's time for everything else."""
INTERVAL_S = 1.0
"""Seconds between two reports, between two tries to load, and after a failure."""

_logger = logging.getLogger(__name__)


class Controller(Protocol):
    """The rollout controller as a replica reaches it: any call may fail or hang."""

    async def wait_for_change(
        self, known_sequence: int, timeout_s: float
    ) -> RolloutView | None: ...
    async def report(self, report: ReplicaReport) -> int: ...
    async def measurement(self) -> dict[str, Any] | None: ...


class Follower:
    """The background tasks of a replica."""

    def __init__(
        self,
        service: RankService,
        log: Log,
        controller: Controller,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.time,
        on_first_version: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes a follower that calls `on_first_version` before the replica first is ready."""
        self._service = service
        self._log = log
        self._controller = controller
        self._interval_s = interval_s
        self._clock = clock
        self._on_first_version = on_first_version
        self._has_news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Reads the ledger, loads what it names, and starts to follow."""
        try:
            self._service.adopt(RolloutView.of(await asyncio.to_thread(self._log.refresh)))
        except RaysysError as error:
            _logger.warning("the ledger cannot be read yet: %s", error)
        await self._follow_versions()
        loops = (self._poll, self._load, self._push)
        self._tasks = [asyncio.create_task(self._forever(loop)) for loop in loops]

    async def stop(self) -> None:
        """Ends the background tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def adopt(self, view: RolloutView) -> None:
        """Has the replica follow a view from now on, and load at once what that needs."""
        self._service.adopt(view)
        self._has_news.set()

    async def measurement(self) -> dict[str, Any] | None:
        """Returns the controller's newest look at the canary, None while it is away."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await self._controller.measurement()
        except Exception as error:  # an actor that died raises a class of its own
            _logger.warning("the rollout controller did not answer: %r", error)
            return None

    async def _forever(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except Exception as error:  # an actor that died raises a class of its own
                _logger.warning("%s failed, next try soon: %r", step.__name__, error)
                await asyncio.sleep(self._interval_s)

    async def _poll(self) -> None:
        known = self._service.view.sequence
        async with asyncio.timeout(POLL_TIMEOUT_S + ANSWER_TIMEOUT_S):
            view = await self._controller.wait_for_change(known, POLL_TIMEOUT_S)
        if view is not None:
            self.adopt(view)

    async def _load(self) -> None:
        await self._follow_versions()
        self._service.report_state()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._interval_s):
                await self._has_news.wait()
        self._has_news.clear()

    async def _follow_versions(self) -> None:
        was_ready = self._service.is_ready
        await self._service.versions.follow(self._service.view)
        if self._service.is_ready and not was_ready:
            self._on_first_version()

    async def _push(self) -> None:
        tally = self._service.tally
        if tally is not None:
            tally.refusal = self._service.versions.refusal(self._service.view)
            tally.shadow = self._service.shadow.counts(tally.rollout_id)
            report = tally.report(self._clock())
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                tally.acknowledge(await self._controller.report(report))
        await asyncio.sleep(self._interval_s)
