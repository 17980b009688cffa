"""The judge: each verdict and its reason, and how often it errs over simulated rollouts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from raysys.config import RolloutConfig
from raysys.rollout.analysis import judge
from raysys.rollout.bounds import cluster_variance
from raysys.rollout.counters import (
    NUM_BUCKETS,
    SURFACES,
    VersionCounters,
)
from raysys.rollout.look import MIN_USER_BUCKETS

CONFIG = RolloutConfig(
    min_requests=500,
    max_bad_rate_increase=0.02,
    max_conversion_drop=0.05,
    error_probability=0.05,
)
Look = tuple[VersionCounters, VersionCounters]


def spread(total: int, buckets: int = NUM_BUCKETS) -> np.ndarray:
    """A total spread evenly over the first buckets."""
    counts = np.zeros(NUM_BUCKETS, np.int64)
    counts[:buckets] = total // buckets
    counts[: total % buckets] += 1
    return counts


def counters(
    requests: int, bad: int = 0, converted: int = 0, matured: int | None = None, buckets: int = 100
) -> VersionCounters:
    return VersionCounters.of(
        num_requests=on_surface(spread(requests, buckets)),
        num_bad=on_surface(spread(bad, buckets)),
        num_matured=on_surface(spread(requests if matured is None else matured, buckets)),
        num_clicked=on_surface(spread(converted, buckets)),
        num_converted=on_surface(spread(converted, buckets)),
    )


def on_surface(counts: np.ndarray, surface: str = "recommend") -> np.ndarray:
    """Counts of buckets as (S, B), all on one surface."""
    found = np.zeros((len(SURFACES), NUM_BUCKETS), np.int64)
    found[SURFACES.index(surface)] = counts
    return found


def test_equal_versions_with_much_traffic_are_successful() -> None:
    found = judge(counters(4000, 8, 800), counters(16000, 32, 3200), CONFIG)
    assert found.phase == "successful"
    assert found.reason.startswith("800 of 4000 canary answers and 3200 of 16000 stable answers")


def test_a_drop_that_is_proven_but_tolerated_is_successful() -> None:
    found = judge(counters(40_000, 0, 7600), counters(160_000, 0, 32_000), CONFIG)
    assert found.conversion_difference is not None
    assert found.conversion_difference.high < 0
    assert found.phase == "successful"


def test_a_proven_drop_that_may_be_beyond_tolerance_fails() -> None:
    found = judge(counters(2000, 0, 280), counters(8000, 0, 1600), CONFIG)
    assert found.phase == "failed"
    assert "were clicked: -6.00%" in found.reason
    assert "tolerated down to -5.00%" in found.reason


def test_more_bad_answers_than_tolerated_fail() -> None:
    found = judge(counters(2000, 120, 400), counters(8000, 8, 1600), CONFIG)
    assert found.phase == "failed"
    assert found.reason.startswith("120 of 2000 canary answers and 8 of 8000 stable answers")


def test_a_canary_that_always_fails_needs_no_minimum_of_requests() -> None:
    found = judge(counters(10, 10), counters(500), CONFIG)
    assert found.phase == "failed"


def test_failures_of_one_user_alone_do_not_fail_a_canary() -> None:
    spread_out = judge(counters(600, 60), counters(2400), CONFIG)
    canary = counters(600)
    canary.num_bad[1, 7] = canary.num_requests[1, 7] = 60
    of_one_user = judge(canary, counters(2400), CONFIG)
    assert (spread_out.phase, of_one_user.phase) == ("failed", "inconclusive")


@pytest.mark.parametrize(
    ("canary", "stable", "reason"),
    [
        pytest.param(
            counters(499), counters(4000), "canary answered 499 requests and needs 500", id="canary"
        ),
        pytest.param(
            counters(900), counters(40), "stable answered 40 requests and needs 500", id="stable"
        ),
        pytest.param(
            counters(900, matured=3),
            counters(4000),
            "canary has 3 requests old enough to judge and needs 500",
            id="immature",
        ),
        pytest.param(
            counters(900, buckets=MIN_USER_BUCKETS - 1),
            counters(4000),
            f"the users of canary fill {MIN_USER_BUCKETS - 1} of the buckets",
            id="few-users",
        ),
        pytest.param(
            counters(600, 9, 120), counters(2400, 36, 480), "9 of 600 canary", id="bad-rate-open"
        ),
        pytest.param(
            counters(600, 0, 120), counters(2400, 0, 480), "120 of 600 canary", id="conversion-open"
        ),
    ],
)
def test_missing_evidence_is_inconclusive_and_says_what_is_missing(
    canary: VersionCounters, stable: VersionCounters, reason: str
) -> None:
    found = judge(canary, stable, CONFIG)
    assert found.phase == "inconclusive"
    assert found.reason.startswith(reason)
    assert "\n" not in found.reason


def test_no_traffic_at_all_is_inconclusive() -> None:
    found = judge(VersionCounters.zeros(), VersionCounters.zeros(), CONFIG)
    assert (found.phase, found.bad_rate_increase) == ("inconclusive", None)


def test_no_conversions_at_all_are_no_drop_beyond_tolerance() -> None:
    found = judge(counters(1000), counters(4000), CONFIG)
    assert found.phase == "successful"
    assert found.conversion_difference is not None
    assert found.conversion_difference.low < 0 < found.conversion_difference.high


def test_more_conversions_than_matured_requests_are_survived() -> None:
    # Feedback is counted where it arrives; the count of its request may have died with a replica.
    found = judge(counters(600, 0, 700), counters(2400, 0, 1000), CONFIG)
    assert found.phase in ("successful", "inconclusive")


def test_a_measurement_goes_into_the_ledger_as_strict_json() -> None:
    for pair in [(counters(10), counters(0)), (counters(4000, 1, 9), counters(4000, 2, 8))]:
        body = judge(*pair, CONFIG).to_json()
        assert json.loads(json.dumps(body, allow_nan=False)) == body


# Simulated rollouts: users with habits of their own, who come back in sessions of three requests.


def rollout(
    rng: np.random.Generator,
    *,
    conversion: float = 0.3,
    relative: float = 1.0,
    bad: tuple[float, float] = (0.005, 0.005),
    num_looks: int = 40,
    num_users: int = 1500,
    weight: float = 0.3,
    sessions_per_look: int = 60,
) -> Iterator[Look]:
    """Yields (canary, stable) at each look; `relative` scales the canary's conversion."""
    on_canary = rng.random(num_users) < weight
    bucket = rng.integers(0, NUM_BUCKETS, num_users)
    habit = rng.beta(conversion * 9, (1 - conversion) * 9, num_users)
    habit = habit * np.where(on_canary, relative, 1.0)
    activity = rng.gamma(1.0, 1.0, num_users)
    arms = {True: VersionCounters.zeros(), False: VersionCounters.zeros()}
    for _ in range(num_looks):
        chosen = rng.choice(num_users, sessions_per_look, p=activity / activity.sum())
        users = np.repeat(chosen, 3)
        converted = rng.random(len(users)) < habit[users]
        failed = rng.random(len(users)) < np.where(on_canary[users], *bad)
        for arm, sums in arms.items():
            mine = on_canary[users] == arm
            for counts, values in (
                (sums.num_requests[1], 1),
                (sums.num_matured[1], 1),
                (sums.num_bad[1], failed[mine]),
                (sums.num_clicked[1], converted[mine]),
            ):
                np.add.at(counts, bucket[users[mine]], values)
        yield arms[True].copy(), arms[False].copy()


def verdicts(
    num_rollouts: int, decide: Callable[[Look], str], seed: int = 0, **settings: Any
) -> Counter[str]:
    """The first conclusive verdict of each rollout."""
    rng = np.random.default_rng(seed)
    found: Counter[str] = Counter()
    for _ in range(num_rollouts):
        looks = map(decide, rollout(rng, **settings))
        found[next((phase for phase in looks if phase != "inconclusive"), "inconclusive")] += 1
    return found


def by_judge(look: Look) -> str:
    return judge(*look, CONFIG).phase


def by_fixed_sample_test(look: Look) -> str:
    """The test of most dashboards: a one-sided z test, clustered, anew at each look."""
    canary, stable = look
    if min(arm.num_requests.sum() for arm in look) < CONFIG.min_requests:
        return "inconclusive"
    variance = sum(cluster_variance(arm.num_clicked[1], arm.num_matured[1]) for arm in look)
    return _z_verdict(canary, stable, variance)


def by_independent_requests(look: Look) -> str:
    """Always valid, but takes each request for an independent one."""
    canary, stable = look
    pooled = [
        VersionCounters.of(
            num_requests=arm.num_requests,
            num_bad=arm.num_bad,
            num_matured=on_surface(spread(int(arm.num_matured.sum()))),
            num_clicked=on_surface(spread(int(arm.num_clicked.sum()))),
        )
        for arm in (canary, stable)
    ]
    return judge(pooled[0], pooled[1], CONFIG).phase


def _z_verdict(canary: VersionCounters, stable: VersionCounters, variance: float) -> str:
    rates = [arm.num_clicked.sum() / arm.num_matured.sum() for arm in (canary, stable)]
    return "failed" if (rates[0] - rates[1]) / math.sqrt(variance) < -1.645 else "inconclusive"


def at_most(count: int, num: int, probability: float) -> bool:
    """Whether a count is within three standard deviations above what is promised at worst."""
    return count <= num * probability + 3 * math.sqrt(num * probability * (1 - probability))


MANY_LOOKS = {"num_looks": 80, "num_users": 20_000, "weight": 0.5, "sessions_per_look": 150}


def test_an_equal_canary_is_seldom_failed_however_often_one_looks() -> None:
    found = verdicts(200, by_judge, **MANY_LOOKS)
    assert found["failed"] <= 200 * CONFIG.error_probability
    assert found["successful"] >= 190


def test_a_fixed_sample_test_fails_equal_canaries_when_looked_at_repeatedly() -> None:
    # The negative control: the same simulation tells an invalid test from a valid one.
    found = verdicts(200, by_fixed_sample_test, **MANY_LOOKS)
    assert found["failed"] > 2 * 200 * CONFIG.error_probability


def test_a_canary_just_beyond_tolerance_is_seldom_passed() -> None:
    found = verdicts(200, by_judge, relative=(0.3 - CONFIG.max_conversion_drop) / 0.3)
    assert at_most(found["successful"], 200, CONFIG.error_probability)


def test_a_canary_that_fails_just_too_often_is_seldom_passed() -> None:
    found = verdicts(200, by_judge, bad=(0.005 + CONFIG.max_bad_rate_increase, 0.005))
    assert at_most(found["successful"], 200, CONFIG.error_probability)


def test_a_rare_outcome_and_a_small_canary_do_not_fail_an_equal_one() -> None:
    # Where a canary of few users and few conversions would look precise by itself.
    found = verdicts(
        200, by_judge, conversion=0.02, weight=0.07, sessions_per_look=180, num_users=800
    )
    assert found["failed"] <= 200 * CONFIG.error_probability


def test_a_clearly_worse_canary_is_failed() -> None:
    assert verdicts(50, by_judge, relative=0.6)["failed"] == 50


def test_a_canary_with_more_errors_is_failed() -> None:
    assert verdicts(50, by_judge, bad=(0.06, 0.005), num_looks=80)["failed"] == 50


def test_a_better_canary_is_passed() -> None:
    found = verdicts(50, by_judge, relative=1.2)
    assert found["successful"] == 50


def test_taking_requests_for_independent_would_err_more_often() -> None:
    # The negative control for the clusters: few users who come back often.
    few = {"num_users": 150, "num_looks": 40, "weight": 0.5}
    assert verdicts(100, by_independent_requests, **few)["failed"] > 100 * CONFIG.error_probability
    assert verdicts(100, by_judge, **few)["failed"] <= 100 * CONFIG.error_probability


def test_a_measurement_carries_the_totals_of_both_versions() -> None:
    found = judge(counters(600, 3, 90), counters(2400, 12, 360), CONFIG)
    assert (found.canary.num_requests, found.canary.num_bad) == (600, 3)
    assert (found.stable.num_matured, found.stable.num_converted) == (2400, 360)
    assert found.canary.num_user_buckets == NUM_BUCKETS
