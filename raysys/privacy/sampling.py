"""Poisson sampling of users on one worker.

    PrivacyPlan.sampler(num_users) -> for users in sampler: one step, perhaps of no user at all

Each user of the worker's shard takes part in a step with the same probability, independent of
all else. Workers hold disjoint users, so together they sample all users alike. Steps without a
user are kept: they are charged, and workers that dropped them would lose step with the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PoissonSampler:
    """Yields `num_steps` arrays of user indexes in [0, num_users)."""

    num_users: int
    num_steps: int
    sampling_prob: float
    rng: np.random.Generator
    """Of this worker alone: `PrivacyPlan.rng`."""

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for _ in range(self.num_steps):
            yield np.flatnonzero(self.rng.random(self.num_users) < self.sampling_prob)

    def __len__(self) -> int:
        return self.num_steps
