"""What is asked about a canary beside stable: each answer is an estimate with always-valid bounds.

    (events_b, requests_b) of both versions -> rate_increase()    of rare events: bad answers
                                            -> mean_difference()  of CTR, conversion, NDCG
    (B, L) latency counts of both versions  -> compare_p99()

Requests of one user are correlated, which is measured over buckets of users and paid for.

Suffixes: _c = canary, _s = stable, B = buckets of users, L = bins of latency.
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.rollout.bounds import (
    cluster_variance,
    design_effect,
    drift_margin,
    is_rate_below,
    rate_lower_bound,
    rate_upper_bound,
)
from raysys.rollout.counters import LATENCY_BOUNDARIES_MS, Counts

Mean = tuple[NDArray[Any], Counts]
"""Sums of something in [0, 1] over requests, and those requests: each (B,)."""
P99_SHARE = 0.01
P99_FLOOR_MS = 10.0
"""Below, stable's p99 is no yardstick: a multiple of it is noise that nobody notices."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A rate of the canary minus that of stable."""

    estimate: float
    low: float
    high: float
    """Each bound holds over all looks; `analysis` says with which probability."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class P99:
    """The 99th percentile of latency, as upper ends of histogram bins."""

    canary_ms: float
    stable_ms: float
    limit_ms: float | None
    """What the canary's must not exceed; None as long as nothing limits it."""
    is_exceeded: bool
    """Whether that is proven, over all looks."""


def rate_increase(canary: Mean, stable: Mean, *, to_fail: float, to_pass: float) -> Difference:
    """Compares rates of rare events; exact for independent requests, from the first one on.

    Args:
      canary: Events and requests; at least one request.
      stable: The same.
      to_fail: Chance that `low` ever exceeds the truth.
      to_pass: Chance that `high` is ever below it.
    """
    bad_c, n_c = _independent_counts(canary)
    bad_s, n_s = _independent_counts(stable)
    # Each version's own bound takes half of the level, since either may be wrong.
    return Difference(
        estimate=bad_c / n_c - bad_s / n_s,
        low=rate_lower_bound(bad_c, n_c, to_fail / 2) - rate_upper_bound(bad_s, n_s, to_fail / 2),
        high=rate_upper_bound(bad_c, n_c, to_pass / 2) - rate_lower_bound(bad_s, n_s, to_pass / 2),
    )


def mean_difference(
    canary: Mean, stable: Mean, *, to_fail: float, to_pass: float, tolerance: float
) -> Difference:
    """Compares means over requests; the bounds are asymptotic, and tightest at the tolerance.

    Args:
      canary: Sums and requests, of at least two buckets.
      stable: The same.
      to_fail: Chance that `high` is ever below the truth.
      to_pass: Chance that `low` ever exceeds it.
      tolerance: What is to be told apart from no difference.
    """
    estimate = _mean(canary) - _mean(stable)
    variance = _variance(canary, stable)
    return Difference(
        estimate=estimate,
        low=estimate - drift_margin(variance, to_pass, scale=tolerance),
        high=estimate + drift_margin(variance, to_fail, scale=tolerance),
    )


def compare_p99(
    canary_bl: Counts,
    stable_bl: Counts,
    *,
    max_ms: float | None,
    max_ratio: float | None,
    error_probability: float,
) -> P99:
    """Compares the canary's p99 with an absolute limit and with a multiple of stable's.

    A p99 exceeds a boundary if more than 1 % of answers do, so that bounds of that share are bounds
    of the quantile. Stable's p99 is the first boundary that is proven not to be exceeded; that one
    is the first of a falling row, so it costs one error, however many boundaries there are.
    """
    level = error_probability / 4  # the absolute limit; stable's bound and the canary's at a ratio
    limits = [] if max_ms is None else [_boundary(max_ms)]
    if max_ratio is not None:
        proven_ms = _proven_p99_ms(stable_bl, level)
        if proven_ms is not None:
            limits.append(_boundary(max(max_ratio * proven_ms, P99_FLOOR_MS)))
    finite = [limit for limit in limits if limit is not None]
    limit_ms = min(finite, default=None)
    return P99(
        canary_ms=_observed_p99_ms(canary_bl),
        stable_ms=_observed_p99_ms(stable_bl),
        limit_ms=limit_ms,
        is_exceeded=limit_ms is not None and _is_exceeded(canary_bl, limit_ms, level),
    )


def _is_exceeded(counts_bl: Counts, limit_ms: float, level: float) -> bool:
    slow, answered = _independent_counts(_slower(counts_bl, limit_ms))
    return is_rate_below(answered - slow, answered, 1 - P99_SHARE, level)


def _proven_p99_ms(counts_bl: Counts, level: float) -> float | None:
    for boundary in LATENCY_BOUNDARIES_MS:
        slow, answered = _independent_counts(_slower(counts_bl, boundary))
        if is_rate_below(slow, answered, P99_SHARE, level):
            return boundary
    return None


def _observed_p99_ms(counts_bl: Counts) -> float:
    num_answered = counts_bl.sum()
    for boundary in LATENCY_BOUNDARIES_MS:
        if _slower(counts_bl, boundary)[0].sum() <= P99_SHARE * num_answered:
            return boundary
    return LATENCY_BOUNDARIES_MS[-1]


def _slower(counts_bl: Counts, boundary_ms: float) -> Mean:
    first = LATENCY_BOUNDARIES_MS.index(boundary_ms) + 1
    return counts_bl[:, first:].sum(axis=1), counts_bl.sum(axis=1)


def _boundary(limit_ms: float) -> float | None:
    """The first boundary from a limit on; None if the histogram does not reach as far."""
    place = bisect.bisect_left(LATENCY_BOUNDARIES_MS, limit_ms)
    return LATENCY_BOUNDARIES_MS[place] if place < len(LATENCY_BOUNDARIES_MS) else None


def _independent_counts(mean: Mean) -> tuple[float, float]:
    """Counts one user's ten failures as fewer, since they are not the evidence of ten users."""
    events_b, requests_b = mean
    effect = design_effect(events_b, requests_b)
    return float(events_b.sum() / effect), float(requests_b.sum() / effect)


def _mean(mean: Mean) -> float:
    return float(mean[0].sum() / mean[1].sum())


def _variance(*arms: Mean) -> float:
    """The larger of two estimates: of each version by itself, and as if the versions were equal.

    A small canary that happens to have few conversions would by itself look precise as well as
    poor, and would be failed too often. One conversion and one other request are added, so that
    no conversions at all do not look like certainty.
    """
    apart = sum(cluster_variance(*arm) for arm in arms)
    num = sum(requests.sum() for _, requests in arms)
    total = min(sum(sums.sum() for sums, _ in arms), num)
    spread = _spread(arms, num, (total + 1) / (num + 2))
    return float(max(apart, spread * sum(1 / requests.sum() for _, requests in arms)))


def _spread(arms: tuple[Mean, ...], num: float, mean: float) -> float:
    """Variance of one request's value, both versions together, correlation by user included."""
    if all(np.issubdtype(sums.dtype, np.integer) for sums, _ in arms):
        effect = sum(design_effect(*arm) * arm[1].sum() for arm in arms) / num
        return float(effect * mean * (1 - mean))
    residuals = [np.square(sums - mean * requests).sum() for sums, requests in arms]
    return float(max(sum(residuals), 1.0) / num)
