"""Splits one user shard's clean rows into outcomes and impressions of known items, each once.

    clean rows -> split_events() -> (outcomes, impressions, where the other rows went)

Pure Polars: the shard's task calls it before counts are bounded and examples are built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from raysys.ingest.labels import IMPRESSION_SCHEMA, IS_SAMPLED, OUTCOME_SCHEMA
from raysys.ingest.periods import period_of
from raysys.ingest.seen import SEEN_SCHEMA, days_of

EVENT_FATES = ("seen_before", "duplicate", "unknown_item", "impression", "outcome", "without_gain")
"""Where a clean row goes."""


def split_events(
    rows: pl.DataFrame,
    *,
    seen: pl.DataFrame,
    item_ids: Sequence[str],
    gains: Mapping[str, float],
    ends: Sequence[float],
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """Returns outcomes, impressions, and where every row went; the counts add up to the rows.

    An event is told by its user, `event_id` and day: with the id alone, one user's rows could
    replace another's, which neither cap nor clipping bounds.

    Args:
      rows: `ingest.clean.CLEAN_COLUMNS`.
      seen: SEEN_SCHEMA: events that earlier updates read.
      item_ids: The catalogue, in the order of the item indexes.
      gains: Gain of each event type that is an outcome.
      ends: (P,) UNIX seconds at which the periods end.

    Returns:
      OUTCOME_SCHEMA, `period` and IS_SAMPLED; IMPRESSION_SCHEMA without what was public;
      EVENT_FATES.
    """
    dated = rows.with_columns(days_of(rows))
    new = dated.join(seen, on=list(SEEN_SCHEMA), how="anti", maintain_order="left")
    distinct = new.unique(list(SEEN_SCHEMA), keep="first", maintain_order=True)
    index = pl.DataFrame({"item_id": item_ids}, schema={"item_id": pl.String}).with_row_index(
        "item"
    )
    known = distinct.join(index, on="item_id", how="inner", maintain_order="left").with_columns(
        pl.col("item").cast(pl.Int32)
    )
    impressions = known.filter(pl.col("event_type") == "impression")
    outcomes = _outcomes(known, gains)
    fates = {
        "seen_before": len(rows) - len(new),
        "duplicate": len(new) - len(distinct),
        "unknown_item": len(distinct) - len(known),
        "impression": len(impressions),
        "outcome": len(outcomes),
        "without_gain": len(known) - len(impressions) - len(outcomes),
    }
    shown = [name for name in IMPRESSION_SCHEMA if name in impressions.columns]
    period = pl.Series("period", period_of(outcomes["ts"].to_numpy(), ends))
    return (
        outcomes.select(*OUTCOME_SCHEMA, IS_SAMPLED).with_columns(period),
        impressions.select(shown),
        fates,
    )


def _outcomes(known: pl.DataFrame, gains: Mapping[str, float]) -> pl.DataFrame:
    outcomes = known.filter(pl.col("event_type").is_in(list(gains)))
    gain = pl.col("event_type").replace_strict(gains, default=0.0, return_dtype=pl.Float64)
    is_sampled = pl.lit(False)
    if "sample_fraction" in outcomes.columns:
        is_sampled = pl.col("sample_fraction").fill_null(1.0) < 1
    return outcomes.with_columns(
        is_sampled.alias(IS_SAMPLED), gain=gain, weight=gain / max(gains.values())
    )
