"""Negatives come from the user's own history and from public numbers, and log Q says how often."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raysys.config import IngestConfig
from raysys.ingest.sample import NegativeSampler, max_candidates

NUM_ITEMS = 40
NUM_DRAWS = 6000
SKEWED = np.where(np.arange(NUM_ITEMS) < 30, (np.arange(NUM_ITEMS) - 30.0) ** 2, 0)
HISTORY = np.array([0, 1, 5, 20, 33, 38, 39], np.int32)
NOTHING = np.zeros(0, np.int32)


def sampler(
    popularity: NDArray[np.float64] = SKEWED, *, own: int = 3, popular: int = 4, uniform: int = 2
) -> NegativeSampler:
    config = IngestConfig(
        num_history_negatives=own, num_popularity_negatives=popular, num_uniform_negatives=uniform
    )
    return NegativeSampler.of(
        popularity.astype(np.float32), np.arange(len(popularity), dtype=np.int32) // 4, config
    )


def draw(
    of: NegativeSampler,
    *,
    positives: NDArray[np.int32] = NOTHING,
    also_chosen: NDArray[np.int32] | None = None,
    history: NDArray[np.int32] = HISTORY,
    seed: int = 0,
) -> tuple[list[int], list[float]]:
    chosen = positives if also_chosen is None else also_chosen
    items, log_q = of.candidates(positives, chosen, history, np.random.default_rng(seed))
    return items.tolist(), log_q.tolist()


def frequencies(of: NegativeSampler) -> tuple[dict[int, float], dict[int, float]]:
    """Share of draws in which each item was a candidate, and what log Q claimed of it."""
    found, claimed = Counter[int](), dict[int, float]()
    for seed in range(NUM_DRAWS):
        items, log_q = draw(of, seed=seed)
        found.update(items)
        claimed.update(zip(items, np.exp(log_q).tolist(), strict=True))
    return {item: count / NUM_DRAWS for item, count in found.items()}, claimed


def standard_error(chance: float) -> float:
    return math.sqrt(chance * (1 - chance) / NUM_DRAWS)


class TestLogQ:
    def test_it_is_the_chance_that_an_item_is_drawn(self) -> None:
        found, claimed = frequencies(sampler())
        assert len(found) == NUM_ITEMS
        for item, chance in claimed.items():
            tolerance = 4.5 * standard_error(chance)
            assert found[item] == pytest.approx(chance, abs=tolerance), f"item {item}"

    def test_the_expected_number_of_draws_would_be_too_high_for_popular_items(self) -> None:
        of = sampler()
        found, _ = frequencies(of)
        expected = 4 * of.probability[0] + 2 / NUM_ITEMS + 3 / len(HISTORY)
        assert expected > found[0] + 4.5 * standard_error(found[0])

    def test_a_history_that_is_drawn_as_a_whole_has_log_q_zero(self) -> None:
        items, log_q = draw(sampler(own=len(HISTORY)))
        claimed = dict(zip(items, log_q, strict=True))
        assert [claimed[int(item)] for item in HISTORY] == [0.0] * len(HISTORY)
        assert all(value < 0 for item, value in claimed.items() if item not in HISTORY)

    def test_a_positive_is_corrected_as_if_it_had_been_drawn(self) -> None:
        of = sampler()
        _, claimed = frequencies(of)
        items, log_q = draw(of, positives=np.array([7], np.int32))
        assert items[0] == 7
        assert math.exp(log_q[0]) == pytest.approx(claimed[7], rel=1e-5)

    def test_it_is_finite_where_popularity_knows_nothing_of_an_item(self) -> None:
        items, log_q = draw(sampler(), positives=np.array([35], np.int32), history=NOTHING)
        assert SKEWED[35] == 0
        assert math.exp(log_q[items.index(35)]) == pytest.approx(1 - (1 - 1 / NUM_ITEMS) ** 2)


class TestSources:
    def test_popularity_draws_follow_the_released_popularity_alone(self) -> None:
        num_items = 10_000
        popularity = np.zeros(num_items)
        popularity[[17, 4711]] = 16.0, 1.0
        of = sampler(popularity, own=0, popular=1, uniform=1)
        drawn = Counter[int]()
        for seed in range(2000):
            drawn.update(draw(of, history=NOTHING, seed=seed)[0])
        share = 8 / 9  # 16 to the power 0.75 is 8
        assert drawn[17] / 2000 == pytest.approx(share, abs=0.03)
        assert drawn[4711] / 2000 == pytest.approx(1 - share, abs=0.03)
        # All others are from the one uniform draw, which hits one item of 10,000 rarely twice.
        assert max(count for item, count in drawn.items() if item not in (17, 4711)) < 10

    def test_without_any_popularity_the_draw_is_uniform(self) -> None:
        assert set(sampler(np.zeros(NUM_ITEMS)).probability) == {1 / NUM_ITEMS}

    def test_history_negatives_are_of_the_own_history_alone(self) -> None:
        popularity = np.zeros(NUM_ITEMS)
        popularity[0] = 1.0
        of = sampler(popularity, own=2, popular=1, uniform=1)
        for seed in range(50):
            items, _ = draw(of, history=np.array([7, 8, 9], np.int32), seed=seed)
            assert len(set(items) & {7, 8, 9}) >= 2
            assert len(set(items) - {0, 7, 8, 9}) <= 1


class TestCandidates:
    @settings(deadline=None)
    @given(
        chosen=st.sets(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=9),
        num_positives=st.integers(1, 6),
        history=st.sets(st.integers(0, NUM_ITEMS - 1), max_size=12),
        seed=st.integers(0, 2**48),
    )
    def test_no_chosen_item_is_a_negative_and_no_candidate_comes_twice(
        self, chosen: set[int], num_positives: int, history: set[int], seed: int
    ) -> None:
        of = sampler()
        also_chosen = np.array(sorted(chosen), np.int32)
        positives = also_chosen[:num_positives]
        items, log_q = draw(
            of,
            positives=positives,
            also_chosen=also_chosen,
            history=np.array(sorted(history), np.int32),
            seed=seed,
        )
        assert items[: len(positives)] == positives.tolist()
        assert not set(items[len(positives) :]) & chosen
        assert len(set(items)) == len(items) == len(log_q)
        assert len(items) <= of.max_candidates == max_candidates(of.config)
        assert np.isfinite(log_q).all() and max(log_q) <= 0

    def test_chosen_items_would_be_drawn_if_they_were_not_left_out(self) -> None:
        # The negative control: the property above is not true for lack of draws.
        drawn = {item for seed in range(50) for item in draw(sampler(), seed=seed)[0]}
        assert set(range(5)) <= drawn

    def test_a_seed_repeats_the_draw_and_another_does_not(self) -> None:
        assert draw(sampler(), seed=1) == draw(sampler(), seed=1)
        assert draw(sampler(), seed=1) != draw(sampler(), seed=2)

    def test_a_catalogue_of_one_item_leaves_only_the_positive(self) -> None:
        one = np.array([0], np.int32)
        assert draw(sampler(np.ones(1)), positives=one, history=one) == ([0], [0.0])


class TestCategoryNegatives:
    """Items 0-3, 4-7, … are of one category."""

    def sampler(self, num: int) -> NegativeSampler:
        config = IngestConfig(
            num_history_negatives=0, num_popularity_negatives=0, num_uniform_negatives=1,
            num_category_negatives=num,
        )  # fmt: skip
        category = np.arange(40, dtype=np.int32) // 4
        category[36:] = -1
        return NegativeSampler.of(np.ones(40, np.float32), category, config)

    def draw(self, num: int, positive: int, seed: int) -> tuple[set[int], dict[int, float]]:
        positives, none = np.array([positive], np.int32), np.zeros(0, np.int32)
        rng = np.random.default_rng(seed)
        found, log_q = self.sampler(num).candidates(positives, positives, none, rng)
        return set(found.tolist()) - {positive}, dict(zip(found.tolist(), log_q, strict=True))

    def test_they_come_from_the_categories_of_the_positives(self) -> None:
        near = [len(self.draw(30, 5, seed)[0] & {4, 6, 7}) for seed in range(20)]
        far = [len(self.draw(0, 5, seed)[0] & {4, 6, 7}) for seed in range(20)]
        assert np.mean(near) > 2.9 and np.mean(far) < 0.5

    def test_an_item_without_a_category_shares_none(self) -> None:
        assert all(len(self.draw(30, 37, seed)[0]) <= 1 for seed in range(20))

    def test_log_q_is_how_often_an_item_is_drawn(self) -> None:
        drawn = np.zeros(40)
        for seed in range(4000):
            items, log_q = self.draw(2, 5, seed)
            drawn[list(items)] += 1 / 4000
        assert np.exp(log_q[5]) == pytest.approx(drawn[6], abs=0.03)
        assert drawn[6] == pytest.approx(1 - (3 / 4) ** 2 * (39 / 40), abs=0.03)
        assert drawn[20] == pytest.approx(1 / 40, abs=0.01)
