"""An impression is trained on once, when mature, with the outcomes that came in time.

The property test at the end splits one stream of events over updates in any way and demands of all
updates together what one look at the whole stream says.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import LabelConfig
from raysys.errors import ConfigError
from raysys.ingest import labels
from raysys.ingest.labels import IMPRESSION_SCHEMA, Labelled, Waiting, label
from tests.shop import impression, no_histories, outcome, outcomes, user

ALICE, BOB = user(1), user(2)
HOUR = 3600.0
LONG_MEMORY = LabelConfig(attribution_window_s=2 * HOUR, late_window_s=1000 * HOUR)
CONFIG = LabelConfig(attribution_window_s=2 * HOUR, late_window_s=24 * HOUR)
Row = dict[str, Any]


def shown(rows: Iterable[Row]) -> pl.DataFrame:
    public = [{"popularity": 0.0, "trend": 0.0, **row} for row in rows]
    return pl.DataFrame(public, schema=IMPRESSION_SCHEMA, orient="row")


def click(who: str, item: int, ts: float, **changes: Any) -> Row:
    return outcome(who, item, ts, **{"request_id": "r", "gain": 1.0, **changes})


def run(
    impressions: Sequence[Row] = (),
    events: Sequence[Row] = (),
    *,
    horizon: float,
    before: Waiting | None = None,
    histories: pl.DataFrame | None = None,
    config: LabelConfig = CONFIG,
) -> Labelled:
    return label(
        shown(impressions),
        outcomes(events),
        before or Waiting.nothing(),
        no_histories() if histories is None else histories,
        horizon=horizon,
        config=config,
    )


def gains(labelled: Labelled) -> list[tuple[int, float]]:
    return labelled.mature.select("item", "gain").rows()


def went(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


PAGE = [impression(ALICE, item, HOUR) for item in range(3)]


class TestAttribution:
    @pytest.mark.parametrize(
        ("event", "gain", "fate"),
        [
            pytest.param(click(ALICE, 1, HOUR), 1.0, "attributed", id="at once"),
            pytest.param(click(ALICE, 1, 3 * HOUR), 1.0, "attributed", id="at the window's end"),
            pytest.param(click(ALICE, 1, 3 * HOUR + 1), 0.0, "late_outcome", id="after it"),
            pytest.param(click(ALICE, 1, HOUR - 1), 0.0, "before_impression", id="before"),
            pytest.param(click(ALICE, 9, 2 * HOUR), 0.0, "not_shown", id="an item not shown"),
            pytest.param(
                click(BOB, 1, 2 * HOUR), 0.0, "without_impression", id="of another user"
            ),
            pytest.param(
                click(ALICE, 1, 2 * HOUR, request_id="q"), 0.0, "without_impression",
                id="of another request",
            ),
        ],
    )  # fmt: skip
    def test_an_outcome_counts_for_its_request_and_item_within_the_window(
        self, event: Row, gain: float, fate: str
    ) -> None:
        result = run(PAGE, [event], horizon=10 * HOUR)
        assert gains(result) == [(0, 0.0), (1, gain), (2, 0.0)]
        assert went(result.outcomes) == {fate: 1}
        assert len(result.unshown) == (fate == "without_impression")

    def test_of_several_outcomes_the_largest_gain_counts(self) -> None:
        events = [click(ALICE, 1, 2 * HOUR), click(ALICE, 1, 2.5 * HOUR, gain=3.0)]
        assert gains(run(PAGE, events, horizon=10 * HOUR))[1] == (1, 3.0)

    def test_position_is_kept(self) -> None:
        assert run(PAGE, horizon=10 * HOUR).mature["position"].to_list() == [1, 2, 3]

    def test_the_window_of_a_request_begins_with_its_first_impression(self) -> None:
        later = impression(ALICE, 5, 2 * HOUR)
        events = [click(ALICE, 5, 3 * HOUR), click(ALICE, 5, 3 * HOUR + 1, event_id="late")]
        result = run([*PAGE, later], events, horizon=3 * HOUR)
        assert went(result.impressions) == {"with_outcome": 4}
        assert went(result.outcomes) == {"attributed": 1, "late_outcome": 1}

    def test_an_item_shown_twice_in_one_request_is_one_impression(self) -> None:
        again = impression(ALICE, 1, HOUR + 1, position=9)
        result = run([*PAGE, again], horizon=10 * HOUR)
        assert result.mature["position"].to_list() == [1, 2, 3]
        assert went(result.impressions) == {"without_outcome": 3, "repeated": 1}


class TestMaturity:
    def test_an_impression_waits_until_its_window_has_closed(self) -> None:
        early = run(PAGE, [click(ALICE, 1, HOUR)], horizon=3 * HOUR - 1)
        assert gains(early) == []
        assert went(early.impressions) == {"waiting": 3}
        assert went(early.outcomes) == {"waiting": 1}
        mature = run(before=early.waiting, horizon=3 * HOUR)
        assert gains(mature) == [(0, 0.0), (1, 1.0), (2, 0.0)]
        assert went(mature.impressions) == {"with_outcome": 3}

    def test_an_outcome_of_a_later_update_still_counts_for_what_waits(self) -> None:
        early = run(PAGE, horizon=2 * HOUR)
        result = run(before=early.waiting, events=[click(ALICE, 2, 2.5 * HOUR)], horizon=4 * HOUR)
        assert gains(result) == [(0, 0.0), (1, 0.0), (2, 1.0)]

    def test_what_was_trained_on_is_not_trained_on_again(self) -> None:
        first = run(PAGE, [click(ALICE, 1, HOUR)], horizon=4 * HOUR)
        again = run(PAGE, before=first.waiting, horizon=8 * HOUR)
        assert gains(again) == []
        assert went(again.impressions) == {"late_impression": 3}

    def test_what_is_public_of_an_item_stays_that_of_when_it_was_shown(self) -> None:
        rows = [{**row, "popularity": 7.0, "trend": 0.5} for row in PAGE]
        result = run(before=run(rows, horizon=HOUR).waiting, horizon=9 * HOUR)
        assert set(result.mature["popularity"]) == {7.0}
        assert set(result.mature["trend"]) == {0.5}


class TestLateOutcomes:
    def test_one_that_arrives_after_its_impression_was_trained_on_is_counted_and_no_more(
        self,
    ) -> None:
        first = run(PAGE, [click(ALICE, 1, HOUR)], horizon=4 * HOUR)
        late = run(events=[click(ALICE, 2, 2 * HOUR)], before=first.waiting, horizon=8 * HOUR)
        assert went(late.outcomes) == {"late_outcome": 1}
        assert late.unshown.is_empty() and late.mature.is_empty()

    def test_it_still_enters_the_users_history(self) -> None:
        first = run(PAGE, horizon=4 * HOUR)
        late = run(events=[click(ALICE, 2, 2 * HOUR)], before=first.waiting, horizon=8 * HOUR)
        assert late.settled["item"].to_list() == [2]

    def test_a_request_is_forgotten_after_the_late_window(self) -> None:
        first = run(PAGE, horizon=4 * HOUR)
        kept = run(before=first.waiting, horizon=27 * HOUR)
        gone = run(before=first.waiting, horizon=28 * HOUR)
        assert (len(kept.waiting.closed), len(gone.waiting.closed)) == (1, 0)

    def test_it_is_remembered_from_when_it_was_trained_on_however_old_it_was(self) -> None:
        first = run(PAGE, horizon=1000 * HOUR)
        again = run(PAGE, [click(ALICE, 1, 2 * HOUR)], before=first.waiting, horizon=1010 * HOUR)
        assert went(again.impressions) == {"late_impression": 3}
        assert went(again.outcomes) == {"late_outcome": 1}

    def test_a_weight_makes_up_for_what_comes_too_late(self) -> None:
        config = LabelConfig(late_outcomes="weight", late_fraction=0.2)
        assert config.in_time_weight == pytest.approx(1.25)
        assert LabelConfig().in_time_weight == 1.0

    def test_a_late_fraction_that_nothing_uses_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"labels\.late_fraction.*late_outcomes: weight"):
            LabelConfig(late_fraction=0.2)


class TestWithoutImpressions:
    def test_impressions_that_come_after_their_outcome_was_trained_on_are_counted(self) -> None:
        first = run(events=[click(ALICE, 1, HOUR)], horizon=2 * HOUR)
        assert len(first.unshown) == 1
        late = run(PAGE, before=first.waiting, horizon=9 * HOUR)
        assert went(late.impressions) == {"late_impression": 3}

    def test_what_is_older_than_the_history_makes_no_example(self) -> None:
        known = no_histories().clear().vstack(
            pl.DataFrame(
                [{"user": ALICE, "item": 0, "count": 1.0, "decayed": 1.0, "first_ts": 0.0,
                  "last_ts": 5 * HOUR}],
                schema=no_histories().schema,
            )
        )  # fmt: skip
        result = run(
            PAGE, [click(ALICE, 7, HOUR, request_id="q"), click(BOB, 7, HOUR, request_id="q")],
            horizon=9 * HOUR, histories=known,
        )  # fmt: skip
        assert went(result.outcomes) == {"late_event": 1, "without_impression": 1}
        assert went(result.impressions) == {"late_impression": 3}


class TestRecentOutcomes:
    def test_those_of_the_last_window_wait_and_the_others_settle_in_the_history(self) -> None:
        rows = [click(ALICE, item, at * HOUR, request_id=f"{at}") for item, at in ((1, 1), (2, 3))]
        result = run(events=rows, horizon=4 * HOUR)
        assert result.settled["item"].to_list() == [1]
        assert result.waiting.recent["item"].to_list() == [2]
        later = run(before=result.waiting, horizon=6 * HOUR)
        assert later.settled["item"].to_list() == [2]
        assert later.waiting.recent.is_empty()


streams = st.lists(
    st.tuples(
        st.sampled_from([ALICE, BOB]),
        st.integers(0, 5),  # request
        st.integers(0, 3),  # item
        st.booleans(),  # impression or outcome
        st.integers(0, 180),  # minutes after the request began
    ),
    max_size=40,
)


def events_of(stream: Sequence[tuple[str, int, int, bool, int]]) -> tuple[list[Row], list[Row]]:
    """Requests begin two hours apart; impressions come at their beginning."""
    pages, clicks = {}, []
    for number, (who, request, item, is_shown, minutes) in enumerate(stream):
        began, name = 2 * HOUR * request, f"r{request}"
        if is_shown:
            pages[who, name, item] = impression(who, item, began, request_id=name)
        else:
            at = began + 60.0 * minutes
            clicks.append(click(who, item, at, request_id=name, event_id=f"e{number}"))
    return list(pages.values()), clicks


def over_updates(
    pages: list[Row], clicks: list[Row], ends: list[float], *, again: bool = False
) -> list[Labelled]:
    """Each update reads what happened up to its end; `again` reads all earlier impressions too."""
    results, waiting, start = [], Waiting.nothing(), -1.0
    for end in [*ends, 100 * HOUR]:
        shown = [row for row in pages if (again or start < row["ts"]) and row["ts"] <= end]
        part = shown, [row for row in clicks if start < row["ts"] <= end]
        results.append(run(*part, horizon=end, before=waiting, config=LONG_MEMORY))
        waiting, start = results[-1].waiting, end
    return results


def trained(results: Iterable[Labelled]) -> Counter[tuple[Any, ...]]:
    rows = pl.concat([result.mature for result in results])
    return Counter(rows.select("user", "request_id", "item", "gain").rows())


@settings(max_examples=150, deadline=None)
@given(
    stream=streams,
    ends=st.lists(st.floats(0, 20 * HOUR), max_size=5, unique=True).map(sorted),
)
def test_however_the_stream_is_split_each_impression_is_trained_on_once_with_the_same_label(
    stream: list[tuple[str, int, int, bool, int]], ends: list[float]
) -> None:
    pages, clicks = events_of(stream)
    at_once, split = over_updates(pages, clicks, []), over_updates(pages, clicks, ends)
    assert trained(split) == trained(at_once)
    assert set(trained(split).values()) <= {1}
    assert sum(trained(split).values()) == len(pages)
    assert trained(over_updates(pages, clicks, ends, again=True)) == trained(split)


def test_a_request_that_is_sent_again_would_be_trained_on_twice_without_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = [impression(ALICE, 1, HOUR)]
    assert set(trained(over_updates(pages, [], [4 * HOUR], again=True)).values()) == {1}
    monkeypatch.setattr(labels, "_closed", lambda before, *rest: before)
    assert set(trained(over_updates(pages, [], [4 * HOUR], again=True)).values()) == {2}


def test_a_request_that_is_not_remembered_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The negative control: what waits is forgotten.
    pages = [impression(ALICE, 1, HOUR)]
    assert len(trained(over_updates(pages, [], [HOUR]))) == 1
    monkeypatch.setattr(labels, "_open_requests", _without_memory)
    assert not trained(over_updates(pages, [], [HOUR]))


def _without_memory(
    impressions: pl.DataFrame, before: Waiting, histories: pl.DataFrame
) -> tuple[pl.DataFrame, dict[str, int]]:
    return impressions, {"repeated": 0, "late_impression": 0}


@settings(max_examples=100, deadline=None)
@given(
    stream=streams,
    ends=st.lists(st.floats(0, 20 * HOUR), min_size=1, max_size=5, unique=True).map(sorted),
)
def test_every_impression_and_every_outcome_is_counted_where_it_went(
    stream: list[tuple[str, int, int, bool, int]], ends: list[float]
) -> None:
    pages, clicks = events_of(stream)
    results = over_updates(pages, clicks, ends)
    waited = 0
    for result, end, start in zip(results, [*ends, 100 * HOUR], [-1.0, *ends], strict=True):
        num_pages, num_clicks = (
            sum(start < row["ts"] <= end for row in rows) for rows in (pages, clicks)
        )
        assert set(result.impressions) == set(labels.IMPRESSION_FATES)
        assert set(result.outcomes) == set(labels.OUTCOME_FATES)
        assert sum(result.impressions.values()) == waited + num_pages
        assert sum(result.outcomes.values()) == num_clicks
        waited = result.impressions["waiting"]
        assert waited == len(result.waiting.impressions)
    settled = pl.concat([r.settled for r in results])
    assert Counter(settled["event_id"]) == Counter(row["event_id"] for row in clicks)


def test_waiting_is_a_dataclass_of_frames_that_have_a_schema() -> None:
    nothing = Waiting.nothing()
    for field in dataclasses.fields(Waiting):
        assert "user" in getattr(nothing, field.name).columns
