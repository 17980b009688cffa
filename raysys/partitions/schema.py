"""The columns of event and item files. Unknown columns stay in the shop's files, unread.

An impression is one item shown in one request; a click, cart or purchase is an outcome. Outcomes
are trained on, with sampled candidates; impressions are counted.
"""

from __future__ import annotations

from typing import Literal, get_args

import polars as pl

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
}
"""`user_key_id` is set where `user_id` is a pseudonym already, made with the key of that id."""

REQUIRED_EVENT_COLUMNS = frozenset({"event_id", "event_type", "user_id", "item_id", "ts"})

ITEM_SCHEMA: dict[str, pl.DataType] = {
    "item_id": pl.String(),
    "title": pl.String(),
    "category": pl.String(),
    "brand": pl.String(),
    "price": pl.Float64(),
    "updated_at": _TIME,
}
"""One row is an upsert: of an item's rows the newest `updated_at` counts."""
