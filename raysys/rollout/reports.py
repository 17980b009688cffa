"""What replicas tell the controller, put together so that lost and repeated reports do no harm.

    replica: serve.tally -> ReplicaReport --(each second, again and again)--> RolloutCounts.take()
    controller: RolloutCounts.totals() -> analysis.judge()

Counters are cumulative and only grow, so the larger value is the newer one: any order, any loss and
any repetition ends with the same sum. Conversions are told apart by the request they belong to,
since feedback may be sent twice and to two replicas. Each replica numbers those that it saw, and
sends what the controller does not have yet; a new controller has none and is sent them all.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from raysys.rollout.counters import Arm, VersionCounters


@dataclasses.dataclass(frozen=True, slots=True)
class Conversion:
    """A matured request that feedback came for."""

    nonce: str
    """Names the request, the same at every replica."""
    arm: Arm
    bucket: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReplicaReport:
    """What one replica counted since its rollout began. `num_converted` is 0 in its counters."""

    replica_id: str
    """New at every start of a replica, so that a restarted one counts beside its predecessor."""
    rollout_id: str
    canary: VersionCounters
    stable: VersionCounters
    conversions: tuple[Conversion, ...]
    first_conversion: int
    """Number of the first of `conversions` among all that this replica saw."""
    refusal: str | None
    """Why the canary did not pass its check here, None if it did or was not checked yet."""


class RolloutCounts:
    """The sum of all replicas' reports about one rollout."""

    def __init__(self, rollout_id: str) -> None:
        self.rollout_id = rollout_id
        self._counters: dict[str, tuple[VersionCounters, VersionCounters]] = {}
        self._num_held: dict[str, int] = {}
        self._seen: set[str] = set()
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
        return self._take_conversions(report)

    def totals(self) -> tuple[VersionCounters, VersionCounters]:
        """Returns the counters of canary and stable over all replicas, dead ones included."""
        canary, stable = self._converted["canary"], self._converted["stable"]
        for of_canary, of_stable in self._counters.values():
            canary, stable = canary + of_canary, stable + of_stable
        return canary, stable

    def _take_conversions(self, report: ReplicaReport) -> int:
        held = self._num_held.get(report.replica_id, 0)
        if report.first_conversion > held:
            return held  # some are missing in between: have them sent again from there
        for conversion in report.conversions[held - report.first_conversion :]:
            if conversion.nonce not in self._seen:
                self._seen.add(conversion.nonce)
                self._converted[conversion.arm].num_converted[conversion.bucket] += 1
        held = max(held, report.first_conversion + len(report.conversions))
        self._num_held[report.replica_id] = held
        return held


def _newer(a: VersionCounters, b: VersionCounters) -> VersionCounters:
    return VersionCounters(
        **{
            field.name: np.maximum(getattr(a, field.name), getattr(b, field.name))
            for field in dataclasses.fields(VersionCounters)
        }
    )
