"""Scores candidates with NumPy alone: the one definition of what enters the head.

    features + text similarities -> head_inputs() -> score() -> (K,)

Replicas and evaluation use it: a request of 100 candidates takes a fraction of a millisecond and
needs no torch. `model.ranker` trains the same head; a test holds the two together.

Shape suffixes: K = candidates, F = features, I = inputs of the head, A = attended items,
d = width of the encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from raysys.ingest.features import FEATURE_NAMES, NUM_FEATURES, FloatArray

NUM_INPUTS = NUM_FEATURES + 3
"""The features, similarity to the history, similarity to the query, whether there is a query."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A two-layer perceptron with a linear skip: `skip(x) + last(relu(second(relu(first(x)))))`."""

    weights: Mapping[str, FloatArray]
    """Names as in `model.ranker.HeadModule.state_dict()`."""

    @classmethod
    def decayed_frequency(cls, hidden_units: int, seed: int = 0) -> Head:
        """Returns the head before any training: personal decayed frequency, a little popularity.

        It needs no data, so private training starts from the strongest heuristic and not below it.
        The hidden layers are random but their last layer is zero, so they add nothing yet.
        """
        rng = np.random.default_rng(seed)

        def layer(num_out: int, num_in: int) -> FloatArray:
            return rng.normal(0, np.sqrt(2 / num_in), (num_out, num_in)).astype(np.float32)

        skip = np.zeros((1, NUM_INPUTS), np.float32)
        skip[0, FEATURE_NAMES.index("own_decayed_count")] = 3.0
        skip[0, FEATURE_NAMES.index("popularity")] = 0.3
        return cls(
            weights={
                "first.weight": layer(hidden_units, NUM_INPUTS),
                "first.bias": np.zeros(hidden_units, np.float32),
                "second.weight": layer(hidden_units, hidden_units),
                "second.bias": np.zeros(hidden_units, np.float32),
                "last.weight": np.zeros((1, hidden_units), np.float32),
                "skip.weight": skip,
            }
        )

    def score(self, inputs: FloatArray) -> FloatArray:
        """Returns a score for each row of (K, I); higher is better."""
        w = self.weights
        hidden = np.maximum(inputs @ w["first.weight"].T + w["first.bias"], 0)
        hidden = np.maximum(hidden @ w["second.weight"].T + w["second.bias"], 0)
        out: FloatArray = (hidden @ w["last.weight"].T + inputs @ w["skip.weight"].T)[:, 0]
        return out


def head_inputs(
    features: FloatArray, by_history: FloatArray | None, by_query: FloatArray | None
) -> FloatArray:
    """Returns (K, I).

    Args:
      features: (K, F).
      by_history: (K,) cosine of each candidate's text to the user's history, None without one.
      by_query: (K,) cosine of each candidate's text to the query, None without one.
    """
    inputs = np.zeros((len(features), NUM_INPUTS), np.float32)
    inputs[:, :NUM_FEATURES] = features
    if by_history is not None:
        inputs[:, NUM_FEATURES] = by_history
    if by_query is not None:
        inputs[:, NUM_FEATURES + 1] = by_query
        inputs[:, NUM_FEATURES + 2] = 1.0
    return inputs


def pool_history(text: FloatArray, attention: NDArray[np.float32]) -> FloatArray | None:
    """Returns the normalised attention-weighted mean of (A, d), None where nothing is attended."""
    pooled = attention @ text if len(attention) else np.zeros(1, np.float32)
    norm = float(np.linalg.norm(pooled))
    return (pooled / norm).astype(np.float32) if norm > 0 else None
