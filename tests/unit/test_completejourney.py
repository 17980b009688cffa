"""The import of the real shop: one partition a day, a catalogue without foresight, repeatable."""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from raysys.config import SchemaConfig
from raysys.errors import ConfigError
from raysys.ingest import completejourney
from raysys.ingest.completejourney import import_days, load_products, load_transactions
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.read import read_events
from raysys.partitions.discover import discover
from raysys.partitions.schema import ITEM_SCHEMA
from raysys.storage import Root

FIRST, LAST = datetime.date(2017, 1, 10), datetime.date(2017, 1, 12)
NUM_PURCHASES = 10_069
"""Of those three days: counted in the data package with `transaction_timestamp` alone."""


@pytest.fixture(scope="module")
def january() -> pl.DataFrame:
    """The real purchases until a week after the days that are imported."""
    end = datetime.datetime(2017, 1, 20, tzinfo=datetime.UTC)
    return load_transactions().filter(pl.col("ts") < end)


@pytest.fixture(scope="module", autouse=True)
def _read_the_data_once(january: pl.DataFrame) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        products = load_products()
        patch.setattr(completejourney, "load_transactions", lambda: january)
        patch.setattr(completejourney, "load_products", lambda: products)
        yield


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A root with the three days. Not to be written to."""
    root = new_root(tmp_path_factory.mktemp("shop"))
    assert import_days(root, FIRST, LAST) == NUM_PURCHASES
    return root


def new_root(folder: Path) -> Root:
    return Root((folder / "root").as_uri())


def contents(root: Root) -> dict[str, bytes]:
    files = [*root.list("events"), *root.list("items")]
    return {file.path: root.read_bytes(file.path) for file in files}


def read(root: Root, prefix: str) -> pl.DataFrame:
    return pl.concat(
        pl.read_parquet(io.BytesIO(root.read_bytes(file.path))).with_columns(
            day=pl.lit(file.path.split("/")[1].removeprefix("dt=")).str.to_date()
        )
        for file in root.list(prefix)
    )


class TestEvents:
    def test_each_day_is_a_partition_that_discovery_finds(self, imported: Root) -> None:
        keys = [partition.key for partition in discover(imported).partitions]
        assert keys == [f"events/dt=2017-01-{day}" for day in (10, 11, 12)]

    def test_every_purchase_is_in_the_partition_of_its_day_once(
        self, imported: Root, january: pl.DataFrame
    ) -> None:
        events = read(imported, "events")
        assert events.select(pl.col("ts").dt.date() == pl.col("day")).to_series().all()
        assert events["event_id"].is_unique().all()
        of_these_days = january.filter(pl.col("ts").dt.date().is_between(FIRST, LAST))
        assert set(events["event_id"]) == set(of_these_days["event_id"])
        assert len(events) == len(of_these_days) == NUM_PURCHASES

    def test_all_rows_pass_the_door_of_ingest(self, imported: Root) -> None:
        hasher = Pseudonymizer(b"0123456789abcdef")
        for partition in discover(imported).partitions:
            path = partition.files[0].path
            date = datetime.datetime.fromisoformat(partition.key.removeprefix("events/dt="))
            start = date.replace(tzinfo=datetime.UTC).timestamp()
            cleaned = read_events(
                imported.read_bytes(path),
                path,
                contract=SchemaConfig(added_columns="fail"),
                pseudonymizer=hasher,
                span=(start, start + 86_400),
            )
            assert cleaned.refused.is_empty()
            assert len(cleaned.usable) > 2000

    def test_a_basket_is_a_request_of_one_household(self, imported: Root) -> None:
        baskets = (
            read(imported, "events")
            .group_by("request_id")
            .agg(pl.col("user_id").n_unique(), pl.len())
        )
        assert baskets["user_id"].max() == 1
        assert baskets["len"].max() > 10


class TestCatalogue:
    def test_it_says_the_same_whether_or_not_there_is_a_future(
        self, imported: Root, january: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        until = january.filter(pl.col("ts").dt.date() <= LAST)
        assert len(until) < len(january)
        monkeypatch.setattr(completejourney, "load_transactions", lambda: until)
        without_future = new_root(tmp_path)
        import_days(without_future, FIRST, LAST)
        assert contents(without_future) == contents(imported)

    def test_an_item_is_listed_on_the_day_of_its_fifth_sale(
        self, imported: Root, january: pl.DataFrame
    ) -> None:
        items = read(imported, "items")
        assert items["item_id"].is_unique().all()
        sales = january.sort("ts", "event_id").group_by("item_id", maintain_order=True)
        fifth = sales.agg(pl.col("ts").get(4, null_on_oob=True).dt.date().alias("fifth"))
        joined = items.join(fifth, on="item_id")
        listed_on = pl.max_horizontal("fifth", pl.lit(FIRST))
        assert joined.select(pl.col("day") == listed_on).to_series().all()
        # A handful of products are sold that the package's table of products does not describe.
        described = fifth.join(load_products(), on="item_id", how="semi")
        due = described.filter(pl.col("fifth") <= LAST)
        assert len(items) == len(due)
        # Most items that are sold at all come to their fifth sale later, or never.
        assert len(items) < january["item_id"].n_unique() / 4

    def test_no_row_is_of_a_later_moment_than_its_day(self, imported: Root) -> None:
        items = read(imported, "items")
        assert items.select((pl.col("updated_at").dt.date() <= pl.col("day")).all()).item()
        assert items.drop("day").schema == pl.Schema(ITEM_SCHEMA)
        assert items["title"].null_count() == 0

    def test_the_price_is_the_median_of_the_sales_so_far(
        self, imported: Root, january: pl.DataFrame
    ) -> None:
        items = read(imported, "items").sort("item_id").head(20)
        for item_id, price in items.select("item_id", "price").rows():
            sales = january.filter(pl.col("item_id") == item_id).sort("ts", "event_id").head(5)
            assert sales["unit_price"].median() == pytest.approx(price)

    def test_a_higher_threshold_lists_fewer_items(self, imported: Root, tmp_path: Path) -> None:
        root = new_root(tmp_path)
        import_days(root, FIRST, FIRST, min_sales=20)
        assert 0 < len(read(root, "items")) < len(read(imported, "items")) / 3


class TestRepeating:
    def test_a_second_import_changes_nothing(self, imported: Root, tmp_path: Path) -> None:
        root = new_root(tmp_path)
        import_days(root, FIRST, LAST)
        before = root.list("events"), root.list("items")
        assert import_days(root, FIRST, LAST) == NUM_PURCHASES
        assert (root.list("events"), root.list("items")) == before
        assert contents(root) == contents(imported)

    def test_days_imported_one_by_one_equal_all_at_once(
        self, imported: Root, tmp_path: Path
    ) -> None:
        root, day = new_root(tmp_path), datetime.timedelta(days=1)
        num = sum(import_days(root, FIRST + i * day, FIRST + i * day) for i in range(3))
        assert num == NUM_PURCHASES
        assert contents(root) == contents(imported)

    def test_an_import_that_was_killed_is_completed_by_the_next(
        self, imported: Root, tmp_path: Path
    ) -> None:
        class Killed(Exception):
            pass

        class DyingRoot(Root):
            writes_left = 2

            def put_if_absent(self, path: str, data: bytes) -> bool:
                if self.writes_left == 0:
                    raise Killed
                self.writes_left -= 1
                return super().put_if_absent(path, data)

        root = new_root(tmp_path)
        with pytest.raises(Killed):
            import_days(DyingRoot(root.uri), FIRST, LAST)
        assert len(contents(root)) == 2
        import_days(root, FIRST, LAST)
        assert contents(root) == contents(imported)

    def test_progress_is_told_for_each_day(self, imported: Root) -> None:
        told: list[str] = []
        import_days(imported, FIRST, LAST, on_partition=told.append)
        assert told == [f"events/dt=2017-01-{day}" for day in (10, 11, 12)]


@pytest.mark.parametrize(
    ("first", "last"),
    [
        pytest.param(datetime.date(2016, 12, 31), LAST, id="before the data"),
        pytest.param(FIRST, datetime.date(2018, 6, 1), id="after the data"),
        pytest.param(LAST, FIRST, id="turned round"),
    ],
)
def test_days_out_of_range_are_refused_with_the_range_before_anything_is_written(
    tmp_path: Path, first: datetime.date, last: datetime.date
) -> None:
    root = new_root(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a range within the data's 2017-01-01 to"):
        import_days(root, first, last)
    assert contents(root) == {}


def test_a_threshold_of_no_sales_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min_sales 0: expected at least 1"):
        import_days(new_root(tmp_path), FIRST, LAST, min_sales=0)
