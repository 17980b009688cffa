"""What Ray Train is asked for, which failures it may retry, and how the others are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError

from raysys.config import TrainConfig
from raysys.errors import (
    ConfigError,
    HealthError,
    LeaseLostError,
    PrivacyError,
    StorageUnavailableError,
    WorkersLostError,
)
from raysys.ledger.log import Log
from raysys.storage import Root
from raysys.train import trainer
from raysys.train.failures import RefuseRetries, told, will_fail_again
from tests import tiny_shop
from tests.helpers import started

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(tiny_encoder: str, local_root: Root, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Returns what `TorchTrainer` would be given for these changes of `train:`."""

    class Stop(Exception):
        pass

    def asked(num_gpus: int = 0, **changes: Any) -> dict[str, Any]:
        given: dict[str, Any] = {}

        def record(*args: Any, **options: Any) -> None:
            given.update(options)
            raise Stop

        monkeypatch.setattr(trainer, "TorchTrainer", record)
        monkeypatch.setattr(trainer.ray, "cluster_resources", lambda: {"GPU": float(num_gpus)})
        job = tiny_shop.train_job(tiny_encoder, train=changes)
        with pytest.raises(Stop):
            trainer.train(job, [], root=local_root, cache=local_root, update_id="u1", num_shards=1)
        return given

    return asked


def test_dead_and_preempted_workers_are_replaced_as_often_as_the_config_says(ask: Ask) -> None:
    """Ray's own default is without end for the preempted ones."""
    failures = ask(max_failures=2)["run_config"].failure_config
    assert (failures.max_failures, failures.max_preemption_failures) == (2, 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"num_workers": 4}, 4), ({"num_workers": 4, "min_workers": 4}, 4),
     ({"num_workers": 4, "min_workers": 2}, (2, 4))],
    ids=["fixed", "equal bounds", "elastic"],
)  # fmt: skip
def test_workers_are_elastic_between_the_configured_bounds(
    ask: Ask, changes: dict[str, int], expected: Any
) -> None:
    scaling = ask(**changes)["scaling_config"]
    assert scaling.num_workers == expected
    assert scaling.elastic_resize_monitor_interval_s == float("inf")


@pytest.mark.parametrize("wrong", [5, -1], ids="min_workers {}".format)
def test_bounds_that_cross_are_refused(wrong: int) -> None:
    with pytest.raises(ConfigError, match=r"train\.min_workers: expected 0 to num_workers \(4\)"):
        TrainConfig(num_workers=4, min_workers=wrong)


@pytest.mark.parametrize(
    ("wanted", "num_gpus", "used"),
    [("auto", 0, False), ("auto", 1, False), ("auto", 2, True), (True, 0, True), (False, 9, False)],
)
def test_gpus_are_used_when_there_is_one_for_each_worker(
    ask: Ask, wanted: Any, num_gpus: int, used: bool
) -> None:
    given = ask(num_gpus, num_workers=2, use_gpu=wanted)
    assert given["scaling_config"].use_gpu is used
    assert given["torch_config"].backend == ("nccl" if used else "gloo")


FINAL = (PrivacyError("p"), HealthError("h"), LeaseLostError("l"), AssertionError(), KeyError("k"))
PASSING = (RuntimeError("connection closed by peer"), StorageUnavailableError("s"), OSError())


@pytest.mark.parametrize("error", FINAL, ids=lambda e: type(e).__name__)
def test_an_error_that_will_come_again_ends_the_run_at_once(error: Exception) -> None:
    assert will_fail_again(error)
    with pytest.raises(type(error)):
        RefuseRetries().after_exception(None, {0: RuntimeError("a peer is gone"), 1: error})
    assert told(ControllerError(error), 3) is error


@pytest.mark.parametrize("error", PASSING, ids=lambda e: type(e).__name__)
def test_an_error_that_may_pass_is_left_to_the_next_attempt(error: Exception) -> None:
    assert not will_fail_again(error)
    RefuseRetries().after_exception(None, {0: error})


def test_a_run_that_lost_too_many_workers_says_so_in_one_line() -> None:
    error = WorkerGroupError("a long\ntraceback", {1: RuntimeError("with a row of data")})
    found = told(error, 3)
    assert isinstance(found, WorkersLostError)
    assert str(found) == (
        "train workers failed more than train.max_failures (3) times, last those of rank 1 "
        "(RuntimeError); see their logs, then submit again"
    )
    outage = StorageUnavailableError("no answer")
    assert told(WorkerGroupError("", {0: RuntimeError(), 1: outage}), 3) is outage
    assert isinstance(told(TrainingFailedError("?"), 3), WorkersLostError)


@pytest.mark.parametrize("is_private", [True, False], ids=["private", "not private"])
def test_a_private_run_asks_the_ledger_for_each_block_another_does_not(
    is_private: bool, tiny_encoder: str, local_root: Root
) -> None:
    job = tiny_shop.train_job(tiny_encoder, plan=tiny_shop.plan(enabled=is_private, num_steps=5))
    next_steps = trainer._next_steps(job, local_root, "u0001-aaaaaa")
    if not is_private:
        assert next_steps(0) == range(0, 5)
        return
    with pytest.raises(LeaseLostError):
        next_steps(0)
    reserved = job.plan.spend
    Log(local_root).transact(lambda state: started(reserved=reserved, permits_steps=True))
    assert next_steps(0) == range(0, 5)
    assert Log(local_root).refresh().permitted_steps == 5
