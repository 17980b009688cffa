"""Added, missing, widened and wrong columns: each goes where the contract says, and is counted."""

from __future__ import annotations

import datetime
import io
import re
from decimal import Decimal
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import SchemaConfig
from raysys.errors import DataError
from raysys.ingest.clean import Cleaned
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.read import read_events, read_item_file
from raysys.partitions.schema import EVENT_SCHEMA, ITEM_SCHEMA, UNUSED_EVENT_COLUMNS

MIDNIGHT = datetime.datetime(2017, 3, 1, tzinfo=datetime.UTC)
DAY = (MIDNIGHT.timestamp(), MIDNIGHT.timestamp() + 86_400)
NOON = MIDNIGHT + datetime.timedelta(hours=12)
NOON_S = NOON.timestamp()
NAIVE = NOON.replace(tzinfo=None)
HASHER = Pseudonymizer(b"0123456789abcdef")
PATH = "events/dt=2017-03-01/a.parquet"
ALL_COLUMNS: dict[str, Any] = {
    "event_id": "e1", "event_type": "purchase", "user_id": "alice", "item_id": "i1", "ts": NOON,
    "request_id": "r1", "query": "milk", "surface": "search", "version": "v1", "user_key_id": None,
    "position": 1, "price": 2.5, "quantity": 1.0, "propensity": 0.5,
}  # fmt: skip


def conforming(num_rows: int = 1) -> pl.DataFrame:
    return pl.DataFrame([ALL_COLUMNS] * num_rows, schema=EVENT_SCHEMA)


def read(frame: pl.DataFrame | pa.Table, **contract: Any) -> Cleaned:
    buffer = io.BytesIO()
    if isinstance(frame, pl.DataFrame):
        frame.write_parquet(buffer)
    else:
        pq.write_table(frame, buffer)
    config = SchemaConfig(**contract)
    return read_events(buffer.getvalue(), PATH, contract=config, pseudonymizer=HASHER, span=DAY)


def read_column(name: str, column: pl.Series | pa.Array, **contract: Any) -> Cleaned:
    """Reads rows that conform but for column `name`."""
    if isinstance(column, pl.Series):
        return read(conforming(len(column)).with_columns(column.alias(name)), **contract)
    table = conforming(len(column)).to_arrow()
    return read(table.set_column(table.schema.get_field_index(name), name, column), **contract)


def test_a_file_as_the_contract_has_it_has_nothing_to_count() -> None:
    cleaned = read(conforming(3))
    assert (len(cleaned.usable), cleaned.column_counts) == (3, {})


class TestAddedColumns:
    FRAME = conforming(2).with_columns(shoe_size=pl.Series([43, None]), colour=pl.lit("red"))

    def test_they_are_counted_by_name_and_stay_behind(self) -> None:
        cleaned = read(self.FRAME)
        assert cleaned.column_counts == {"added:shoe_size": 2, "added:colour": 2}
        assert cleaned.rescued.is_empty()
        assert len(cleaned.usable) == 2

    def test_they_quarantine_the_file_if_the_config_says_so(self) -> None:
        message = f"^{re.escape(PATH)} has columns .*: shoe_size, colour; schema.added_columns"
        with pytest.raises(DataError, match=message):
            read(self.FRAME, added_columns="fail")
        assert len(read(conforming(), added_columns="fail").usable) == 1


class TestMissingColumns:
    @pytest.mark.parametrize("name", [n for n, v in ALL_COLUMNS.items() if n not in
        ("event_id", "event_type", "user_id", "item_id", "ts")])  # fmt: skip
    def test_an_optional_one_is_null_and_counted(self, name: str) -> None:
        cleaned = read(conforming(2).drop(name))
        assert cleaned.column_counts == {f"missing:{name}": 2}
        assert len(cleaned.usable) == 2

    def test_a_required_one_quarantines_the_file_and_is_named_beside_those_there_are(self) -> None:
        with pytest.raises(DataError, match=r"has no column item_id, ts; it has \['event_id'"):
            read(conforming().drop("item_id", "ts"))

    def test_a_broken_file_s_other_columns_are_not_named_since_they_may_be_user_ids(self) -> None:
        frame = conforming().select("event_id", pl.lit(1).alias("alice@example.com"))
        with pytest.raises(DataError, match=r"it has \['event_id'\] and 1 of other names"):
            read(frame)

    def test_a_default_fills_it_and_is_counted(self) -> None:
        frame = conforming(2).drop("event_type", "surface")
        with pytest.raises(DataError, match="no column event_type"):
            read(frame)
        defaults = {"event_type": "click", "surface": "ads"}
        cleaned = read(frame, missing_columns="default", defaults=defaults)
        assert cleaned.usable.select("event_type", "surface").unique().rows() == [("click", "ads")]
        assert cleaned.column_counts == {"default:event_type": 2, "default:surface": 2}

    def test_a_default_does_not_touch_a_column_that_is_there(self) -> None:
        frame = conforming(2).with_columns(event_type=pl.Series(["purchase", None]))
        cleaned = read(frame, missing_columns="default", defaults={"event_type": "click"})
        assert cleaned.usable["event_type"].to_list() == ["purchase"]
        assert cleaned.refused["reason"].to_list() == ["unknown event_type"]

    def test_a_column_without_a_default_quarantines_the_file_all_the_same(self) -> None:
        with pytest.raises(DataError, match="no column item_id"):
            read(
                conforming().drop("item_id"),
                missing_columns="default",
                defaults={"event_type": "click"},
            )


class TestDerivedEventIds:
    def rows(self, **changes: Any) -> pl.DataFrame:
        return pl.DataFrame([ALL_COLUMNS | changes], schema=EVENT_SCHEMA).drop("event_id")

    def ids(self, *frames: pl.DataFrame) -> list[str]:
        cleaned = read(pl.concat(frames), derive_event_id=True)
        assert cleaned.column_counts["derived:event_id"] == len(frames)
        return cleaned.usable["event_id"].to_list()

    def test_without_the_switch_the_file_is_quarantined(self) -> None:
        with pytest.raises(DataError, match="no column event_id"):
            read(self.rows())

    def test_the_same_row_gets_the_same_id_in_another_file(self) -> None:
        assert self.ids(self.rows()) == self.ids(self.rows(price=9.0))

    @pytest.mark.parametrize(
        "changes",
        [
            {"user_id": "bob"},
            {"item_id": "i2"},
            {"ts": NOON + datetime.timedelta(microseconds=1)},
            {"event_type": "click"},
            {"request_id": "r2"},
            {"request_id": None},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_rows_that_differ_get_different_ids(self, changes: dict[str, Any]) -> None:
        assert len(set(self.ids(self.rows(), self.rows(**changes)))) == 2

    def test_no_id_is_made_of_a_refused_row_since_it_would_hold_the_user(self) -> None:
        cleaned = read(self.rows(item_id=""), derive_event_id=True)
        assert cleaned.refused["event_id"].to_list() == [None]

    def test_ids_that_the_shop_sent_are_kept(self) -> None:
        assert read(conforming(), derive_event_id=True).usable["event_id"].to_list() == ["e1"]


class TestWidenedColumns:
    @pytest.mark.parametrize(
        ("name", "column", "value"),
        [
            pytest.param("user_id", pl.Series([42]), HASHER.pseudonym("42"), id="integer user"),
            pytest.param("user_id", pl.Series([42.0]), HASHER.pseudonym("42"), id="float user"),
            pytest.param(
                "user_id", pl.Series([42], dtype=pl.Float32), HASHER.pseudonym("42"), id="float32"
            ),
            pytest.param(
                "user_id", pa.array([Decimal("42.00")]), HASHER.pseudonym("42"), id="decimal user"
            ),
            pytest.param(
                "user_id", pl.Series([2**64 - 1], dtype=pl.UInt64),
                HASHER.pseudonym("18446744073709551615"), id="uint64 user",
            ),
            pytest.param("item_id", pl.Series([7.0]), "7", id="float item"),
            pytest.param("item_id", pl.Series([-7]), "-7", id="negative item"),
            pytest.param("item_id", pl.Series(["i9"], dtype=pl.Categorical), "i9", id="category"),
            pytest.param("item_id", pl.Series(["i9"], dtype=pl.Enum(["i9"])), "i9", id="enum"),
            pytest.param(
                "event_type", pa.array(["click"]).dictionary_encode(), "click", id="dictionary"
            ),
            pytest.param("position", pl.Series([3], dtype=pl.Int64), 3, id="int64 position"),
            pytest.param("position", pl.Series([3], dtype=pl.UInt8), 3, id="uint8 position"),
            pytest.param("position", pl.Series([3.0]), 3, id="whole float position"),
            pytest.param("position", pl.Series(["3"]), 3, id="text position"),
            pytest.param("position", pl.Series([" 3.0 "]), 3, id="text of a float position"),
            pytest.param("position", pa.array([Decimal("3.0")]), 3, id="decimal position"),
            pytest.param(
                "propensity", pl.Series([0.5], dtype=pl.Float32), 0.5, id="float32 propensity"
            ),
            pytest.param("propensity", pl.Series([1]), 1.0, id="integer propensity"),
            pytest.param("propensity", pa.array([Decimal("0.50")]), 0.5, id="decimal propensity"),
            pytest.param("propensity", pl.Series(["5e-1"]), 0.5, id="text propensity"),
            pytest.param("query", pl.Series([123]), "123", id="integer query"),
        ],
    )  # fmt: skip
    def test_a_value_of_another_type_is_cast_without_loss_and_counted(
        self, name: str, column: Any, value: Any
    ) -> None:
        cleaned = read_column(name, column)
        kept = "user" if name == "user_id" else name
        assert cleaned.usable[kept].to_list() == [value]
        assert cleaned.column_counts == {f"cast:{name}": 1}

    @pytest.mark.parametrize(
        "column",
        [
            pytest.param(pa.array(["i9"], pa.large_string()), id="large"),
            pytest.param(pa.array(["i9"], pa.string()), id="small"),
            pytest.param(pa.array([b"i9"], pa.binary()), id="bytes, not said to be text"),
        ],
    )
    def test_all_that_parquet_knows_as_bytes_of_text_is_the_same_text(self, column: Any) -> None:
        cleaned = read_column("item_id", column)
        assert cleaned.usable["item_id"].to_list() == ["i9"]
        assert cleaned.column_counts == {}

    @pytest.mark.parametrize(
        "column",
        [
            pytest.param(
                pl.Series([NOON]).dt.cast_time_unit("ns").dt.convert_time_zone("Europe/Berlin"),
                id="aware, Berlin, nanoseconds",
            ),
            pytest.param(pl.Series([NOON]).dt.convert_time_zone("Europe/Berlin"), id="Berlin"),
            pytest.param(pa.array([NOON], pa.timestamp("us", "+01:00")), id="an offset"),
            pytest.param(pa.array([NOON], pa.timestamp("us", "Mars/Base")), id="no known zone"),
            pytest.param(pl.Series([NAIVE]), id="naive is UTC"),
            pytest.param(pl.Series([NAIVE]).dt.cast_time_unit("ms"), id="naive, milliseconds"),
            pytest.param(pl.Series([int(NOON_S)]), id="whole seconds"),
            pytest.param(pl.Series([NOON_S]), id="seconds"),
            pytest.param(pa.array([Decimal(int(NOON_S))]), id="decimal seconds"),
            pytest.param(pl.Series(["2017-03-01T12:00:00Z"]), id="text, Z"),
            pytest.param(pl.Series(["2017-03-01T13:00:00+01:00"]), id="text, offset"),
            pytest.param(pl.Series(["2017-03-01 13:00:00+0100"]), id="text, offset, blank"),
            pytest.param(pl.Series(["2017-03-01 12:00:00"]), id="text, naive is UTC"),
            pytest.param(pl.Series(["2017-03-01T12:00:00.000000"]), id="text, microseconds"),
            pytest.param(pl.Series([str(NOON_S)]), id="text, seconds"),
        ],
    )
    def test_all_common_forms_of_a_time_mean_the_same_second(self, column: Any) -> None:
        cleaned = read_column("ts", column)
        assert cleaned.usable["ts"].to_list() == [NOON_S]
        assert cleaned.column_counts == {"cast:ts": 1}

    def test_a_date_is_its_midnight(self) -> None:
        cleaned = read_column("ts", pl.Series([MIDNIGHT.date()]))
        assert cleaned.usable["ts"].to_list() == [MIDNIGHT.timestamp()]

    def test_times_of_an_old_spark_are_read(self) -> None:
        buffer = io.BytesIO()
        pq.write_table(conforming().to_arrow(), buffer, use_deprecated_int96_timestamps=True)
        cleaned = read_events(
            buffer.getvalue(), PATH, contract=SchemaConfig(), pseudonymizer=HASHER, span=DAY
        )
        assert cleaned.usable["ts"].to_list() == [NOON_S]

    def test_forms_may_be_mixed_in_one_file(self) -> None:
        forms = ["2017-03-01 12:00:00", "2017-03-01T12:00:00Z", str(int(NOON_S)), "2017-03-01"]
        usable = read_column("ts", pl.Series(forms)).usable
        assert usable["ts"].to_list() == [NOON_S, NOON_S, NOON_S, MIDNIGHT.timestamp()]

    def test_fractions_of_a_second_survive(self) -> None:
        for column in (pl.Series([NOON_S + 0.1]), pl.Series(["2017-03-01T12:00:00.1Z"])):
            assert read_column("ts", column).usable["ts"].to_list() == [NOON_S + 0.1]

    @settings(deadline=None)
    @given(values=st.lists(st.integers(-(2**63), 2**63 - 1) | st.none(), min_size=1))
    def test_an_integer_id_is_its_digits_whatever_its_size(self, values: list[int | None]) -> None:
        cleaned = read_column("item_id", pl.Series(values, dtype=pl.Int64))
        digits = [str(value) for value in values if value is not None]
        assert cleaned.usable["item_id"].to_list() == digits
        assert cleaned.column_counts["cast:item_id"] == len(digits)

    @settings(deadline=None)
    @given(values=st.lists(st.floats() | st.integers(-10, 10).map(float), min_size=1))
    def test_a_float_id_is_whole_or_refused(self, values: list[float]) -> None:
        cleaned = read_column("item_id", pl.Series(values, dtype=pl.Float64))
        whole = [v for v in values if v == v and abs(v) <= 2**53 and v == int(v)]
        assert cleaned.usable["item_id"].to_list() == [str(int(v)) for v in whole]


class TestWrongValues:
    @pytest.mark.parametrize(
        ("name", "column", "reason"),
        [
            pytest.param("price", pl.Series(["abc"]), "price is not a number", id="text price"),
            pytest.param(
                "position", pl.Series([3.7]), "position is not a whole number", id="float position"
            ),
            pytest.param(
                "position", pl.Series(["3.7"]), "position is not a whole number", id="text position"
            ),
            pytest.param(
                "position", pl.Series([2**31]), "position is not a whole number", id="too large"
            ),
            pytest.param(
                "quantity", pl.Series([True]), "quantity is not a number", id="boolean quantity"
            ),
            pytest.param(
                "price", pl.Series([datetime.time(1)]), "price is not a number", id="time of price"
            ),
            pytest.param(
                "query", pl.Series([1.5]), "query is not text or a whole number", id="float query"
            ),
        ],
    )
    def test_one_of_an_optional_column_refuses_its_row_or_becomes_null(
        self, name: str, column: pl.Series, reason: str
    ) -> None:
        cleaned = read_column(name, column)
        assert cleaned.refused["reason"].to_list() == [reason]
        assert cleaned.row_counts == {f"quarantined: {reason}": 1}
        cleaned = read_column(name, column, wrong_values="default")
        assert cleaned.refused.is_empty()
        assert cleaned.column_counts == {f"nulled:{name}": 1}
        if name not in UNUSED_EVENT_COLUMNS:
            assert cleaned.usable[name].to_list() == [None]

    @pytest.mark.parametrize("wrong_values", ["quarantine", "default"])
    @pytest.mark.parametrize(
        ("name", "column", "reason"),
        [
            pytest.param("ts", pl.Series(["yesterday"]), "ts is not a time", id="no date"),
            pytest.param("ts", pl.Series([float("inf")]), "ts is not a time", id="infinite"),
            pytest.param("ts", pl.Series([2**62]), "ts is not a time", id="overflow"),
            pytest.param("ts", pl.Series([""]), "no ts", id="blank"),
            pytest.param("ts", pl.Series([float("nan")]), "no ts", id="nan"),
            pytest.param("ts", pl.Series([None], dtype=pl.Null), "no ts", id="no type at all"),
            pytest.param(
                "ts", pl.Series([int(NOON_S * 1000)]), "ts outside its partition", id="milliseconds"
            ),
            pytest.param(
                "user_id", pl.Series([4.2]), "user_id is not text or a whole number", id="4.2"
            ),
            pytest.param(
                "user_id", pl.Series([1e17]), "user_id is not text or a whole number",
                id="a float that stands for several whole numbers",
            ),
            pytest.param(
                "item_id", pa.array([Decimal("4.2")]), "item_id is not text or a whole number",
                id="decimal",
            ),
            pytest.param("user_id", pl.Series([float("nan")]), "no user_id", id="nan user"),
            pytest.param(
                "user_key_id", pl.Series([0.5]), "user_key_id is not text or a whole number",
                id="key of a pseudonym",
            ),
        ],
    )  # fmt: skip
    def test_one_of_a_required_column_always_refuses_its_row(
        self, name: str, column: Any, reason: str, wrong_values: str
    ) -> None:
        cleaned = read_column(name, column, wrong_values=wrong_values)
        assert cleaned.usable.is_empty()
        assert cleaned.refused["reason"].to_list() == [reason]

    def test_its_neighbours_are_kept_and_counted_as_cast(self) -> None:
        cleaned = read_column("price", pl.Series(["1.5", "abc", None, "", " 2"]))
        assert len(cleaned.usable) == 4
        assert cleaned.row_counts == {"quarantined: price is not a number": 1}
        assert cleaned.column_counts == {"cast:price": 2, "nulled:price": 1}

    def test_nan_is_no_value_as_pandas_means_it(self) -> None:
        cleaned = read_column("propensity", pl.Series([0.5, float("nan")]))
        assert cleaned.usable["propensity"].to_list() == [0.5, None]
        assert cleaned.column_counts == {"nulled:propensity": 1}


class TestImpossibleColumns:
    @pytest.mark.parametrize(
        ("name", "column"),
        [
            pytest.param("ts", pl.Series([b"noon"]), id="binary time"),
            pytest.param("ts", pl.Series([datetime.time(12)]), id="time without a day"),
            pytest.param("ts", pl.Series([[1]]), id="list of times"),
            pytest.param("user_id", pl.Series([{"id": "alice"}]), id="struct of a user"),
            pytest.param("user_id", pl.Series([True]), id="boolean user"),
            pytest.param("price", pl.Series([[1.0, 2.0]]), id="list of prices"),
            pytest.param(
                "price", pa.array([[("a", 1.0)]], pa.map_(pa.string(), pa.float64())), id="map"
            ),
            pytest.param("price", pa.array([Decimal(1)], pa.decimal256(50)), id="decimal256"),
            pytest.param("item_id", pa.array([b"\xff"]), id="bytes that are no text"),
            pytest.param(
                "query", pa.array([b"\xff"]).view(pa.string()), id="text that is not UTF-8"
            ),
        ],
    )
    def test_a_column_of_which_no_value_fits_quarantines_the_file_in_one_line(
        self, name: str, column: Any
    ) -> None:
        with pytest.raises(DataError, match=f"^{re.escape(PATH)} ") as error:
            read_column(name, column)
        assert "\n" not in str(error.value)

    def test_names_and_metadata_that_are_no_text_quarantine_the_file_or_do_not_matter(self) -> None:
        table = conforming().to_arrow().replace_schema_metadata({b"\xff": b"\xff"})
        assert len(read(table).usable) == 1

    def test_the_text_of_a_float_is_another_user_than_the_float(self) -> None:
        users = [read_column("user_id", pl.Series([user])).usable["user"][0] for user in (42, 42.0)]
        assert users[0] == users[1] != read_column("user_id", pl.Series(["42.0"])).usable["user"][0]

    @pytest.mark.parametrize(
        "column",
        [
            pytest.param(pa.array([b"alice\xff"]), id="bytes"),
            pytest.param(pa.array([b"alice\xff"]).view(pa.string()), id="text"),
        ],
    )
    def test_no_value_is_named(self, column: Any) -> None:
        with pytest.raises(DataError) as error:
            read_column("user_id", column)
        assert "alice" not in str(error.value) and error.value.__cause__ is None

    def test_a_column_that_is_there_twice_quarantines_the_file(self) -> None:
        table = conforming().to_arrow()
        table = table.append_column("price", table["price"])
        with pytest.raises(DataError, match=r"columns twice: \['price'\]"):
            read(table)


class TestItems:
    def read(self, frame: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        return read_item_file(buffer.getvalue(), "items/a.parquet")

    def test_what_happened_to_their_columns_is_counted_too(self) -> None:
        rows, counts = self.read(
            pl.DataFrame({"item_id": [1, 2], "price": ["1.5", "dear"], "colour": ["red", "blue"]})
        )
        assert rows.schema == pl.Schema(ITEM_SCHEMA)
        assert rows.select("item_id", "price").rows() == [("1", 1.5), ("2", None)]
        assert counts == {
            "cast:item_id": 2, "cast:price": 1, "nulled:price": 1, "added:colour": 2,
            "missing:title": 2, "missing:category": 2, "missing:brand": 2, "missing:updated_at": 2,
        }  # fmt: skip

    def test_an_item_file_without_its_ids_is_a_data_error(self) -> None:
        with pytest.raises(DataError, match=r"has no column item_id; it has \['title'\]"):
            self.read(pl.DataFrame({"title": ["milk"]}))

    def test_a_column_of_which_no_value_fits_is_a_data_error(self) -> None:
        with pytest.raises(DataError, match="has Binary in column updated_at; write it as a time"):
            self.read(pl.DataFrame({"item_id": ["a"], "updated_at": [b"noon"]}))
