"""Keeps what the contract does not know: the values of added columns, as one JSON text a row.

    added columns of usable rows -> rescue() -> event_id, ts, rescued

The raw user id is written nowhere: a value that equals it is replaced by the row's pseudonym, also
inside of nested values, whose numbers become text for that. A text that merely contains the id
stays as it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import polars as pl

from raysys.ingest.contract import convert

RESCUED_SCHEMA: dict[str, pl.DataType] = {
    "event_id": pl.String(),
    "ts": pl.Float64(),
    "rescued": pl.String(),
}


def rescue(
    extra: pl.DataFrame, *, raw_users: pl.Series, rows: pl.DataFrame
) -> tuple[pl.DataFrame, Counter[str]]:
    """Returns RESCUED_SCHEMA of the rows that have a value, and `rescued:NAME` counted in rows.

    Args:
      extra: The added columns, row by row as in the other two.
      raw_users: The users as the shop wrote them.
      rows: `user`, `event_id` and `ts`.
    """
    counts = {f"rescued:{name}": len(extra) - extra[name].null_count() for name in extra.columns}
    columns = [_without_user(extra[name], raw_users, rows["user"]) for name in extra.columns]
    kept = pl.DataFrame(columns)
    text = kept.select(pl.struct(pl.all()).struct.json_encode()).to_series()
    if any(column.dtype.is_nested() for column in columns):
        text = _without_nested_user(text, raw_users, rows["user"])
    has_value = kept.select(pl.any_horizontal(pl.all().is_not_null())).to_series()
    rescued = rows.select("event_id", "ts").with_columns(rescued=text).filter(has_value)
    return rescued, +Counter(counts)


def _without_user(column: pl.Series, raw: pl.Series, pseudonym: pl.Series) -> pl.Series:
    if column.dtype.is_nested():
        return column.cast(_with_text_leaves(column.dtype))
    if column.dtype == pl.Binary:
        return column.bin.encode("base64")
    same = (convert(column, pl.String()) == raw).fill_null(False)
    if not same.any():
        return column
    return pseudonym.zip_with(same, column.cast(pl.String)).alias(column.name)


def _with_text_leaves(dtype: Any) -> pl.DataType:
    if isinstance(dtype, pl.Struct):
        return pl.Struct({field.name: _with_text_leaves(field.dtype) for field in dtype.fields})
    if isinstance(dtype, pl.List | pl.Array):
        return pl.List(_with_text_leaves(dtype.inner))
    return pl.String()


def _without_nested_user(text: pl.Series, raw: pl.Series, pseudonym: pl.Series) -> pl.Series:
    quoted = raw.alias("v").to_frame().select(pl.struct("v").struct.json_encode()).to_series()
    inside = quoted.str.slice(len('{"v":"')).str.head(-len('"}'))
    frame = pl.DataFrame({"text": text, "raw": inside, "pseudonym": pseudonym})
    result = pl.col("text")
    for suffix in ("", ".0"):  # as a float leaf writes a whole number
        old = pl.concat_str(pl.lit('"'), "raw", pl.lit(f'{suffix}"'))
        new = pl.concat_str(pl.lit('"'), "pseudonym", pl.lit('"'))
        result = result.str.split(old).list.join(new)
    return frame.select(result).to_series()
