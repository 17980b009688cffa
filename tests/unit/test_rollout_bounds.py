"""The bounds hold over all looks together: by exact enumeration, and by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from raysys.rollout.bounds import (
    cluster_variance,
    design_effect,
    drift_margin,
    rate_lower_bound,
    rate_upper_bound,
)

ERROR = 0.05
Bound = Callable[[int, int], float]


def upper(events: int, requests: int) -> float:
    return rate_upper_bound(events, requests, ERROR)


def clopper_pearson_upper(events: int, requests: int) -> float:
    """The exact bound for one look, for the negative control."""
    if events == requests:
        return 1.0
    return float(beta.ppf(1 - ERROR, events + 1, requests - events))


def chance_of_ever_missing(bound: Bound, rate: float, num_looks: int) -> float:
    """The exact chance that the bound is below `rate` at one of the first `num_looks` requests."""
    alive = np.array([1.0])  # chance of each number of events, without a miss so far
    missed = 0.0
    for n in range(1, num_looks + 1):
        alive = np.append(alive, 0.0) * (1 - rate) + np.append(0.0, alive) * rate
        # The bound rises with the number of events: few events are what makes it miss.
        for events in range(n + 1):
            if bound(events, n) >= rate:
                break
            missed += alive[events]
            alive[events] = 0.0
    return missed


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.5, 0.9])
def test_the_upper_bound_misses_at_any_look_with_at_most_its_error(rate: float) -> None:
    assert chance_of_ever_missing(upper, rate, 300) <= ERROR


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_a_bound_for_one_look_would_miss_far_more_often(rate: float) -> None:
    # The negative control: looking again and again with Clopper-Pearson breaks its promise.
    assert chance_of_ever_missing(clopper_pearson_upper, rate, 300) > 2.5 * ERROR


counts = st.integers(1, 5000).flatmap(
    lambda n: st.tuples(st.integers(0, n), st.just(n), st.floats(0.001, 0.5))
)


@given(counts)
def test_bounds_enclose_the_observed_rate(case: tuple[int, int, float]) -> None:
    events, requests, error = case
    low = rate_lower_bound(events, requests, error)
    high = rate_upper_bound(events, requests, error)
    assert 0 <= low <= events / requests <= high <= 1


@given(counts)
def test_more_events_and_less_error_raise_the_upper_bound(case: tuple[int, int, float]) -> None:
    events, requests, error = case
    bound = rate_upper_bound(events, requests, error)
    assert rate_upper_bound(min(events + 1, requests), requests, error) >= bound - 1e-9
    assert rate_upper_bound(events, requests, error / 2) >= bound - 1e-9


@pytest.mark.parametrize("requests", [10, 1000, 10**6, 10**9])
def test_the_bounds_survive_many_requests(requests: int) -> None:
    for events in (0, 1, requests // 2, requests - 1, requests):
        low = rate_lower_bound(events, requests, ERROR)
        high = rate_upper_bound(events, requests, ERROR)
        assert low <= events / requests <= high, events


def test_a_version_that_always_fails_is_proven_bad_within_ten_requests() -> None:
    assert rate_lower_bound(10, 10, ERROR / 4) > 0.4


def test_independent_users_have_no_design_effect() -> None:
    rng = np.random.default_rng(0)
    requests = np.full(100, 50)
    effects = [design_effect(rng.binomial(requests, 0.1), requests) for _ in range(200)]
    assert 1.0 <= np.mean(effects) < 1.1


def test_users_that_always_do_the_same_count_as_one_request_each() -> None:
    rng = np.random.default_rng(0)
    users = rng.random(100) < 0.3
    assert design_effect(users * 20, np.full(100, 20)) == pytest.approx(20, rel=0.05)


def test_the_jackknife_agrees_with_the_spread_over_many_samples() -> None:
    rng = np.random.default_rng(1)
    rates, variances = [], []
    for _ in range(1000):
        requests = rng.poisson(20, 100)
        events = rng.binomial(requests, rng.beta(3, 7, 100))
        rates.append(events.sum() / requests.sum())
        variances.append(cluster_variance(events, requests))
    assert np.mean(variances) == pytest.approx(np.var(rates), rel=0.15)


def test_empty_buckets_do_not_change_the_variance() -> None:
    events, requests = np.array([3, 1, 2]), np.array([10, 9, 12])
    padded = [np.concatenate([x, np.zeros(7, int)]) for x in (events, requests)]
    assert cluster_variance(*padded) == pytest.approx(cluster_variance(events, requests))


def ever_beyond(margins: np.ndarray, paths: np.ndarray) -> float:
    """The share of paths whose mean is ever above its margin."""
    times = np.arange(1, paths.shape[1] + 1)
    means = paths.cumsum(axis=1) / times
    return float((means > margins).any(axis=1).mean())


def test_the_drift_margin_holds_over_thousands_of_looks() -> None:
    paths = np.random.default_rng(2).normal(size=(2000, 2000))
    margins = np.array([drift_margin(1 / n, ERROR, scale=0.1) for n in range(1, 2001)])
    assert ever_beyond(margins, paths) <= ERROR


def test_a_margin_for_one_look_would_not_hold() -> None:
    # The negative control: 1.645 standard errors at each look.
    paths = np.random.default_rng(2).normal(size=(2000, 2000))
    margins = np.array([1.645 / math.sqrt(n) for n in range(1, 2001)])
    assert ever_beyond(margins, paths) > 8 * ERROR


@pytest.mark.parametrize("error", [0.01, 0.05, 0.2])
def test_the_margin_is_near_its_tightest_where_it_is_as_wide_as_its_scale(error: float) -> None:
    variance = 1.0
    for _ in range(60):  # the variance at which the margin of scale 1 is 1
        variance /= drift_margin(variance, error, scale=1.0) ** 2
    best = min(drift_margin(variance, error, scale=s) for s in np.geomspace(0.1, 10, 400))
    assert 1.01 * best >= 1.0
