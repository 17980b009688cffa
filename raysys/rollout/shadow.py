"""What shadow scoring found so far: how alike stable and canary rank.

serve.shadow (a replica) -> ShadowCounts -> ReplicaReport -> RolloutCounts: sum over replicas
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShadowCounts:
    """Sums over the requests that both versions ranked for one analysis."""

    num_compared: int = 0
    sum_overlap: float = 0.0
    """Of overlap@k, in [0, 1] each."""
    num_tau: int = 0
    """Comparisons that have a tau: there is none where either version gives equal scores only."""
    sum_tau: float = 0.0
    """Of Kendall's tau-b, in [-1, 1] each."""
    num_failed: int = 0
    """Requests that the canary could not rank, while stable could."""

    @property
    def num_requests(self) -> int:
        """Requests that the canary was tried on."""
        return self.num_compared + self.num_failed

    @property
    def overlap(self) -> float | None:
        """Mean overlap@k, None before the first comparison."""
        return self.sum_overlap / self.num_compared if self.num_compared else None

    @property
    def tau(self) -> float | None:
        """Mean Kendall's tau-b, None before the first comparison that has one."""
        return self.sum_tau / self.num_tau if self.num_tau else None

    def __add__(self, other: ShadowCounts) -> ShadowCounts:
        names = [field.name for field in dataclasses.fields(self)]
        return ShadowCounts(**{n: getattr(self, n) + getattr(other, n) for n in names})

    def to_json(self) -> dict[str, Any]:
        """Returns what the API says of it.

        >>> ShadowCounts(num_compared=2, sum_overlap=1.5, num_failed=1).to_json()
        {'num_compared': 2, 'num_failed': 1, 'overlap': 0.75, 'tau': None}
        """
        return {
            "num_compared": self.num_compared,
            "num_failed": self.num_failed,
            "overlap": self.overlap,
            "tau": self.tau,
        }
