"""Bounds what one user can change: item counts of a period, and requests of an update.

    clean events -> bounded_counts() -> sums over users, (P, N) -> + Gaussian noise -> public

A user adds at most 1 to each of at most `max_items` counts of a period, so leaving the user out
moves the period's counts by at most sqrt(max_items) in L2 norm (`count_l2_sensitivity`). That holds
for each seed, and so against whoever knows it: which rows of a user are kept depends on no other.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl
from numpy.typing import NDArray


def count_l2_sensitivity(max_items: int) -> float:
    """Returns how far one user can move one period's counts, in L2 norm."""
    return math.sqrt(max_items)


def bounded_counts(events: pl.DataFrame, *, max_items: int, seed: int) -> pl.DataFrame:
    """Returns in how many users' bounded baskets each item is: `period`, `item`, `count`.

    Args:
      events: Columns `user`, `item` (index) and `period`, of any number of users.
      max_items: Distinct items kept for each user and period, chosen at random.
      seed: Of that choice.
    """
    distinct = events.select("user", "period", "item").unique(maintain_order=True)
    kept = sample_per_group(distinct, ["user", "period"], ["item"], max_items, seed=seed)
    counts = kept.group_by("period", "item").agg(count=pl.len().cast(pl.Float64))
    return counts.sort("period", "item")


def sample_per_group(
    frame: pl.DataFrame, keys: list[str], names: list[str], max_rows: int, *, seed: int
) -> pl.DataFrame:
    """Returns at most `max_rows` rows of each group, chosen uniformly, in the order of `frame`.

    Rows are ranked by a seeded hash: a shared generator would let one group's rows change the
    choice within all others.

    Args:
      keys: Columns that make a group.
      names: Columns that tell the rows of one group apart.
    """
    drawn = pl.struct(*keys, *names).hash(seed)
    return frame.filter(drawn.rank("ordinal").over(keys) <= max_rows)


def noise_counts(counts: NDArray[np.float64], std: float) -> NDArray[np.float64]:
    """Returns counts with fresh Gaussian noise from the operating system's entropy.

    The noise has no seed on purpose: who knows it can take it off again.
    """
    return counts + np.random.default_rng().normal(0.0, std, counts.shape)
