"""Builders of a small shop's events, catalogue and config, for the tests of ingest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from raysys.config import IngestConfig
from raysys.ingest.features import DAY_S, ItemTable
from raysys.ingest.history import HISTORY_SCHEMA
from raysys.ingest.labels import IMPRESSION_SCHEMA, OUTCOME_SCHEMA
from raysys.ingest.stats import Timeline

HALF_LIFE_S = 28 * DAY_S
SHOWN_SCHEMA = {
    name: dtype for name, dtype in IMPRESSION_SCHEMA.items() if name not in ("popularity", "trend")
}
"""What ingest reads of an impression; what was public is added to it."""


def user(number: int, *, held_out: bool = False) -> str:
    """A pseudonym of a user who is held out, or not, whatever the fraction."""
    return f"{number:08x}{'00000000' if held_out else 'ffffffff'}{number:016x}"


def ingest_config(**changes: Any) -> IngestConfig:
    """Keeps every request and draws few negatives."""
    small = IngestConfig(
        max_examples_per_user=1000,
        num_history_negatives=3,
        num_popularity_negatives=3,
        num_uniform_negatives=3,
    )
    return dataclasses.replace(small, **changes)


def outcome(who: str, item: int, ts: float, **changes: Any) -> dict[str, Any]:
    """A purchase at `ts` seconds, a request of its own unless `request_id` is given."""
    own = f"{who[:8]}@{ts:g}"
    return {
        "user": who, "item": item, "ts": float(ts), "event_id": f"{own}-{item}", "weight": 1.0,
        "gain": 3.0, "request_id": own, "query": None, **changes,
    }  # fmt: skip


def outcomes(rows: Iterable[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=OUTCOME_SCHEMA, orient="row")


def impression(who: str, item: int, ts: float, **changes: Any) -> dict[str, Any]:
    """An item shown at `ts` seconds in request `r` unless `request_id` is given."""
    return {
        "user": who, "item": item, "ts": float(ts), "request_id": "r", "query": None,
        "position": 1 + item, **changes,
    }  # fmt: skip


def impressions(rows: Iterable[dict[str, Any]] = ()) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=SHOWN_SCHEMA, orient="row")


def timeline(tables: Sequence[ItemTable], ends: Sequence[float]) -> Timeline:
    """What was public in each period, and last what is after them."""
    return Timeline(
        after=tables[-1],
        ends=tuple(ends),
        as_of=np.array([table.as_of for table in tables[:-1]]),
        popularity=np.stack([table.popularity for table in tables[:-1]]),
        trend=np.stack([table.trend for table in tables[:-1]]),
    )


def no_histories() -> pl.DataFrame:
    return pl.DataFrame(schema=HISTORY_SCHEMA)


def item_table(
    num_items: int = 8,
    *,
    category: Sequence[int] | None = None,
    brand: Sequence[int] | None = None,
    price: Sequence[float] | None = None,
    popularity: Sequence[float] | None = None,
    as_of: float = 0.0,
) -> ItemTable:
    """Items `i0`, `i1`, … that share one category and brand unless told otherwise."""
    zeros = np.zeros(num_items)
    return ItemTable(
        ids=[f"i{i}" for i in range(num_items)],
        texts=[f"item {i}" for i in range(num_items)],
        category=np.asarray(zeros if category is None else category, np.int32),
        brand=np.asarray(zeros if brand is None else brand, np.int32),
        price=np.asarray(zeros + 1 if price is None else price, np.float32),
        popularity=np.asarray(zeros if popularity is None else popularity, np.float32),
        trend=zeros.astype(np.float32),
        as_of=as_of,
        half_life_s=HALF_LIFE_S,
    )
