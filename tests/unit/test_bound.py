"""No user moves item counts by more than is paid for, even for someone who knows the seed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raysys.ingest.bound import (
    bounded_counts,
    count_l2_sensitivity,
    noise_counts,
    sample_per_group,
)

NUM_PERIODS, NUM_ITEMS = 2, 12
SCHEMA = {"user": pl.String(), "period": pl.Int64(), "item": pl.UInt32()}
Counts = NDArray[np.float64]
CountsOf = Callable[[pl.DataFrame], Counts]
Row = tuple[str, int, int]


def counts(events: pl.DataFrame, *, max_items: int = 3, seed: int = 0) -> Counts:
    found = bounded_counts(events, max_items=max_items, seed=seed)
    out = np.zeros((NUM_PERIODS, NUM_ITEMS))
    out[found["period"].to_numpy(), found["item"].to_numpy()] = found["count"].to_numpy()
    return out


def counts_by_one_shuffle(events: pl.DataFrame) -> Counts:
    """A broken version: one shuffle of all rows, so that a user who leaves moves all others."""
    order = pl.Series("order", np.random.default_rng(0).permutation(len(events)))
    shuffled = events.with_columns(order).sort("order")
    kept = shuffled.group_by("user", "period", maintain_order=True).head(3)
    out = np.zeros((NUM_PERIODS, NUM_ITEMS))
    np.add.at(out, (kept["period"].to_numpy(), kept["item"].to_numpy()), 1.0)
    return out


def frame(rows: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def largest_move(rows: list[Row], counts_of: CountsOf) -> float:
    """The largest L2 distance of a period's counts, over all users that may leave."""
    events = frame(rows)
    everyone = counts_of(events)
    moves = [
        np.linalg.norm(everyone - counts_of(events.filter(pl.col("user") != name)), axis=1).max()
        for name in events["user"].unique()
    ]
    return float(max(moves, default=0.0))


GREEDY: list[Row] = [
    ("abcd"[who], 0, item) for who in range(4) for item in range(NUM_ITEMS) if item != who
]
"""Everyone is far over the cap, each with other items."""


class TestBoundedCounts:
    @settings(deadline=None)
    @given(
        rows=st.lists(
            st.tuples(
                st.sampled_from("abcd"),
                st.integers(0, NUM_PERIODS - 1),
                st.integers(0, NUM_ITEMS - 1),
            ),
            max_size=80,
        ),
        max_items=st.integers(1, 5),
        seed=st.integers(0, 2**48),
    )
    @example(rows=GREEDY, max_items=3, seed=0)
    def test_leaving_a_user_out_moves_each_period_by_at_most_the_sensitivity(
        self, rows: list[Row], max_items: int, seed: int
    ) -> None:
        moved = largest_move(rows, lambda events: counts(events, max_items=max_items, seed=seed))
        assert moved <= count_l2_sensitivity(max_items) + 1e-9

    def test_without_a_cap_a_user_moves_more_than_that(self) -> None:
        moved = largest_move(GREEDY, lambda events: counts(events, max_items=1000))
        assert moved == pytest.approx(math.sqrt(NUM_ITEMS - 1))
        assert moved > count_l2_sensitivity(3)

    def test_one_shuffle_of_all_users_would_move_more_than_that(self) -> None:
        assert largest_move(GREEDY, counts_by_one_shuffle) > count_l2_sensitivity(3)

    def test_below_the_cap_every_user_counts_once_an_item_and_period(self) -> None:
        rows = [("a", 0, 1), ("a", 0, 1), ("b", 0, 1), ("a", 1, 1), ("a", 0, 2)]
        expected = np.zeros((NUM_PERIODS, NUM_ITEMS))
        expected[0, 1], expected[0, 2], expected[1, 1] = 2, 1, 1
        assert np.array_equal(counts(frame(rows)), expected)

    def test_the_cap_is_one_for_each_period(self) -> None:
        rows = [("a", period, item) for period in range(2) for item in range(NUM_ITEMS)]
        assert counts(frame(rows), max_items=3).sum(axis=1).tolist() == [3, 3]

    def test_the_order_of_the_events_changes_nothing(self) -> None:
        events = frame(GREEDY)
        assert np.array_equal(counts(events), counts(events.reverse()))

    def test_another_seed_keeps_other_items(self) -> None:
        events = frame(GREEDY)
        assert not np.array_equal(counts(events, seed=1), counts(events, seed=2))

    def test_no_events_count_nothing(self) -> None:
        assert counts(frame([])).tolist() == np.zeros((NUM_PERIODS, NUM_ITEMS)).tolist()


class TestSamplePerGroup:
    def test_each_row_of_a_group_is_kept_with_the_same_chance(self) -> None:
        num_groups, size, kept = 6000, 8, 3
        rows = pl.DataFrame(
            {
                "user": np.repeat(np.arange(num_groups), size),
                "item": np.tile(np.arange(size), num_groups),
            }
        )
        sample = sample_per_group(rows, ["user"], ["item"], kept, seed=3)
        assert set(sample.group_by("user").len()["len"]) == {kept}
        share = sample.group_by("item").len()["len"].to_numpy() / num_groups
        chance = kept / size
        assert np.abs(share - chance).max() < 4 * math.sqrt(chance * (1 - chance) / num_groups)

    def test_pairs_of_rows_are_kept_as_often_as_without_replacement(self) -> None:
        num_groups, size = 6000, 5
        rows = pl.DataFrame(
            {
                "user": np.repeat(np.arange(num_groups), size),
                "item": np.tile(np.arange(size), num_groups),
            }
        )
        sample = sample_per_group(rows, ["user"], ["item"], 2, seed=4)
        pairs = sample.group_by("user").agg(pl.col("item").sort()).group_by("item").len()["len"]
        assert len(pairs) == 10
        assert np.abs(pairs.to_numpy() / num_groups - 0.1).max() < 4 * math.sqrt(0.09 / num_groups)

    def test_rows_keep_their_order_and_columns(self) -> None:
        rows = pl.DataFrame({"user": list("abab"), "item": [3, 2, 1, 0], "more": [1, 2, 3, 4]})
        assert sample_per_group(rows, ["user"], ["item"], 2, seed=0).equals(rows)


class TestNoise:
    def test_noise_has_the_standard_deviation_that_was_asked_for_and_no_bias(self) -> None:
        num, std = 100_000, 37.0
        noise = noise_counts(np.full((2, num // 2), 5.0), std) - 5.0
        # Nine and six standard errors: the noise has no seed.
        assert float(noise.std()) == pytest.approx(std, rel=9 / math.sqrt(2 * num))
        assert abs(float(noise.mean())) < 6 * std / math.sqrt(num)

    def test_two_calls_differ_and_no_global_seed_repeats_them(self) -> None:
        zeros = np.zeros((1, 50))
        np.random.seed(0)
        first = noise_counts(zeros, 1.0)
        np.random.seed(0)
        second = noise_counts(zeros, 1.0)
        assert not np.isclose(first, second).any()

    def test_counts_themselves_are_left_alone(self) -> None:
        counted = np.ones((1, 3))
        noise_counts(counted, 1.0)
        assert counted.tolist() == [[1, 1, 1]]
