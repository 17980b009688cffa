"""Every row is usable or refused with its reason, and the raw user id gets past neither."""

from __future__ import annotations

import datetime
import io
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import SchemaConfig
from raysys.ingest.clean import CLEAN_COLUMNS, CLEAN_SCHEMA, MAX_CLOCK_SKEW, REFUSED_SCHEMA, Cleaned
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.read import read_events
from raysys.partitions.schema import EVENT_SCHEMA, EVENT_TYPES

MIDNIGHT = datetime.datetime(2017, 3, 1, tzinfo=datetime.UTC)
DAY = (MIDNIGHT.timestamp(), MIDNIGHT.timestamp() + 86_400)
NOON = MIDNIGHT + datetime.timedelta(hours=12)
NOON_S = NOON.timestamp()
HASHER = Pseudonymizer(b"0123456789abcdef")
RAW_ID = "alice@example.com"


def event(**changes: Any) -> dict[str, Any]:
    return {
        "event_id": "e1", "event_type": "purchase", "user_id": RAW_ID, "item_id": "i1", "ts": NOON,
        "user_key_id": None, **changes,
    }  # fmt: skip


def clean_frame(frame: pl.DataFrame, **contract: Any) -> Cleaned:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    config = SchemaConfig(**contract)
    return read_events(
        buffer.getvalue(), "events/a.parquet", contract=config, pseudonymizer=HASHER, span=DAY
    )


def clean(*events: dict[str, Any], **contract: Any) -> Cleaned:
    return clean_frame(pl.DataFrame(list(events)), **contract)


def mentions(frame: pl.DataFrame, text: str) -> bool:
    return text in frame.write_json()


class TestUsableRows:
    def test_a_row_becomes_pseudonym_item_and_unix_seconds(self) -> None:
        cleaned = clean(event(request_id="r1", query="milk", surface="search", version="v1"))
        assert cleaned.usable.schema == pl.Schema(CLEAN_SCHEMA)
        row = cleaned.usable.row(0, named=True)
        assert row == dict.fromkeys(CLEAN_COLUMNS) | {
            "user": HASHER.pseudonym(RAW_ID), "item_id": "i1", "ts": NOON_S, "event_id": "e1",
            "event_type": "purchase", "request_id": "r1", "query": "milk", "surface": "search",
            "version": "v1",
        }  # fmt: skip
        assert cleaned.refused.schema == pl.Schema(REFUSED_SCHEMA)
        assert cleaned.refused.is_empty() and not cleaned.row_counts

    def test_position_and_propensity_are_kept_for_debiasing(self) -> None:
        usable = clean(event(position=3, propensity=0.25)).usable
        assert usable.select("position", "propensity").rows() == [(3, 0.25)]

    @pytest.mark.parametrize("event_type", EVENT_TYPES)
    def test_every_event_type_of_the_contract_is_usable(self, event_type: str) -> None:
        assert clean(event(event_type=event_type)).usable["event_type"].to_list() == [event_type]

    def test_a_pseudonym_made_with_our_key_is_kept_as_it_is(self) -> None:
        pseudonym = HASHER.pseudonym(RAW_ID)
        own = {"user_id": pseudonym, "user_key_id": HASHER.key_id}
        assert clean(event(), event(**own)).usable["user"].to_list() == [pseudonym, pseudonym]
        assert clean(event(**own)).usable["user"].to_list() == [pseudonym]

    @pytest.mark.parametrize("missing", [None, ""], ids=["null", "blank"])
    def test_rows_without_request_id_share_a_request_by_user_and_time(
        self, missing: str | None
    ) -> None:
        later = NOON + datetime.timedelta(microseconds=1)
        usable = clean(
            event(event_id="e1", request_id=missing),
            event(event_id="e2", request_id=missing, item_id="i2"),
            event(event_id="e3", request_id=missing, ts=later),
            event(event_id="e4", request_id=missing, user_id="bob"),
            event(event_id="e5", request_id="r5"),
        ).usable
        first, second, later_one, of_bob, given_one = usable["request_id"]
        assert first == second
        assert len({first, later_one, of_bob, given_one}) == 4
        assert given_one == "r5"

    def test_a_file_without_rows_gives_no_rows(self) -> None:
        cleaned = clean_frame(pl.DataFrame(schema=EVENT_SCHEMA))
        assert cleaned.num_rows == 0
        assert cleaned.usable.schema == pl.Schema(CLEAN_SCHEMA)

    def test_users_are_told_apart_by_all_of_their_id(self) -> None:
        names = ["bob", "Bob", "bob ", "böb", "bob" * 100]
        usable = clean(*(event(user_id=name) for name in names * 2)).usable
        assert usable["user"].to_list() == [HASHER.pseudonym(name) for name in names] * 2

    def test_the_hour_of_a_partition_bounds_its_rows_as_a_day_does(self) -> None:
        buffer = io.BytesIO()
        pl.DataFrame([event(ts=NOON), event(ts=NOON + MAX_CLOCK_SKEW * 2)]).write_parquet(buffer)
        hour = (NOON_S, NOON_S + 3600)
        cleaned = read_events(
            buffer.getvalue(), "a", contract=SchemaConfig(), pseudonymizer=HASHER, span=hour
        )
        assert (len(cleaned.usable), len(cleaned.refused)) == (1, 1)


BAD = {
    "no user": (event(user_id=None), "no user_id"),
    "blank user": (event(user_id=""), "no user_id"),
    "no item": (event(item_id=None), "no item_id"),
    "blank item": (event(item_id=""), "no item_id"),
    "no event id": (event(event_id=None), "no event_id"),
    "blank event id": (event(event_id=""), "no event_id"),
    "no time": (event(ts=None), "no ts"),
    "another year": (event(ts=NOON.replace(year=2018)), "ts outside its partition"),
    "unknown type": (event(event_type="refund"), "unknown event_type"),
    "no type": (event(event_type=None), "unknown event_type"),
    "another key": (
        event(user_id="f" * 32, user_key_id="00000000"),
        "pseudonym of another key",
    ),
    "raw id that claims our key": (
        event(user_key_id=HASHER.key_id),
        "user_id is no pseudonym",
    ),
}


class TestRefusedRows:
    @pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD.keys())
    def test_a_bad_row_is_refused_for_its_reason_and_its_neighbour_is_not(
        self, row: dict[str, Any], reason: str
    ) -> None:
        cleaned = clean(row, event(event_id="good"))
        assert cleaned.usable["event_id"].to_list() == ["good"]
        assert cleaned.refused["reason"].to_list() == [reason]
        assert cleaned.row_counts == {f"quarantined: {reason}": 1}

    def test_the_first_reason_is_given_where_there_are_several(self) -> None:
        cleaned = clean(event(user_id=None, item_id=None, ts=None, event_type="refund"))
        assert cleaned.refused["reason"].to_list() == ["no user_id"]

    @pytest.mark.parametrize(
        ("ts", "is_usable"),
        [
            pytest.param(MIDNIGHT - MAX_CLOCK_SKEW, True, id="the first usable moment"),
            pytest.param(
                MIDNIGHT - MAX_CLOCK_SKEW - datetime.timedelta(seconds=1), False, id="just before"
            ),
            pytest.param(
                MIDNIGHT + datetime.timedelta(days=1) + MAX_CLOCK_SKEW,
                True,
                id="the last usable moment",
            ),
            pytest.param(
                MIDNIGHT + datetime.timedelta(days=1, seconds=1) + MAX_CLOCK_SKEW,
                False,
                id="just after",
            ),
            pytest.param(datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC), False, id="the epoch"),
        ],
    )
    def test_a_time_far_outside_the_partition_is_refused(
        self, ts: datetime.datetime, is_usable: bool
    ) -> None:
        cleaned = clean(event(ts=ts))
        assert len(cleaned.usable) == is_usable
        reasons = [] if is_usable else ["ts outside its partition"]
        assert cleaned.refused["reason"].to_list() == reasons

    def test_the_raw_id_is_in_neither_output(self) -> None:
        rows = [row for row, _ in BAD.values()]
        # Without this the search below could find nothing because it cannot.
        assert mentions(pl.DataFrame(rows), RAW_ID)
        cleaned = clean(event(event_id="good"), *rows)
        assert (len(cleaned.usable), len(cleaned.refused)) == (1, len(rows))
        assert not mentions(cleaned.usable, RAW_ID)
        assert not mentions(cleaned.refused, RAW_ID)

    def test_a_refused_row_does_not_even_keep_the_pseudonym(self) -> None:
        refused = clean(*(row for row, _ in BAD.values())).refused
        assert refused.columns == ["event_id", "item_id", "ts", "event_type", "reason"]
        assert not mentions(refused, HASHER.pseudonym(RAW_ID))
        assert not mentions(refused, "f" * 32)

    def test_a_user_that_stands_in_another_column_is_not_kept_either(self) -> None:
        shifted = [
            event(event_id=RAW_ID, item_id=None), event(item_id=RAW_ID, event_type="refund"),
            event(event_type=RAW_ID), event(event_id="kept", item_id="kept too", ts=None),
        ]  # fmt: skip
        refused = clean(*shifted).refused
        assert len(refused) == len(shifted) and not mentions(refused, RAW_ID)
        assert refused.select("event_id", "item_id", "event_type").row(-1) == (
            "kept", "kept too", "purchase"
        )  # fmt: skip

    @settings(deadline=None)
    @given(
        rows=st.lists(
            st.fixed_dictionaries(
                {
                    "event_id": st.sampled_from(["e1", "e2", "", None]),
                    "event_type": st.sampled_from(["purchase", "impression", "refund", None]),
                    "user_id": st.sampled_from([RAW_ID, "bob", "", None, "f" * 32]),
                    "item_id": st.sampled_from(["i1", "", None]),
                    "ts": st.sampled_from([NOON, MIDNIGHT.replace(year=2016), None]),
                    "user_key_id": st.sampled_from([None, HASHER.key_id, "00000000"]),
                    "price": st.sampled_from(["1.5", "dear", "", None]),
                    "position": st.sampled_from(["1", "2.5", None]),
                }
            ),
            min_size=1,
            max_size=20,
        ),
        wrong_values=st.sampled_from(["quarantine", "default"]),
    )
    def test_each_row_is_either_usable_or_refused_with_a_reason(
        self, rows: list[dict[str, Any]], wrong_values: str
    ) -> None:
        schema = {name: EVENT_SCHEMA[name] for name in rows[0]} | {
            "price": pl.String(), "position": pl.String()
        }  # fmt: skip
        cleaned = clean_frame(pl.DataFrame(rows, schema=schema), wrong_values=wrong_values)
        assert len(cleaned.usable) + len(cleaned.refused) == cleaned.num_rows == len(rows)
        assert cleaned.refused["reason"].null_count() == 0
        assert cleaned.row_counts.total() == len(cleaned.refused)
        given_always = ["user", "item_id", "ts", "event_id", "event_type", "request_id"]
        assert cleaned.usable.select(given_always).null_count().sum_horizontal().item() == 0
        assert cleaned.usable["user"].str.contains("^[0-9a-f]{32}$").all()
