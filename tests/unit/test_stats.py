"""The catalogue only grows, and its statistics are made of noised counts and nothing else."""

from __future__ import annotations

import datetime
import io
import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.ingest.features import DAY_S
from raysys.ingest.items import read_items
from raysys.ingest.stats import ItemState, load_item_state, release, save_item_state, upsert
from raysys.ledger.records import FileRef
from raysys.partitions.periods import Period
from raysys.partitions.schema import ITEM_SCHEMA
from raysys.storage import Root
from tests.shop import HALF_LIFE_S


def day(number: int) -> datetime.datetime:
    return datetime.datetime(2017, 3, number, tzinfo=datetime.UTC)


def item(item_id: str, updated: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "item_id": item_id, "title": item_id.upper(), "category": "food", "brand": None,
        "price": 1.0, "updated_at": day(updated), **changes,
    }  # fmt: skip


def items(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=ITEM_SCHEMA)


def state(*rows: dict[str, Any]) -> ItemState:
    return upsert(ItemState.empty(HALF_LIFE_S), items(*(rows or (item("a"), item("b")))))


def released(base: ItemState, *counts: list[float], std: float = 0.0) -> list[ItemState]:
    """States after periods of a day each."""
    ends = [base.as_of + (i + 1) * DAY_S for i in range(len(counts))]
    return release(base, np.array(counts, np.float64), days(*ends), noise_std=std)


def days(*ends: float) -> list[Period]:
    """Periods of a day each."""
    return [Period(end=end, num_days=1.0) for end in ends]


class TestUpsert:
    def test_new_items_are_appended_by_id_behind_the_known_ones(self) -> None:
        grown = upsert(state(item("m")), items(item("z"), item("a")))
        assert grown.catalogue["item_id"].to_list() == ["m", "a", "z"]

    def test_a_change_keeps_the_index_and_the_statistics(self) -> None:
        base = released(state(), [5.0, 7.0])[-1]
        changed = upsert(base, items(item("b", 2, price=9.0), item("0")))
        assert changed.catalogue["item_id"].to_list() == ["a", "b", "0"]
        assert changed.catalogue["price"].to_list() == [1.0, 9.0, 1.0]
        assert changed.popularity.tolist() == [5.0, 7.0, 0.0]
        assert changed.recent.tolist() == [5.0, 7.0, 0.0]

    @pytest.mark.parametrize("in_one_update", [True, False], ids=["one update", "two updates"])
    @pytest.mark.parametrize("turned", [False, True], ids=["old first", "new first"])
    def test_the_newest_row_of_an_item_counts_in_whatever_order_they_come(
        self, in_one_update: bool, turned: bool
    ) -> None:
        old, new = item("a", 1, title="old"), item("a", 2, title="new")
        first, second = (new, old) if turned else (old, new)
        result = state(first, second) if in_one_update else upsert(state(first), items(second))
        assert result.catalogue["title"].to_list() == ["new"]

    def test_of_rows_of_one_moment_the_last_counts(self) -> None:
        result = upsert(state(item("a", title="x")), items(item("a", title="y")))
        assert result.catalogue["title"].to_list() == ["y"]

    def test_nothing_new_changes_nothing(self) -> None:
        base = state()
        assert upsert(base, items()).catalogue.equals(base.catalogue)

    @settings(deadline=None)
    @given(
        batches=st.lists(
            st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 9)), max_size=6),
            max_size=5,
        )
    )
    def test_indexes_are_stable_and_the_newest_row_counts(
        self, batches: list[list[tuple[str, int]]]
    ) -> None:
        current, newest = ItemState.empty(HALF_LIFE_S), dict[str, int]()
        for batch in batches:
            before = current.catalogue["item_id"].to_list()
            current = upsert(current, items(*(item(name, moment) for name, moment in batch)))
            ids = current.catalogue["item_id"].to_list()
            assert ids[: len(before)] == before
            assert len(set(ids)) == len(ids) == len(current.popularity) == len(current.recent)
            for name, moment in batch:
                newest[name] = max(newest.get(name, 0), moment)
        found = current.catalogue.select("item_id", pl.col("updated_at").dt.day()).rows()
        assert dict(found) == newest


class TestRelease:
    def test_each_period_has_what_was_public_when_it_began(self) -> None:
        base = state()
        states = released(base, [4.0, 0.0], [0.0, 8.0])
        assert states[0] is base
        assert states[1].recent.tolist() == [4.0, 0.0]
        assert states[1].as_of == DAY_S
        assert states[2].recent.tolist() == [0.0, 8.0]
        assert len(states) == 3

    def test_a_later_period_does_not_change_an_earlier_state(self) -> None:
        base = state()
        one, other = (released(base, [4.0, 0.0], last)[1] for last in ([0.0, 8.0], [9.0, 1.0]))
        assert one.popularity.tolist() == other.popularity.tolist()

    def test_popularity_halves_with_each_half_life_and_noise_decays_with_it(self) -> None:
        last = release(
            state(), np.array([[8.0, 0.0], [1.0, 1.0]]), days(0.0, HALF_LIFE_S), noise_std=2.0
        )[-1]
        assert last.popularity.tolist() == [5.0, 1.0]
        assert last.popularity_std == pytest.approx(math.hypot(1.0, 2.0))
        assert last.num_days == pytest.approx(1.5)

    def test_its_noise_has_the_standard_deviation_that_the_state_says(self) -> None:
        rng, num_items, std = np.random.default_rng(0), 50_000, 3.0
        base = ItemState.empty(HALF_LIFE_S)
        base = upsert(base, items(*(item(f"{i:05}") for i in range(num_items))))
        noise = rng.normal(0, std, (3, num_items))
        ends = [0.0, HALF_LIFE_S, 2 * HALF_LIFE_S]
        last = release(base, noise, days(*ends), noise_std=std)[-1]
        assert float(last.popularity.std()) == pytest.approx(last.popularity_std, rel=0.02)

    def test_updates_one_after_the_other_equal_one_with_all_periods(self) -> None:
        at_once = released(state(), [4.0, 1.0], [2.0, 8.0], std=1.5)[-1]
        one_by_one = released(released(state(), [4.0, 1.0], std=1.5)[-1], [2.0, 8.0], std=1.5)[-1]
        assert at_once.popularity == pytest.approx(one_by_one.popularity)
        assert at_once.popularity_std == pytest.approx(one_by_one.popularity_std)
        assert at_once.as_of == one_by_one.as_of

    def test_late_periods_do_not_turn_time_back(self) -> None:
        base = release(state(), np.array([[1.0, 1.0]]), days(10 * DAY_S), noise_std=0.0)[-1]
        late = release(base, np.array([[1.0, 0.0]]), days(5 * DAY_S), noise_std=0.0)[-1]
        assert late.as_of == 10 * DAY_S
        aged = 2 ** (-5 * DAY_S / HALF_LIFE_S)
        assert late.popularity == pytest.approx([1.0 + aged, 1.0])
        assert late.recent.tolist() == [1.0, 1.0]

    def test_late_periods_end_up_as_if_they_had_come_in_time(self) -> None:
        counts = np.array([[4.0, 1.0], [2.0, 8.0]])
        in_time = release(state(), counts, days(DAY_S, 9 * DAY_S), noise_std=1.5)[-1]
        newer_first = release(state(), counts[1:], days(9 * DAY_S), noise_std=1.5)[-1]
        late = release(newer_first, counts[:1], days(DAY_S), noise_std=1.5)[-1]
        assert late.popularity == pytest.approx(in_time.popularity)
        assert late.popularity_std == pytest.approx(in_time.popularity_std)
        assert late.recent.tolist() == in_time.recent.tolist()
        assert late.num_days == pytest.approx(in_time.num_days)

    def test_hours_of_constant_sales_have_no_trend(self) -> None:
        hours = [Period(end=(h + 1) * 3600.0, num_days=1 / 24) for h in range(24 * 30)]
        counts = np.full((len(hours), 2), 50.0)
        last = release(state(), counts, hours, noise_std=0.0)[-1]
        assert np.abs(last.statistics()[1]).max() < 0.1

    def test_a_late_file_of_the_newest_days_joins_them(self) -> None:
        counts = np.array([[50.0, 50.0], [50.0, 50.0]])
        last = release(state(), counts, days(DAY_S, 2 * DAY_S), noise_std=0.0)[-1]
        late = release(last, np.array([[1.0, 0.0]]), days(2 * DAY_S), noise_std=2.0)[-1]
        assert late.recent.tolist() == [51.0, 50.0]
        assert (late.recent_days, late.num_days) == (1.0, last.num_days)
        assert late.recent_std == 2.0

    def test_a_trend_compares_sales_a_day_not_periods_of_different_length(self) -> None:
        steady = [Period(end=7 * DAY_S, num_days=7.0), Period(end=8 * DAY_S, num_days=1.0)]
        counts = np.array([[700.0, 700.0], [100.0, 300.0]])
        last = release(state(), counts, steady, noise_std=0.0)[-1]
        same, doubled = last.statistics()[1]
        assert abs(same) < 0.1
        assert doubled > 0.4


class TestTable:
    def test_popularity_that_may_be_noise_is_none(self) -> None:
        table = released(state(item("a"), item("b"), item("c")), [-5.0, 7.4, 9.0], std=3.0)[
            -1
        ].table()
        assert table.popularity.tolist() == [0.0, 0.0, 9.0]
        assert (table.trend[:2] == 0).all()

    @settings(deadline=None)
    @given(
        counts=st.lists(
            st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2), min_size=1, max_size=4
        ),
        std=st.floats(0, 1e4),
    )
    def test_whatever_the_noise_the_table_is_in_bounds(
        self, counts: list[list[float]], std: float
    ) -> None:
        table = released(state(), *counts, std=std)[-1].table()
        assert (table.popularity >= 0).all()
        assert (np.abs(table.trend) <= 1).all()
        assert np.isfinite(table.popularity).all()

    def test_a_rising_item_has_a_positive_trend_and_a_new_one_none(self) -> None:
        risen = released(state(), [10.0, 100.0], [100.0, 10.0])[-1]
        trend = upsert(risen, items(item("new"))).table().trend
        assert trend[0] > 0 > trend[1]
        assert trend[2] == 0

    def test_missing_attributes_are_codes_below_zero_and_a_price_that_is_no_number(self) -> None:
        table = state(
            item("a", category=None, brand=None, price=None), item("b", brand="x"), item("c")
        ).table()
        assert table.category.tolist() == [-1, 0, 0]
        assert table.brand.tolist() == [-1, 0, -1]
        assert np.isnan(table.price[0]) and table.price[1] == 1.0

    def test_texts_join_what_there_is(self) -> None:
        table = state(
            item("a", title="Milk", category="Dairy", brand="Best"),
            item("b", title="Milk", category=None, brand="Best"),
            item("c", title="Milk", category=None, brand=None),
            item("d", title=None, category=None, brand=None),
        ).table()
        assert table.texts[0] == "Milk, Dairy, Best"
        assert table.texts[2:] == ["Milk", ""]

    def test_an_empty_catalogue_is_an_empty_table(self) -> None:
        assert len(ItemState.empty(HALF_LIFE_S).table()) == 0


class TestSavedState:
    def test_a_state_reads_back_as_it_was(self, local_root: Root) -> None:
        saved = released(state(item("a", price=None), item("b")), [4.25, -1.5], std=2.0)[-1]
        save_item_state(local_root, "u0001-aaaaaa", saved)
        read = load_item_state(local_root, "u0001-aaaaaa")
        assert read.catalogue.equals(saved.catalogue)
        assert read.catalogue.schema == saved.catalogue.schema
        for name in ("popularity", "recent"):
            assert getattr(read, name).tolist() == getattr(saved, name).tolist()
        for name in (
            "popularity_std", "recent_std", "recent_days", "num_days", "as_of", "half_life_s",
        ):  # fmt: skip
            assert getattr(read, name) == getattr(saved, name)

    def test_raw_counts_are_nowhere_in_what_is_saved(self, local_root: Root) -> None:
        raw = np.array([[4321.0, 1234.0]])
        noised = raw + np.array([[0.7, -3.3]])
        save_item_state(
            local_root, "u0001-aaaaaa", release(state(), noised, days(DAY_S), noise_std=3.0)[-1]
        )
        read = load_item_state(local_root, "u0001-aaaaaa")
        saved = np.concatenate([read.popularity, read.recent])
        assert np.isin(noised, saved).all()
        assert not np.isin(raw, saved).any()


class TestReadItems:
    def write(self, root: Root, frame: pl.DataFrame, name: str = "a") -> FileRef:
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        path = f"items/dt=2017-03-01/{name}.parquet"
        root.put(path, buffer.getvalue())
        return FileRef(path=path, size_bytes=1, etag="e")

    def test_rows_without_an_id_are_left_out(self, local_root: Root) -> None:
        frame = pl.DataFrame([item("a"), item(""), {**item("c"), "item_id": None}])
        read, _, _ = read_items(local_root, [self.write(local_root, frame)])
        assert read["item_id"].to_list() == ["a"]

    def test_missing_columns_are_null_and_a_row_without_time_is_the_oldest(
        self, local_root: Root
    ) -> None:
        bare = self.write(local_root, pl.DataFrame({"item_id": ["a"]}), "z")
        full = self.write(local_root, pl.DataFrame([item("a", title="Milk")]), "b")
        read, _, _ = read_items(local_root, [full, bare])
        assert read.schema == pl.Schema(ITEM_SCHEMA)
        assert state(*read.rows(named=True)).catalogue["title"].to_list() == ["Milk"]

    @pytest.mark.parametrize(
        "updated_at",
        [
            pytest.param(pl.Series([day(2)]), id="aware"),
            pytest.param(pl.Series([day(2).replace(tzinfo=None)]), id="naive is UTC"),
            pytest.param(pl.Series([int(day(2).timestamp())]), id="seconds"),
            pytest.param(pl.Series(["2017-03-02T00:00:00Z"]), id="text"),
        ],
    )
    def test_times_are_read_as_those_of_events(
        self, local_root: Root, updated_at: pl.Series
    ) -> None:
        frame = pl.DataFrame([item("a")]).with_columns(updated_at.alias("updated_at"))
        read, _, _ = read_items(local_root, [self.write(local_root, frame)])
        assert read["updated_at"].to_list() == [day(2)]

    def test_a_file_without_ids_or_of_wrong_types_is_named(self, local_root: Root) -> None:
        good = self.write(local_root, pl.DataFrame([item("a")]), "good")
        nameless = self.write(local_root, pl.DataFrame({"title": ["Milk"]}), "nameless")
        nested = self.write(local_root, pl.DataFrame({"item_id": [["a"]]}), "nested")
        local_root.put("items/dt=2017-03-01/junk.parquet", b"no parquet")
        junk = FileRef(path="items/dt=2017-03-01/junk.parquet", size_bytes=1, etag="e")
        read, _, bad_files = read_items(local_root, [nameless, nested, junk, good])
        assert read["item_id"].to_list() == ["a"], "one bad file does not hold the others up"
        reasons = {path.rpartition("/")[2]: reason for path, reason in bad_files.items()}
        assert reasons.keys() == {"nameless.parquet", "nested.parquet", "junk.parquet"}
        assert "has no column item_id" in reasons["nameless.parquet"]
        assert "has nested values in column item_id" in reasons["nested.parquet"]
        assert "is not a readable parquet file" in reasons["junk.parquet"]

    def test_no_files_are_no_rows_of_the_contract(self, local_root: Root) -> None:
        read, _, _ = read_items(local_root, [])
        assert read.is_empty()
        assert read.schema == pl.Schema(ITEM_SCHEMA)
