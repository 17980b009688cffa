"""What the replicas count about each version of a rollout, grouped by fixed buckets of users.

    serve.tally (a replica) -> VersionCounters -> controller: sum over replicas -> analysis.judge

Users are randomised, not requests, so the requests of one user are correlated and must not be
taken for independent evidence. A sum over each of `NUM_BUCKETS` buckets of users is enough to see
that correlation, and stays small however many users there are (bucketed or "cluster" standard
errors; Deng et al. 2018, arXiv 1803.06336).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import NDArray

NUM_BUCKETS = 100
"""User buckets by a hash that is independent of the split."""

Arm = Literal["stable", "canary"]
"""The two sides of a split."""

Counts = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VersionCounters:
    """Counts of one version since its rollout began, each of shape (NUM_BUCKETS,)."""

    num_requests: Counts
    num_bad: Counts
    """Requests that failed or were slower than `rollout.latency_slo_ms`."""
    num_matured: Counts
    """Requests older than `rollout.feedback_delay_s`."""
    num_converted: Counts
    """Matured requests that some feedback came for."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            assert getattr(self, field.name).shape == (NUM_BUCKETS,), field.name

    @classmethod
    def zeros(cls) -> VersionCounters:
        """Counters of a version that has answered nothing yet."""
        return cls(**{f.name: np.zeros(NUM_BUCKETS, np.int64) for f in dataclasses.fields(cls)})

    def copy(self) -> VersionCounters:
        """Returns counters that later counting does not change."""
        return self + VersionCounters.zeros()

    def __add__(self, other: VersionCounters) -> VersionCounters:
        return VersionCounters(
            num_requests=self.num_requests + other.num_requests,
            num_bad=self.num_bad + other.num_bad,
            num_matured=self.num_matured + other.num_matured,
            num_converted=self.num_converted + other.num_converted,
        )
