"""An example of what was shown: the same whenever its label came, and never with a look ahead."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest

from raysys.config import LabelConfig
from raysys.ingest.cases import Case, read_cases
from raysys.ingest.example_set import ExampleSet
from raysys.ingest.examples import ShardResult, ShardSettings, ShardState, build_shard
from raysys.ingest.features import DAY_S, FEATURE_NAMES
from tests.shop import (
    impression,
    impressions,
    ingest_config,
    item_table,
    outcome,
    outcomes,
    timeline,
    user,
)

ALICE, BOB = user(1), user(2)
HELD_OUT = user(3, held_out=True)
NUM_ITEMS = 40
Row = dict[str, Any]


def settings(*, start: float, end: float, **changes: Any) -> ShardSettings:
    """An update of one period. What is public changes from update to update."""
    before = item_table(NUM_ITEMS, popularity=[10 + start / DAY_S] * NUM_ITEMS, as_of=start)
    values: dict[str, Any] = {
        "timeline": timeline([before, dataclasses.replace(before, as_of=end)], [end]),
        "window_start": start,
        "horizon": end,
        "ingest": ingest_config(),
        "labels": LabelConfig(attribution_window_s=DAY_S),
        "needs_outcome": True,
        "seed": 0,
    }
    return ShardSettings(**{**values, **changes})


def over_days(
    shown: Sequence[Row], events: Sequence[Row], ends: Sequence[int], **changes: Any
) -> list[ShardResult]:
    """One update for each end, in days, which reads what happened since the one before."""
    results, state, start = [], ShardState.nothing(), 0.0
    for end in ends:
        part = [[r for r in rows if start <= r["ts"] < end * DAY_S] for rows in (shown, events)]
        plan = settings(start=start, end=end * DAY_S, **changes)
        results.append(build_shard(outcomes(part[1]), impressions(part[0]), state, plan))
        state, start = results[-1].state, end * DAY_S
    return results


def rows(results: Sequence[ShardResult]) -> list[dict[str, Any]]:
    names = [field.name for field in dataclasses.fields(ExampleSet) if field.name != "user"]
    return [
        {name: np.asarray(getattr(result.examples, name)[row]).tolist() for name in names}
        for result in results
        for row in range(len(result.examples.user))
    ]


def shown_rows(results: Sequence[ShardResult]) -> list[dict[str, Any]]:
    """The examples of what was shown, not of sampled candidates."""
    return [row for row in rows(results) if any(row["position"])]


def bought(row: dict[str, Any]) -> set[int]:
    """Which candidates the user had bought before, as the features tell."""
    flags = np.array(row["features"])[:, FEATURE_NAMES.index("own_bought")]
    return {item for item, flag in zip(row["candidates"], flags, strict=True) if flag}


def page(at: float, items: Sequence[int], who: str = ALICE, **changes: Any) -> list[Row]:
    return [impression(who, item, at * DAY_S, **changes) for item in items]


def click(item: int, at: float, who: str = ALICE, **changes: Any) -> Row:
    return outcome(who, item, at * DAY_S, request_id="r", **{"gain": 1.0, **changes})


SHOWN = page(1.5, [0, 1, 2, 3])
PAST = [outcome(ALICE, 1, 0.2 * DAY_S), outcome(ALICE, 2, 1.2 * DAY_S)]
LATER = [click(2, 1.6), outcome(ALICE, 3, 1.9 * DAY_S), outcome(ALICE, 0, 2.2 * DAY_S)]


class TestAsOfTheRequest:
    def test_candidates_are_what_was_shown_with_its_place_and_label(self) -> None:
        (one,) = shown_rows(over_days(SHOWN, [click(2, 1.6)], [9]))
        items = [item for item in one["candidates"] if item >= 0]
        assert items == [2, 0, 1, 3]
        assert one["gains"][:4] == [1.0, 0.0, 0.0, 0.0]
        assert one["position"][:4] == [3, 1, 2, 4]

    def test_an_example_is_the_same_in_whichever_update_its_label_came(self) -> None:
        one_day_each = over_days(SHOWN, [*PAST, *LATER], [1, 2, 3, 4])
        assert [len(r.examples.user) for r in one_day_each][2] == 1 + 1  # the request, a purchase
        late = shown_rows(one_day_each)
        in_one = shown_rows(over_days(SHOWN, [*PAST, *LATER], [1, 9]))
        assert len(late) == len(in_one) == 1
        for name in ("features", "attention"):
            np.testing.assert_allclose(late[0].pop(name), in_one[0].pop(name), rtol=1e-6)
        assert late == in_one

    def test_it_knows_the_users_past_and_nothing_since(self) -> None:
        (one,) = shown_rows(over_days(SHOWN, [*PAST, *LATER], [1, 2, 3]))
        assert bought(one) == {1, 2}
        count = np.array(one["features"])[0, FEATURE_NAMES.index("own_count")]
        assert count == pytest.approx(np.log1p(1.0) / 2)

    def test_a_history_that_settled_at_once_would_give_the_answer_away(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The negative control: without the outcomes that wait, histories hold what followed.
        honest = ShardState.__init__

        def settle_at_once(self: ShardState, **fields: Any) -> None:
            waiting = fields["waiting"]
            if len(waiting.recent):
                new = waiting.recent.select(
                    "user", "item", pl.col("weight").alias("count"),
                    pl.col("weight").alias("decayed"), pl.col("ts").alias("first_ts"),
                    pl.col("ts").alias("last_ts"),
                )  # fmt: skip
                fields["histories"] = pl.concat([fields["histories"], new])
            honest(self, **fields)

        monkeypatch.setattr(ShardState, "__init__", settle_at_once)
        (one,) = shown_rows(over_days(SHOWN, [*PAST, *LATER], [1, 2, 3]))
        assert bought(one) == {1, 2, 3}

    def test_its_item_statistics_are_those_that_were_public_then(self) -> None:
        (one,) = shown_rows(over_days(SHOWN, LATER[:1], [1, 2, 3]))
        found = np.array(one["features"])[0, FEATURE_NAMES.index("popularity")]
        public = settings(start=DAY_S, end=2 * DAY_S).timeline.at(0)
        expected = public.published(np.array([2], np.int32), 1.5 * DAY_S).popularity[0]
        assert found == pytest.approx(np.log1p(expected) / 4)

    def test_histories_after_all_updates_are_those_of_one(self) -> None:
        split = over_days(SHOWN, [*PAST, *LATER], [1, 2, 3, 9])[-1].state
        at_once = over_days(SHOWN, [*PAST, *LATER], [9])[-1].state
        for name in ("user", "item", "count", "first_ts", "last_ts"):
            assert split.histories[name].to_list() == at_once.histories[name].to_list()
        assert split.histories["decayed"].to_list() == pytest.approx(
            at_once.histories["decayed"].to_list()
        )

    def test_nobody_who_is_held_out_is_trained_on(self) -> None:
        shown = page(1.5, [0, 1], HELD_OUT)
        assert rows(over_days(shown, [click(0, 1.6, HELD_OUT)], [9])) == []


class TestImbalance:
    """Three shown requests, one with an outcome."""

    SHOWN = (*page(1.0, range(20)), *page(2.0, range(20), request_id="b"))

    def build(self, *, needs_outcome: bool = False, **changes: Any) -> list[dict[str, Any]]:
        labels = LabelConfig(attribution_window_s=DAY_S, **changes)
        return rows(
            over_days(
                self.SHOWN, [click(4, 1.1)], [9], labels=labels, needs_outcome=needs_outcome,
                ingest=ingest_config(max_examples_per_user=3, num_uniform_negatives=40),
            )
        )  # fmt: skip

    def test_a_listwise_loss_gets_only_requests_with_an_outcome(self) -> None:
        assert [max(one["gains"]) for one in self.build(needs_outcome=True)] == [1.0]
        assert [max(one["gains"]) for one in self.build()] == [1.0, 0.0]

    def test_kept_negatives_are_a_share_and_the_loss_is_told_which(self) -> None:
        whole, some = self.build()[0], self.build(negative_keep_fraction=0.5)[0]
        assert sum(item >= 0 for item in whole["candidates"]) == 20
        num = sum(item >= 0 for item in some["candidates"])
        assert 4 < num < 17
        assert some["candidates"][0] == 4 and some["gains"][0] == 1.0
        assert some["log_q"][:num] == pytest.approx([np.log(0.5)] * num)
        assert whole["log_q"] == [0.0] * len(whole["log_q"])

    def test_the_weight_of_outcomes_is_configured_and_makes_up_for_late_ones(self) -> None:
        one = self.build(positive_weight=3.0, late_outcomes="weight", late_fraction=0.25)[0]
        assert one["weight"][:3] == [4.0, 1.0, 1.0]
        assert one["weight"][20:] == [0.0] * (len(one["weight"]) - 20)

    def test_requests_with_an_outcome_are_repeated_within_the_users_cap(self) -> None:
        repeated = self.build(positive_repeats=8)
        assert len(repeated) == 3
        assert sum(max(one["gains"]) > 0 for one in repeated) >= 2

    def test_more_items_than_an_example_holds_are_a_share_too(self) -> None:
        small = ingest_config(max_positives=1)
        shown = page(1.0, range(NUM_ITEMS))
        (one,) = rows(over_days(shown, [click(4, 1.1)], [9], ingest=small))
        width = len(one["candidates"])
        assert -1 not in one["candidates"]
        assert one["log_q"][0] == pytest.approx(np.log((width - 1) / (NUM_ITEMS - 1)))


def test_a_user_who_leaves_changes_nothing_of_the_others() -> None:
    mine, theirs = page(1.5, range(20)), page(1.4, range(5, 30), BOB)
    labels = LabelConfig(attribution_window_s=DAY_S, negative_keep_fraction=0.5)
    alone = rows(over_days(mine, [click(2, 1.6)], [1, 2, 9], labels=labels))
    events = [click(2, 1.6), click(7, 1.7, BOB)]
    among = over_days([*mine, *theirs], events, [1, 2, 9], labels=labels)
    kept = [r for r in rows(among) if 2 in r["candidates"][:1]]
    assert kept == alone != []


def test_an_impression_keeps_what_was_public_in_its_own_period_of_an_update() -> None:
    tables = [
        item_table(NUM_ITEMS, popularity=[level] * NUM_ITEMS, as_of=at * DAY_S)
        for level, at in ((10.0, 0), (500.0, 1), (900.0, 2))
    ]
    both = settings(start=0.0, end=2 * DAY_S, labels=LabelConfig(attribution_window_s=3600.0))
    both = dataclasses.replace(both, timeline=timeline(tables, [DAY_S, 2 * DAY_S]))
    shown = [*page(0.5, [0, 1]), *page(1.5, [0, 1], request_id="b")]
    events = [click(0, 0.51), {**click(1, 1.51), "request_id": "b"}]
    result = build_shard(outcomes(events), impressions(shown), ShardState.nothing(), both)
    found = result.examples.features[:, 0, FEATURE_NAMES.index("popularity")]
    expected = [
        np.log1p(table.published(np.array([0], np.int32), at * DAY_S).popularity[0]) / 4
        for table, at in zip(tables, (0.5, 1.5), strict=False)
    ]
    assert found == pytest.approx(expected)


def test_a_request_of_several_pages_is_seen_as_of_its_first() -> None:
    shown = [*page(1.5, [0, 1]), *page(1.6, [2, 3])]
    events = [click(0, 1.55, event_id="first"), click(3, 1.65, event_id="second")]
    (one,) = shown_rows(over_days(shown, events, [9]))
    assert bought(one) == set()
    assert sum(gain > 0 for gain in one["gains"]) == 2


def cases(results: Sequence[ShardResult]) -> list[Case]:
    buffer = io.BytesIO()
    pl.concat([result.cases for result in results]).write_parquet(buffer)
    return list(read_cases(buffer.getvalue()))


class TestCasesOfWhatWasShown:
    """What calibration reads: held-out users alone, once mature, and nothing that came of it."""

    def shown(self, who: str = HELD_OUT, **changes: Any) -> list[Row]:
        return [impression(who, item, 0.2 * DAY_S, **changes) for item in (4, 5, 6)]

    def test_a_held_out_users_mature_requests_are_a_case_with_their_outcomes(self) -> None:
        bought_5 = outcome(HELD_OUT, 5, 0.3 * DAY_S, request_id="r")
        one, two = over_days(self.shown(), [bought_5], ends=(1, 2))
        (window,) = cases([one])
        assert window.is_ranked and window.positives.tolist() == [5] and not len(window.shown)
        (judged,) = cases([two])
        assert not judged.is_ranked and judged.held_out
        assert judged.shown.tolist() == [4, 5, 6]
        assert judged.shown_positive.tolist() == [False, True, False]

    def test_it_is_seen_as_of_the_first_of_them_before_what_came_of_it(self) -> None:
        before = outcome(HELD_OUT, 9, 0.1 * DAY_S)
        after = outcome(HELD_OUT, 5, 0.3 * DAY_S, request_id="r")
        _, two = over_days(self.shown(), [before, after], ends=(1, 2))
        (judged,) = cases([two])
        assert judged.now == judged.history.as_of == 0.2 * DAY_S
        assert judged.history.items.tolist() == [9]

    def test_who_took_nothing_counts_too(self) -> None:
        (judged,) = cases(over_days(self.shown(), [], ends=(1, 2)))
        assert judged.shown_positive.tolist() == [False] * 3

    def test_users_who_are_trained_on_are_no_such_case(self) -> None:
        assert cases(over_days(self.shown(ALICE), [], ends=(1, 2))) == []

    def test_requests_with_a_query_are_left_out(self) -> None:
        assert cases(over_days(self.shown(query="milk"), [], ends=(1, 2))) == []
        assert len(cases(over_days(self.shown(query=""), [], ends=(1, 2)))) == 1

    def test_requests_long_before_the_window_are_left_out(self) -> None:
        """Their statistics and histories are of another time than what is served."""
        late = over_days(self.shown(), [], ends=(4,))
        assert len(cases(late)) == 1, "the window begins with the update"
        plan = settings(start=0.0, end=4 * DAY_S, window_start=3 * DAY_S)
        result = build_shard(outcomes([]), impressions(self.shown()), ShardState.nothing(), plan)
        assert cases([result]) == []
