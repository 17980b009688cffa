"""Which stretches of time an update's partitions make: periods of item counts, evaluation window.

    UpdatePlan.partitions -> period_ends() -> one charged release of item counts for each
                          -> window_start() -> where before and after are compared

Pure, and known before any data is read: the privacy reserved depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable

from raysys.ledger.records import PartitionRef
from raysys.partitions.layout import DAY_S, partition_span


def period_ends(partitions: Iterable[PartitionRef], period_days: int) -> list[float]:
    """Returns where the periods end into which the partitions fall, at most `period_days` long.

    Times without a partition make no period: a stray old day must not be charged for the years
    between.

    >>> keys = ("events/dt=1970-01-02", "events/dt=1970-01-03", "events/dt=1970-01-20/hour=05")
    >>> [end / 3600 for end in period_ends([PartitionRef(key=k, files=()) for k in keys], 7)]
    [72.0, 462.0]

    Returns:
      UNIX seconds, in order.
    """
    starts: list[float] = []
    ends: list[float] = []
    for start, end in sorted(partition_span(partition.key) for partition in partitions):
        if not starts or end - starts[-1] > period_days * DAY_S:
            starts.append(start)
            ends.append(end)
        ends[-1] = max(ends[-1], end)
    return ends


def window_start(partitions: Iterable[PartitionRef], window_days: int) -> float:
    """Returns where the newest `window_days` days of the partitions begin, UNIX seconds."""
    spans = [partition_span(partition.key) for partition in partitions]
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    return max(first, last - window_days * DAY_S)
