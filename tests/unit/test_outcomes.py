"""Every clean row becomes an outcome once, or is counted where it went instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.ingest.clean import CLEAN_SCHEMA
from raysys.ingest.outcomes import find_outcomes, period_of

GAINS = {"click": 1.0, "cart": 2.0, "purchase": 3.0}


def row(**changes: Any) -> dict[str, Any]:
    return {
        "user": "a", "item_id": "i0", "ts": 5.0, "event_id": "e1", "event_type": "purchase",
        "request_id": "r", "query": None, **changes,
    }  # fmt: skip


def find(*rows: dict[str, Any], item_ids: tuple[str, ...] = ("i0", "i1")) -> Any:
    frame = pl.DataFrame(list(rows), schema=CLEAN_SCHEMA)
    return find_outcomes(frame, item_ids=item_ids, gains=GAINS, ends=[10.0, 20.0])


def test_an_outcome_has_its_items_index_gain_weight_and_period() -> None:
    found, _ = find(row(item_id="i1", event_type="click", ts=12.0))
    assert found.select("item", "gain", "weight", "period").rows() == [(1, 1.0, 1 / 3, 1)]


def test_a_repeated_event_counts_once() -> None:
    found, went = find(row(), row(), row(event_id="e2"))
    assert found["event_id"].to_list() == ["e1", "e2"]
    assert went["duplicate"] == 1


def test_an_event_id_of_another_user_takes_no_row_away() -> None:
    alone, _ = find(row(user="b"))
    among, _ = find(row(user="a"), row(user="b"))
    assert among.filter(pl.col("user") == "b").equals(alone)


@pytest.mark.parametrize(
    ("changes", "went_to"),
    [
        pytest.param({"item_id": "gone"}, "unknown_item", id="an item that the catalogue lacks"),
        pytest.param({"event_type": "impression"}, "impression", id="an impression"),
    ],
)
def test_what_is_no_outcome_is_counted(changes: dict[str, str], went_to: str) -> None:
    found, went = find(row(**changes))
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
    )
)
def test_the_counts_add_up_to_the_rows(rows: list[dict[str, Any]]) -> None:
    found, went = find(*rows)
    assert sum(went.values()) == len(rows)
    assert went["outcome"] == len(found)
    assert found.select("user", "event_id").is_unique().all()


def test_a_period_ends_where_the_next_begins_and_the_outer_ones_are_open() -> None:
    ts = np.array([-100.0, 9.9, 10.0, 19.9, 20.0, 500.0])
    assert period_of(ts, [10.0, 20.0, 30.0]).tolist() == [0, 0, 1, 1, 2, 2]
    assert period_of(ts, [10.0]).tolist() == [0] * 6
