"""The columns of event and item files.

    found columns -> plan_columns() -> ColumnPlan -> what ingest reads and fills of one file

An impression is one item shown in one request; a click, cart or purchase is an outcome. Outcomes
are trained on, with sampled candidates; impressions are counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import polars as pl

from raysys.config import SchemaConfig
from raysys.errors import DataError

EventType = Literal["impression", "click", "cart", "purchase"]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
Surface = Literal["search", "recommend", "ads"]

_TIME = pl.Datetime("us", "UTC")

EVENT_SCHEMA: dict[str, pl.DataType] = {
    "event_id": pl.String(),
    "event_type": pl.String(),
    "user_id": pl.String(),
    "item_id": pl.String(),
    "ts": _TIME,
    "request_id": pl.String(),
    "query": pl.String(),
    "surface": pl.String(),
    "version": pl.String(),
    "user_key_id": pl.String(),
    "position": pl.Int32(),
    "price": pl.Float64(),
    "quantity": pl.Float64(),
    "propensity": pl.Float64(),
    "sample_fraction": pl.Float64(),
}
"""`user_key_id` is set where `user_id` is a pseudonym already, made with the key of that id.

`propensity` is the probability that the user was answered by the version that did, over all draws
of the split. `sample_fraction` is the share of requests whose impressions are kept, of which this
is one or, for an outcome, may not be one; null stands for 1."""

REQUIRED_EVENT_COLUMNS = frozenset({"event_id", "event_type", "user_id", "item_id", "ts"})

UNUSED_EVENT_COLUMNS = frozenset({"price", "quantity"})
"""Of the contract, but no part of training: read only where a value might not fit."""

ITEM_SCHEMA: dict[str, pl.DataType] = {
    "item_id": pl.String(),
    "title": pl.String(),
    "category": pl.String(),
    "brand": pl.String(),
    "price": pl.Float64(),
    "updated_at": _TIME,
}
"""One row is an upsert: of an item's rows the newest `updated_at` counts."""

_ACCEPTED = {
    pl.String: "text or a whole number",
    pl.Int32: "a whole number",
    pl.Float64: "a number",
    pl.Datetime: "a time",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnPlan:
    """What is done with the columns of one event file."""

    read: tuple[str, ...]
    """Columns of the contract, in its order, that are read."""
    added: tuple[str, ...]
    """Columns that the contract does not know."""
    rescued: tuple[str, ...]
    """Those of them that are read and kept too."""
    missing: tuple[str, ...]
    """Optional columns that are null throughout."""
    defaults: Mapping[str, str]
    """Value of each column that is filled."""
    derive_event_id: bool
    null_wrong_values: bool
    """Whether a wrong value of an optional column becomes null instead of refusing its row."""


def plan_columns(
    names: Mapping[str, bool],
    found: Mapping[str, pl.DataType],
    config: SchemaConfig,
    path: str,
) -> ColumnPlan:
    """Decides by the contract what is done with the columns of an event file.

    Args:
      names: All columns of the file, each with whether its values can be kept as JSON.
      found: Types of those that the contract knows, none of them nested.

    Raises:
      DataError: The file is to be quarantined: a required column is missing without a default or
        has an impossible type, or a column is not to be there.
    """
    absent = [name for name in EVENT_SCHEMA if name not in found]
    filled = {name: value for name, value in config.defaults.items() if name in absent}
    derived = {"event_id"} if config.derive_event_id and "event_id" in absent else set()
    lost = sorted(REQUIRED_EVENT_COLUMNS & set(absent) - set(filled) - derived)
    if lost:
        raise DataError(
            f"{path} has no column {', '.join(lost)}; it has {name_columns(names, EVENT_SCHEMA)}"
        )
    added = tuple(name for name in names if name not in EVENT_SCHEMA)
    if added and config.added_columns == "fail":
        raise DataError(
            f"{path} has columns that the contract does not know: {', '.join(added)}; "
            "schema.added_columns: ignore or rescue takes them"
        )
    check_types(found, EVENT_SCHEMA, REQUIRED_EVENT_COLUMNS, path)
    return ColumnPlan(
        read=tuple(
            name
            for name, dtype in EVENT_SCHEMA.items()
            if name in found and not (name in UNUSED_EVENT_COLUMNS and found[name] == dtype)
        ),
        added=added,
        rescued=tuple(n for n in added if names[n] and config.added_columns == "rescue"),
        missing=tuple(name for name in absent if name not in {*filled, *derived}),
        defaults=filled,
        derive_event_id=bool(derived),
        null_wrong_values=config.wrong_values == "default",
    )


def check_types(
    found: Mapping[str, pl.DataType],
    schema: Mapping[str, pl.DataType],
    required: frozenset[str],
    path: str,
) -> None:
    """Refuses a file of which no row could be used.

    Raises:
      DataError: A required column is of a type of which no value can fit.
    """
    for name in sorted(required & set(found)):
        if not can_fit(found[name], schema[name]):
            kind = found[name].base_type()
            raise DataError(
                f"{path} has {kind} in column {name}; write it as {accepted(schema[name])}"
            )


def name_columns(names: Collection[str], schema: Mapping[str, pl.DataType]) -> str:
    """Names those columns that a schema has; in a broken file the others may be user ids.

    >>> name_columns(["ts", "alice@example.com"], EVENT_SCHEMA)
    "['ts'] and 1 of other names"
    """
    known = [name for name in names if name in schema]
    num_others = len(names) - len(known)
    return f"{known} and {num_others} of other names" if num_others else f"{known}"


def can_fit(found: pl.DataType, wanted: pl.DataType) -> bool:
    """Returns whether a column's values can be turned into the contract's type."""
    if found in (wanted, pl.Null, pl.String, pl.Categorical, pl.Enum) or found.is_numeric():
        return True
    return isinstance(wanted, pl.Datetime) and found in (pl.Datetime, pl.Date)


def accepted(wanted: pl.DataType) -> str:
    """Returns what a column of this type takes, in words."""
    return _ACCEPTED[type(wanted)]
