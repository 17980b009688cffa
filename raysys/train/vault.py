"""What trials know of each other: nothing. What leaves of them: the best one, once all are done.

    driver: fill(draws) -> trial: draw() … offer() | fail() -> driver: winner()

An actor of the driver's, without a name, that holds one result at a time: a loser's weights, score
and hyperparameters are gone as soon as a better one comes. Nothing of it is written anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from raysys.errors import TrialError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a trial came to."""

    values: Mapping[str, object]
    output: bytes
    """Its weights, pickled: this actor needs no torch, and what it returns may be written to."""
    score: float
    """With noise under privacy."""


class Vault:
    """Made an actor by `train.tune`."""

    def __init__(self) -> None:
        self._draws: list[Mapping[str, object]] = []
        self._num_open = 0
        self._best: Result | None = None
        self._failure: str | None = None

    def fill(self, draws: Iterable[Mapping[str, object]]) -> None:
        """Takes the hyperparameters of all trials. Not on construction: Ray keeps those arguments
        where the cluster's state is."""
        self._draws = list(draws)
        self._num_open = len(self._draws)

    def draw(self) -> Mapping[str, object] | None:
        """Hands out the hyperparameters of one trial, once; none after one has failed."""
        return None if self._failure is not None else self._draws.pop()

    def offer(self, result: Result) -> None:
        """Keeps a trial's result if it is the best so far."""
        self._num_open -= 1
        if self._best is None or not result.score <= self._best.score:
            self._best = result

    def fail(self, values: Mapping[str, object], reason: str) -> None:
        """Fails the selection.

        A failed trial counts as better than any that is not, so what is told of it is as private as
        the winner would have been.
        """
        self._failure = self._failure or f"{_written(values)}: {reason}"

    def winner(self) -> Result:
        """Returns the best trial.

        Raises:
          TrialError: One failed or was lost.
        """
        if self._failure is not None:
            raise TrialError(
                f"a trial failed, and with it the selection: {self._failure}; mend tune.space, "
                "then submit again"
            )
        if self._best is None or self._num_open > 0:
            raise TrialError(
                "a trial's process was lost, and with it the selection: look for nodes out of "
                "memory, lower tune.max_concurrent, then submit again"
            )
        return self._best


def _written(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
