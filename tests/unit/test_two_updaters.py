"""Two processes that start an update of the same shop at once: one does it, the other says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysys.ledger.log import Log
from raysys.storage import Root
from tests.helpers import file_uses
from tests.update_shop import DAYS, find_problems, write_catalogue, write_day, write_shop

Updater = subprocess.Popen[str]


@pytest.fixture(scope="module")
def updaters(s3_root: str) -> Iterator[list[Updater]]:
    command = [sys.executable, "-m", "tests.racing_updater"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = subprocess.PIPE
    updaters = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        for _ in range(2)
    ]
    try:
        assert [read(updater) for updater in updaters] == ["ready", "ready"]
        yield updaters
    finally:
        for updater in updaters:
            updater.kill()
            updater.communicate()


def read(updater: Updater) -> str:
    assert updater.stdout is not None
    return updater.stdout.readline().strip()


def write(updater: Updater, line: str) -> None:
    assert updater.stdin is not None
    updater.stdin.write(f"{line}\n")
    updater.stdin.flush()


def test_each_partition_is_won_by_one_and_the_other_says_who_has_it(
    root: Root, updaters: list[Updater], tmp_path: Path, tiny_encoder: str
) -> None:
    config = write_shop(tmp_path, root, tiny_encoder, lease_s=4.0)
    write_catalogue(root)
    for day in DAYS[:3]:
        write_day(root, day)
        for updater in updaters:
            write(updater, str(config))
        answers = [read(updater) for updater in updaters]
        assert sorted(answers)[1] == "training"
        (winner,) = (u for u, a in zip(updaters, answers, strict=True) if a == "training")
        (refusal,) = (answer for answer in answers if answer != "training")
        assert re.fullmatch(
            rf"refused LeaseHeldError: update u\d+-\w+ is being run by \S+:{winner.pid} .*"
            "; wait for it to end, then submit again",
            refusal,
        )
        write(winner, "go on")
        assert read(winner).startswith("committed ")
    uses = file_uses(Log(root).refresh().committed)
    assert {path: len(updates) for path, updates in uses.items()} == {
        f"events/dt={day}/a.parquet": 1 for day in DAYS[:3]
    }
    assert find_problems(root) == []
