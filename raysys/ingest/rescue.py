"""Keeps what the contract does not know: the values of added columns, as one JSON text a row.

    added columns of usable rows -> rescue() -> event_id, ts, rescued

The raw user id is written nowhere: a value that equals it, also one inside of a list or struct, is
replaced by the row's pseudonym. A text that merely contains the id stays as it is.
"""

from __future__ import annotations

from collections import Counter

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
    kept = pl.DataFrame([_without_user(column, raw_users, rows["user"]) for column in extra])
    rescued = rows.select("event_id", "ts").with_columns(
        kept.select(pl.struct(pl.all()).struct.json_encode().alias("rescued")).to_series()
    )
    has_value = kept.select(pl.any_horizontal(pl.all().is_not_null())).to_series()
    return rescued.filter(has_value), +Counter(counts)


def _without_user(column: pl.Series, raw: pl.Series, pseudonym: pl.Series) -> pl.Series:
    """The column with the pseudonym for each value that equals the raw id of its row."""
    if column.dtype == pl.Binary:
        same = (column == raw.cast(pl.Binary)).fill_null(False)
        return pseudonym.zip_with(same, column.bin.encode("base64")).alias(column.name)
    if isinstance(column.dtype, pl.Struct):
        return _struct_without_user(column, raw, pseudonym)
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if isinstance(column.dtype, pl.List):
        return _list_without_user(column, raw, pseudonym)
    same = (convert(column, pl.String()) == raw).fill_null(False)
    if not same.any():
        return column
    return pseudonym.zip_with(same, column.cast(pl.String)).alias(column.name)


def _struct_without_user(column: pl.Series, raw: pl.Series, pseudonym: pl.Series) -> pl.Series:
    fields = [_without_user(field, raw, pseudonym) for field in column.struct.unnest()]
    value = pl.when(column.is_not_null()).then(pl.struct(pl.all()))
    return pl.DataFrame(fields).select(value.alias(column.name)).to_series()


def _list_without_user(column: pl.Series, raw: pl.Series, pseudonym: pl.Series) -> pl.Series:
    rows = pl.DataFrame({"row": pl.int_range(len(column), eager=True), "value": column})
    flat = rows.filter(pl.col("value").list.len() > 0).explode("value")
    owner = flat["row"]
    values = _without_user(flat["value"], raw.gather(owner), pseudonym.gather(owner))
    lists = (
        pl.DataFrame({"row": owner, "kept": values})
        .group_by("row", maintain_order=True)
        .agg("kept")
    )
    joined = rows.join(lists, on="row", how="left", maintain_order="left")
    empty = pl.Series([[]], dtype=lists.schema["kept"])
    kept = pl.when(pl.col("value").list.len() == 0).then(pl.lit(empty).first()).otherwise("kept")
    return joined.select(kept.alias(column.name)).to_series()
