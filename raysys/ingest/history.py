"""User histories: what each user did, as state that is carried from update to update.

    histories settled so far + recent outcomes -> Histories.at(user, now) -> features
    the same + the update's outcomes           -> merge_histories()       -> the next state

A history holds one row for each of a user's distinct items, so when something happened cannot be
taken out of it again. Outcomes of the last attribution window therefore stay beside it as events
(`recent`): whatever matures later still sees exactly what its user had done before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl

from raysys.ingest.features import UserHistory

HISTORY_SCHEMA = {
    "user": pl.String(),
    "item": pl.Int32(),
    "count": pl.Float64(),
    "decayed": pl.Float64(),
    "first_ts": pl.Float64(),
    "last_ts": pl.Float64(),
}


def merge_histories(
    histories: pl.DataFrame,
    events: pl.DataFrame,
    *,
    histories_as_of: float,
    as_of: float,
    half_life_s: float,
    max_items: int,
) -> pl.DataFrame:
    """Returns every user's history after the events, at most `max_items` recent items a user.

    Args:
      histories: HISTORY_SCHEMA, decayed to `histories_as_of`.
      events: Outcomes: `user`, `item`, `ts`, `weight`.
    """
    old_decay = float(np.exp2(-(as_of - histories_as_of) / half_life_s)) if len(histories) else 1.0
    new_decay = (2.0 ** (-(as_of - pl.col("ts")) / half_life_s)) * pl.col("weight")
    new = events.select(
        "user",
        pl.col("item").cast(pl.Int32),
        pl.col("weight").alias("count"),
        new_decay.alias("decayed"),
        pl.col("ts").alias("first_ts"),
        pl.col("ts").alias("last_ts"),
    )
    old = histories.with_columns(pl.col("decayed") * old_decay)
    merged = (
        pl.concat([old.select(list(HISTORY_SCHEMA)), new])
        # In order: a sum must come out the same to the last bit when an update is replayed.
        .group_by("user", "item", maintain_order=True)
        .agg(pl.col("count", "decayed").sum(), pl.col("first_ts").min(), pl.col("last_ts").max())
    )
    recent = merged.sort(["user", "last_ts", "item"], descending=[False, True, False])
    kept = recent.group_by("user", maintain_order=True).head(max_items)
    return kept.select(list(HISTORY_SCHEMA)).sort("user", "item")


def history_slices(frame: pl.DataFrame, as_of: float) -> dict[str, UserHistory]:
    """Returns the history of each user in a frame of HISTORY_SCHEMA sorted by user and item."""
    columns = {name: frame[name].to_numpy() for name in list(HISTORY_SCHEMA)[1:]}
    return {
        user: UserHistory(
            items=columns["item"][part], count=columns["count"][part],
            decayed=columns["decayed"][part], first_ts=columns["first_ts"][part],
            last_ts=columns["last_ts"][part], as_of=as_of,
        )
        for user, part in _parts(frame["user"])
    }  # fmt: skip


class Histories:
    """Histories of a shard's users as of any moment since they were settled."""

    def __init__(
        self,
        events: pl.DataFrame,
        settled: pl.DataFrame,
        *,
        as_of: float,
        half_life_s: float,
        max_items: int,
    ) -> None:
        """Makes the lookup.

        Args:
          events: Outcomes sorted by user and time: the update's, and the recent ones before it.
          settled: HISTORY_SCHEMA, decayed to `as_of`: all that happened before the events.
        """
        self._before = history_slices(settled.sort("user", "item"), as_of)
        self._parts = dict(_parts(events["user"]))
        self._items = events["item"].cast(pl.Int32).to_numpy()
        self._ts = events["ts"].to_numpy()
        self._weight = events["weight"].to_numpy()
        self._half_life_s = half_life_s
        self._max_items = max_items

    def at(self, user: str, now: float) -> UserHistory:
        """Returns what the user did strictly before `now`, cut as a replica's history is."""
        before = self._before.get(user) or UserHistory.empty()
        part = self._parts.get(user, slice(0, 0))
        num_new = int(np.searchsorted(self._ts[part], now, side="left"))
        new = slice(part.start, part.start + num_new)
        extended = before.extend(
            self._items[new], self._ts[new], self._weight[new],
            as_of=now, half_life_s=self._half_life_s,
        )  # fmt: skip
        return extended.most_recent(self._max_items)


def _parts(users: pl.Series) -> Iterator[tuple[str, slice]]:
    """Yields each user of a sorted column with the rows that are theirs."""
    start = 0
    lengths = users.rle()
    for run in lengths.struct.unnest().iter_rows(named=True):
        yield run["value"], slice(start, start + run["len"])
        start += run["len"]
