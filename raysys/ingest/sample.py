"""Candidates of a training example: the positives, and negatives from public or own sources.

    own history + noised popularity ** 0.75 + categories of the positives + uniform
        -> candidates, log Q for each

Popularity is the noised, released one and history is the user's own, so no other user's behaviour
enters an example except through what is already paid for. Drawn items are made distinct, so
`log_q` is the log of the probability that an item is drawn at all: the loss subtracts it, which
makes the softmax over sampled negatives an estimate of the one over the catalogue (Yi et al. 2019,
RecSys).

Shape suffixes: K = candidates, N = items of the table.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from raysys.config import IngestConfig
from raysys.ingest.features import FloatArray, IndexArray

POPULARITY_POWER = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NegativeSampler:
    """Draws negatives under one released popularity."""

    probability: NDArray[np.float64]
    """(N,) of the popularity draw; uniform where no popularity is known yet."""
    cumulative: NDArray[np.float64]
    category: IndexArray
    """(N,) codes; -1 where the shop gave none."""
    config: IngestConfig

    @classmethod
    def of(
        cls, popularity: FloatArray, category: IndexArray, config: IngestConfig
    ) -> NegativeSampler:
        """Builds the sampler for one released popularity, (N,), never negative."""
        weight = popularity.astype(np.float64) ** POPULARITY_POWER
        if weight.sum() == 0:
            weight = np.ones_like(weight)
        probability = weight / weight.sum()
        return cls(
            probability=probability, cumulative=np.cumsum(probability), category=category,
            config=config,
        )  # fmt: skip

    def candidates(
        self,
        positives: IndexArray,
        also_chosen: IndexArray,
        history_items: IndexArray,
        rng: np.random.Generator,
    ) -> tuple[IndexArray, FloatArray]:
        """Returns distinct candidates, the positives first, and `log_q` of each, both (K,).

        Args:
          positives: Items of the request that are positives of the example.
          also_chosen: Every item with an outcome in the request: none of them is a negative.
          history_items: Distinct items of the user's history.
        """
        config, num_items = self.config, len(self.probability)
        own = rng.permutation(history_items)[: config.num_history_negatives]
        draws = rng.random(config.num_popularity_negatives)
        popular = np.minimum(np.searchsorted(self.cumulative, draws), num_items - 1)
        uniform = rng.integers(num_items, size=config.num_uniform_negatives)
        alike = self._alike(positives)
        num_alike = config.num_category_negatives if len(alike) else 0
        similar = alike[rng.integers(max(len(alike), 1), size=num_alike)]
        drawn = np.unique(np.concatenate([own, popular, similar, uniform]).astype(np.int32))
        negatives = np.setdiff1d(drawn, also_chosen)
        candidates = np.concatenate([positives, negatives]).astype(np.int32)
        return candidates, self._log_q(candidates, history_items, alike)

    def _alike(self, positives: IndexArray) -> IndexArray:
        """Returns the items in the categories of the positives."""
        if not self.config.num_category_negatives:
            return np.zeros(0, np.int32)
        known = np.setdiff1d(self.category[positives], [-1])
        return np.flatnonzero(np.isin(self.category, known)).astype(np.int32)

    def _log_q(
        self, candidates: IndexArray, history_items: IndexArray, alike: IndexArray
    ) -> FloatArray:
        config, num_items = self.config, len(self.probability)
        share = min(1.0, config.num_history_negatives / max(len(history_items), 1))
        missed = 1 - np.isin(candidates, history_items) * share
        missed *= (1 - self.probability[candidates]) ** config.num_popularity_negatives
        missed *= (1 - 1 / num_items) ** config.num_uniform_negatives
        if len(alike):
            of_category = np.isin(candidates, alike) / len(alike)
            missed *= (1 - of_category) ** config.num_category_negatives
        log_q: FloatArray = np.log(1 - missed).astype(np.float32)
        return log_q

    @property
    def max_candidates(self) -> int:
        """Most candidates that an example can have."""
        return max_candidates(self.config)


def max_candidates(config: IngestConfig) -> int:
    """Returns K, the width to which every example is padded."""
    return (
        config.max_positives
        + config.num_history_negatives
        + config.num_popularity_negatives
        + config.num_category_negatives
        + config.num_uniform_negatives
    )
