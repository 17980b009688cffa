"""An example sees its own user's past and public numbers, and neither future nor other users."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from raysys.config import IngestConfig, LabelConfig
from raysys.ingest.cases import Case, read_cases
from raysys.ingest.example_set import NUM_ATTENDED, ExampleSet
from raysys.ingest.examples import ShardResult, ShardSettings, ShardState, build_shard
from raysys.ingest.features import (
    DAY_S,
    FEATURE_NAMES,
    NUM_FEATURES,
    ItemTable,
    UserHistory,
    features,
)
from raysys.ingest.history import HISTORY_SCHEMA, Histories, history_slices, merge_histories
from raysys.ingest.labels import Waiting
from raysys.ingest.pseudonym import HELD_OUT_SCHEMA
from raysys.ingest.sample import max_candidates
from tests.shop import (
    HALF_LIFE_S,
    impressions,
    ingest_config,
    item_table,
    no_histories,
    outcome,
    outcomes,
    timeline,
    user,
)

NUM_ITEMS = 8
END = 10 * DAY_S
ALICE, BOB = user(1), user(2)
HELD_OUT = user(3, held_out=True)
Row = dict[str, Any]


def tables(popularity: Sequence[float] | None = None) -> list[ItemTable]:
    """What was public in the only period, and what is after it."""
    before = item_table(NUM_ITEMS, popularity=popularity or [8, 7, 6, 5, 4, 3, 2, 1])
    return [before, dataclasses.replace(before, as_of=END)]


def build(
    rows: Iterable[Row],
    *,
    histories: pl.DataFrame | None = None,
    histories_as_of: float = 0.0,
    window_start: float = 0.0,
    config: IngestConfig | None = None,
    seed: int = 0,
    public: list[ItemTable] | None = None,
    ends: Sequence[float] = (END,),
    held_out: pl.DataFrame | None = None,
) -> ShardResult:
    before = ShardState(
        histories=no_histories() if histories is None else histories,
        waiting=Waiting.nothing(),
        held_out=pl.DataFrame(schema=HELD_OUT_SCHEMA) if held_out is None else held_out,
        as_of=histories_as_of,
    )
    settings = ShardSettings(
        timeline=timeline(public or tables(), ends),
        window_start=window_start,
        horizon=2 * END,
        ingest=config or ingest_config(),
        labels=LabelConfig(),
        needs_outcome=True,
        seed=seed,
    )
    return build_shard(outcomes(rows), impressions(), before, settings)


def example(result: ShardResult, row: int) -> dict[str, Any]:
    """All that an example says, without the number that its user has in the shard."""
    fields = [field.name for field in dataclasses.fields(ExampleSet) if field.name != "user"]
    values = ((name, getattr(result.examples, name)[row]) for name in fields)
    return {name: value.tolist() if name != "queries" else value for name, value in values}


def examples(result: ShardResult) -> list[dict[str, Any]]:
    return [example(result, row) for row in range(len(result.examples.user))]


def cases(result: ShardResult) -> list[Case]:
    buffer = io.BytesIO()
    result.cases.write_parquet(buffer)
    return list(read_cases(buffer.getvalue()))


def histories_of(rows: Iterable[Row], as_of: float) -> pl.DataFrame:
    """Histories after these outcomes, and before all else."""
    return merge_histories(
        no_histories(), outcomes(rows), histories_as_of=0.0, as_of=as_of,
        half_life_s=HALF_LIFE_S, max_items=1000,
    )  # fmt: skip


purchases = st.lists(
    st.tuples(st.integers(0, NUM_ITEMS - 1), st.integers(1, 900)), min_size=1, max_size=12
)
"""Items and times in thousandths of a period of ten days."""


def rows_of(who: str, bought: Iterable[tuple[int, int]]) -> list[Row]:
    return [outcome(who, item, thousandth * END / 1000) for item, thousandth in bought]


class TestNothingLooksPastNow:
    @given(past=purchases, future=purchases, now=st.integers(300, 600))
    @settings(max_examples=60, deadline=None)
    def test_events_at_or_after_a_request_change_nothing_in_its_example(
        self, past: list[tuple[int, int]], future: list[tuple[int, int]], now: int
    ) -> None:
        request = outcome(ALICE, 0, now * END / 1000, request_id="a")
        before = rows_of(ALICE, [(item, at % now) for item, at in past])
        after = [
            {**row, "request_id": f"z{i}"}
            for i, row in enumerate(rows_of(ALICE, [(item, now + at % 300) for item, at in future]))
        ]
        place = len({row["request_id"] for row in before})
        alone, among = build([*before, request]), build([*before, request, *after])
        assert example(among, place) == example(alone, place)
        assert len(among.examples.user) > len(alone.examples.user)

    def test_an_event_before_a_request_does_change_its_example(self) -> None:
        request = outcome(ALICE, 0, 5 * DAY_S)
        alone = build([request])
        with_past = build([request, outcome(ALICE, 0, 4 * DAY_S)])
        assert example(with_past, 1) != example(alone, 0)

    def test_a_history_that_reached_the_request_itself_would_be_noticed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The negative control for "strictly before": the answer would be among the features.
        rows = [outcome(ALICE, 0, 5 * DAY_S), outcome(BOB, 1, 1.0)]
        assert _bought(build(rows)) == [0.0, 0.0]
        honest = Histories.at
        monkeypatch.setattr(
            Histories,
            "at",
            lambda self, who, now: honest(self, who, np.nextafter(now, np.inf)),
        )
        assert _bought(build(rows)) == [1.0, 1.0]

    def test_items_of_one_request_do_not_know_of_each_other(self) -> None:
        rows = [outcome(ALICE, item, DAY_S + item, request_id="basket") for item in (0, 1)]
        (one,) = examples(build(rows))
        assert one["attended"] == [-1] * NUM_ATTENDED
        assert np.array(one["features"])[:, FEATURE_NAMES.index("has_history")].sum() == 0

    def test_each_request_has_the_item_statistics_that_were_public_in_its_period(self) -> None:
        loud, later = item_table(NUM_ITEMS, popularity=[1e6] * NUM_ITEMS), tables()[1]
        public = [tables()[0], loud, later]
        rows = [outcome(ALICE, 0, DAY_S), outcome(ALICE, 1, 2 * DAY_S)]
        popularity = build(rows, public=public, ends=[1.5 * DAY_S, END]).examples.features[:, 0, 8]
        expected = [
            features(UserHistory.empty(), public[period], np.array([period], np.int32), now=at)[
                0, 8
            ]
            for period, at in ((0, DAY_S), (1, 2 * DAY_S))
        ]
        assert popularity.tolist() == expected
        assert expected[1] > expected[0]

    def test_a_late_event_makes_no_example_of_a_history_that_knows_what_followed(self) -> None:
        known = histories_of([outcome(ALICE, 0, 5 * DAY_S)], as_of=6 * DAY_S)
        late, fresh = outcome(ALICE, 0, 4 * DAY_S), outcome(ALICE, 0, 7 * DAY_S)
        result = build([late, fresh], histories=known, histories_as_of=6 * DAY_S)
        assert len(result.examples.user) == 1
        assert result.state.histories["count"].to_list() == [3.0]
        assert [case.positives.tolist() for case in cases(result)] == [[0]]
        assert cases(build([late], histories=known, histories_as_of=6 * DAY_S)) == []


def _bought(result: ShardResult) -> list[float]:
    """Whether each example's positive was bought before, as its features tell."""
    return result.examples.features[:, 0, FEATURE_NAMES.index("own_bought")].tolist()


class TestOtherUsers:
    CONFIG = ingest_config(max_examples_per_user=2)

    @given(mine=purchases, theirs=purchases, held_out=purchases, seed=st.integers(0, 2**48))
    @settings(max_examples=60, deadline=None)
    def test_a_user_who_leaves_changes_nothing_of_the_others(
        self,
        mine: list[tuple[int, int]],
        theirs: list[tuple[int, int]],
        held_out: list[tuple[int, int]],
        seed: int,
    ) -> None:
        own = rows_of(BOB, mine)
        # One user before and one behind in the order of the shard.
        others = [*rows_of(ALICE, theirs), *rows_of(HELD_OUT, held_out)]
        alone = build(own, config=self.CONFIG, seed=seed)
        among = build([*others, *own], config=self.CONFIG, seed=seed)
        bob = among.examples.user == 1
        assert [example(among, row) for row in np.flatnonzero(bob)] == examples(alone)
        # Up to rounding: how a vector of powers is rounded depends on its length.
        kept = among.state.histories.filter(pl.col("user") == BOB)
        assert_frame_equal(kept, alone.state.histories)

    def test_one_generator_for_all_would_give_the_others_away(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shared = np.random.default_rng(0)
        monkeypatch.setattr(np.random, "default_rng", lambda *_: shared)
        own = rows_of(BOB, [(item, 100 * item + 1) for item in range(8)])
        alone = build(own)
        shared.bit_generator.state = np.random.Generator(np.random.PCG64(0)).bit_generator.state
        among = build([*rows_of(ALICE, [(1, 500)]), *own])
        assert [example(among, row) for row in range(1, 9)] != examples(alone)

    def test_who_the_users_are_is_not_in_the_examples(self) -> None:
        data = build([outcome(ALICE, 0, 1.0), outcome(BOB, 1, 1.0)]).examples.to_bytes()
        assert ALICE.encode() not in data
        assert ALICE.encode() in pl.DataFrame({"user": [ALICE]}).serialize()


class TestExamples:
    def test_users_are_numbered_in_order_and_held_out_ones_have_none(self) -> None:
        rows = [outcome(who, 0, at) for who in (HELD_OUT, BOB, ALICE) for at in (1.0, 2.0)]
        result = build(rows)
        assert result.examples.user.tolist() == [0, 0, 1, 1]
        assert result.examples.num_users == 2
        assert result.num_users == 3
        assert set(result.state.histories["user"]) == {ALICE, BOB, HELD_OUT}

    def test_what_was_drawn_before_prevails_over_the_pseudonym(self) -> None:
        """As after a rotation of the key, or of another fraction."""
        drawn = pl.DataFrame({"user": [ALICE, HELD_OUT], "held_out": [True, False]})
        result = build([outcome(who, 0, 1.0) for who in (ALICE, BOB, HELD_OUT)], held_out=drawn)
        assert result.examples.num_users == 2
        assert sorted(case.held_out for case in cases(result)) == [False, False, True]
        after = result.state.held_out
        assert dict(after.iter_rows()) == {ALICE: True, BOB: False, HELD_OUT: False}
        assert build([outcome(BOB, 0, 1.0)], held_out=drawn).state.held_out.equals(after)

    @given(
        bought=st.dictionaries(st.integers(0, 20), purchases, min_size=1, max_size=5),
        most=st.integers(1, 3),
        seed=st.integers(0, 2**48),
    )
    @settings(max_examples=60, deadline=None)
    def test_no_user_has_more_examples_than_the_cap_and_no_held_out_one_has_any(
        self, bought: dict[int, list[tuple[int, int]]], most: int, seed: int
    ) -> None:
        names = {number: user(number, held_out=number % 3 == 0) for number in bought}
        rows = [row for number in bought for row in rows_of(names[number], bought[number])]
        result = build(rows, config=ingest_config(max_examples_per_user=most), seed=seed)
        requests = {n: len({at for _, at in bought[n]}) for n in sorted(bought) if n % 3}
        expected = [min(most, num) for num in requests.values()]
        assert np.bincount(result.examples.user).tolist() == expected

    def test_which_requests_are_kept_depends_on_the_seed(self) -> None:
        rows = rows_of(ALICE, [(0, at) for at in range(1, 100)])
        config = ingest_config(max_examples_per_user=3)
        kept = {str(examples(build(rows, config=config, seed=seed))) for seed in range(5)}
        assert len(kept) == 5

    def test_a_seed_repeats_everything_in_whatever_order_the_rows_were_read(self) -> None:
        rows = [row for who in (ALICE, BOB) for row in rows_of(who, [(1, 5), (2, 9), (3, 20)])]
        one, other = build(rows, seed=7), build(rows[::-1], seed=7)
        assert one.examples.to_bytes() == other.examples.to_bytes()
        assert one.cases.equals(other.cases)
        assert_frame_equal(one.state.histories, other.state.histories)
        assert build(rows, seed=8).examples.to_bytes() != one.examples.to_bytes()

    def test_positives_come_first_with_their_largest_gain_and_negatives_gain_nothing(self) -> None:
        rows = [
            outcome(ALICE, 2, 1.0, request_id="r", gain=1.0, event_id="click"),
            outcome(ALICE, 2, 2.0, request_id="r", gain=3.0, event_id="purchase"),
            outcome(ALICE, 5, 1.0, request_id="r", gain=2.0),
        ]
        (one,) = examples(build(rows))
        gain = dict(zip(one["candidates"], one["gains"], strict=True))
        assert set(one["candidates"][:2]) == {2, 5}
        assert (gain.pop(2), gain.pop(5)) == (3.0, 2.0)
        assert set(gain.values()) == {0.0}

    def test_positives_beyond_the_cap_are_no_negatives_either(self) -> None:
        config = ingest_config(max_positives=2, num_uniform_negatives=50)
        rows = [outcome(ALICE, item, 1.0, request_id="r") for item in range(5)]
        (one,) = examples(build(rows, config=config))
        positives, others = set(one["candidates"][:2]), set(one["candidates"][2:]) - {-1}
        assert positives < set(range(5))
        assert others == {5, 6, 7}

    def test_features_are_those_that_the_replica_would_compute(self) -> None:
        past = [(3, 10), (4, 20), (3, 300)]
        rows = [*rows_of(ALICE, past), outcome(ALICE, 0, 0.5 * END)]
        result = build(rows)
        bought = outcomes(rows_of(ALICE, past))
        history = UserHistory.empty().extend(
            bought["item"].cast(pl.Int32).to_numpy(), bought["ts"].to_numpy(), np.ones(3),
            as_of=0.5 * END, half_life_s=HALF_LIFE_S,
        )  # fmt: skip
        last = result.examples.candidates[-1]
        candidates = last[last >= 0]
        expected = features(history, tables()[0], candidates, now=0.5 * END)
        found = result.examples.features[-1]
        assert np.array_equal(found[: len(candidates)], expected)
        assert not found[len(candidates) :].any()
        attended, attention = history.attention(NUM_ATTENDED)
        assert result.examples.attended[-1][:2].tolist() == attended.tolist()
        assert result.examples.attention[-1][:2].tolist() == attention.tolist()

    def test_a_history_is_cut_to_the_items_that_a_replica_keeps(self) -> None:
        rows = rows_of(ALICE, [(1, 10), (2, 20), (3, 30), (0, 500)])
        config = ingest_config(max_history_items=2)
        last = build(rows, config=config).examples.attended[-1]
        assert set(last[last >= 0]) == {2, 3}

    def test_a_request_carries_its_query(self) -> None:
        rows = [
            outcome(ALICE, 1, 1.0, request_id="r", query=None),
            outcome(ALICE, 2, 1.0, request_id="r", query="milk"),
            outcome(ALICE, 3, 2.0),
        ]
        assert build(rows).examples.queries == ["milk", ""]

    def test_padding_is_minus_one_without_gain(self) -> None:
        held = build([outcome(ALICE, 0, 1.0)]).examples
        padded = held.candidates == -1
        assert held.candidates.shape == (1, max_candidates(ingest_config()))
        assert padded.any()
        assert not held.gains[padded].any()
        assert not held.log_q[padded].any()


class TestCases:
    def test_a_case_is_the_window_seen_from_its_beginning(self) -> None:
        rows = [
            outcome(ALICE, 1, 2 * DAY_S),
            outcome(ALICE, 2, 3 * DAY_S),
            outcome(ALICE, 3, 4 * DAY_S),
            outcome(HELD_OUT, 4, 3.5 * DAY_S, gain=1.0),
        ]
        one, other = cases(build(rows, window_start=3 * DAY_S))
        assert one.now == one.history.as_of == 3 * DAY_S
        assert one.history.items.tolist() == [1]
        assert one.positives.tolist() == [2, 3]
        assert (one.held_out, other.held_out) == (False, True)
        assert other.history.items.tolist() == []
        assert other.gains.tolist() == [1.0]

    def test_what_happens_within_the_window_does_not_change_the_history(self) -> None:
        past = rows_of(ALICE, [(1, 10), (2, 50)])
        short, long = (
            cases(build([*past, *rows_of(ALICE, within)], window_start=0.2 * END))[0]
            for within in ([(3, 200)], [(3, 200), (1, 300), (5, 900)])
        )
        assert short.history.items.tolist() == long.history.items.tolist() == [1, 2]
        assert short.history.decayed.tolist() == long.history.decayed.tolist()

    def test_who_does_nothing_in_the_window_is_no_case(self) -> None:
        assert cases(build([outcome(ALICE, 1, DAY_S)], window_start=3 * DAY_S)) == []

    def test_a_history_of_earlier_updates_has_decayed_to_the_windows_beginning(self) -> None:
        known = histories_of([outcome(ALICE, 1, 0.0)], as_of=DAY_S)
        start = HALF_LIFE_S
        (case,) = cases(
            build(
                [outcome(ALICE, 2, start + 1)],
                histories=known,
                histories_as_of=DAY_S,
                window_start=start,
            )
        )
        assert case.history.items.tolist() == [1]
        assert case.history.decayed.tolist() == [pytest.approx(0.5)]

    def test_a_case_keeps_as_many_items_as_a_history(self) -> None:
        rows = [*rows_of(ALICE, [(1, 10), (2, 20), (3, 30)]), outcome(ALICE, 4, 0.5 * END)]
        config = ingest_config(max_history_items=2)
        (case,) = cases(build(rows, window_start=0.5 * END, config=config))
        assert case.history.items.tolist() == [2, 3]


class TestHistories:
    @given(
        old=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 400))),
        new=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(400, 999))),
    )
    @settings(max_examples=60, deadline=None)
    def test_merging_a_shard_equals_extending_each_user(
        self, old: list[tuple[int, int, int]], new: list[tuple[int, int, int]]
    ) -> None:
        earlier, later = (
            outcomes(
                outcome(user(who), item, at * END / 1000, weight=1 / 3) for who, item, at in part
            )
            for part in (old, new)
        )
        known = histories_of(earlier.rows(named=True), as_of=0.4 * END)
        merged = merge_histories(
            known, later, histories_as_of=0.4 * END, as_of=END,
            half_life_s=HALF_LIFE_S, max_items=1000,
        )  # fmt: skip
        assert merged.schema == pl.Schema(HISTORY_SCHEMA)
        slices = history_slices(merged, END)
        both = pl.concat([earlier, later])
        assert set(slices) == set(both["user"])
        for name, found in slices.items():
            mine = both.filter(pl.col("user") == name)
            expected = UserHistory.empty().extend(
                mine["item"].cast(pl.Int32).to_numpy(), mine["ts"].to_numpy(),
                mine["weight"].to_numpy(), as_of=END, half_life_s=HALF_LIFE_S,
            )  # fmt: skip
            assert found.items.tolist() == expected.items.tolist()
            assert found.decayed == pytest.approx(expected.decayed)
            assert found.count == pytest.approx(expected.count)
            assert found.first_ts.tolist() == expected.first_ts.tolist()
            assert found.last_ts.tolist() == expected.last_ts.tolist()

    def test_a_history_keeps_the_items_bought_last_as_most_recent_does(self) -> None:
        rows = rows_of(ALICE, [(0, 30), (1, 10), (2, 40), (3, 30), (4, 5)])
        merged = merge_histories(
            no_histories(), outcomes(rows), histories_as_of=0.0, as_of=END,
            half_life_s=HALF_LIFE_S, max_items=2,
        )  # fmt: skip
        whole = history_slices(histories_of(rows, as_of=END), END)[ALICE]
        assert merged["item"].to_list() == whole.most_recent(2).items.tolist() == [0, 2]

    def test_a_user_who_did_nothing_is_kept_and_decays(self) -> None:
        known = histories_of([outcome(BOB, 1, 0.0)], as_of=0.0)
        after = dataclasses.replace(tables()[1], as_of=HALF_LIFE_S)
        result = build(
            [outcome(ALICE, 0, 1.0)], histories=known, public=[tables()[0], after]
        ).state.histories
        assert result.filter(pl.col("user") == BOB)["decayed"].to_list() == [pytest.approx(0.5)]
        assert result.filter(pl.col("user") == BOB)["count"].to_list() == [1.0]


class TestBytes:
    def same(self, one: ExampleSet, other: ExampleSet) -> bool:
        return one.queries == other.queries and all(
            np.array_equal(getattr(one, field.name), getattr(other, field.name))
            and getattr(one, field.name).dtype == getattr(other, field.name).dtype
            and getattr(one, field.name).shape == getattr(other, field.name).shape
            for field in dataclasses.fields(ExampleSet)
            if field.name != "queries"
        )

    def test_examples_read_back_as_they_were(self) -> None:
        rows = [*rows_of(ALICE, [(1, 5), (2, 9)]), outcome(BOB, 3, 5.0, query="milk")]
        held = build(rows).examples
        assert self.same(ExampleSet.from_bytes(held.to_bytes()), held)
        assert not self.same(build(rows, seed=1).examples, held)

    def test_a_shard_without_examples_reads_back_with_its_widths(self) -> None:
        held = build([]).examples
        read = ExampleSet.from_bytes(held.to_bytes())
        assert self.same(read, held)
        assert read.num_users == 0
        width = max_candidates(ingest_config())
        assert read.features.shape == (0, width, NUM_FEATURES)

    def test_a_shard_without_events_has_no_cases_and_keeps_its_histories(self) -> None:
        known = histories_of([outcome(BOB, 1, 0.0)], as_of=DAY_S)
        result = build([], histories=known, histories_as_of=DAY_S)
        assert cases(result) == []
        assert result.num_users == 0
        assert result.state.histories["user"].to_list() == [BOB]

    def test_a_shard_of_held_out_users_only_has_cases_and_no_examples(self) -> None:
        result = build([outcome(HELD_OUT, 1, 1.0)])
        assert len(result.examples.user) == 0
        assert [case.held_out for case in cases(result)] == [True]
