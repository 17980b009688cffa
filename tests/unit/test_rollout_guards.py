"""Guards beside bad rate and CTR: p99, scores that are no numbers, purchases, NDCG, surfaces."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from raysys.config import Analysis, RolloutConfig, Step
from raysys.rollout.analysis import Measurement, judge
from raysys.rollout.counters import (
    LATENCY_BOUNDARIES_MS,
    NUM_BUCKETS,
    SURFACES,
    VersionCounters,
    latency_bin,
)
from raysys.rollout.questions import compare_p99

CONFIG = RolloutConfig(min_requests=500, max_conversion_drop=0.05)
NUM_BINS = len(LATENCY_BOUNDARIES_MS) + 1


def evenly(total: float, surface: str = "search") -> np.ndarray:
    """A total as (S, B), spread evenly over the users of one surface."""
    found = np.zeros((len(SURFACES), NUM_BUCKETS), np.int64)
    found[SURFACES.index(surface)] = total / NUM_BUCKETS
    return found


def version(num: int = 10_000, **counts: Any) -> VersionCounters:
    """A version with a CTR of 20 %, and what else is given."""
    base = {
        "num_requests": evenly(num),
        "num_matured": evenly(num),
        "num_clicked": evenly(num * 0.2),
    }
    return VersionCounters.of(**{**base, **counts})


def taking(ms: np.ndarray) -> np.ndarray:
    """Latencies, spread over the users, as (B, L)."""
    found = np.zeros((NUM_BUCKETS, NUM_BINS), np.int64)
    bins = np.searchsorted(LATENCY_BOUNDARIES_MS, ms)
    np.add.at(found, (np.arange(len(ms)) % NUM_BUCKETS, bins), 1)
    return found


def lognormal(seed: int, num: int, factor: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(np.log(8.0), 0.5, num) * factor


def failed(measurement: Measurement, words: str) -> bool:
    return measurement.phase == "failed" and words in measurement.reason


def test_an_equal_canary_passes_all_guards() -> None:
    arms = [version(num_by_latency=taking(lognormal(seed, 10_000))) for seed in (1, 2)]
    found = judge(*arms, CONFIG)
    assert found.phase == "successful"
    assert found.p99 is not None
    assert found.p99.limit_ms is not None


def test_one_answer_without_numbers_fails_a_canary_at_once() -> None:
    canary = version(100, num_bad=evenly(0), num_invalid=evenly(0))
    canary.num_invalid[0, 3] = canary.num_bad[0, 3] = 1
    assert failed(judge(canary, version(100), CONFIG), "scores that are no numbers")
    tolerant = dataclasses.replace(CONFIG, max_invalid=1)
    assert judge(canary, version(100), tolerant).phase == "inconclusive"


def test_answers_without_numbers_of_stable_fail_nobody() -> None:
    stable = version()
    stable.num_invalid[0, 3] = 5
    assert judge(version(), stable, CONFIG).phase == "successful"


def test_a_canary_five_times_slower_fails_though_it_is_within_the_slo() -> None:
    slow = lognormal(1, 3000, factor=5.0)
    assert np.quantile(slow, 0.99) < CONFIG.latency_slo_ms
    canary = version(3000, num_by_latency=taking(slow))
    stable = version(12_000, num_by_latency=taking(lognormal(2, 12_000)))
    assert failed(judge(canary, stable, CONFIG), "p99 of the canary is")
    # The negative control: without the guard nobody notices.
    blind = dataclasses.replace(CONFIG, max_p99_ratio=None)
    assert judge(canary, stable, blind).phase == "successful"


def test_an_absolute_limit_of_p99_needs_no_stable() -> None:
    canary = version(num_by_latency=taking(lognormal(1, 10_000, factor=3.0)))
    stable = version(num_by_latency=taking(lognormal(2, 10_000, factor=3.0)))
    limited = dataclasses.replace(CONFIG, max_p99_ms=30.0, max_p99_ratio=None)
    assert failed(judge(canary, stable, limited), "over the limit of 30 ms, proven")


def test_a_p99_over_the_limit_that_is_not_proven_is_inconclusive() -> None:
    ms = np.full(1000, 5.0)
    ms[:12] = 40.0
    canary = version(1000, num_by_latency=taking(ms))
    stable = version(num_by_latency=taking(np.full(10_000, 5.0)))
    limited = dataclasses.replace(CONFIG, max_p99_ms=30.0, max_bad_rate_increase=0.5)
    limited = dataclasses.replace(limited, max_conversion_drop=0.15)
    found = judge(canary, stable, limited)
    assert (found.phase, "not proven yet" in found.reason) == ("inconclusive", True)


def test_a_multiple_of_a_tiny_p99_is_no_fault() -> None:
    canary = version(num_by_latency=taking(np.full(10_000, 9.0)))
    stable = version(num_by_latency=taking(np.full(10_000, 1.0)))
    assert judge(canary, stable, CONFIG).phase == "successful"


def test_one_users_slow_answers_alone_do_not_prove_a_slow_canary() -> None:
    counts = taking(np.full(2000, 5.0))
    stable = taking(np.full(20_000, 5.0))
    at = latency_bin(300.0)
    spread, of_one = counts.copy(), counts.copy()
    spread[:40, at] += 2
    of_one[7, at] += 80
    rules: Any = {"max_ms": 100.0, "max_ratio": None, "error_probability": 0.01}
    assert compare_p99(spread, stable, **rules).is_exceeded
    assert not compare_p99(of_one, stable, **rules).is_exceeded


def test_the_p99_of_equal_versions_is_seldom_called_exceeded_at_any_look() -> None:
    """Over 80 looks at 60 versions whose true p99 is exactly at the limit."""
    num_failed, naive_failed = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        counts = np.zeros((NUM_BUCKETS, NUM_BINS), np.int64)
        verdicts, naive = [], []
        for _ in range(80):
            ms = np.where(rng.random(100) < 0.01, 200.0, 5.0)
            np.add.at(counts, (rng.integers(0, NUM_BUCKETS, 100), (ms > 100) * 18), 1)
            found = compare_p99(counts, counts, max_ms=100, max_ratio=None, error_probability=0.05)
            verdicts.append(found.is_exceeded)
            n, slow = counts.sum(), counts[:, 18].sum()
            naive.append(n >= 500 and slow / n - 0.01 > 1.645 * np.sqrt(0.01 * 0.99 / n))
        num_failed += any(verdicts)
        naive_failed += any(naive)
    assert num_failed <= 3
    # The negative control: one look's test, repeated.
    assert naive_failed > 6


def test_purchases_that_fail_to_come_fail_a_canary_whose_clicks_are_fine() -> None:
    canary = version(num_converted=evenly(200))
    stable = version(num_converted=evenly(1000))
    assert failed(judge(canary, stable, CONFIG), "200 of 10000 canary answers") is True
    assert judge(version(num_converted=evenly(900)), stable, CONFIG).phase == "successful"


def test_a_tolerance_of_ctr_of_its_own_is_used() -> None:
    canary = version(40_000, num_clicked=evenly(7200))
    stable = version(160_000, num_clicked=evenly(32_000))
    assert judge(canary, stable, CONFIG).phase == "successful"
    strict = dataclasses.replace(CONFIG, max_ctr_drop=0.01)
    assert failed(judge(canary, stable, strict), "were clicked: -2.00%")


def ranked(mean: float, num: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    bucket, ndcg = rng.integers(0, NUM_BUCKETS, num), rng.beta(4 * mean, 4 * (1 - mean), num)
    return {
        "num_ranked": np.bincount(bucket, minlength=NUM_BUCKETS),
        "sum_ndcg": np.bincount(bucket, ndcg, minlength=NUM_BUCKETS),
    }


def test_a_canary_that_puts_what_is_chosen_lower_fails_by_ndcg() -> None:
    stable = version(**ranked(0.7, 8000, 1))
    worse = judge(version(**ranked(0.5, 2000, 2)), stable, CONFIG)
    assert failed(worse, "NDCG by outcome, of 2000 canary answers")
    assert judge(version(**ranked(0.7, 2000, 3)), stable, CONFIG).phase == "successful"


def test_without_ranks_ndcg_is_no_question() -> None:
    found = judge(version(**ranked(0.1, 50, 2)), version(**ranked(0.9, 8000, 1)), CONFIG)
    assert (found.phase, found.ndcg_difference) == ("successful", None)


def two_surfaces(clicks_on_ads: float, bad_on_ads: int = 0) -> VersionCounters:
    """Much search, a little of ads."""
    return version(
        40_000,
        num_requests=evenly(40_000) + evenly(2000, "ads"),
        num_matured=evenly(40_000) + evenly(2000, "ads"),
        num_clicked=evenly(8000) + evenly(2000 * clicks_on_ads, "ads"),
        num_bad=evenly(bad_on_ads, "ads"),
    )


def test_a_loss_on_one_surface_fails_a_canary_that_is_fine_overall() -> None:
    found = judge(two_surfaces(0.05), two_surfaces(0.2), CONFIG)
    assert failed(found, "on surface ads, 100 of 2000 canary answers")
    # The negative control: over all surfaces together the loss is within tolerance.
    assert found.ctr_difference is not None
    assert found.ctr_difference.low > -CONFIG.max_conversion_drop
    assert found.surfaces["ads"]["canary"].num_clicked == 100
    assert judge(two_surfaces(0.2), two_surfaces(0.2), CONFIG).phase == "successful"


def test_errors_on_one_surface_fail_a_canary_that_is_fine_overall() -> None:
    found = judge(two_surfaces(0.2, bad_on_ads=200), two_surfaces(0.2), CONFIG)
    assert failed(found, "on surface ads, 200 of 2000 canary answers")
    assert found.bad_rate_increase is not None
    assert found.bad_rate_increase.estimate < CONFIG.max_bad_rate_increase


def test_a_surface_with_too_little_traffic_decides_nothing() -> None:
    strict = dataclasses.replace(CONFIG, min_requests=3000)
    assert judge(two_surfaces(0.05), two_surfaces(0.2), strict).phase == "successful"


def test_more_weights_share_the_chance_of_a_wrong_failure() -> None:
    steps = tuple(
        step
        for weight in (0.05, 0.1, 0.2, 0.4)
        for step in (Step(set_weight=weight), Step(analysis=Analysis()))
    )
    ramp = dataclasses.replace(CONFIG, steps=steps)
    canary = version(1000, num_clicked=evenly(100))
    alone, shared = (judge(canary, version(), config) for config in (CONFIG, ramp))
    assert alone.ctr_difference is not None and shared.ctr_difference is not None
    assert shared.ctr_difference.high > alone.ctr_difference.high
    assert shared.ctr_difference.low == alone.ctr_difference.low


def test_a_step_may_ask_for_more_requests_than_the_others() -> None:
    found = judge(version(), version(), CONFIG, min_requests=20_000)
    assert found.reason.startswith("canary answered 10000 requests and needs 20000")
