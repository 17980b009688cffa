"""What replicas tell the controller, put together so that lost and repeated reports do no harm.

    replica: serve.tally -> ReplicaReport --(each second, again and again)--> RolloutCounts.take()
    controller: RolloutCounts.totals() -> analysis.judge()

Counters are cumulative and only grow, so the larger value is the newer one: any order, any loss and
any repetition ends with the same sum. Outcomes are told apart by the request they belong to, since
feedback may be sent twice and to two replicas. Each replica numbers those that it saw, and sends
what the controller does not have yet; a new controller has none and is sent them all.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from raysys.partitions.schema import Surface
from raysys.rollout.counters import GAINS, Arm, OutcomeKind, VersionCounters, place
from raysys.rollout.shadow import ShadowCounts

_RANK_UNIT = max(GAINS.values()) + 1


@dataclasses.dataclass(frozen=True, slots=True)
class Conversion:
    """What feedback says came of a matured request: one choice of one item."""

    nonce: str
    """Names the request, the same at every replica."""
    arm: Arm
    bucket: int
    surface: Surface = "recommend"
    kind: OutcomeKind = "click"
    rank: int | None = None
    """Of the item in the answer, from 1; None where feedback did not tell."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReplicaReport:
    """What one replica counted for one analysis. Its counters have no outcomes in them."""

    replica_id: str
    """New at every start of a replica, so that a restarted one counts beside its predecessor."""
    rollout_id: str
    """`RolloutView.analysis_id`: the rollout, and which of its weights."""
    canary: VersionCounters
    stable: VersionCounters
    conversions: tuple[Conversion, ...]
    first_conversion: int
    """Number of the first of `conversions` among all that this replica saw."""
    refusal: str | None
    """Why the canary did not pass its check here, None if it did or was not checked yet."""
    shadow: ShadowCounts = dataclasses.field(default_factory=ShadowCounts)
    """What shadow scoring found here."""


class RolloutCounts:
    """The sum of all replicas' reports for one analysis."""

    def __init__(self, rollout_id: str) -> None:
        self.rollout_id = rollout_id
        self._counters: dict[str, tuple[VersionCounters, VersionCounters]] = {}
        self._shadow: dict[str, ShadowCounts] = {}
        self._num_held: dict[str, int] = {}
        self._outcomes: dict[str, tuple[int, ...]] = {}
        """Nonce -> what is known of the request's outcomes, sorted: few bytes a request."""
        self._converted: dict[Arm, VersionCounters] = {
            "canary": VersionCounters.zeros(),
            "stable": VersionCounters.zeros(),
        }

    def take(self, report: ReplicaReport) -> int:
        """Adds a report.

        Returns:
          How many conversions of this replica are held: the number of the first one to send next.
        """
        assert report.rollout_id == self.rollout_id
        zeros = (VersionCounters.zeros(), VersionCounters.zeros())
        canary, stable = self._counters.get(report.replica_id, zeros)
        self._counters[report.replica_id] = (
            _newer(canary, report.canary),
            _newer(stable, report.stable),
        )
        before = self._shadow.get(report.replica_id, ShadowCounts())
        self._shadow[report.replica_id] = max(
            before, report.shadow, key=lambda counts: counts.num_requests
        )
        return self._take_conversions(report)

    @property
    def shadow(self) -> ShadowCounts:
        """What shadow scoring found at all replicas, dead ones included."""
        return sum(self._shadow.values(), ShadowCounts())

    def totals(self) -> tuple[VersionCounters, VersionCounters]:
        """Returns the counters of canary and stable over all replicas, dead ones included."""
        canary, stable = self._converted["canary"].copy(), self._converted["stable"].copy()
        for of_canary, of_stable in self._counters.values():
            canary, stable = canary + of_canary, stable + of_stable
        return canary, stable

    def _take_conversions(self, report: ReplicaReport) -> int:
        held = self._num_held.get(report.replica_id, 0)
        if report.first_conversion > held:
            return held  # some are missing in between: have them sent again from there
        for conversion in report.conversions[held - report.first_conversion :]:
            self._take_conversion(conversion)
        held = max(held, report.first_conversion + len(report.conversions))
        self._num_held[report.replica_id] = held
        return held

    def _take_conversion(self, conversion: Conversion) -> None:
        gain, rank = GAINS[conversion.kind], conversion.rank or 0
        code = rank * _RANK_UNIT + gain
        before = self._outcomes.get(conversion.nonce, ())
        if code in before:
            return
        after = tuple(sorted((*before, code)))
        self._outcomes[conversion.nonce] = after
        sums, at = self._converted[conversion.arm], place(conversion.surface, conversion.bucket)
        sums.num_clicked[at] += not before
        sums.num_converted[at] += _has_purchase(after) - _has_purchase(before)
        was, now = _ndcg(before), _ndcg(after)
        sums.num_ranked[conversion.bucket] += (now > 0) - (was > 0)
        sums.sum_ndcg[conversion.bucket] += now - was


def _has_purchase(codes: tuple[int, ...]) -> bool:
    return any(code % _RANK_UNIT == GAINS["purchase"] for code in codes)


def _ndcg(codes: tuple[int, ...]) -> float:
    """NDCG of one answer by what was chosen from it, 0 where no rank is known."""
    gains: dict[int, int] = {}
    for code in codes:  # sorted, so that the largest gain of a rank comes last
        rank, gain = divmod(code, _RANK_UNIT)
        if rank:
            gains[rank] = gain
    ideal = sum(g / math.log2(i + 2) for i, g in enumerate(sorted(gains.values(), reverse=True)))
    return sum(g / math.log2(rank + 1) for rank, g in gains.items()) / ideal if gains else 0.0


def _newer(a: VersionCounters, b: VersionCounters) -> VersionCounters:
    return VersionCounters(
        **{
            field.name: np.maximum(getattr(a, field.name), getattr(b, field.name))
            for field in dataclasses.fields(VersionCounters)
        }
    )
