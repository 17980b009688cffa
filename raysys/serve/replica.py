"""Everything that one replica runs, as one thing that starts and stops.

Replica.start() -> ledger read, versions loaded, background tasks -> serve.app answers
Replica.stop()  -> waiting events written
"""

from __future__ import annotations

import asyncio

from raysys.serve.feedback import EventWriter
from raysys.serve.follower import Follower
from raysys.serve.service import RankService
from raysys.serve.steering import Steering


class Replica:
    """A service, what keeps it up to date, and what writes its events."""

    def __init__(
        self,
        service: RankService,
        follower: Follower,
        impressions: EventWriter,
        feedback: EventWriter,
        steering: Steering,
    ) -> None:
        self.service = service
        self.follower = follower
        self.steering = steering
        self._writers = (impressions, feedback)
        self._tasks: list[asyncio.Task[None]] = []
        self._shadow: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Loads what the ledger names and starts the background tasks."""
        await self.follower.start()
        self._tasks = [asyncio.create_task(writer.run()) for writer in self._writers]
        self._shadow = asyncio.create_task(self.service.shadow.run())

    async def stop(self) -> None:
        """Writes the events that wait, and ends the background tasks."""
        if self._shadow is not None:
            self._shadow.cancel()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._tasks)
        await self.follower.stop()
