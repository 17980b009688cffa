"""Fits columns to the contract's types, and says of each value whether it fits.

    columns as read -> fit() -> Fitted: the contract's columns, and where values do not fit

What is converted loses nothing: whole numbers become text, 42.0 becomes "42" (pandas makes floats
of integer columns with gaps), text is parsed, times become UTC microseconds. Blank text and NaN
are no value, as is null. All else that does not fit is null and masked, so that its row can be
judged by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import polars as pl

from raysys.partitions.schema import can_fit

_EXACT_UP_TO: dict[type[pl.DataType], int] = {
    pl.Float16: 2**11,
    pl.Float32: 2**24,
    pl.Float64: 2**53,
}
"""Above this a float no longer tells a whole number from the next."""
_TIME_FORMATS = (
    "%Y-%m-%dT%H:%M:%S%.f%#z",
    "%Y-%m-%d %H:%M:%S%.f%#z",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%d",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Columns in the types of a schema."""

    frame: pl.DataFrame
    """The schema's columns that there are, in the order in which they were asked for."""
    wrong: dict[str, pl.Series]
    """Masks of the values that do not fit, by column; null in `frame`. Without columns that fit."""
    counts: Counter[str]
    """Rows by what happened to a column: `cast:price`, `nulled:price` (blank text and NaN)."""


def fit(frame: pl.DataFrame, names: Iterable[str], schema: Mapping[str, pl.DataType]) -> Fitted:
    """Converts columns to the types of `schema`."""
    columns, wrong, counts = [], {}, Counter[str]()
    for name in names:
        raw = frame[name]
        given = _given(raw, schema[name])
        fitted = convert(given, schema[name])
        columns.append(fitted)
        if num_wrong := fitted.null_count() - given.null_count():
            wrong[name] = given.is_not_null() & fitted.is_null()
            assert wrong[name].sum() == num_wrong
        if num_nulled := given.null_count() - raw.null_count():
            counts[f"nulled:{name}"] = num_nulled
        if raw.dtype != schema[name] and (num_cast := len(raw) - fitted.null_count()):
            counts[f"cast:{name}"] = num_cast
    return Fitted(frame=pl.DataFrame(columns), wrong=wrong, counts=counts)


def complete(frame: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """Returns the schema's columns in its order; one that is missing is null throughout."""
    return frame.select(
        pl.col(name) if name in frame.columns else pl.lit(None, dtype).alias(name)
        for name, dtype in schema.items()
    )


def convert(column: pl.Series, wanted: pl.DataType) -> pl.Series:
    """Returns the column in the contract's type; null where a value does not fit."""
    if column.dtype == wanted:
        return column
    if not can_fit(column.dtype, wanted):
        return _nulls(column, wanted)
    if column.dtype in (pl.Categorical, pl.Enum):
        column = column.cast(pl.String)
    if isinstance(wanted, pl.String):
        return _text(column)
    if isinstance(wanted, pl.Datetime):
        return _time(column, wanted)
    if column.dtype == pl.String:
        column = column.cast(pl.Float64, strict=False)
    return (column if wanted.is_float() else _whole(column)).cast(wanted, strict=False)


def _given(column: pl.Series, wanted: pl.DataType) -> pl.Series:
    """The column with null for what is no value."""
    if column.dtype.is_float():
        return column.fill_nan(None) if column.is_nan().any() else column
    if column.dtype in (pl.Categorical, pl.Enum):
        column = column.cast(pl.String)
    if column.dtype == pl.String and not isinstance(wanted, pl.String):
        return column.str.strip_chars().replace("", None)
    return column


def _whole(column: pl.Series) -> pl.Series:
    """The column with null for what is no whole number that its type can tell apart."""
    if column.dtype.is_integer():
        return column
    x = pl.col(column.name)
    whole = x.round(0) == x
    if column.dtype.is_float():
        whole &= x.abs() <= _EXACT_UP_TO[type(column.dtype)]
    return column.to_frame().select(pl.when(whole).then(x)).to_series()


def _text(column: pl.Series) -> pl.Series:
    if column.dtype.is_float():
        return _whole(column).cast(pl.Int64).cast(pl.String)
    if column.dtype.is_decimal():
        return _whole(column).cast(pl.String).str.replace(r"\.0*$", "")
    return column.cast(pl.String)


def _time(column: pl.Series, wanted: pl.Datetime) -> pl.Series:
    if isinstance(column.dtype, pl.Datetime):
        aware = column if column.dtype.time_zone else column.dt.replace_time_zone("UTC")
        return aware.cast(wanted)
    if column.dtype == pl.String:
        return _parsed_time(column, wanted)
    if column.dtype == pl.Date:
        return column.cast(wanted, strict=False)
    micros = (column.cast(pl.Float64, strict=False) * 1e6).round(0)
    return micros.cast(pl.Int64, strict=False).cast(wanted)


def _parsed_time(column: pl.Series, wanted: pl.Datetime) -> pl.Series:
    """Tries one format after the other, the rest as UNIX seconds; a file mostly has one."""
    num_given = len(column) - column.null_count()
    parsed = _nulls(column, wanted)
    for form in _TIME_FORMATS:
        if len(parsed) - parsed.null_count() == num_given:
            return parsed
        times = column.str.to_datetime(form, time_unit="us", time_zone="UTC", strict=False)
        parsed = _first(parsed, times)
    return _first(parsed, _time(column.cast(pl.Float64, strict=False), wanted))


def _first(column: pl.Series, other: pl.Series) -> pl.Series:
    """The column with the other's values where it has none."""
    return column.zip_with(column.is_not_null(), other)


def _nulls(column: pl.Series, dtype: pl.DataType) -> pl.Series:
    return pl.repeat(None, len(column), dtype=dtype, eager=True).alias(column.name)
