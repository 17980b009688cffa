"""Turns one user shard's clean rows into outcomes: known items, each event once, with its gain.

    clean rows -> find_outcomes() -> (outcomes, where the other rows went)

Pure Polars: the shard's task calls it before counts are bounded and examples are built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray


def find_outcomes(
    rows: pl.DataFrame,
    *,
    item_ids: Sequence[str],
    gains: Mapping[str, float],
    ends: Sequence[float],
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Returns the outcomes, and where every row went; the counts add up to the rows.

    An event is told by its user and `event_id`: with the id alone, one user's rows could replace
    another's, which neither cap nor clipping bounds.

    Args:
      rows: `ingest.clean.CLEAN_COLUMNS`.
      item_ids: The catalogue, in the order of the item indexes.
      gains: Gain of each event type that is an outcome.
      ends: (P,) UNIX seconds at which the periods end.

    Returns:
      The rows plus `item` (index), `gain`, `weight` in (0, 1] and `period`.
    """
    distinct = rows.unique(["user", "event_id"], keep="first", maintain_order=True)
    catalogue = pl.DataFrame({"item_id": item_ids}, schema={"item_id": pl.String})
    index = catalogue.with_row_index("item")
    known = distinct.join(index, on="item_id", how="inner", maintain_order="left")
    outcomes = known.filter(pl.col("event_type").is_in(list(gains))).with_columns(
        gain=pl.col("event_type").replace_strict(gains, default=0.0, return_dtype=pl.Float64)
    )
    outcomes = outcomes.with_columns(
        pl.Series("period", period_of(outcomes["ts"].to_numpy(), ends)),
        weight=pl.col("gain") / max(gains.values()),
    )
    return outcomes, {
        "duplicate": len(rows) - len(distinct),
        "unknown_item": len(distinct) - len(known),
        "impression": len(known) - len(outcomes),
        "outcome": len(outcomes),
    }


def period_of(ts: NDArray[np.float64], ends: Sequence[float]) -> NDArray[np.int64]:
    """Returns the period of each time, (len(ts),): the first and last one are open outwards."""
    return np.searchsorted(np.array(ends[:-1]), ts, side="right").astype(np.int64)
