"""From scores to probabilities: Platt scaling, `p = sigmoid(slope * score + intercept)`.

    held-out users' scores and outcomes -> Calibration -> manifest -> LoadedVersion.probabilities()

Source: Platt (1999), Probabilistic outputs for support vector machines.

Shape suffix: K = candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raysys.ingest.features import FloatArray

Event = Literal["shown", "taken", "trained", "next"]
"""What a probability is of: see `EVENT_MEANINGS`."""

EVENT_MEANINGS: Mapping[Event, str] = {
    "shown": (
        "an outcome of an item that is shown: of a user at random, and one of the items that were "
        "shown to that user without a query"
    ),
    "taken": (
        "a user taking the item within the evaluation window, of users who take anything in it and "
        "of all items of the catalogue"
    ),
    "trained": "an outcome as the pointwise loss was trained on; checked on nobody",
    "next": "the next item that an unknown user takes being this one; checked on nobody",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How a version's scores become probabilities."""

    slope: float
    """Not negative: a higher score never is less probable."""
    intercept: float
    event: Event

    def __post_init__(self) -> None:
        if not (np.isfinite([self.slope, self.intercept]).all() and self.slope >= 0):
            raise ValueError(f"expected a finite calibration of slope >= 0, got {self}")

    def probabilities(self, scores: FloatArray) -> FloatArray:
        """Returns a probability in [0, 1] for each score, (K,), rising with it; NaN stays NaN."""
        return sigmoid(self.slope * scores.astype(np.float64) + self.intercept).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A calibration and how good it is."""

    slope: float
    intercept: float
    event: Event
    num_users: int
    base_rate: float
    """How often the event happened."""
    mean_predicted: float
    """Mean probability of the candidates."""
    expected_error: float | None = None
    """Mean distance of probability and observed rate over bins of candidates, each half of the
    users judged by what was fitted on the other; None where it is not released."""

    @property
    def calibration(self) -> Calibration:
        """What a version keeps of it."""
        return Calibration(slope=self.slope, intercept=self.intercept, event=self.event)


def sigmoid(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns `1 / (1 + exp(-log_odds))`, without overflow."""
    out: NDArray[np.float64] = 0.5 * (1 + np.tanh(0.5 * log_odds))
    return out


def without_fit(loss: str, reference: FloatArray) -> Calibration:
    """Returns what can be said of a version whose probabilities were fitted on nobody.

    Scores of the pointwise loss are log odds. Others rank items against each other: their softmax
    over the catalogue is the chance that the next item taken is this one.

    Args:
      loss: As trained.
      reference: (N,) scores of all items for a user of whom nothing is known.
    """
    if loss == "pointwise":
        return Calibration(slope=1.0, intercept=0.0, event="trained")
    rate = 1 / max(len(reference), 1)
    return Calibration(slope=1.0, intercept=intercept_of(reference, rate), event="next")


def intercept_of(scores: FloatArray, rate: float) -> float:
    """Returns the intercept with which scores of slope 1 have this mean probability; finite."""
    found = finite(scores)
    log_rate = float(np.log(rate) - np.log1p(-rate)) if 0 < rate < 1 else 0.0
    if not len(found):
        return log_rate
    low, high = log_rate - float(found.max()) - 1, log_rate - float(found.min()) + 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(found + middle).mean() < rate else (low, middle)
    return (low + high) / 2


def finite(scores: FloatArray) -> NDArray[np.float64]:
    """Returns scores that can be counted, whatever a broken model gives."""
    return np.nan_to_num(scores.astype(np.float64), nan=0.0, posinf=1e6, neginf=-1e6)


def center_of(reference: FloatArray) -> float:
    """Returns the score at which offsets begin: the mean of the public ones, (N,)."""
    return float(finite(reference).mean()) if len(reference) else 0.0
