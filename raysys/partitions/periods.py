"""Which stretches of time an update's partitions make: periods of item counts, evaluation window.

    UpdatePlan.partitions -> periods_of()  -> one charged release of item counts for each
                          -> window_start() -> where before and after are compared

Pure, and known before any data is read: the privacy reserved depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from raysys.ledger.records import PartitionRef
from raysys.partitions.layout import DAY_S, partition_span


@dataclass(frozen=True, kw_only=True, slots=True)
class Period:
    """A stretch of time that has partitions."""

    end: float
    """UNIX seconds."""
    num_days: float
    """Days that its partitions cover; an hour is 1/24."""


def periods_of(partitions: Iterable[PartitionRef], period_days: int) -> list[Period]:
    """Returns the periods into which the partitions fall, in order, at most `period_days` long.

    Times without a partition make no period: a stray old day must not be charged for the years
    between.

    >>> keys = ("events/dt=1970-01-02", "events/dt=1970-01-03", "events/dt=1970-01-20/hour=06")
    >>> periods = periods_of([PartitionRef(key=k, files=()) for k in keys], 7)
    >>> [(period.end / 3600, period.num_days * 24) for period in periods]
    [(72.0, 48.0), (463.0, 1.0)]
    """
    runs: list[list[tuple[float, float]]] = []
    for span in sorted({partition_span(partition.key) for partition in partitions}):
        if not runs or span[1] - runs[-1][0][0] > period_days * DAY_S:
            runs.append([])
        runs[-1].append(span)
    return [
        Period(end=max(end for _, end in run), num_days=_covered_s(run) / DAY_S) for run in runs
    ]


def _covered_s(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the seconds that sorted spans cover: a day and its hours may both be there."""
    covered, until = 0.0, float("-inf")
    for start, end in spans:
        covered += max(end - max(start, until), 0.0)
        until = max(until, end)
    return covered


def window_start(partitions: Iterable[PartitionRef], window_days: int) -> float:
    """Returns where the newest `window_days` days of the partitions begin, UNIX seconds."""
    spans = [partition_span(partition.key) for partition in partitions]
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    return max(first, last - window_days * DAY_S)
