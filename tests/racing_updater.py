"""Two processes that update the same shop at the same moment, as they are told.

    python -m tests.racing_updater READ_FD WRITE_FD

One listens on standard input and answers on standard output, the other on the two descriptors:

    (start)    -> "ready PID"
    CONFIG     -> "training", once the update is started and holds the lease; or "refused ERROR"
    "go on"    -> "committed UPDATE_ID"
"""

from __future__ import annotations

import os
import sys
import time
from typing import IO, Any

import pytest

from raysys.config import load_config
from raysys.errors import RaysysError
from raysys.train.output import TrainOutput
from tests.stub_steps import Steps


class RealClock:
    """Two processes share no other time."""

    def __call__(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def advance(self, seconds: float) -> None:
        """Time passes by itself."""


class RacingSteps(Steps):
    """Waits in the midst of an update until it is told to go on."""

    def __init__(self, patch: pytest.MonkeyPatch, orders: IO[str], answers: IO[str]) -> None:
        super().__init__(patch)
        self.clock = RealClock()  # type: ignore[assignment]
        self._orders = orders
        self._answers = answers

    def follow(self) -> None:
        self._tell(f"ready {os.getpid()}")
        # Not `for line in`, which reads ahead.
        while line := self._orders.readline():
            try:
                self._tell(f"committed {self.update(load_config(line.strip())).update_id}")
            except RaysysError as error:
                self._tell(f"refused {type(error).__name__}: {error}")

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._tell("training")
        assert self._orders.readline() == "go on\n"
        return super().train(*args, **kwargs)

    def _tell(self, line: str) -> None:
        print(line, file=self._answers, flush=True)


def main() -> None:
    """Becomes two only now: loading what an update imports takes longer than all the rest."""
    orders, answers = (int(fd) for fd in sys.argv[1:])
    is_second = os.fork() == 0
    with pytest.MonkeyPatch.context() as patch:
        if is_second:
            RacingSteps(patch, os.fdopen(orders), os.fdopen(answers, "w")).follow()
        else:
            os.close(orders)
            os.close(answers)
            RacingSteps(patch, sys.stdin, sys.stdout).follow()


if __name__ == "__main__":
    main()
