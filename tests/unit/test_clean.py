"""Every row is usable or refused with its reason, and the raw user id gets past neither."""

from __future__ import annotations

import datetime
import io
import re
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import DataError
from raysys.ingest.clean import (
    CLEAN_COLUMNS,
    MAX_CLOCK_SKEW,
    clean_events,
    conform,
    read_parquet_file,
)
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.partitions.schema import EVENT_SCHEMA, EVENT_TYPES

DATE = datetime.date(2017, 3, 1)
MIDNIGHT = datetime.datetime(2017, 3, 1, tzinfo=datetime.UTC)
NOON = MIDNIGHT + datetime.timedelta(hours=12)
NOON_S = NOON.timestamp()
HASHER = Pseudonymizer(b"0123456789abcdef")
RAW_ID = "alice@example.com"
PATH = "events/dt=2017-03-01/a.parquet"


def event(**changes: Any) -> dict[str, Any]:
    return {
        "event_id": "e1", "event_type": "purchase", "user_id": RAW_ID, "item_id": "i1", "ts": NOON,
        "user_key_id": None, **changes,
    }  # fmt: skip


def clean(*events: dict[str, Any]) -> tuple[pl.DataFrame, pl.DataFrame]:
    return clean_events(conform(pl.DataFrame(list(events)), PATH), HASHER, date=DATE)


def clean_column(name: str, column: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Cleans one row whose column `name` has the type of `column`."""
    frame = pl.DataFrame([event()]).with_columns(column.alias(name))
    return clean_events(conform(frame, PATH), HASHER, date=DATE)


def mentions(frame: pl.DataFrame, text: str) -> bool:
    return text in frame.write_json()


class TestUsableRows:
    def test_a_row_becomes_pseudonym_item_and_unix_seconds(self) -> None:
        usable, refused = clean(event(request_id="r1", query="milk"))
        assert usable.columns == CLEAN_COLUMNS
        assert usable.rows() == [
            (HASHER.pseudonym(RAW_ID), "i1", NOON_S, "e1", "purchase", "r1", "milk")
        ]
        assert refused.is_empty()

    @pytest.mark.parametrize("event_type", EVENT_TYPES)
    def test_every_event_type_of_the_contract_is_usable(self, event_type: str) -> None:
        usable, _ = clean(event(event_type=event_type))
        assert usable["event_type"].to_list() == [event_type]

    def test_a_pseudonym_made_with_our_key_is_kept_as_it_is(self) -> None:
        pseudonym = HASHER.pseudonym(RAW_ID)
        usable, _ = clean(
            event(), event(event_id="e2", user_id=pseudonym, user_key_id=HASHER.key_id)
        )
        assert usable["user"].to_list() == [pseudonym, pseudonym]

    @pytest.mark.parametrize("missing", [None, ""], ids=["null", "blank"])
    def test_rows_without_request_id_share_a_request_by_user_and_time(
        self, missing: str | None
    ) -> None:
        later = NOON + datetime.timedelta(seconds=1)
        usable, _ = clean(
            event(event_id="e1", request_id=missing),
            event(event_id="e2", request_id=missing, item_id="i2"),
            event(event_id="e3", request_id=missing, ts=later),
            event(event_id="e4", request_id=missing, user_id="bob"),
        )
        first, second, later_one, of_bob = usable["request_id"]
        assert first == second
        assert len({first, later_one, of_bob}) == 3

    def test_optional_columns_may_be_missing_and_unknown_ones_stay_behind(self) -> None:
        frame = pl.DataFrame([event()]).drop("user_key_id").with_columns(shoe_size=pl.lit(43))
        conforming = conform(frame, PATH)
        assert conforming.schema == pl.Schema(EVENT_SCHEMA)
        usable, refused = clean_events(conforming, HASHER, date=DATE)
        assert (len(usable), len(refused)) == (1, 0)
        assert usable["query"].to_list() == [None]

    def test_a_file_without_rows_gives_no_rows(self) -> None:
        usable, refused = clean_events(
            conform(pl.DataFrame(schema=EVENT_SCHEMA), PATH), HASHER, date=DATE
        )
        assert usable.is_empty() and refused.is_empty()
        assert usable.columns == CLEAN_COLUMNS

    def test_a_numeric_user_is_the_same_user_as_its_text(self) -> None:
        usable, _ = clean_column("user_id", pl.Series([42]))
        assert usable["user"].to_list() == [HASHER.pseudonym("42")]


class TestTimestamps:
    @pytest.mark.parametrize(
        "column",
        [
            pytest.param(pl.Series([NOON]), id="aware, microseconds"),
            pytest.param(
                pl.Series([NOON]).dt.cast_time_unit("ns").dt.convert_time_zone("Europe/Berlin"),
                id="aware, Berlin, nanoseconds",
            ),
            pytest.param(pl.Series([NOON.replace(tzinfo=None)]), id="naive is UTC"),
            pytest.param(
                pl.Series([NOON.replace(tzinfo=None)]).dt.cast_time_unit("ms"),
                id="naive, milliseconds",
            ),
            pytest.param(pl.Series([int(NOON_S)]), id="whole seconds"),
            pytest.param(pl.Series([NOON_S]), id="seconds"),
            pytest.param(pl.Series(["2017-03-01T12:00:00Z"]), id="text, Z"),
            pytest.param(pl.Series(["2017-03-01T13:00:00+01:00"]), id="text, offset"),
            pytest.param(pl.Series(["2017-03-01 12:00:00"]), id="text, naive is UTC"),
            pytest.param(pl.Series(["2017-03-01T12:00:00.000000"]), id="text, microseconds"),
        ],
    )
    def test_all_common_forms_mean_the_same_second(self, column: pl.Series) -> None:
        usable, refused = clean_column("ts", column)
        assert usable["ts"].to_list() == [NOON_S]
        assert refused.is_empty()

    def test_fractions_of_a_second_survive(self) -> None:
        for column in (pl.Series([NOON_S + 0.25]), pl.Series(["2017-03-01T12:00:00.25Z"])):
            usable, _ = clean_column("ts", column)
            assert usable["ts"].to_list() == [NOON_S + 0.25]

    @pytest.mark.parametrize(
        "column",
        [
            pytest.param(pl.Series([None], dtype=pl.Datetime("us", "UTC")), id="null"),
            pytest.param(pl.Series(["yesterday"]), id="no date"),
            pytest.param(pl.Series([""]), id="blank"),
            pytest.param(pl.Series([float("nan")]), id="nan"),
            pytest.param(pl.Series([float("inf")]), id="infinite"),
            pytest.param(pl.Series([2**62]), id="overflow"),
        ],
    )
    def test_a_time_that_cannot_be_read_refuses_the_row(self, column: pl.Series) -> None:
        usable, refused = clean_column("ts", column)
        assert usable.is_empty()
        assert refused["reason"].to_list() == ["no ts"]

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
    def test_a_time_far_outside_the_partitions_day_is_refused(
        self, ts: datetime.datetime, is_usable: bool
    ) -> None:
        usable, refused = clean(event(ts=ts))
        assert len(usable) == is_usable
        assert refused["reason"].to_list() == (
            [] if is_usable else ["ts outside the partition's day"]
        )

    def test_milliseconds_taken_for_seconds_are_refused(self) -> None:
        _, refused = clean_column("ts", pl.Series([int(NOON_S * 1000)]))
        assert refused["reason"].to_list() == ["ts outside the partition's day"]


BAD = {
    "no user": (event(user_id=None), "no user_id"),
    "blank user": (event(user_id=""), "no user_id"),
    "no item": (event(item_id=None), "no item_id"),
    "blank item": (event(item_id=""), "no item_id"),
    "no event id": (event(event_id=None), "no event_id"),
    "blank event id": (event(event_id=""), "no event_id"),
    "no time": (event(ts=None), "no ts"),
    "another year": (event(ts=NOON.replace(year=2018)), "ts outside the partition's day"),
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
        usable, refused = clean(row, event(event_id="good"))
        assert usable["event_id"].to_list() == ["good"]
        assert refused["reason"].to_list() == [reason]

    def test_the_first_reason_is_given_where_there_are_several(self) -> None:
        _, refused = clean(event(user_id=None, item_id=None, ts=None, event_type="refund"))
        assert refused["reason"].to_list() == ["no user_id"]

    def test_the_raw_id_is_in_neither_output(self) -> None:
        rows = [row for row, _ in BAD.values()]
        # Without this the search below could find nothing because it cannot.
        assert mentions(pl.DataFrame(rows), RAW_ID)
        usable, refused = clean(event(event_id="good"), *rows)
        assert len(usable) == 1
        assert len(refused) == len(rows)
        assert not mentions(usable, RAW_ID)
        assert not mentions(refused, RAW_ID)

    def test_a_refused_row_does_not_even_keep_the_pseudonym(self) -> None:
        _, refused = clean(*(row for row, _ in BAD.values()))
        assert refused.columns == ["event_id", "item_id", "ts", "event_type", "reason"]
        assert not mentions(refused, HASHER.pseudonym(RAW_ID))
        assert not mentions(refused, "f" * 32)

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
                }
            ),
            min_size=1,
            max_size=20,
        )
    )
    def test_each_row_is_either_usable_or_refused_with_a_reason(
        self, rows: list[dict[str, Any]]
    ) -> None:
        schema = {name: EVENT_SCHEMA[name] for name in rows[0]}
        frame = conform(pl.DataFrame(rows, schema=schema), PATH)
        usable, refused = clean_events(frame, HASHER, date=DATE)
        assert len(usable) + len(refused) == len(rows)
        assert refused["reason"].null_count() == 0
        assert usable.drop("query").null_count().sum_horizontal().item() == 0
        assert usable["user"].str.contains("^[0-9a-f]{32}$").all()


class TestUnreadableFiles:
    def test_what_is_not_parquet_is_a_data_error_that_names_the_file(self) -> None:
        with pytest.raises(DataError, match=f"^{re.escape(PATH)} is not a readable parquet file"):
            read_parquet_file(b"not parquet at all", PATH)

    def test_a_file_that_was_cut_off_is_a_data_error_of_one_line(self) -> None:
        buffer = io.BytesIO()
        pl.DataFrame([event()]).write_parquet(buffer)
        data = buffer.getvalue()
        assert len(read_parquet_file(data, PATH)) == 1
        for size in (0, 10, len(data) // 2, len(data) - 1):
            with pytest.raises(DataError) as error:
                read_parquet_file(data[:size], PATH)
            assert "\n" not in str(error.value)

    def test_a_missing_required_column_is_named_beside_those_there_are(self) -> None:
        with pytest.raises(DataError, match=r"has no column item_id, ts; it has \['event_id'"):
            conform(pl.DataFrame([event()]).drop("item_id", "ts"), PATH)

    @pytest.mark.parametrize(
        ("name", "column"),
        [
            pytest.param("ts", pl.Series([b"noon"]), id="binary time"),
            pytest.param("ts", pl.Series([datetime.time(12)]), id="time without a day"),
            pytest.param("ts", pl.Series([[1]]), id="list of times"),
            pytest.param("user_id", pl.Series([{"id": "alice"}]), id="struct of a user"),
            pytest.param("price", pl.Series([[1.0, 2.0]]), id="list of prices"),
        ],
    )
    def test_a_column_of_an_impossible_type_is_a_data_error_of_one_line(
        self, name: str, column: pl.Series
    ) -> None:
        with pytest.raises(DataError, match=f"^{re.escape(PATH)} has .*{name}") as error:
            clean_column(name, column)
        assert "\n" not in str(error.value)

    def test_a_value_that_does_not_fit_an_optional_column_only_empties_it(self) -> None:
        frame = pl.DataFrame([event()]).with_columns(price=pl.lit("dear"), position=pl.lit("3"))
        row = conform(frame, PATH)
        assert row["price"].to_list() == [None]
        assert row["position"].to_list() == [3]
