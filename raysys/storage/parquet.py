"""Frames as the bytes of parquet files, which is how a root takes and gives them."""

from __future__ import annotations

import io

import polars as pl


def to_parquet(frame: pl.DataFrame) -> bytes:
    """Returns the bytes of a parquet file."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()
