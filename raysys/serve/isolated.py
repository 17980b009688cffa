"""A canary in a process of its own: `replica.isolate_canary`.

    ingress replica: RankService -> RemoteVersion.rank(task) -> deployment Canary -> Ranking
    no answer in time, or none at all -> ScoresError -> counted as bad, and stable answers

What a canary can do to its process, crash, hang, eat memory, then ends that process alone. It
costs a second process with the versions in it, and a hop for the canary's requests. The deployment
is part of the application from its start; which version it holds it reads off the ledger, as
others do.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Literal, Protocol

from raysys.rollout.view import RolloutView
from raysys.serve.answer import Ranking, Task
from raysys.serve.ranker import InvalidScoresError, ScoresError
from raysys.serve.schema import ApiError

REST_S = 1.0
"""After a request without an answer, so long no other waits for one: each fails at once."""
_STATUS_TIMEOUT_S = 2.0

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RemoteStatus:
    """A version that the other process can answer with."""

    num_items: int
    encoder_runtime: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RemoteError:
    """Why the other process has no ranking: errors as plain data, which every pickle survives."""

    kind: Literal["request", "scores", "invalid"]
    message: str
    status: int = 500

    @classmethod
    def of(cls, error: ApiError | ScoresError) -> RemoteError:
        """Takes down an error."""
        if isinstance(error, ApiError):
            return cls(kind="request", message=error.message, status=error.status)
        kind: Literal["scores", "invalid"] = (
            "invalid" if isinstance(error, InvalidScoresError) else "scores"
        )
        return cls(kind=kind, message=str(error))

    def raised(self) -> ApiError | ScoresError:
        """Returns the error to raise here."""
        if self.kind == "request":
            return ApiError(self.status, self.message)
        return (InvalidScoresError if self.kind == "invalid" else ScoresError)(self.message)


class CanaryProcess(Protocol):
    """The other process as a replica reaches it: any call may fail or hang."""

    async def rank(self, name: str, task: Task) -> Ranking | RemoteError: ...
    async def status(self, name: str) -> RemoteStatus | None: ...


class RemoteVersion:
    """A version that answers elsewhere."""

    def __init__(
        self,
        name: str,
        status: RemoteStatus,
        process: CanaryProcess,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.status = status
        self._process = process
        self._timeout_s = timeout_s
        self._clock = clock
        self._rests_until = -1.0

    async def rank(self, task: Task) -> Ranking:
        """Has the other process rank.

        Raises:
          ApiError: The request is to blame.
          ScoresError: The version is, or its process did not answer in time.
        """
        if self._clock() < self._rests_until:
            raise ScoresError(f"the process of canary {self.name} has just failed to answer")
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._process.rank(self.name, task)
        except Exception as error:  # an actor that died raises a class of its own
            self._rests_until = self._clock() + REST_S
            raise ScoresError(
                f"the process of canary {self.name} gave no answer within {self._timeout_s:g} s: "
                f"{type(error).__name__}"
            ) from error
        if isinstance(answer, RemoteError):
            raise answer.raised()
        return answer


class RemoteCanary:
    """Knows whether the canary of a view can answer elsewhere."""

    def __init__(self, process: CanaryProcess, *, timeout_s: float) -> None:
        self._process = process
        self._timeout_s = timeout_s
        self._version: RemoteVersion | None = None

    def get(self, name: str | None) -> RemoteVersion | None:
        """Returns the version if it can answer, or could: one that falls silent has to count."""
        found = self._version
        return found if found is not None and found.name == name else None

    async def follow(self, view: RolloutView) -> None:
        """Asks for the view's canary, until it can answer."""
        if view.canary is None:
            self._version = None
            return
        if self.get(view.canary) is not None:
            return
        self._version = None
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                status = await self._process.status(view.canary)
        except Exception as error:  # an actor that died raises a class of its own
            _logger.warning("the canary's process did not answer: %r", error)
            return
        if status is not None:
            self._version = RemoteVersion(view.canary, status, self._process, self._timeout_s)
