"""The split is exact, sticky, monotone and new for each rollout."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chi2

from raysys.rollout.counters import NUM_BUCKETS
from raysys.serve.router import NUM_POINTS, analysis_bucket, assign, split_point

users = st.text(min_size=1, max_size=64)
weights = st.floats(0, 1)
NUM_USERS = 100_000


def canary_users(rollout_id: str, weight: float, num_users: int = NUM_USERS) -> set[int]:
    return {
        user
        for user in range(num_users)
        if assign(f"user-{user}", rollout_id=rollout_id, weight_fraction=weight) == "canary"
    }


def within_binomial(count: int, num: int, share: float, confidence: float = 0.999) -> bool:
    low, high = binom.interval(confidence, num, share)
    return bool(low <= count <= high)


@given(users, weights)
def test_a_user_gets_the_same_arm_each_time(user: str, weight: float) -> None:
    first = assign(user, rollout_id="r0001", weight_fraction=weight)
    assert assign(user, rollout_id="r0001", weight_fraction=weight) == first


@given(users, weights, weights)
def test_raising_the_weight_takes_no_user_from_the_canary(user: str, a: float, b: float) -> None:
    low, high = sorted((a, b))
    if assign(user, rollout_id="r0001", weight_fraction=low) == "canary":
        assert assign(user, rollout_id="r0001", weight_fraction=high) == "canary"


@given(users)
def test_weight_zero_has_no_canary_and_weight_one_no_stable(user: str) -> None:
    assert assign(user, rollout_id="r0001", weight_fraction=0.0) == "stable"
    assert assign(user, rollout_id="r0001", weight_fraction=1.0) == "canary"


def test_the_split_is_the_one_that_was_released() -> None:
    # A change would move users between versions in the middle of a rollout.
    points = [split_point(user, rollout_id="r0001") for user in ("alice", "bob", "ålice")]
    assert points == [9230, 1268, 3609]
    assert [analysis_bucket(user) for user in ("alice", "bob", "ålice")] == [20, 24, 13]


def test_the_share_of_many_users_is_the_weight() -> None:
    for weight in (0.0001, 0.01, 0.2, 0.5):
        assert within_binomial(len(canary_users("r0001", weight)), NUM_USERS, weight), weight


def test_two_rollouts_draw_independent_users() -> None:
    both = canary_users("r0001", 0.2) & canary_users("r0002", 0.2)
    assert within_binomial(len(both), NUM_USERS, 0.2 * 0.2)


def test_without_the_salt_two_rollouts_would_draw_the_same_users() -> None:
    # The negative control: the check above must fail on a split that ignores the rollout.
    both = canary_users("r0001", 0.2) & canary_users("r0001", 0.2)
    assert not within_binomial(len(both), NUM_USERS, 0.2 * 0.2)


def test_analysis_buckets_are_even_and_independent_of_the_split() -> None:
    canary = canary_users("r0001", 0.5)
    counts = [[0, 0] for _ in range(NUM_BUCKETS)]
    for user in range(NUM_USERS):
        counts[analysis_bucket(f"user-{user}")][user in canary] += 1
    expected = NUM_USERS / NUM_BUCKETS / 2
    statistic = sum((count - expected) ** 2 / expected for pair in counts for count in pair)
    assert statistic < chi2.ppf(0.999, 2 * NUM_BUCKETS - 1)


def test_a_bucket_taken_from_the_split_hash_would_depend_on_the_split() -> None:
    # The negative control: one hash for both puts every canary user into the lower buckets.
    canary = canary_users("r0001", 0.2, 1000)
    points = {u: split_point(f"user-{u}", rollout_id="r0001") for u in range(1000)}
    assert all((points[u] * NUM_BUCKETS // NUM_POINTS < 20) == (u in canary) for u in range(1000))


def test_points_come_from_blake2b_with_the_rollout_as_key() -> None:
    digest = hashlib.blake2b(b"alice", digest_size=8, key=b"r0001", person=b"split").digest()
    assert split_point("alice", rollout_id="r0001") == int.from_bytes(digest) % NUM_POINTS
