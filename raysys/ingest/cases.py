"""Evaluation cases: each user's window, seen from its beginning.

outcomes of a shard + Histories -> build_cases() -> staging/UPDATE/cases/ -> read_cases()
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from raysys.ingest.features import IndexArray, UserHistory
from raysys.ingest.history import Histories

_OWN = ("held_out", "tried", "draw", "now", "shown", "shown_positive")
_HISTORY = ("items", "count", "decayed", "first_ts", "last_ts")
CASE_SCHEMA = {
    "held_out": pl.Boolean(),
    "tried": pl.Boolean(),
    "draw": pl.Float64(),
    "now": pl.Float64(),
    "positives": pl.List(pl.Int32()),
    "gains": pl.List(pl.Float32()),
    "shown": pl.List(pl.Int32()),
    "shown_positive": pl.List(pl.Boolean()),
    **{name: pl.List(pl.Int32() if name == "items" else pl.Float64()) for name in _HISTORY},
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One user's evaluation window, seen from its beginning; or what a held-out user was shown."""

    held_out: bool
    tried: bool
    """Whether this user is of the group that a selection's trials read."""
    draw: float
    """Uniform in [0, 1), of this user alone: who is below a fraction depends on nobody else."""
    history: UserHistory
    positives: IndexArray
    """Items with an outcome in the window; none where the case is of what was shown."""
    gains: NDArray[np.float32]
    now: float
    shown: IndexArray
    """Items of mature requests without a query, as often as shown; none where of the window."""
    shown_positive: NDArray[np.bool_]
    """Whether each of them had an outcome in time."""

    @property
    def scores_trials(self) -> bool:
        """Whether trials of a selection are scored on it, and their winner is then judged without.

        A high bit of the draw: half of the held-out users, and half of those below any fraction.
        """
        return self.is_ranked and self.user_scores_trials

    @property
    def is_ranked(self) -> bool:
        """Whether there is something to be ranked: it is not a case of what was shown."""
        return len(self.positives) > 0

    @property
    def user_scores_trials(self) -> bool:
        """Whether the user scores trials, if there is something to be ranked."""
        return self.held_out and self.tried and bool(int(self.draw * 2**32) & 1)

    @property
    def half(self) -> int:
        """Which half of the users it is of, 0 or 1, whether or not it scores trials."""
        return int(self.draw * 2**31) & 1


def build_cases(
    outcomes: pl.DataFrame,
    lookup: Histories,
    window_start: float,
    held_out: pl.DataFrame,
    shown: pl.DataFrame,
    *,
    seed: int,
) -> pl.DataFrame:
    """Returns rows of CASE_SCHEMA: one for each user with an outcome since `window_start`, as of
    then; and one for each user of `shown`, as of the first that was shown.

    Args:
      outcomes: `user`, `item` (index), `ts`, `gain`, sorted by user.
      window_start: UNIX seconds.
      held_out: HELD_OUT_SCHEMA of at least these users, and `tried`: whether trials read them.
      shown: As `shown_to_held_out` gives it.
      seed: Of the users' draws.
    """
    window = outcomes.filter(pl.col("ts") >= window_start)
    taken = window.group_by("user", maintain_order=True).agg(
        pl.col("item", "gain"), now=pl.lit(window_start)
    )
    judged = shown.group_by("user", maintain_order=True).agg(
        shown=pl.col("item"), shown_positive=pl.col("gain") > 0, now=pl.col("ts").min()
    )
    empty = [pl.col(name).fill_null([]) for name in ("item", "gain", "shown", "shown_positive")]
    users = (
        pl.concat([taken, judged], how="diagonal")
        .with_columns(empty)
        .join(held_out, on="user", how="left", maintain_order="left")
        .with_columns(draw=pl.col("user").hash(seed) / 2.0**64)
    )
    rows = []
    for user in users.iter_rows(named=True):
        history = lookup.at(user["user"], user["now"])
        positives, gains = strongest(user["item"], user["gain"])
        columns = {name: getattr(history, name).tolist() for name in _HISTORY}
        chosen = {"positives": positives.tolist(), "gains": gains.tolist()}
        rows.append({**{name: user[name] for name in _OWN}, **chosen, **columns})
    return pl.DataFrame(rows, schema=CASE_SCHEMA)


def shown_to_held_out(mature: pl.DataFrame, held_out: pl.DataFrame, since: float) -> pl.DataFrame:
    """Returns what held-out users were shown since then, in requests without a query.

    Evaluation scores without queries, so what was shown for one says nothing of these scores.

    Args:
      mature: `Labelled.mature`.
      since: UNIX seconds.
    """
    for_query = (pl.col("query").fill_null("") != "").any().over("user", "request_id")
    recent = mature.filter((pl.col("ts") >= since) & ~for_query)
    users = held_out.filter("held_out")
    return recent.join(users, on="user", how="semi", maintain_order="left").sort("user", "ts")


def read_cases(data: bytes) -> Iterator[Case]:
    """Reads the cases of one shard from their parquet bytes."""
    for row in pl.read_parquet(io.BytesIO(data)).iter_rows(named=True):
        history = UserHistory(
            items=np.array(row["items"], np.int32),
            as_of=row["now"],
            **{name: np.array(row[name], np.float64) for name in _HISTORY[1:]},
        )
        yield Case(
            held_out=row["held_out"], tried=row["tried"], draw=row["draw"], history=history,
            now=row["now"],
            positives=np.array(row["positives"], np.int32),
            gains=np.array(row["gains"], np.float32),
            shown=np.array(row["shown"], np.int32),
            shown_positive=np.array(row["shown_positive"], bool),
        )  # fmt: skip


def strongest(
    items: Sequence[int], gains: Sequence[float]
) -> tuple[IndexArray, NDArray[np.float32]]:
    """Returns the distinct items, each with its largest gain."""
    distinct, place = np.unique(np.asarray(items, np.int32), return_inverse=True)
    best = np.zeros(len(distinct), np.float32)
    np.maximum.at(best, place, np.asarray(gains, np.float32))
    return distinct, best
