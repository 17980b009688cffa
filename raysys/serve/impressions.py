"""What was shown, kept as it was answered and made into rows only when its file is written.

    answer -> Impressions -> EventWriter.add() -> impressions_frame() -> events/dt=DATE/…

A request shows a hundred items, so a row for each, made on its way, would cost a request more than
its scores do. A file's rows are made column by column, in the thread that writes it, and by Polars,
which lets other threads run meanwhile: for 200 answers of 100 items it
takes 2 ms instead of 45.

`position` is the place in the answer, from 1. `propensity` is the probability that this user was
answered by this version: the split's weight for a canary, what remains of 1 for stable, 1 where
nothing was drawn. It is that of the whole arrangement, since a version ranks without chance; how
likely a place is to be looked at is not in it, and no constant for that is assumed.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections.abc import Sequence

import polars as pl

from raysys.partitions.schema import EVENT_SCHEMA
from raysys.serve.request_id import RequestTag


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Impressions:
    """One answer's impressions: as many rows as items."""

    tag: RequestTag
    request_id: str
    """Of the answer."""
    item_ids: Sequence[str]
    """In the order shown."""
    ts: float
    """UNIX seconds."""
    query: str | None
    user_key_id: str

    def __len__(self) -> int:
        return len(self.item_ids)


def impressions_frame(answers: Sequence[Impressions]) -> pl.DataFrame:
    """Returns one row of EVENT_SCHEMA for each item of each answer, in order."""
    of_answers = pl.DataFrame(
        {
            "nonce": [a.tag.nonce for a in answers],
            "user_id": [a.tag.pseudonym for a in answers],
            "ts": [datetime.datetime.fromtimestamp(a.ts, datetime.UTC) for a in answers],
            "request_id": [a.request_id for a in answers],
            "query": [a.query for a in answers],
            "surface": [a.tag.surface for a in answers],
            "version": [a.tag.version for a in answers],
            "user_key_id": [a.user_key_id for a in answers],
            "propensity": [a.tag.propensity for a in answers],
            "sample_fraction": [a.tag.sample_fraction for a in answers],
            "num_items": [len(a) for a in answers],
        },
        schema=_OF_ANSWERS,
    )
    positions = pl.int_ranges(1, pl.col("num_items") + 1, dtype=pl.Int32())
    item_ids = list(itertools.chain.from_iterable(a.item_ids for a in answers))
    shown = of_answers.filter(pl.col("num_items") > 0).with_columns(position=positions)
    return (
        shown.explode("position")
        .with_columns(
            event_id=pl.concat_str("nonce", "position", separator="-"),
            event_type=pl.lit("impression"),
            item_id=pl.Series(item_ids, dtype=pl.String()),
            **{name: pl.lit(None, EVENT_SCHEMA[name]) for name in _UNKNOWN},
        )
        .select(list(EVENT_SCHEMA))
    )


_OF_ANSWERS = {
    "nonce": pl.String(),
    **{
        name: EVENT_SCHEMA[name]
        for name in (
            "user_id",
            "ts",
            "request_id",
            "query",
            "surface",
            "version",
            "user_key_id",
            "propensity",
            "sample_fraction",
        )
    },
    "num_items": pl.Int64(),
}
_UNKNOWN = ("price", "quantity")
