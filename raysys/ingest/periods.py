"""In which period of an update a time lies; `partitions.periods` says which periods there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def period_of(ts: NDArray[np.float64], ends: Sequence[float]) -> NDArray[np.int64]:
    """Returns the period of each time, (len(ts),): the first and last one are open outwards."""
    return np.searchsorted(np.array(ends[:-1]), ts, side="right").astype(np.int64)
