"""One of several processes that update the same shop at the same moment.

python -m tests.racing_updater    a line on standard input -> lines on standard output

CONFIG     -> "training", once the update is started and holds the lease; or "refused ERROR"
"go on"    -> "committed UPDATE_ID"
"""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from raysys.config import load_config
from raysys.errors import RaysysError
from raysys.train.trainer import TrainOutput
from tests.stub_steps import Steps


class RealClock:
    """Two processes share no time but this."""

    def __call__(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def advance(self, seconds: float) -> None:
        """Time passes by itself."""


class RacingSteps(Steps):
    """Waits in the midst of an update for the one who asked for it."""

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        tell("training")
        assert sys.stdin.readline() == "go on\n"
        return super().train(*args, **kwargs)


def tell(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    with pytest.MonkeyPatch.context() as patch:
        steps = RacingSteps(patch)
        steps.clock = RealClock()  # type: ignore[assignment]
        tell("ready")
        for line in sys.stdin:
            try:
                tell(f"committed {steps.update(load_config(line.strip())).update_id}")
            except RaysysError as error:
                tell(f"refused {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
