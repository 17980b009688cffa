"""Two processes that start an update of the same shop at once: one does it, the other says so."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from raysys.ledger.log import Log
from raysys.storage import Root
from tests.helpers import file_uses
from tests.update_shop import DAYS, find_problems, write_catalogue, write_day, write_shop


class Updater:
    """A process of `tests/racing_updater.py`."""

    def __init__(self, orders: IO[str], answers: IO[str]) -> None:
        self._orders = orders
        self._answers = answers
        state, self.pid = self.answer().split()
        assert state == "ready"

    def tell(self, line: str) -> None:
        print(line, file=self._orders, flush=True)

    def answer(self) -> str:
        return self._answers.readline().strip()


@pytest.fixture(scope="module")
def updaters(s3_root: str) -> Iterator[list[Updater]]:
    their_orders, our_orders = os.pipe()
    our_answers, their_answers = os.pipe()
    with os.fdopen(our_orders, "w") as orders, os.fdopen(our_answers) as answers:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.racing_updater", str(their_orders), str(their_answers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(their_orders, their_answers),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
        os.close(their_orders)
        os.close(their_answers)
        try:
            assert process.stdin is not None and process.stdout is not None
            yield [Updater(process.stdin, process.stdout), Updater(orders, answers)]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_each_partition_is_won_by_one_and_the_other_says_who_has_it(
    root: Root, updaters: list[Updater], tmp_path: Path, tiny_encoder: str
) -> None:
    config = write_shop(tmp_path, root, tiny_encoder, lease_s=4.0)
    write_catalogue(root)
    for day in DAYS[:3]:
        write_day(root, day)
        for updater in updaters:
            updater.tell(str(config))
        answers = {updater.answer(): updater for updater in updaters}
        winner = answers.pop("training")
        (refusal,) = answers
        assert re.fullmatch(
            rf"refused LeaseHeldError: update u\d+-\w+ is being run by \S+:{winner.pid} .*"
            "; wait for it to end, then submit again",
            refusal,
        )
        winner.tell("go on")
        assert winner.answer().startswith("committed ")
    uses = file_uses(Log(root).refresh().committed)
    assert {path: len(updates) for path, updates in uses.items()} == {
        f"events/dt={day}/a.parquet": 1 for day in DAYS[:3]
    }
    assert find_problems(root) == []
