"""Periods: the runs of days within an update for which item counts are released.

partitions -> periods_of() -> one release of counts each, charged under privacy
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysys.ingest.features import DAY_S
from raysys.ledger.records import PartitionRef
from raysys.partitions.layout import partition_date


@dataclass(frozen=True, kw_only=True, slots=True)
class Period:
    """A run of days that has partitions."""

    end: float
    """UNIX seconds."""
    num_days: float
    """Days within it that have a partition."""


def periods_of(partitions: Iterable[PartitionRef], period_days: int) -> list[Period]:
    """Returns the periods into which the partitions fall, in order, at most `period_days` long.

    Days without a partition make no period: a stray old one must not be charged for the years
    between.

    >>> days = [PartitionRef(key=f"events/dt=2017-03-{d:02}", files=()) for d in (1, 2, 29)]
    >>> [(period.end / 86400, period.num_days) for period in periods_of(days, 7)]
    [(17228.0, 2.0), (17255.0, 1.0)]
    """
    runs: list[list[datetime.date]] = []
    for date in sorted({partition_date(p.key) for p in partitions}):
        if not runs or (date - runs[-1][0]).days >= period_days:
            runs.append([])
        runs[-1].append(date)
    return [Period(end=midnight(run[-1]) + DAY_S, num_days=float(len(run))) for run in runs]


def period_of(ts: NDArray[np.float64], ends: Sequence[float]) -> NDArray[np.int64]:
    """Returns the period of each time, (len(ts),): the first and last one are open outwards."""
    return np.searchsorted(np.array(ends[:-1]), ts, side="right").astype(np.int64)


def span_of(key: str) -> tuple[float, float]:
    """Returns when a partition begins and ends, UNIX seconds."""
    start = midnight(partition_date(key))
    return start, start + DAY_S


def midnight(date: datetime.date) -> float:
    """Returns when a day begins, UTC, in UNIX seconds."""
    return datetime.datetime.combine(date, datetime.time(), datetime.UTC).timestamp()
