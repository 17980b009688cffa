"""What crosses between train workers, counted as the benchmark counts it: adapter bytes alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from raysys.model.encoder import TextEncoder
from raysys.model.scorer import Head
from raysys.privacy import plan
from raysys.train.blocks import uncharged
from raysys.train.loop import TrainJob, train_on_shards
from tests import tiny_shop

FOLDER = Path(__file__).parents[2] / "benchmarks"
NUM_STEPS = 5


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("train_scaling")


@pytest.fixture
def moved(
    benchmark: ModuleType, tiny_encoder: str, world: None
) -> Callable[[], dict[str, list[int]]]:
    """Trains, and returns the sizes of all tensors that were handed over."""

    def train() -> dict[str, list[int]]:
        job = tiny_shop.train_job(tiny_encoder)
        texts = tiny_shop.distinct_texts()
        with benchmark.counted_bytes() as sizes:
            train_on_shards(
                job, [tiny_shop.shard(tiny_shop.outcomes(20)).examples],
                TextEncoder(tiny_encoder, 8).activations(texts).select(texts),
                num_workers=1, on_step=lambda step: None,
                next_steps=uncharged(num_steps=NUM_STEPS, size=2),
            )  # fmt: skip
        return dict(sizes)

    return train


@pytest.fixture
def job(tiny_encoder: str) -> TrainJob:
    return tiny_shop.train_job(tiny_encoder)


def test_workers_exchange_the_gradients_of_what_is_trained_and_two_numbers_a_block(
    benchmark: ModuleType, job: TrainJob, moved: Callable[[], dict[str, list[int]]]
) -> None:
    sizes = moved()
    head = sum(value.nbytes for value in Head.decayed_frequency(8).weights.values())
    trained = 4 * 16 * job.model.lora_rank + head
    assert benchmark.trained_bytes(job) == trained
    assert sum(sizes["all_reduce"]) == NUM_STEPS * trained
    # Where each block of 2 begins and ends, and that there is none after the third.
    assert sizes.keys() == {"all_reduce", "broadcast"} and sizes["broadcast"] == [16] * 4


def test_an_encoder_that_is_reduced_as_well_is_counted(
    job: TrainJob,
    moved: Callable[[], dict[str, list[int]]],
    benchmark: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What DistributedDataParallel does with all that a model holds and trains."""
    encoder = TextEncoder(job.model.encoder, 8).model
    optimizer = plan.PrivacyPlan.optimizer

    def reduces_all(self: Any, *args: Any, **options: Any) -> Any:
        private = optimizer(self, *args, **options)
        reduce = private.reduce_gradients

        def too_much() -> None:
            reduce()
            for parameter in encoder.parameters():
                torch.distributed.all_reduce(parameter.data)

        private.reduce_gradients = too_much
        return private

    monkeypatch.setattr(plan.PrivacyPlan, "optimizer", reduces_all)
    assert sum(moved()["all_reduce"]) > 10 * NUM_STEPS * benchmark.trained_bytes(job)
