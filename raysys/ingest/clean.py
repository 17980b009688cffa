"""Reads partitions and keeps the rows that an update can use; the others go to quarantine.

    events/dt=…/*.parquet -> read_events() -> (usable rows, refused rows with a reason)

Usable rows: `user` (pseudonym), `item_id`, `ts` (UNIX seconds), `event_id`, `event_type`,
`request_id` (the user and the time where the shop sent none), `query`.
Pure Polars: Ray Data calls it once a partition, inside its tasks.
"""

from __future__ import annotations

import datetime
import io
from collections.abc import Mapping, Sequence

import polars as pl

from raysys.errors import DataError
from raysys.ingest.pseudonym import Pseudonymizer, is_pseudonym, pseudonymize
from raysys.partitions.schema import EVENT_SCHEMA, EVENT_TYPES, REQUIRED_EVENT_COLUMNS

CLEAN_COLUMNS = ["user", "item_id", "ts", "event_id", "event_type", "request_id", "query"]
MAX_CLOCK_SKEW = datetime.timedelta(hours=14)
"""Partitions may be cut by the shop's own time zone."""
_DAY = datetime.timedelta(days=1)


def read_parquet_file(data: bytes, path: str) -> pl.DataFrame:
    """Parses one parquet file.

    Raises:
      DataError: It is not parquet, or cut off.
    """
    try:
        return pl.read_parquet(io.BytesIO(data))
    except (pl.exceptions.PolarsError, OSError) as error:
        # Its message may quote what is in the file, and a reason is written below the root.
        kind = type(error).__name__
        raise DataError(
            f"{path} is not a readable parquet file ({kind}, {len(data):,} bytes)"
        ) from None


def conform(frame: pl.DataFrame, path: str) -> pl.DataFrame:
    """Returns the contract's columns with the contract's types; unknown columns stay behind.

    A value that does not fit its column's type becomes null, so that the row is judged by it.

    Raises:
      DataError: A required column is missing, or a column's type cannot be converted.
    """
    missing = sorted(set(REQUIRED_EVENT_COLUMNS) - set(frame.columns))
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; it has {name_columns(frame, EVENT_SCHEMA)}"
        )
    return select_as(frame, EVENT_SCHEMA, path)


def select_as(frame: pl.DataFrame, schema: Mapping[str, pl.DataType], path: str) -> pl.DataFrame:
    """Returns the schema's columns with its types; a missing one is null throughout.

    Raises:
      DataError: A column's type cannot be converted.
    """
    nested = [name for name in schema if name in frame.columns and frame.schema[name].is_nested()]
    if nested:
        raise DataError(f"{path} has nested values in column {', '.join(nested)}; flatten them")
    columns = []
    for name, dtype in schema.items():
        try:
            columns.append(
                frame.select(_cast(frame, name, dtype)).to_series()
                if name in frame.columns
                else pl.repeat(None, len(frame), dtype=dtype, eager=True).alias(name)
            )
        except pl.exceptions.PolarsError:
            # The message may quote values, and the type of an Enum does.
            raise DataError(
                f"{path} has column {name} of type {frame.schema[name].base_type()}, which does "
                f"not become {dtype}; write it as that"
            ) from None
    return pl.DataFrame(columns)


def name_columns(frame: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> str:
    """Names those of a frame's columns that a schema has; the others may be anything, ids too.

    >>> name_columns(pl.DataFrame({"ts": [], "alice@example.com": []}), EVENT_SCHEMA)
    "['ts'] and 1 of other names"
    """
    known = [name for name in frame.columns if name in schema]
    num_others = len(frame.columns) - len(known)
    return f"{known} and {num_others} of other names" if num_others else f"{known}"


def _cast(frame: pl.DataFrame, name: str, dtype: pl.DataType) -> pl.Expr:
    column, found = pl.col(name), frame.schema[name]
    if isinstance(dtype, pl.Datetime) and isinstance(found, pl.Datetime):
        aware = column if found.time_zone else column.dt.replace_time_zone("UTC")
        return aware.cast(dtype).alias(name)
    if isinstance(dtype, pl.Datetime) and found.is_numeric():
        return (
            (column.cast(pl.Float64, strict=False) * 1e6).cast(pl.Int64, strict=False).cast(dtype)
        )
    if isinstance(dtype, pl.Datetime) and found == pl.String:
        return column.str.to_datetime(time_unit="us", time_zone="UTC", strict=False).alias(name)
    return column.cast(dtype, strict=False)


def clean_events(
    frame: pl.DataFrame, pseudonymizer: Pseudonymizer, *, date: datetime.date
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Splits the conforming rows of one partition into usable ones and refused ones.

    Args:
      date: The partition's day. A row more than `MAX_CLOCK_SKEW` outside of it is refused, since
        a wrong time would poison every decayed count.

    Returns:
      Usable rows (`CLEAN_COLUMNS`), and refused rows: `event_id`, `item_id`, `ts`, `event_type`
      (where it is one) and `reason`, without the user, since quarantine is below the root like all
      else.
    """
    reasons = frame.with_columns(reason=_refusal(pseudonymizer.key_ids, date))
    # A type that is none may be anything, a user id too where a file's columns are shifted.
    known_type = pl.when(pl.col("event_type").is_in(list(EVENT_TYPES))).then("event_type")
    refused = reasons.filter(pl.col("reason").is_not_null()).with_columns(event_type=known_type)
    usable = pseudonymize(reasons.filter(pl.col("reason").is_null()), pseudonymizer)
    usable = usable.with_columns(ts=pl.col("ts").dt.timestamp("us") / 1e6)
    own_request = pl.concat_str("user", pl.col("ts").cast(pl.String), separator="@")
    given_request = pl.col("request_id").replace("", None)
    usable = usable.with_columns(request_id=given_request.fill_null(own_request))
    return (
        usable.select(CLEAN_COLUMNS),
        refused.select("event_id", "item_id", "ts", "event_type", "reason"),
    )


def _refusal(key_ids: Sequence[str], date: datetime.date) -> pl.Expr:
    """The first reason for which a row cannot be used, null where there is none."""
    midnight = datetime.datetime.combine(date, datetime.time(), datetime.UTC)
    blank = {name: pl.col(name).fill_null("") == "" for name in ("event_id", "user_id", "item_id")}
    return (
        pl.when(blank["user_id"]).then(pl.lit("no user_id"))
        .when(blank["item_id"]).then(pl.lit("no item_id"))
        .when(blank["event_id"]).then(pl.lit("no event_id"))
        .when(pl.col("ts").is_null()).then(pl.lit("no ts"))
        .when(~pl.col("ts").is_between(midnight - MAX_CLOCK_SKEW, midnight + MAX_CLOCK_SKEW + _DAY))
        .then(pl.lit("ts outside the partition's day"))
        .when(~pl.col("event_type").fill_null("").is_in(list(EVENT_TYPES)))
        .then(pl.lit("unknown event_type"))
        .when(~pl.col("user_key_id").is_in([*key_ids, None], nulls_equal=True))
        .then(pl.lit("pseudonym of another key"))
        .when(pl.col("user_key_id").is_not_null() & ~is_pseudonym("user_id"))
        .then(pl.lit("user_id is no pseudonym"))
        .otherwise(None)
    )  # fmt: skip
