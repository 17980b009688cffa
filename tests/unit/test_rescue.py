"""What the contract does not know is kept as JSON, without the raw user id."""

from __future__ import annotations

import datetime
import io
import json
from decimal import Decimal
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import SchemaConfig
from raysys.ingest.clean import Cleaned
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.read import read_events
from raysys.ingest.rescue import RESCUED_SCHEMA

NOON = datetime.datetime(2017, 3, 1, 12, tzinfo=datetime.UTC)
DAY = (NOON.timestamp() - 43_200, NOON.timestamp() + 43_200)
HASHER = Pseudonymizer(b"0123456789abcdef")


def read(users: Any, added_columns: Any = "rescue", **added: Any) -> Cleaned:
    """Reads one row for each user, with these added columns."""
    num = len(users)
    columns = {
        "event_id": [f"e{i}" for i in range(num)], "event_type": ["click"] * num,
        "user_id": users, "item_id": ["i"] * num, "ts": [NOON] * num, **added,
    }  # fmt: skip
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    contract = SchemaConfig(added_columns=added_columns)
    data = buffer.getvalue()
    return read_events(data, "a.parquet", contract=contract, pseudonymizer=HASHER, span=DAY)


def rescued(users: Any, **added: Any) -> list[Any]:
    return [json.loads(text) for text in read(users, **added).rescued["rescued"]]


def test_a_row_s_values_are_kept_beside_its_id_and_time_and_counted() -> None:
    cleaned = read(["alice", "bob"], shoe_size=[43, None], colour=["red", "blue"])
    assert cleaned.rescued.schema == pl.Schema(RESCUED_SCHEMA)
    assert cleaned.rescued.select("event_id", "ts").rows() == [
        ("e0", NOON.timestamp()), ("e1", NOON.timestamp())
    ]  # fmt: skip
    assert [json.loads(text) for text in cleaned.rescued["rescued"]] == [
        {"shoe_size": 43, "colour": "red"}, {"shoe_size": None, "colour": "blue"}
    ]  # fmt: skip
    assert cleaned.column_counts["rescued:shoe_size"] == 1
    assert cleaned.column_counts["rescued:colour"] == 2
    assert cleaned.column_counts["added:shoe_size"] == 2


def test_nothing_is_kept_unless_it_is_asked_for() -> None:
    assert read(["alice"], added_columns="ignore", colour=["red"]).rescued.is_empty()


def test_a_row_without_a_value_and_a_refused_row_are_not_kept() -> None:
    cleaned = read(["alice", "", "carol"], colour=[None, "red", "blue"])
    assert cleaned.rescued["event_id"].to_list() == ["e2"]
    assert cleaned.column_counts["rescued:colour"] == 1


ALICE = HASHER.pseudonym("alice")
P42 = HASHER.pseudonym("42")


@pytest.mark.parametrize(
    ("users", "column", "kept"),
    [
        pytest.param(["alice"], ["alice"], ALICE, id="text"),
        pytest.param(["alice"], ["bob"], "bob", id="another text"),
        pytest.param(["42"], [42], P42, id="a number of a text id"),
        pytest.param([42], ["42"], P42, id="a text of a numeric id"),
        pytest.param([42.0], [42], P42, id="a number of a float id"),
        pytest.param([42], [42.0], P42, id="a float of a numeric id"),
        pytest.param(["42"], [Decimal("42.0")], P42, id="a decimal"),
        pytest.param(["alice"], pa.array(["alice"]).dictionary_encode(), ALICE, id="a category"),
        pytest.param(["alice"], [["bob", "alice"]], ["bob", ALICE], id="in a list"),
        pytest.param(["alice"], [{"a": {"b": "alice"}}], {"a": {"b": ALICE}}, id="in a struct"),
        pytest.param(["42"], [[42, 142]], [P42, "142"], id="a number in a list"),
        pytest.param(["42"], [[42.0, 4.5]], [P42, "4.5"], id="a float in a list"),
        pytest.param(["alice"], [[b"\xff", b"alice"]], ["/w==", ALICE], id="bytes as base64"),
        pytest.param(['a"\\é\n'], [['a"\\é\n']], [HASHER.pseudonym('a"\\é\n')], id="escapes"),
    ],
)
def test_a_value_that_is_the_raw_id_becomes_the_pseudonym(
    users: Any, column: Any, kept: Any
) -> None:
    assert rescued(users, owner=column) == [{"owner": kept}]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        pytest.param(pa.list_(pa.int64()), [[1, None], [], None, [2]], id="lists"),
        pytest.param(
            pa.struct({"a": pa.int64(), "b": pa.list_(pa.string())}),
            [{"a": 1, "b": ["x"]}, {"a": None, "b": []}, None, {"a": 2, "b": None}],
            id="structs",
        ),
        pytest.param(
            pa.list_(pa.struct({"a": pa.list_(pa.bool_())})),
            [[{"a": [True]}, {"a": []}], [None], [], None],
            id="lists of structs",
        ),
        pytest.param(pa.list_(pa.int64(), 2), [[1, 2], [3, 4], None, [5, 6]], id="arrays"),
    ],
)
def test_nested_values_are_kept_as_they_are(kind: pa.DataType, values: list[Any]) -> None:
    users = ["a", "b", "c", "d"]
    kept = rescued(users, nested=pa.array(values, kind), row=[0, 1, 2, 3])
    assert [row["nested"] for row in kept] == values


def test_an_id_is_only_replaced_in_its_own_row() -> None:
    values = rescued(["alice", "bob"], owner=["bob", "bob"], friends=[["bob"], ["bob"]])
    bob = HASHER.pseudonym("bob")
    assert values == [{"owner": "bob", "friends": ["bob"]}, {"owner": bob, "friends": [bob]}]


def test_a_column_may_have_the_name_of_one_that_ingest_makes() -> None:
    assert rescued(["alice"], user=["x"], reason=["y"], micros=["z"]) == [
        {"user": "x", "reason": "y", "micros": "z"}
    ]


def test_what_has_no_json_stays_behind_and_is_counted_as_added_only() -> None:
    kinds = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
    large = pa.array([Decimal(1)], pa.decimal256(50))
    cleaned = read(["alice"], kinds=kinds, large=large, colour=["red"])
    assert [json.loads(text) for text in cleaned.rescued["rescued"]] == [{"colour": "red"}]
    assert cleaned.column_counts["added:kinds"] == cleaned.column_counts["added:large"] == 1
    assert "rescued:kinds" not in cleaned.column_counts


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.text(min_size=1), st.text(), st.lists(st.text(), max_size=3)), min_size=1
    )
)
def test_no_raw_id_is_among_the_values_whatever_its_characters(
    rows: list[tuple[str, str, list[str]]],
) -> None:
    users = [user for user, _, _ in rows]
    owners = [user if i % 2 else owner for i, (user, owner, _) in enumerate(rows)]
    lists = [[*friends, user] for user, _, friends in rows]
    result = rescued(users, owner=owners, friends=pa.array(lists))
    for (user, _, friends), owner, row in zip(rows, owners, result, strict=True):
        pseudonym = HASHER.pseudonym(user)
        assert row["owner"] == (pseudonym if owner == user else owner)
        assert row["friends"] == [pseudonym if f == user else f for f in [*friends, user]]
