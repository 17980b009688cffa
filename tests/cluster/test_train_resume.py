"""Train workers that are killed in the midst of an update: it commits, and spends what it reserved.

Workers write down each step before they take it, so that what the ledger and the run say can be
held against what was done. What happens between which two lines is in
`tests/unit/test_train_blocks.py`.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from raysys.config import load_config
from raysys.errors import HealthError, WorkersLostError
from raysys.ledger.log import Log
from raysys.ledger.records import StepsPermitted, UpdateCommitted
from raysys.registry.store import load_weights
from raysys.storage import Root
from raysys.train import trainer
from raysys.update import run_update
from tests.update_shop import DAYS, find_problems, write_catalogue, write_day, write_shop

pytestmark = pytest.mark.usefixtures("ray_cluster")
NUM_STEPS, BLOCK = 24, 4
"""`BLOCK` divides neither of the steps at which a worker is killed."""


@dataclasses.dataclass(frozen=True)
class Took:
    """One line of a worker's diary."""

    pid: int
    rank: int
    world_size: int
    step: int


class Diary:
    """The steps that workers began, one file for all of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def read(self) -> list[Took]:
        return [Took(*map(int, line.split())) for line in self.path.read_text().splitlines()]

    @contextmanager
    def kills(self, *victims: tuple[int, int]) -> Iterator[None]:
        """Kills, one after the other, the worker of a rank once it begins a step."""
        over = threading.Event()
        thread = threading.Thread(target=self._kill, args=(victims, over))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _kill(self, victims: tuple[tuple[int, int], ...], over: threading.Event) -> None:
        for rank, step in victims:
            while not over.wait(0.02):
                found = [t for t in self.read() if t.rank == rank and t.step >= step]
                if found:
                    os.kill(found[-1].pid, signal.SIGKILL)
                    break


@pytest.fixture
def diary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Diary:
    """Has train workers keep one, and take their time over each step."""
    kept = Diary(tmp_path / "diary")
    path, worker = str(kept.path), trainer._worker

    def diarist(config: dict[str, Any]) -> None:
        from raysys.train.step import Stepper

        run = Stepper.run

        def slow(self: Stepper, step: int) -> None:
            context = ray.train.get_context()
            rank, size = context.get_world_rank(), context.get_world_size()
            with open(path, "a") as file:
                file.write(f"{os.getpid()} {rank} {size} {step}\n")
            time.sleep(0.1)
            run(self, step)

        Stepper.run = slow  # type: ignore[method-assign]
        worker(config)

    monkeypatch.setattr(trainer, "_worker", diarist)
    return kept


def shop(root: Root, folder: Path, encoder: str, **changes: Any) -> Path:
    """Writes a shop of one day, and its config with these changes of `train:`."""
    path = write_shop(folder, root, encoder, num_steps=NUM_STEPS, lease_s=4.0)
    changed = {"checkpoint_steps": BLOCK, **changes}
    keys = ", ".join(f"{key}: {value}" for key, value in changed.items())
    path.write_text(path.read_text().replace("train: {", f"train: {{{keys}, "))
    write_catalogue(root)
    write_day(root, DAYS[0])
    return path


def permits(root: Root) -> list[int]:
    records = (entry.record for entry in Log(root).entries())
    return [record.num_steps for record in records if isinstance(record, StepsPermitted)]


def require_spent_once(root: Root, commit: UpdateCommitted, took: list[Took]) -> None:
    """What must hold whatever was killed."""
    assert commit.spent is not None and commit.spent.num_steps == NUM_STEPS
    told = permits(root)
    assert told == list(range(BLOCK, NUM_STEPS + 1, BLOCK))
    by_rank = Counter((line.rank, line.step) for line in took)
    assert set(by_rank.values()) == {1}, "a step ran twice"
    assert max(line.step for line in took) == NUM_STEPS - 1


def test_workers_killed_mid_run_are_replaced_and_nothing_is_spent_or_run_twice(
    local_root: Root, tmp_path: Path, tiny_encoder: str, diary: Diary
) -> None:
    """First the one that asks the ledger, then the other."""
    config = load_config(shop(local_root, tmp_path, tiny_encoder))
    with diary.kills((0, 5), (1, 14)):
        commit = run_update(config)
    took = diary.read()
    assert len({line.pid for line in took}) == 6, "three groups of two workers"
    require_spent_once(local_root, commit, took)
    # Two blocks were cut short, and what they still had to run is lost.
    assert len({line.step for line in took}) < NUM_STEPS
    assert find_problems(local_root) == []
    state = Log(local_root).refresh()
    assert [(name, spend, status) for name, spend, status in state.spends] == [
        (commit.update_id, commit.spent, "committed")
    ]
    _, weights = load_weights(local_root, commit)
    start = type(weights.head).decayed_frequency(config.model.hidden_units)
    for name, value in weights.head.weights.items():
        assert np.isfinite(value).all() and not np.array_equal(value, start.weights[name])


def test_a_cluster_with_room_for_fewer_workers_trains_with_those(
    local_root: Root, tmp_path: Path, tiny_encoder: str, diary: Diary
) -> None:
    """Of two workers at 1.5 CPUs one fits into 2 CPUs, and it is killed as well."""
    config = shop(local_root, tmp_path, tiny_encoder, num_workers=2, min_workers=1)
    config.write_text(config.read_text().replace("cpus_per_worker: 0.25", "cpus_per_worker: 1.5"))
    with diary.kills((0, 9)):
        commit = run_update(load_config(config))
    took = diary.read()
    assert {line.world_size for line in took} == {1} and len({line.pid for line in took}) == 2
    require_spent_once(local_root, commit, took)


def test_a_run_that_loses_more_workers_than_allowed_stays_charged_for_its_permits(
    local_root: Root, tmp_path: Path, tiny_encoder: str, diary: Diary
) -> None:
    config = load_config(shop(local_root, tmp_path, tiny_encoder, max_failures=0))
    with diary.kills((1, 9)), pytest.raises(WorkersLostError, match=r"train\.max_failures") as lost:
        run_update(config)
    assert "\n" not in str(lost.value)
    assert max(line.step for line in diary.read()) < permits(local_root)[-1] < NUM_STEPS
    ((_, spend, status),) = Log(local_root).refresh().spends
    assert (spend.num_steps, status) == (permits(local_root)[-1], "abandoned")


def test_an_unhealthy_model_fails_the_update_in_one_line_and_is_not_trained_again(
    local_root: Root, tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(shop(local_root, tmp_path, tiny_encoder))
    attempts, worker = str(tmp_path / "attempts"), trainer._worker

    def forgetful(config: dict[str, Any]) -> None:
        """Loads the head that training started from (sentence-transformers #3936)."""
        from raysys.train import output

        with open(attempts, "a") as file:
            file.write(f"{os.getpid()}\n")
        read, head = output.read_output, config["job"].head
        output.read_output = lambda folder: dataclasses.replace(read(folder), head=head)
        worker(config)

    monkeypatch.setattr(trainer, "_worker", forgetful)
    with pytest.raises(HealthError, match="the version as reloaded scores up to") as refused:
        run_update(config)
    assert "\n" not in str(refused.value)
    assert len(Path(attempts).read_text().splitlines()) == config.train.num_workers
    assert Log(local_root).refresh().committed == ()
    (abandoned,) = Log(local_root).refresh().abandoned
    assert abandoned.reason == f"HealthError: {refused.value}"
