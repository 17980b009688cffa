"""Records: what is written reads back the same, and nothing else reads at all."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.errors import LedgerCorruptError
from raysys.ledger.records import SCHEMA_VERSION, Entry, Record, SetAside, decode, encode
from raysys.ledger.seal import seal
from tests.helpers import (
    abandoned,
    committed,
    item_file,
    partition,
    renewed,
    rollout,
    started,
)

SET_ASIDE = (
    SetAside(
        path="events/dt=2017-03-01/b", size_bytes=1, etag="e", kind="late", reason="came late"
    ),
    SetAside(path="events/dt=2017-03-02", size_bytes=0, etag="", kind="empty", reason="no data"),
)
RECORDS: dict[str, Record] = {
    "started": started(item_files=(item_file(),)),
    "started-not-private": started(private=False, reserved=None),
    "started-with-set-asides": started(set_aside=SET_ASIDE),
    "renewed": renewed(),
    "abandoned": abandoned(),
    "committed": committed(
        metrics={"ndcg10": {"before": 0.3, "after": 0.31}, "interval": [0.1, 0.2]},
        artifacts={"versions/v1/head.bin": "0" * 64},
    ),
    "committed-with-set-asides": committed(set_aside=SET_ASIDE),
    "held": committed(version=None),
    "canary": rollout(measurement={"phase": "inconclusive"}),
    "rolled-back": rollout("rolled_back"),
}


def body(record: Record | None = None, **changes: Any) -> bytes:
    found = json.loads(encode(Entry(sequence=7, at=1.5, record=record or started())))
    del found["hash"]
    return seal({**found, **changes})


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_reads_back_as_it_was_written(record: Record) -> None:
    entry = Entry(sequence=7, at=1.5, record=record)
    assert decode(encode(entry), sequence=7) == entry


@given(
    names=st.lists(st.text(), unique=True, min_size=1, max_size=3),
    owner=st.text(),
    seed=st.integers(),
    at=st.floats(allow_nan=False, allow_infinity=False),
)
def test_any_text_and_number_survives(names: list[str], owner: str, seed: int, at: float) -> None:
    record = started(partitions=(partition("2017-03-01", *names),), owner=owner, seed=seed)
    entry = Entry(sequence=1, at=at, record=record)
    assert decode(encode(entry), sequence=1) == entry


def test_a_record_is_one_line_of_json_that_names_its_type_and_schema() -> None:
    written = encode(Entry(sequence=7, at=1.5, record=abandoned()))
    assert b"\n" not in written
    found = json.loads(written)
    assert len(found.pop("hash")) == 64
    assert found == {
        "schema_version": SCHEMA_VERSION,
        "type": "UpdateAbandoned",
        "sequence": 7,
        "at": 1.5,
        "prev": "",
        "update_id": "u0001-aaaaaa",
        "reason": "lease expired",
    }


def test_a_number_that_json_lacks_is_refused_before_it_is_written() -> None:
    record = committed(metrics={"ndcg10": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(Entry(sequence=1, at=0.0, record=record))


def test_a_record_of_a_newer_schema_says_to_upgrade() -> None:
    data = body(schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(LedgerCorruptError, match="upgrade raysys"):
        decode(data, sequence=7)


def test_a_record_in_the_place_of_another_is_refused() -> None:
    with pytest.raises(LedgerCorruptError, match="record 8 says that it is record 7"):
        decode(body(), sequence=8)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe", id="not-text"),
        pytest.param(b"[]", id="not-an-object"),
        pytest.param(b"{}", id="without-schema"),
        pytest.param(body()[:-9], id="torn"),
        pytest.param(body(type="Nonsense"), id="unknown-type"),
        pytest.param(body(type=[]), id="type-not-text"),
        pytest.param(body(schema_version="1"), id="schema-not-a-number"),
        pytest.param(body(surplus=1), id="unknown-key"),
        pytest.param(body(partitions=5), id="partitions-not-a-list"),
        pytest.param(body(partitions=["events/dt=2017-03-01"]), id="partition-not-an-object"),
    ],
)
def test_what_is_not_a_record_is_corrupt_and_names_its_place(data: bytes) -> None:
    with pytest.raises(LedgerCorruptError, match="ledger record 7") as caught:
        decode(data, sequence=7)
    assert "\n" not in str(caught.value)


@given(cut=st.integers(min_value=0, max_value=len(body()) - 1))
def test_a_record_torn_anywhere_is_corrupt(cut: int) -> None:
    with pytest.raises(LedgerCorruptError):
        decode(body()[:cut], sequence=7)


@given(data=st.binary(max_size=64))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(LedgerCorruptError):
        decode(data, sequence=7)
