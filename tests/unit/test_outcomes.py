"""Every clean row becomes an outcome or an impression once, or is counted where it went instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.ingest.clean import CLEAN_SCHEMA
from raysys.ingest.outcomes import EVENT_FATES, split_events
from raysys.ingest.periods import period_of
from raysys.ingest.seen import SEEN_SCHEMA

GAINS = {"click": 1.0, "cart": 2.0, "purchase": 3.0}


def row(**changes: Any) -> dict[str, Any]:
    return {
        "user": "a", "item_id": "i0", "ts": 5.0, "event_id": "e1", "event_type": "purchase",
        "request_id": "r", **changes,
    }  # fmt: skip


def split(
    *rows: dict[str, Any],
    seen: list[tuple[str, str]] | None = None,
    gains: dict[str, float] = GAINS,
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    return split_events(
        pl.DataFrame(list(rows), schema=CLEAN_SCHEMA),
        seen=pl.DataFrame([(*s, 0) for s in seen or []], schema=SEEN_SCHEMA, orient="row"),
        item_ids=("i0", "i1"),
        gains=gains,
        ends=[10.0, 20.0],
    )


def test_an_outcome_has_its_items_index_gain_weight_and_period() -> None:
    found, _, _ = split(row(item_id="i1", event_type="click", ts=12.0))
    assert found.select("item", "gain", "weight", "period").rows() == [(1, 1.0, 1 / 3, 1)]


def test_an_impression_keeps_its_place_and_query() -> None:
    _, shown, _ = split(row(item_id="i1", event_type="impression", position=4, query="milk"))
    assert shown.select("item", "position", "query", "request_id").rows() == [(1, 4, "milk", "r")]


def test_a_repeated_event_counts_once() -> None:
    found, _, went = split(row(), row(), row(event_id="e2"))
    assert found["event_id"].to_list() == ["e1", "e2"]
    assert went["duplicate"] == 1


def test_an_event_of_an_earlier_update_does_not_count_again() -> None:
    found, _, went = split(row(), row(event_id="e2"), seen=[("a", "e1"), ("b", "e2")])
    assert found["event_id"].to_list() == ["e2"]
    assert went["seen_before"] == 1


def test_an_event_id_of_another_day_is_another_event_in_this_update_and_in_an_earlier_one() -> None:
    found, _, went = split(row(), row(ts=90_000.0), row(ts=90_001.0), seen=[("a", "e1")])
    assert found["ts"].to_list() == [90_000.0]
    assert (went["seen_before"], went["duplicate"]) == (1, 1)


def test_an_event_id_of_another_user_takes_no_row_away() -> None:
    alone, _, _ = split(row(user="b"))
    among, _, _ = split(row(user="a"), row(user="b"), seen=[("a", "e1")])
    assert among.filter(pl.col("user") == "b").equals(alone)


@pytest.mark.parametrize(
    ("changes", "went_to"),
    [
        pytest.param({"item_id": "gone"}, "unknown_item", id="an item that the catalogue lacks"),
        pytest.param({"event_type": "impression"}, "impression", id="an impression"),
        pytest.param({"event_type": "cart"}, "without_gain", id="an outcome that gains nothing"),
    ],
)
def test_what_is_no_outcome_is_counted(changes: dict[str, str], went_to: str) -> None:
    found, _, went = split(row(**changes), gains={"purchase": 1.0})
    assert found.is_empty()
    assert {name for name, count in went.items() if count} == {went_to}


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            row,
            user=st.sampled_from("ab"),
            item_id=st.sampled_from(["i0", "i1", "gone"]),
            event_id=st.sampled_from(["e1", "e2", "e3"]),
            event_type=st.sampled_from([*GAINS, "impression"]),
        ),
        max_size=12,
    ),
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["e1", "e2"])), max_size=3),
)
def test_the_counts_add_up_to_the_rows(
    rows: list[dict[str, Any]], seen: list[tuple[str, str]]
) -> None:
    found, shown, went = split(*rows, seen=seen)
    assert set(went) == set(EVENT_FATES)
    assert sum(went.values()) == len(rows)
    assert (went["outcome"], went["impression"]) == (len(found), len(shown))
    kept = found.select("user", "event_id")
    assert kept.is_unique().all()
    assert not set(kept.rows()) & set(seen)


def test_a_period_ends_where_the_next_begins_and_the_outer_ones_are_open() -> None:
    ts = np.array([-100.0, 9.9, 10.0, 19.9, 20.0, 500.0])
    assert period_of(ts, [10.0, 20.0, 30.0]).tolist() == [0, 0, 1, 1, 2, 2]
    assert period_of(ts, [10.0]).tolist() == [0] * 6
