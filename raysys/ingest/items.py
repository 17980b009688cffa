"""Reads catalogue upserts from item files.

items/dt=…/*.parquet -> read_items() -> (rows, column counts, files that cannot be used) -> upsert()
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable

import polars as pl

from raysys.errors import DataError
from raysys.ingest.read import read_item_file
from raysys.ledger.records import FileRef
from raysys.partitions.schema import ITEM_SCHEMA
from raysys.storage import Root


def read_items(
    root: Root, item_files: Iterable[FileRef]
) -> tuple[pl.DataFrame, Counter[str], dict[str, str]]:
    """Reads catalogue upserts.

    Returns:
      Their rows, how many of them by what happened to a column (`items:nulled:price`), and path ->
      reason of the files that cannot be used.
    """
    frames, bad_files = [pl.DataFrame(schema=ITEM_SCHEMA)], {}
    counts: Counter[str] = Counter()
    for file in item_files:
        try:
            with root.open_input(file.path) as source:
                rows, columns = read_item_file(source, file.path)
        except DataError as error:
            bad_files[file.path] = str(error)
            continue
        frames.append(rows)
        counts.update({f"items:{name}": num for name, num in columns.items()})
    epoch = pl.lit(datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC), ITEM_SCHEMA["updated_at"])
    rows = pl.concat(frames).filter(pl.col("item_id").fill_null("") != "")
    return rows.with_columns(pl.col("updated_at").fill_null(epoch)), counts, bad_files
