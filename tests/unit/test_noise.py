"""Noise has the size that is charged, whatever the number of workers, and is never drawn twice.

Every bound is 5 standard errors or wider, so a sound engine fails one test in a million runs.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from raysys.model.encoder import TextEncoder
from raysys.privacy import plan as engine
from raysys.privacy.accounting import epsilon
from raysys.privacy.plan import PrivacyPlan
from raysys.train.loop import train_on_shards
from tests import tiny_shop
from tests.broken_engines import (
    DropsEmptySteps,
    HalfAPercentLess,
    NotTimesClip,
    with_fault,
)
from tests.noisy_ranks import (
    NOISE_STD,
    NUM_COORDINATES,
    NUM_STEPS,
    NUM_USERS,
    WORLD_SIZES,
    empty_step,
    plan,
)

Values = NDArray[np.float32]
Ranks = list[dict[str, Any]]


def ratio(values: Values) -> float:
    """Standard deviation over that which the accountant is told, noise_multiplier * clip."""
    return float(values.astype(np.float64).std() / NOISE_STD)


def is_as_charged(values: Values) -> bool:
    """Within 5 standard errors of mean 0 and of the charged standard deviation."""
    num = len(values)
    return abs(ratio(values) - 1) < 5 / math.sqrt(2 * num) and abs(
        float(values.mean())
    ) < 5 * NOISE_STD / math.sqrt(num)


def is_shared(first: Values, second: Values) -> bool:
    return bool(abs(np.corrcoef(first, second)[0, 1]) > 5 / math.sqrt(len(first)))


def million_coordinates() -> float:
    """Mean ratio of 4 steps of a million coordinates.

    Of one step it has a standard error of 0.0007, so 0.9977 to 1.0023 would fail one sound run in
    900; of four, 0.00035 and one in 10 billion.
    """
    return float(np.mean([ratio(empty_step(1, 1_000_000)[1]) for _ in range(4)]))


def test_noise_is_noise_multiplier_times_clip_norm(world: None) -> None:
    assert 0.9977 < million_coordinates() < 1.0023


def test_noise_that_forgets_the_clip_norm_is_noticed(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrivacyPlan, "optimizer", with_fault(NotTimesClip))
    assert million_coordinates() == pytest.approx(1 / 3, abs=0.0023)


def test_noise_half_a_percent_off_is_noticed(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivacyPlan, "optimizer", with_fault(HalfAPercentLess))
    assert million_coordinates() < 0.9977


@pytest.mark.parametrize("world_size", WORLD_SIZES, ids="{} workers".format)
class TestWorkers:
    def test_all_of_them_add_the_noise_of_one(self, noisy_ranks: Ranks, world_size: int) -> None:
        totals = [rank[f"total_{world_size}"] for rank in noisy_ranks[:world_size]]
        assert all(np.array_equal(totals[0], total) for total in totals)
        assert len(totals[0]) == NUM_COORDINATES and is_as_charged(totals[0])

    def test_noise_of_each_of_them_is_noticed(self, noisy_ranks: Ranks, world_size: int) -> None:
        total = noisy_ranks[0][f"broken_total_{world_size}"]
        assert not is_as_charged(total)
        assert ratio(total) == pytest.approx(math.sqrt(world_size), rel=0.01)

    def test_only_one_of_them_adds_any(self, noisy_ranks: Ranks, world_size: int) -> None:
        own = [rank[f"own_{world_size}"] for rank in noisy_ranks[:world_size]]
        assert (own[0] != 0).mean() > 0.99 and not any(values.any() for values in own[1:])
        broken = [rank[f"broken_own_{world_size}"] for rank in noisy_ranks[:world_size]]
        assert all(values.any() for values in broken)

    def test_all_take_the_planned_number_of_steps(
        self, noisy_ranks: Ranks, world_size: int
    ) -> None:
        sizes = [rank[f"sizes_{world_size}"] for rank in noisy_ranks[:world_size]]
        assert [len(rank) for rank in sizes] == [NUM_STEPS] * world_size
        assert all((rank == 0).any() for rank in sizes), "empty steps among them"
        assert len({tuple(rank) for rank in sizes}) == world_size, "each draws its own"


def test_ranks_that_drop_empty_steps_are_noticed() -> None:
    kept = plan().sampler(NUM_USERS, plan().rng(0, 0))
    dropping = DropsEmptySteps(
        num_users=NUM_USERS, num_steps=NUM_STEPS, sampling_prob=kept.sampling_prob, rng=kept.rng
    )
    assert len(list(kept)) == NUM_STEPS > len(list(dropping))


def test_runs_and_ranks_and_steps_never_share_noise(world: None, noisy_ranks: Ranks) -> None:
    """Although all of them set the same seed first."""
    drawn = [noisy_ranks[0][f"{name}_{n}"] for n in WORLD_SIZES for name in ("total", "again")]
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(empty_step(1)[1])
    assert not any(is_shared(one, other) for one, other in itertools.combinations(drawn, 2))
    own = [rank["broken_own_4"] for rank in noisy_ranks]
    assert not any(is_shared(one, other) for one, other in itertools.combinations(own, 2))


def test_noise_of_a_shared_generator_is_noticed(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "raysys.privacy.plan.unguessable_generator", lambda _: torch.Generator().manual_seed(0)
    )
    assert is_shared(empty_step(1, 10_000)[1], empty_step(1, 10_000)[1])


class Released:
    """A probe that keeps what each step releases."""

    def __init__(self) -> None:
        self.steps: list[Values] = []

    def before_clip(self, users: Any, parameters: Any) -> None:
        raise AssertionError("nobody was sampled")

    def after_noise(self, optimizer: Any) -> None:
        flat = [parameter.grad.flatten() for parameter in optimizer.params]
        self.steps.append(torch.cat(flat).numpy().copy())


def released_by_nobody(encoder: str) -> tuple[PrivacyPlan, list[Values]]:
    """What a run whose steps sample nobody releases, and its plan."""
    quiet = tiny_shop.plan(
        num_steps=20, sampling_prob=1e-12, noise_multiplier=2.0, l2_clip_norm=3.0
    )
    job = tiny_shop.train_job(encoder, plan=quiet)
    texts = tiny_shop.distinct_texts()
    activations = TextEncoder(encoder, job.model.max_tokens).activations(texts).select(texts)
    shards, probe = [tiny_shop.shard(tiny_shop.outcomes(8)).examples], Released()
    train_on_shards(job, shards, activations, num_workers=1, on_step=lambda step: None, probe=probe)
    return quiet, probe.steps


def test_an_empty_step_is_pure_noise_and_is_charged(tiny_encoder: str, world: None) -> None:
    plan, steps = released_by_nobody(tiny_encoder)
    assert len(steps) == plan.spend.num_steps
    assert plan.reserved == plan.spend and epsilon([plan.spend], 1e-5) > 0
    assert is_as_charged(np.concatenate(steps))


def test_a_step_that_is_dropped_because_it_is_empty_stops_the_run(
    tiny_encoder: str, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PoissonSampler", DropsEmptySteps)
    with pytest.raises(ValueError, match="not enough values"):
        released_by_nobody(tiny_encoder)
