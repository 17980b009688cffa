"""One function makes all features, and a history is the same however it was put together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raysys.ingest.features import (
    DAY_S,
    FEATURE_NAMES,
    NUM_FEATURES,
    ItemTable,
    UserHistory,
    features,
)
from tests.shop import HALF_LIFE_S, item_table

NOW = 100 * DAY_S
Event = tuple[int, float, float]
"""Item, seconds, weight."""


def history(*events: Event, as_of: float = NOW, start: UserHistory | None = None) -> UserHistory:
    items, times, weights = (np.array([e[i] for e in events]) for i in range(3))
    return (start or UserHistory.empty()).extend(
        items.astype(np.int32),
        times.astype(np.float64),
        weights.astype(np.float64),
        as_of=as_of,
        half_life_s=HALF_LIFE_S,
    )


def feature(
    name: str, who: UserHistory, items: ItemTable, *candidates: int, now: float = NOW
) -> list[float]:
    out = features(who, items, np.array(candidates, np.int32), now=now)
    return [float(value) for value in out[:, FEATURE_NAMES.index(name)]]


def same(one: UserHistory, other: UserHistory) -> bool:
    return (
        one.as_of == other.as_of
        and np.array_equal(one.items, other.items)
        and np.array_equal(one.first_ts, other.first_ts)
        and np.array_equal(one.last_ts, other.last_ts)
        and np.allclose(one.count, other.count)
        and np.allclose(one.decayed, other.decayed)
    )


event_lists = st.lists(
    st.tuples(
        st.integers(0, 5), st.floats(0, NOW, allow_nan=False), st.sampled_from([1 / 3, 2 / 3, 1.0])
    ),
    max_size=30,
)


class TestHistory:
    @settings(deadline=None)
    @given(events=event_lists, cuts=st.lists(st.integers(0, 30), max_size=4))
    def test_extending_step_by_step_equals_all_at_once(
        self, events: list[Event], cuts: list[int]
    ) -> None:
        ordered = sorted(events, key=lambda event: event[1])
        step_by_step, start = UserHistory.empty(), 0
        for cut in [*sorted(cuts), len(ordered)]:
            part = ordered[start : max(cut, start)]
            as_of = part[-1][1] if part else step_by_step.as_of
            step_by_step = history(*part, as_of=as_of, start=step_by_step)
            start = max(cut, start)
        step_by_step = history(as_of=NOW, start=step_by_step)
        assert same(step_by_step, history(*ordered, as_of=NOW))

    def test_steps_that_forget_to_decay_would_be_noticed(self) -> None:
        first, second = (0, 0.0, 1.0), (0, NOW, 1.0)
        kept_fresh = history(second, start=history(first, as_of=NOW))
        undecayed = history(second, start=history((0, NOW, 1.0), as_of=NOW))
        assert same(kept_fresh, history(first, second))
        assert not same(undecayed, history(first, second))

    @pytest.mark.parametrize("half_lives", [0, 1, 3])
    def test_a_purchase_halves_with_each_half_life(self, half_lives: int) -> None:
        bought = history((2, NOW - half_lives * HALF_LIFE_S, 1.0))
        assert bought.decayed.tolist() == [pytest.approx(0.5**half_lives)]
        assert bought.count.tolist() == [1.0]

    def test_repeated_purchases_make_one_row_sorted_by_item(self) -> None:
        who = history((3, 10.0, 1.0), (1, 20.0, 0.5), (3, 30.0, 1.0))
        assert who.items.tolist() == [1, 3]
        assert who.count.tolist() == [0.5, 2.0]
        assert who.first_ts.tolist() == [20.0, 10.0]
        assert who.last_ts.tolist() == [20.0, 30.0]

    def test_the_most_recent_items_are_kept_in_item_order(self) -> None:
        who = history((0, 30.0, 1.0), (1, 10.0, 1.0), (2, 40.0, 1.0), (3, 30.0, 1.0))
        assert who.most_recent(2).items.tolist() == [0, 2]
        assert who.most_recent(3).last_ts.tolist() == [30.0, 40.0, 30.0]
        assert who.most_recent(4) is who

    def test_attention_prefers_what_is_bought_often_and_lately_and_sums_to_one(self) -> None:
        who = history((0, NOW - 60 * DAY_S, 1.0), (1, NOW, 1.0), (2, NOW, 1.0), (2, NOW, 1.0))
        items, weights = who.attention(2)
        assert items.tolist() == [2, 1]
        assert weights.tolist() == pytest.approx([2 / 3, 1 / 3])

    def test_an_empty_history_attends_to_nothing(self) -> None:
        items, weights = UserHistory.empty().attention(5)
        assert len(items) == len(weights) == 0


class TestFeatures:
    def test_a_stranger_has_item_features_only(self) -> None:
        table = item_table(
            3, price=[math.e**4 - 1, math.nan, 0.0], popularity=[math.e**4 - 1, 0, 0]
        )
        out = features(UserHistory.empty(), table, np.array([0, 1, 2], np.int32), now=0.0)
        names = ("popularity", "price", "price_known")
        columns = [FEATURE_NAMES.index(name) for name in names]
        assert out[:, columns].tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
        assert np.delete(out, columns, axis=1).sum() == 0

    def test_features_are_finite_and_keep_the_order_of_the_candidates(self) -> None:
        table = item_table(4, price=[1.0, math.nan, -1.0, math.inf], popularity=[3, 0, 2, 1])
        who = history((1, NOW - DAY_S, 1.0))
        ordered = features(who, table, np.array([0, 1, 2, 3], np.int32), now=NOW)
        turned = features(who, table, np.array([3, 2, 1, 0], np.int32), now=NOW)
        assert ordered.shape == (4, NUM_FEATURES)
        assert ordered.dtype == np.float32
        assert np.isfinite(ordered).all()
        assert np.array_equal(ordered, turned[::-1])

    def test_own_purchases_count_decay_and_age(self) -> None:
        who = history((1, NOW - 28 * DAY_S, 1.0), (1, NOW - 7 * DAY_S, 1.0))
        table = item_table(3)
        decayed = 0.5 + 0.5**0.25
        expected = {
            "own_decayed_count": math.log1p(decayed),
            "own_count": math.log1p(2) / 2,
            "own_bought": 1.0,
            "own_recency_week": math.exp(-1),
            "own_recency_month": math.exp(-0.25),
            "own_share": 1.0,
            "own_cycle": (7 / 21) / 3,
            "own_cycle_known": 1.0,
        }
        for name, value in expected.items():
            assert feature(name, who, table, 1, 2) == pytest.approx([value, 0.0]), name
        assert feature("has_history", who, table, 1, 2) == [1.0, 1.0]

    def test_one_purchase_has_no_cycle_yet(self) -> None:
        who = history((1, NOW - 7 * DAY_S, 1.0))
        assert feature("own_cycle_known", who, item_table(), 1) == [0.0]
        assert feature("own_cycle", who, item_table(), 1) == [0.0]

    @pytest.mark.parametrize(
        ("codes", "name"),
        [("category", "category_share"), ("category", "category_count"), ("brand", "brand_share")],
    )
    def test_an_unknown_category_or_brand_is_not_a_shared_taste(
        self, codes: str, name: str
    ) -> None:
        who = history((0, NOW, 1.0))
        unknown = item_table(2, **_codes(codes, -1, -1))
        shared = item_table(2, **_codes(codes, 5, 5))
        assert feature(name, who, unknown, 0, 1) == [0.0, 0.0]
        assert min(feature(name, who, shared, 0, 1)) > 0.3

    def test_shares_are_of_the_decayed_history(self) -> None:
        table = item_table(3, category=[0, 1, 1])
        who = history((0, NOW - HALF_LIFE_S, 1.0), (1, NOW, 1.0))
        assert feature("category_share", who, table, 0, 2) == pytest.approx([1 / 3, 2 / 3])
        assert feature("own_share", who, table, 0, 2) == pytest.approx([1 / 3, 0.0])

    def test_a_history_read_later_has_decayed_as_if_made_later(self) -> None:
        events: list[Event] = [(0, 10 * DAY_S, 1.0), (1, 40 * DAY_S, 1.0), (0, 90 * DAY_S, 0.5)]
        candidates = np.arange(3, dtype=np.int32)
        stored = features(history(*events, as_of=95 * DAY_S), item_table(3), candidates, now=NOW)
        fresh = features(history(*events, as_of=NOW), item_table(3), candidates, now=NOW)
        assert stored == pytest.approx(fresh, rel=1e-5)

    def test_popularity_decays_from_the_tables_moment_to_now(self) -> None:
        table = item_table(1, popularity=[8.0], as_of=NOW - HALF_LIFE_S)
        (value,) = feature("popularity", UserHistory.empty(), table, 0)
        assert value == pytest.approx(math.log1p(4.0) / 4)

    def test_a_table_of_a_later_moment_is_not_grown(self) -> None:
        table = item_table(1, popularity=[8.0], as_of=NOW + HALF_LIFE_S)
        (value,) = feature("popularity", UserHistory.empty(), table, 0)
        assert value == pytest.approx(math.log1p(8.0) / 4)

    def test_no_candidates_give_no_rows(self) -> None:
        none: NDArray[np.int32] = np.zeros(0, np.int32)
        for who in (UserHistory.empty(), history((0, NOW, 1.0))):
            assert features(who, item_table(), none, now=NOW).shape == (0, NUM_FEATURES)


class TestItemTable:
    def test_items_are_found_by_id_and_unknown_ones_left_out(self) -> None:
        table = item_table(3)
        assert len(table) == 3
        assert table.index_of("i2") == 2
        assert table.index_of("nothing") is None
        assert table.indexes_of(["i2", "nothing", "i0"]).tolist() == [2, 0]


def _codes(name: str, *codes: int) -> dict[str, Any]:
    return {name: codes}
