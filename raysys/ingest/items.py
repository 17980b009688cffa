"""Reads catalogue upserts from item files.

items/dt=…/*.parquet -> read_items() -> (rows, files that cannot be used) -> stats.upsert()
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable

import polars as pl

from raysys.errors import DataError
from raysys.ingest.clean import read_parquet_file, select_as
from raysys.ledger.records import FileRef
from raysys.partitions.schema import ITEM_SCHEMA
from raysys.storage import Root


def read_items(root: Root, item_files: Iterable[FileRef]) -> tuple[pl.DataFrame, dict[str, str]]:
    """Reads catalogue upserts.

    Returns:
      Their rows, and path -> reason of the files that cannot be used.
    """
    frames, bad_files = [pl.DataFrame(schema=ITEM_SCHEMA)], {}
    for file in item_files:
        try:
            frames.append(_read_item_file(root, file.path))
        except DataError as error:
            bad_files[file.path] = str(error)
    epoch = pl.lit(datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC), ITEM_SCHEMA["updated_at"])
    rows = pl.concat(frames).filter(pl.col("item_id").fill_null("") != "")
    return rows.with_columns(pl.col("updated_at").fill_null(epoch)), bad_files


def _read_item_file(root: Root, path: str) -> pl.DataFrame:
    frame = read_parquet_file(root.read_bytes(path), path)
    if "item_id" not in frame.columns:
        raise DataError(f"{path} has no column item_id; it has {frame.columns}")
    return select_as(frame, ITEM_SCHEMA, path)
