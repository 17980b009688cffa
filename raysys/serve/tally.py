"""What one replica counts about the rollout on trial.

    answered(tag), converted(tag) -> Tally -> report() -> rollout.reports -> controller

A request counts for conversion only once it has matured (`rollout.feedback_delay_s`): a canary's
requests are newer on average than stable's are, and would seem to convert less. What came of a
request is held back until then as well.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from raysys.config import RolloutConfig
from raysys.rollout.counters import (
    NUM_BUCKETS,
    SURFACES,
    Arm,
    Counts,
    OutcomeKind,
    VersionCounters,
    latency_bin,
    place,
)
from raysys.rollout.reports import Conversion, ReplicaReport
from raysys.rollout.shadow import ShadowCounts
from raysys.serve.request_id import RequestTag

MAX_CONVERSIONS = 1_000_000
"""A replica stops to count outcomes there: every canary is decided long before. Bounds memory."""
_NUM_SLOTS = 100


def _no_requests() -> dict[Arm, Counts]:
    shape = (len(SURFACES), NUM_BUCKETS)
    return {"canary": np.zeros(shape, np.int64), "stable": np.zeros(shape, np.int64)}


class Tally:
    """Counts of one replica for one rollout. For one thread."""

    def __init__(self, replica_id: str, rollout_id: str, config: RolloutConfig) -> None:
        self.rollout_id = rollout_id
        self.refusal: str | None = None
        """Why the canary did not pass its check."""
        self.shadow = ShadowCounts()
        """What shadow scoring found."""
        self._replica_id = replica_id
        self._delay_s = config.feedback_delay_s
        # Requests of one slot mature together: their number, not that of requests, bounds memory.
        self._slot_s = max(1.0, config.feedback_delay_s / _NUM_SLOTS)
        self._counters: dict[Arm, VersionCounters] = {
            "canary": VersionCounters.zeros(),
            "stable": VersionCounters.zeros(),
        }
        self._unripe_requests: defaultdict[int, dict[Arm, Counts]] = defaultdict(_no_requests)
        self._unripe_conversions: defaultdict[int, list[Conversion]] = defaultdict(list)
        self._conversions: list[Conversion] = []
        self._seen: set[Conversion] = set()
        self._num_acknowledged = 0

    def answered(
        self,
        tag: RequestTag,
        *,
        bad: bool,
        invalid: bool = False,
        latency_ms: float | None = None,
    ) -> None:
        """Counts a request of this rollout, which this replica answered or failed to.

        Args:
          tag: What its id says.
          bad: Whether it failed, or was answered late.
          invalid: Whether the version gave scores that nothing can be ranked by.
          latency_ms: How long its answer took; None if the version gave none.
        """
        counters, at = self._counters[tag.arm], place(tag.surface, tag.bucket)
        counters.num_requests[at] += 1
        counters.num_bad[at] += bad
        counters.num_invalid[at] += invalid
        if latency_ms is not None:
            counters.num_by_latency[tag.bucket, latency_bin(latency_ms)] += 1
        if not self._is_full:
            self._unripe_requests[self._slot(tag)][tag.arm][at] += 1

    def converted(
        self, tag: RequestTag, kind: OutcomeKind = "click", rank: int | None = None
    ) -> None:
        """Counts what feedback says of a request of this rollout, each choice once."""
        conversion = Conversion(tag.nonce, tag.arm, tag.bucket, tag.surface, kind, rank)
        if conversion in self._seen or self._is_full:
            return
        self._seen.add(conversion)
        self._unripe_conversions[self._slot(tag)].append(conversion)

    def report(self, now: float) -> ReplicaReport:
        """Returns all counts so far, and the conversions that the controller does not have."""
        self._ripen(now)
        return ReplicaReport(
            replica_id=self._replica_id,
            rollout_id=self.rollout_id,
            canary=self._counters["canary"].copy(),
            stable=self._counters["stable"].copy(),
            conversions=tuple(self._conversions[self._num_acknowledged :]),
            first_conversion=self._num_acknowledged,
            refusal=self.refusal,
            shadow=self.shadow,
        )

    def acknowledge(self, num_held: int) -> None:
        """Notes how many conversions the controller holds; a new one holds none."""
        self._num_acknowledged = min(num_held, len(self._conversions))

    @property
    def _is_full(self) -> bool:
        return len(self._seen) >= MAX_CONVERSIONS

    def _slot(self, tag: RequestTag) -> int:
        return int(tag.answered_at // self._slot_s)

    def _ripen(self, now: float) -> None:
        last_ripe = int((now - self._delay_s) // self._slot_s) - 1
        for slot in [slot for slot in self._unripe_requests if slot <= last_ripe]:
            for arm, matured in self._unripe_requests.pop(slot).items():
                self._counters[arm].num_matured[:] += matured
        for slot in [slot for slot in self._unripe_conversions if slot <= last_ripe]:
            self._conversions.extend(self._unripe_conversions.pop(slot))
