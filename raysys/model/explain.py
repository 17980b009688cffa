"""Explains a score by groups of inputs: exact Shapley values of the head.

    head_inputs() of each candidate -> explain() -> {"base": (K,), "repeat": (K,), …}, which add up

The head is not linear, so what an input is worth depends on which others are known. A group's part
is what it adds to the score, averaged over all orders in which the groups may become known: the
only split that adds up, treats groups alike that do the same, and gives nothing to one that the
head ignores. With 6 groups the average is over 64 sets, which are scored at once.

Unknown means zero. That is what the inputs themselves say of a request of which nothing is known:
no history, no query, an item without sales, price, category or brand. So `base` is the score of an
unknown item for an unknown user, the same for every candidate, and a part is what was learned from
it. (A mean over users would be another baseline; it would show other users' behaviour.)

Source: Shapley (1953); Lundberg and Lee (2017), arXiv:1705.07874, with one reference point.

Shape suffixes: K = candidates, I = inputs of the head, G = groups, S = 2^G sets of groups.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.ingest.features import FEATURE_NAMES, NUM_FEATURES, FloatArray
from raysys.model.scorer import NUM_INPUTS, Head

BASE = "base"

GROUPS: Mapping[str, tuple[int, ...]] = {
    "text": (NUM_FEATURES,),
    "query": (NUM_FEATURES + 1, NUM_FEATURES + 2),
    "repeat": tuple(
        FEATURE_NAMES.index(name)
        for name in (
            "own_decayed_count", "own_count", "own_bought", "own_recency_week",
            "own_recency_month", "own_share", "own_cycle", "own_cycle_known", "has_history",
        )
    ),
    "popularity": tuple(FEATURE_NAMES.index(name) for name in ("popularity", "trend")),
    "price": tuple(FEATURE_NAMES.index(name) for name in ("price", "price_known")),
    "category": tuple(
        FEATURE_NAMES.index(name) for name in ("category_share", "category_count", "brand_share")
    ),
}  # fmt: skip
"""Name of a part -> its inputs, each input once. `text` is likeness to the history, `repeat` how
often and how lately this user bought the item (that there is a history is what makes "never" mean
something), `category` the user's share of its category and brand."""


def explain(
    head: Head, inputs: FloatArray, groups: Mapping[str, tuple[int, ...]] = GROUPS
) -> dict[str, FloatArray]:
    """Returns the parts of each candidate's score by name, `base` first; they add up to the score.

    Args:
      inputs: (K, I).
      groups: Columns of each; together all I, each once.
    """
    assert sorted(itertools.chain(*groups.values())) == list(range(NUM_INPUTS))
    values = _score_sets(head, inputs.astype(np.float64), list(groups.values()))
    out = {BASE: values[0]}
    for group, name in enumerate(groups):
        others, weights = sets_without(group, len(groups))
        # Differences first, so that a group that changes nothing gets exactly 0.
        out[name] = weights @ (values[others | 1 << group] - values[others])
    return {name: part.astype(np.float32) for name, part in out.items()}


@functools.cache
def sets_without(group: int, num_groups: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the sets that a group is not in, and how often it joins each, of all orders.

    Bit g of a set's number says whether group g is in it.

    >>> [part.tolist() for part in sets_without(0, 2)]
    [[0, 2], [0.5, 0.5]]
    """
    sets = np.arange(2**num_groups, dtype=np.int64)
    others = sets[sets >> group & 1 == 0]
    sizes = [int(s).bit_count() for s in others]
    orders = [math.factorial(n) * math.factorial(num_groups - 1 - n) for n in sizes]
    return others, np.array(orders) / math.factorial(num_groups)


def _score_sets(
    head: Head, inputs: NDArray[Any], groups: list[tuple[int, ...]]
) -> NDArray[np.float64]:
    """Returns each candidate's score with only the inputs of each set known, (S, K)."""
    is_in = np.arange(2 ** len(groups))[:, None] >> np.arange(len(groups)) & 1
    known = np.zeros((len(is_in), inputs.shape[1]), bool)
    for group, columns in enumerate(groups):
        known[:, list(columns)] = is_in[:, group, None]
    masked = np.where(known[:, None, :], inputs, 0.0)
    # Double precision: a part is a difference of scores that may be close together.
    exact = Head(weights={name: w.astype(np.float64) for name, w in head.weights.items()})
    scores = exact.score(masked.reshape(-1, inputs.shape[1]))
    return np.asarray(scores, np.float64).reshape(len(is_in), len(inputs))
