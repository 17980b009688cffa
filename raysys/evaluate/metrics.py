"""Ranking metrics of one user, and their intervals over users.

    scores, gains -> ranking_metrics() -> one row a user -> bootstrap_mean() -> Comparison

Sources: NDCG is Jarvelin and Kekalainen (2002) with linear gains; the interval is Efron's
percentile bootstrap with users as the unit, because a user's requests are not independent.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from raysys.evaluate.calibrate import Fit

METRIC_NAMES = ("ndcg10", "conversion10", "auc")
TOP = 10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean over users and its 95% interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Before and after, each metric with its interval over users."""

    num_holdout_users: int
    before: dict[str, Interval]
    after: dict[str, Interval]
    difference: dict[str, Interval]
    """After minus before, paired by user."""
    num_prequential_users: int
    prequential: dict[str, Interval]
    """The previous version on the window's users, held out or not, before training on them."""
    private: bool = False
    """Whether all of this, the numbers of users too, is estimated from sums that were noised."""
    noise_half_width: float = 0.0
    """Half the width that noise alone gives the interval of the difference of NDCG@10."""
    max_difference: float | None = None
    """A user's change of NDCG@10 and AUC was clipped to plus and minus this; None if it was not."""
    calibration: Fit | None = None
    """From the new weights' scores to probabilities; None where nobody was held out."""


def ranking_metrics(
    scores: NDArray[np.float32], positives: NDArray[np.int32], gains: NDArray[np.float32]
) -> tuple[float, float, float]:
    """Returns NDCG@10, whether a positive is among the first 10 (0 or 1), and AUC.

    Ties rank against the positives, so a constant score earns nothing.

    Args:
      scores: (N,) of all candidates.
      positives: (P,) distinct indexes into `scores`, at least one.
      gains: (P,) above zero.

    >>> ranking_metrics(np.array([.1, .9, .5], np.float32), np.array([1]), np.array([3.0]))
    (1.0, 1.0, 1.0)
    """
    return place_metrics(places(scores, positives), gains, len(scores))


def place_metrics(
    found: NDArray[np.int64], gains: NDArray[np.float32], num: int
) -> tuple[float, float, float]:
    """Returns the same, of positives whose places are known.

    Args:
      found: (P,) from 0.
      num: Candidates, the positives included.
    """
    discount = np.where(found < TOP, 1 / np.log2(found + 2), 0)
    ideal = np.sort(gains)[::-1][:TOP]
    ndcg = float((gains * discount).sum() / (ideal / np.log2(np.arange(len(ideal)) + 2)).sum())
    return ndcg, float((found < TOP).any()), float(share_below(found, num).mean())


def places(scores: NDArray[np.float32], positives: NDArray[np.int32]) -> NDArray[np.int64]:
    """Returns where each positive ranks, from 0; behind every negative of the same score."""
    is_positive = np.zeros(len(scores), bool)
    is_positive[positives] = True
    order = np.lexsort((is_positive, -scores))
    place = np.empty(len(scores), np.int64)
    place[order] = np.arange(len(scores))
    return place[positives]


def share_below(found: NDArray[np.int64], num: int) -> NDArray[np.float64]:
    """Returns the share of the negatives that each positive outranks, best first: AUC is its mean.

    Args:
      found: (P,) places of the positives.
      num: Candidates, the positives included.
    """
    num_negatives = num - len(found)
    if num_negatives == 0:
        return np.ones(len(found))
    return 1 - (np.sort(found) - np.arange(len(found))) / num_negatives


def bootstrap_mean(values: NDArray[np.float64], *, num_resamples: int, seed: int = 0) -> Interval:
    """Returns the mean of (num_users,) values and its 95% percentile interval; NaN for no users."""
    if not len(values):
        return Interval(mean=float("nan"), low=float("nan"), high=float("nan"))
    rng = np.random.default_rng(seed)
    # Counts of a multinomial are a resample of users; chunks bound memory at any number of them.
    means = np.concatenate(
        [
            rng.multinomial(len(values), np.full(len(values), 1 / len(values)), 50) @ values
            for _ in range(-(-num_resamples // 50))
        ]
    ) / len(values)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))
