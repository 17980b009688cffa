"""Backfill: history in several updates, or a refusal before the first."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from raysys import update
from raysys.errors import DataError
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted
from raysys.storage import Root
from tests.stub_steps import Steps
from tests.update_shop import DAYS, contents, find_problems, write_catalogue, write_day, write_shop

JOB = Path(__file__).parents[2] / "jobs" / "backfill.py"


class Shop:
    """A shop with a week of history, and the job's command line. Each update costs epsilon 0.01."""

    def __init__(self, folder: Path, encoder: str, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.encoder, self._patch = folder, encoder, patch
        self.root = Root((folder / "root").as_uri())
        self.steps = Steps(patch)
        self.config = write_shop(folder, self.root, encoder)
        write_catalogue(self.root)
        for day in DAYS:
            write_day(self.root, day)

    def configure(self, extra: str = "", **changes: Any) -> None:
        self.config = write_shop(self.folder, self.root, self.encoder, **changes)
        self.config.write_text(self.config.read_text() + extra)

    def run_job(self, *options: str) -> int | str | None:
        """Runs jobs/backfill.py in this process, without Ray."""
        self._patch.setattr("ray.init", lambda **settings: None)
        self._patch.setattr(sys, "argv", [str(JOB), "--config", str(self.config), *options])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(JOB), run_name="__main__")
        return exit_info.value.code

    def read(self) -> list[list[str]]:
        """The days that each committed update read."""
        commits = Log(self.root).refresh().committed
        return [[p.key.removeprefix("events/dt=") for p in c.partitions] for c in commits]


@pytest.fixture
def shop(tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, tiny_encoder, monkeypatch)


def test_catches_up_in_bounded_updates_oldest_first(shop: Shop, capsys: Any) -> None:
    assert shop.run_job("--max-partitions", "3") == 0
    assert shop.read() == [list(DAYS[:3]), list(DAYS[3:6]), list(DAYS[6:])]
    assert find_problems(shop.root) == []
    printed = capsys.readouterr().out
    assert printed.startswith(
        "[backfill] 7 partitions are new and take 3 updates; epsilon will be 0.030 after them "
        "(unit: a user; neighbours: add or remove one user; delta 0.0001; accountant: PLD "
        "(dp-accounting), pessimistic)\n"
    )
    assert "[backfill] 3 updates committed; nothing new below" in printed


def test_says_so_before_it_starts(shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(*args: Any, **named: Any) -> UpdateCommitted:
        assert "7 partitions are new and take 7 updates" in capsys.readouterr().out
        raise DataError("stop here")

    monkeypatch.setattr(update, "run_update", fail)
    assert shop.run_job("--max-partitions", "1") == 1


def test_without_privacy_speaks_of_none(shop: Shop, capsys: Any) -> None:
    shop.configure(private="false")
    assert shop.run_job() == 0
    printed = capsys.readouterr().out
    assert "[backfill] 7 partitions are new and take 1 updates\n" in printed
    assert shop.read() == [list(DAYS)]


def test_takes_the_limit_of_the_config(shop: Shop) -> None:
    shop.configure("partitions: {max_partitions: 4}\n")
    assert shop.run_job() == 0
    assert shop.read() == [list(DAYS[:4]), list(DAYS[4:])]


def test_keeps_to_its_range_and_does_nothing_when_run_again(shop: Shop, capsys: Any) -> None:
    options = ("--first", DAYS[1], "--last", DAYS[3], "--max-partitions", "2")
    assert shop.run_job(*options) == 0
    assert shop.read() == [list(DAYS[1:3]), [DAYS[3]]]
    before = contents(shop.root)
    capsys.readouterr()
    assert shop.run_job(*options) == 0
    assert contents(shop.root) == before
    assert "[backfill] 0 partitions are new and take 0 updates\n" in capsys.readouterr().out


def test_reads_what_is_older_than_the_config_looks_back(shop: Shop) -> None:
    shop.configure("partitions: {check_back_days: 1}\n")
    assert shop.run_job("--first", DAYS[5]) == 0
    assert shop.run_job("--max-partitions", "4") == 0
    assert shop.read() == [list(DAYS[5:]), list(DAYS[:4]), [DAYS[4]]]


def test_is_refused_as_a_whole_if_the_budget_does_not_suffice_for_all(
    shop: Shop, capsys: Any
) -> None:
    shop.configure(epsilon_total=0.035)
    before = contents(shop.root)
    assert shop.run_job("--max-partitions", "2") == 1
    message = "raysys: these 4 updates would bring epsilon to 0.040 of privacy.epsilon_total 0.035"
    assert capsys.readouterr().err.startswith(message)
    assert contents(shop.root) == before and shop.read() == []
    assert shop.run_job("--max-partitions", "3") == 0


def test_stops_at_the_first_failure_and_goes_on_when_run_again(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole, num_trained = shop.steps.train, 0

    def train(*args: Any, **named: Any) -> Any:
        nonlocal num_trained
        num_trained += 1
        if num_trained == 2:
            raise DataError("a bad day")
        return whole(*args, **named)

    monkeypatch.setattr(update, "train", train)
    assert shop.run_job("--max-partitions", "3") == 1
    assert shop.read() == [list(DAYS[:3])]
    told = capsys.readouterr()
    assert told.err == "raysys: a bad day\n"
    assert "[backfill] stopped; committed before that: u0001-" in told.out
    assert shop.run_job("--max-partitions", "3") == 0
    assert shop.read() == [list(DAYS[:3]), list(DAYS[3:6]), list(DAYS[6:])]
    assert find_problems(shop.root) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--first", DAYS[3], "--last", DAYS[1]), f"--last {DAYS[1]} is before --first {DAYS[3]}"),
        (("--max-partitions", "-1"), "--max-partitions: expected 0 or more, got -1"),
    ],
    ids=["range", "limit"],
)
def test_options_that_make_no_sense_are_one_line(
    shop: Shop, capsys: Any, options: tuple[str, ...], message: str
) -> None:
    before = contents(shop.root)
    assert shop.run_job(*options) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"raysys: {message}") and error.count("\n") == 1
    assert contents(shop.root) == before
