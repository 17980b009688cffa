"""What the replicas count about each version of a rollout, grouped by fixed buckets of users.

    serve.tally (a replica) -> VersionCounters -> controller: sum over replicas -> analysis.judge

Users are randomised, not requests, so the requests of one user are correlated and must not be
taken for independent evidence. A sum over each of `NUM_BUCKETS` buckets of users is enough to see
that correlation, and stays small however many users there are (bucketed or "cluster" standard
errors; Deng et al. 2018, arXiv 1803.06336).

Suffixes: S = surfaces, B = buckets of users, L = bins of latency.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from raysys.partitions.schema import Surface

NUM_BUCKETS = 100
"""User buckets by a hash that is independent of the split."""
SURFACES: tuple[Surface, ...] = get_args(Surface)
LATENCY_BOUNDARIES_MS = (
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 70.0, 100.0, 150.0),
    *(200.0, 300.0, 500.0, 700.0, 1000.0, 1500.0, 2000.0, 3000.0, 5000.0, 7000.0, 10_000.0),
)
"""Upper ends of the bins; one more bin holds what is slower."""

Arm = Literal["stable", "canary"]
"""The two sides of a split."""
OutcomeKind = Literal["click", "cart", "purchase"]
GAINS: Mapping[OutcomeKind, int] = {"click": 1, "cart": 2, "purchase": 3}
"""What an outcome is worth in NDCG, as in training by default."""

Counts = NDArray[np.int64]
Sums = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VersionCounters:
    """Counts of one version since its rollout got its present weight."""

    num_requests: Counts
    """(S, B), as all that say nothing else."""
    num_bad: Counts
    """Requests that failed or were slower than `rollout.latency_slo_ms`."""
    num_invalid: Counts
    """Of them, those whose scores were not finite, or not one for each candidate."""
    num_matured: Counts
    """Requests older than `rollout.feedback_delay_s`."""
    num_clicked: Counts
    """Matured requests that some feedback came for: what was bought was chosen as well."""
    num_converted: Counts
    """Matured requests that a purchase came of."""
    num_ranked: Counts
    """(B,): matured requests with an outcome whose rank is known."""
    sum_ndcg: Sums
    """(B,): the sum of their NDCG."""
    num_by_latency: Counts
    """(B, L): answers by how long they took; those that failed are not among them."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            assert getattr(self, field.name).shape == _shape(field.name), field.name

    @classmethod
    def zeros(cls) -> VersionCounters:
        """Counters of a version that has answered nothing yet."""
        return cls.of()

    @classmethod
    def of(cls, **counts: Any) -> VersionCounters:
        """Counters of which all that is not given is zero."""
        names = [field.name for field in dataclasses.fields(cls)]
        zeros = {n: np.zeros(_shape(n), float if n == "sum_ndcg" else np.int64) for n in names}
        return cls(**{**zeros, **counts})

    def copy(self) -> VersionCounters:
        """Returns counters that later counting does not change."""
        return self + VersionCounters.zeros()

    def __add__(self, other: VersionCounters) -> VersionCounters:
        names = [field.name for field in dataclasses.fields(self)]
        return VersionCounters(**{n: getattr(self, n) + getattr(other, n) for n in names})


def place(surface: Surface, bucket: int) -> tuple[int, int]:
    """Returns where in an (S, B) array a user's requests on a surface are counted.

    >>> place("recommend", 7)
    (1, 7)
    """
    return SURFACES.index(surface), bucket


def latency_bin(latency_ms: float) -> int:
    """Returns the bin of a latency, in [0, L).

    >>> latency_bin(0.2), latency_bin(5.0), latency_bin(5.1), latency_bin(99_999.0)
    (0, 4, 5, 25)
    """
    return int(np.searchsorted(LATENCY_BOUNDARIES_MS, latency_ms))


def _shape(name: str) -> tuple[int, ...]:
    if name == "num_by_latency":
        return NUM_BUCKETS, len(LATENCY_BOUNDARIES_MS) + 1
    return (NUM_BUCKETS,) if name in ("num_ranked", "sum_ndcg") else (len(SURFACES), NUM_BUCKETS)
