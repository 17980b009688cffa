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

_HISTORY = ("items", "count", "decayed", "first_ts", "last_ts")
CASE_SCHEMA = {
    "held_out": pl.Boolean(),
    "tried": pl.Boolean(),
    "draw": pl.Float64(),
    "now": pl.Float64(),
    "positives": pl.List(pl.Int32()),
    "gains": pl.List(pl.Float32()),
    **{name: pl.List(pl.Int32() if name == "items" else pl.Float64()) for name in _HISTORY},
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One user's evaluation window, seen from its beginning."""

    held_out: bool
    tried: bool
    """Whether this user is of the group that a selection's trials read."""
    draw: float
    """Uniform in [0, 1), of this user alone: who is below a fraction depends on nobody else."""
    history: UserHistory
    positives: IndexArray
    gains: NDArray[np.float32]
    now: float

    @property
    def scores_trials(self) -> bool:
        """Whether trials of a selection are scored on it, and their winner is then judged without.

        A high bit of the draw: half of the held-out users, and half of those below any fraction.
        """
        return self.held_out and self.tried and bool(int(self.draw * 2**32) & 1)


def build_cases(
    outcomes: pl.DataFrame,
    lookup: Histories,
    window_start: float,
    held_out: pl.DataFrame,
    *,
    seed: int,
) -> pl.DataFrame:
    """Returns a row of CASE_SCHEMA for each user with an outcome since `window_start`.

    Args:
      outcomes: `user`, `item` (index), `ts`, `gain`, sorted by user.
      window_start: UNIX seconds.
      held_out: HELD_OUT_SCHEMA of at least these users, and `tried`: whether trials read them.
      seed: Of the users' draws.
    """
    window = outcomes.filter(pl.col("ts") >= window_start)
    users = (
        window.group_by("user", maintain_order=True)
        .agg(pl.col("item", "gain"))
        .join(held_out, on="user", how="left", maintain_order="left")
        .with_columns(draw=pl.col("user").hash(seed) / 2.0**64)
    )
    rows = []
    for user in users.iter_rows(named=True):
        history = lookup.at(user["user"], window_start)
        positives, gains = strongest(user["item"], user["gain"])
        columns = {name: getattr(history, name).tolist() for name in _HISTORY}
        chosen = {"positives": positives.tolist(), "gains": gains.tolist()}
        own = {name: user[name] for name in ("held_out", "tried", "draw")}
        rows.append({**own, "now": window_start, **chosen, **columns})
    return pl.DataFrame(rows, schema=CASE_SCHEMA)


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
        )  # fmt: skip


def strongest(
    items: Sequence[int], gains: Sequence[float]
) -> tuple[IndexArray, NDArray[np.float32]]:
    """Returns the distinct items, each with its largest gain."""
    distinct, place = np.unique(np.asarray(items, np.int32), return_inverse=True)
    best = np.zeros(len(distinct), np.float32)
    np.maximum.at(best, place, np.asarray(gains, np.float32))
    return distinct, best
