"""Shadow scoring: stable and canary rank the same request after it was answered, and are compared.

    RankService (answered) -> Shadow.offer() -> queue -> compare() -> ShadowCounts -> controller

The answer has gone out by then, and nothing here can change it or fail it: a comparison waits in a
bounded queue, runs in a thread, one at a time, and is left out where the event loop runs late, for
then the replica has no time to spare. So a canary can be looked at before anyone sees it, at weight
0, and a shadow that is off costs one comparison of numbers.

Overlap@k is the share of stable's top k that the canary's top k has as well. Kendall's tau-b takes
all items that both ranked, and allows for equal scores (Kendall 1945, Biometrika 33:239-251).
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raysys.config import ShadowConfig
from raysys.rollout.shadow import ShadowCounts
from raysys.serve.ranker import Servable

DELAY_S = 0.02
"""A comparison waits at least so long, in which its answer is written to the socket."""
MAX_LAG_S = 0.05
"""An event loop that wakes up later than this is busy answering."""

Outcome = Literal["compared", "canary_failed", "stable_failed", "dropped"]
"""What became of a request that was drawn. `dropped`: the queue was full, or the replica busy."""

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Ranked:
    """A whole ranking, best first."""

    item_ids: Sequence[str]
    scores: Sequence[float]


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """How alike two rankings are."""

    overlap: float
    """In [0, 1]."""
    tau: float | None
    """In [-1, 1]; None where a ranking gives all common items one score, or they have just one."""


def compare(stable: Ranked, canary: Ranked, k: int) -> Comparison | None:
    """Compares two rankings of one request; None if stable's has nothing in it.

    >>> compare(Ranked("abc", [3, 2, 1]), Ranked("cba", [3, 2, 1]), k=2)
    Comparison(overlap=0.5, tau=-1.0)
    """
    top = set(stable.item_ids[:k])
    if not top:
        return None
    overlap = len(top & set(canary.item_ids[:k])) / len(top)
    scored = dict(zip(canary.item_ids, canary.scores, strict=True))
    pairs = [
        (score, scored[item])
        for item, score in zip(stable.item_ids, stable.scores, strict=True)
        if item in scored
    ]
    scores = np.array(pairs, np.float64).reshape(-1, 2)
    return Comparison(overlap=overlap, tau=kendall_tau(scores[:, 0], scores[:, 1]))


def kendall_tau(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Returns tau-b of two scores of the same items, (K,) each; None if either is constant.

    >>> kendall_tau(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))
    0.3333333333333333
    """
    orders = [np.sign(scores[:, None] - scores[None, :]).astype(np.int8) for scores in (a, b)]
    untied = [int(np.count_nonzero(order)) for order in orders]
    if 0 in untied:
        return None
    return float((orders[0] * orders[1]).sum(dtype=np.int64) / np.sqrt(untied[0] * untied[1]))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShadowRequest:
    """An answered request that both versions are to rank."""

    analysis_id: str
    """The tally that the result is for."""
    stable: Servable
    canary: Servable
    rank: Callable[[Servable], Ranked]
    """Ranks the request with a version. Blocking; it may raise anything."""


class Shadow:
    """Draws requests, and compares them in the background. For one event loop."""

    def __init__(
        self,
        config: ShadowConfig,
        on_outcome: Callable[[ShadowRequest, Outcome], None] = lambda request, outcome: None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._config = config
        self._on_outcome = on_outcome
        self._clock = clock
        self._sleep = sleep
        self._queue: asyncio.Queue[ShadowRequest] = asyncio.Queue(config.max_waiting)
        self._counts: tuple[str | None, ShadowCounts] = (None, ShadowCounts())

    def draws(self, nonce: str) -> bool:
        """Whether the request of this nonce is one of the sample."""
        share = self._config.sample_fraction
        if share == 0:
            return False
        digest = hashlib.blake2b(nonce.encode(), digest_size=8, person=b"shadow").digest()
        return int.from_bytes(digest) < share * 2**64

    def offer(self, request: ShadowRequest) -> None:
        """Has a request compared later, if there is room for it. It never waits."""
        try:
            self._queue.put_nowait(request)
        except asyncio.QueueFull:
            self._on_outcome(request, "dropped")

    def counts(self, analysis_id: str) -> ShadowCounts:
        """Returns what was found for an analysis: the newest one, or nothing."""
        known_id, counts = self._counts
        return counts if known_id == analysis_id else ShadowCounts()

    async def run(self) -> None:
        """Compares until it is cancelled."""
        while True:
            request = await self._queue.get()
            due = self._clock() + DELAY_S
            await self._sleep(DELAY_S)
            if self._clock() > due + MAX_LAG_S:
                self._on_outcome(request, "dropped")
                continue
            self._on_outcome(request, await self._compare(request))

    async def _compare(self, request: ShadowRequest) -> Outcome:
        try:
            stable = await asyncio.to_thread(request.rank, request.stable)
        except Exception as error:  # whatever it is: users were answered, and are not to notice
            _logger.warning("stable failed in the shadow: %r", error)
            return "stable_failed"
        try:
            canary = await asyncio.to_thread(request.rank, request.canary)
        except Exception as error:
            _logger.warning("canary %s failed in the shadow: %r", request.canary.name, error)
            self._add(request, ShadowCounts(num_failed=1))
            return "canary_failed"
        self._add(request, _counted(compare(stable, canary, self._config.k)))
        return "compared"

    def _add(self, request: ShadowRequest, counts: ShadowCounts) -> None:
        known = self.counts(request.analysis_id)
        self._counts = (request.analysis_id, known + counts)


def _counted(comparison: Comparison | None) -> ShadowCounts:
    if comparison is None:
        return ShadowCounts()
    return ShadowCounts(
        num_compared=1,
        sum_overlap=comparison.overlap,
        num_tau=int(comparison.tau is not None),
        sum_tau=comparison.tau or 0.0,
    )
