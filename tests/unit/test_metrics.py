"""The metrics are what their definitions say, and an interval covers as often as it claims."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raysys.evaluate.metrics import TOP, bootstrap_mean, ranking_metrics


def measure(scores: list[float], gains: dict[int, float]) -> tuple[float, float, float]:
    return ranking_metrics(
        np.array(scores, np.float32),
        np.array(list(gains), np.int32),
        np.array(list(gains.values()), np.float32),
    )


def by_definition(scores: list[float], gains: dict[int, float]) -> tuple[float, float, float]:
    """NDCG@10, conversion@10 and AUC, spelled out; a positive loses each tie against a negative."""
    negatives = [i for i in range(len(scores)) if i not in gains]

    def place(item: int) -> int:
        ahead = sum(scores[other] >= scores[item] for other in negatives)
        same = [i for i in gains if scores[i] == scores[item]]
        return ahead + sum(scores[i] > scores[item] for i in gains) + same.index(item)

    def discounted(gain: float, at: int) -> float:
        return gain / math.log2(at + 2) if at < TOP else 0.0

    ideal = sum(discounted(gain, at) for at, gain in enumerate(sorted(gains.values())[::-1]))
    ndcg = sum(discounted(gain, place(item)) for item, gain in gains.items()) / ideal
    pairs = [scores[item] > scores[other] for item in gains for other in negatives]
    conversion = float(any(place(item) < TOP for item in gains))
    return ndcg, conversion, float(np.mean(pairs)) if pairs else 1.0


class TestRankingMetrics:
    @pytest.mark.parametrize(
        ("scores", "gains", "expected"),
        [
            pytest.param([3, 2, 1], {0: 3.0}, (1.0, 1.0, 1.0), id="first of three"),
            pytest.param([3, 2, 1], {1: 3.0}, (1 / math.log2(3), 1.0, 0.5), id="second of three"),
            pytest.param([3, 2, 1], {2: 3.0}, (0.5, 1.0, 0.0), id="last of three"),
            pytest.param([3, 2, 1], {0: 1.0, 2: 3.0}, (2.5 / 3.6309298, 1.0, 0.5), id="two gains"),
            pytest.param([3, 2], {0: 1.0, 1: 1.0}, (1.0, 1.0, 1.0), id="no negatives"),
        ],
    )
    def test_small_rankings_have_the_values_computed_by_hand(
        self, scores: list[float], gains: dict[int, float], expected: tuple[float, float, float]
    ) -> None:
        assert measure(scores, gains) == pytest.approx(expected)

    @settings(deadline=None)
    @given(data=st.data())
    def test_they_equal_their_definitions_with_and_without_ties(self, data: Any) -> None:
        num = data.draw(st.integers(2, 30))
        scores = data.draw(st.lists(st.integers(0, 6), min_size=num, max_size=num))
        chosen = sorted(data.draw(st.sets(st.integers(0, num - 1), min_size=1)))
        # Equal gains: positives of one score may stand in any order among themselves.
        gains = dict.fromkeys(chosen, 2.0)
        assert measure(scores, gains) == pytest.approx(by_definition(scores, gains))

    @settings(deadline=None)
    @given(data=st.data())
    def test_they_equal_their_definitions_with_different_gains(self, data: Any) -> None:
        num = data.draw(st.integers(2, 30))
        scores = data.draw(st.permutations(range(num)))
        chosen = data.draw(st.sets(st.integers(0, num - 1), min_size=1))
        gains = {item: data.draw(st.sampled_from([1.0, 2.0, 3.0])) for item in sorted(chosen)}
        assert measure(scores, gains) == pytest.approx(by_definition(scores, gains))

    @pytest.mark.parametrize("score", [0.0, math.nan], ids=["constant", "nan"])
    def test_a_score_that_tells_nothing_earns_nothing(self, score: float) -> None:
        assert measure([score] * 50, {0: 3.0, 7: 1.0}) == (0.0, 0.0, 0.0)

    def test_a_positive_without_a_number_ranks_last(self) -> None:
        assert measure([math.nan, 1.0, 2.0], {0: 1.0}) == measure([0.0, 1.0, 2.0], {0: 1.0})

    def test_places_beyond_ten_earn_nothing_but_auc(self) -> None:
        ndcg, conversion, auc = measure([*range(20, 0, -1)], {10: 3.0})
        assert (ndcg, conversion) == (0.0, 0.0)
        assert auc == pytest.approx(9 / 19)

    def test_more_than_ten_positives_can_still_be_perfect(self) -> None:
        assert measure([*range(30, 0, -1)], dict.fromkeys(range(15), 1.0)) == pytest.approx(
            (1, 1, 1)
        )


def coverage(num_users: int, *, num_resamples: int, shrink: float = 1.0) -> float:
    """Share of seeded data sets whose interval holds the true mean, its width times `shrink`."""
    rng, held, num_sets = np.random.default_rng(5), 0, 300
    true_mean = 0.3 * 0.5
    for seed in range(num_sets):
        bought: NDArray[np.float64] = (rng.random(num_users) < 0.3) * rng.random(num_users)
        found = bootstrap_mean(bought, num_resamples=num_resamples, seed=seed)
        low = found.mean - shrink * (found.mean - found.low)
        high = found.mean + shrink * (found.high - found.mean)
        held += low <= true_mean <= high
    return held / num_sets


class TestBootstrap:
    def test_the_interval_holds_the_true_mean_as_often_as_it_claims(self) -> None:
        assert 0.90 <= coverage(150, num_resamples=300) <= 0.98

    def test_an_interval_of_half_the_width_would_be_noticed(self) -> None:
        assert coverage(150, num_resamples=300, shrink=0.5) < 0.80

    def test_it_is_as_wide_as_the_normal_one_for_many_users(self) -> None:
        values = np.random.default_rng(0).normal(2.0, 3.0, 4000)
        found = bootstrap_mean(values, num_resamples=2000)
        half = 1.96 * values.std() / math.sqrt(len(values))
        assert found.mean == pytest.approx(values.mean())
        assert found.high - found.mean == pytest.approx(half, rel=0.1)
        assert found.mean - found.low == pytest.approx(half, rel=0.1)

    def test_it_is_the_same_at_each_call(self) -> None:
        values = np.arange(20.0)
        one, other = (bootstrap_mean(values, num_resamples=100) for _ in range(2))
        assert one == other
        assert bootstrap_mean(values, num_resamples=100, seed=1) != one

    def test_no_users_have_no_interval(self) -> None:
        found = bootstrap_mean(np.zeros(0), num_resamples=100)
        assert math.isnan(found.mean) and math.isnan(found.low) and math.isnan(found.high)

    def test_a_value_that_is_no_number_is_not_hidden(self) -> None:
        found = bootstrap_mean(np.array([1.0, math.nan, 2.0]), num_resamples=100)
        assert math.isnan(found.mean) and math.isnan(found.low)

    def test_equal_users_have_an_interval_of_one_point(self) -> None:
        found = bootstrap_mean(np.full(40, 0.25), num_resamples=100)
        assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
