"""Sampler, noise and accounting come from one plan; without privacy it does nothing and says so.

How much noise there is, and that it never comes twice: `test_noise.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.config import PrivacyConfig
from raysys.privacy.plan import PrivacyPlan
from tests import tiny_shop
from tests.two_workers import gradients_of_users, step_gradient

CONFIG = PrivacyConfig()
NOISY = tiny_shop.plan(noise_multiplier=2.0, l2_clip_norm=3.0)


def noise(num: int, plan: PrivacyPlan = NOISY) -> NDArray[np.float32]:
    """What an empty step hands to the inner optimizer."""
    return step_gradient(plan, torch.zeros(0, num), num_workers=1)


def is_shared(first: NDArray[np.float32], second: NDArray[np.float32]) -> bool:
    return bool(abs(np.corrcoef(first, second)[0, 1]) > 5 / math.sqrt(len(first)))


def clipped_mean(rows: torch.Tensor, *, clip: float, expected: int) -> NDArray[np.float32]:
    norms = rows.norm(dim=1, keepdim=True)
    out: NDArray[np.float32] = (rows * (clip / norms).clamp(max=1)).sum(0).numpy() / expected
    return out


def test_the_ledger_is_charged_for_what_sampler_and_optimizer_do(world: None) -> None:
    plan = PrivacyPlan.for_update(CONFIG, num_steps=15, num_count_releases=2)
    assert plan.reserved is plan.spend
    assert (plan.spend.num_steps, plan.spend.num_count_releases) == (15, 2)
    assert plan.spend.count_noise_multiplier == CONFIG.count_noise_multiplier
    sampler = plan.sampler(1000, plan.rng(0, 0))
    assert (len(sampler), sampler.sampling_prob) == (15, CONFIG.sampling_prob)
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    optimizer = plan.optimizer(inner, num_workers=1)
    assert optimizer.noise_multiplier == plan.spend.noise_multiplier == 4.5
    assert optimizer.max_grad_norm == CONFIG.l2_clip_norm
    assert optimizer.expected_batch_size == CONFIG.expected_batch_users


def test_noise_of_the_steps_of_one_run_differs(world: None) -> None:
    parameter = torch.nn.Parameter(torch.zeros(10_000))
    optimizer = NOISY.optimizer(torch.optim.SGD([parameter], lr=1.0), num_workers=1)
    steps = []
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        parameter.grad_sample = torch.zeros(0, 10_000)  # type: ignore[attr-defined]
        optimizer.step()
        assert parameter.grad is not None
        steps.append(parameter.grad.numpy().copy())
    assert not is_shared(*steps)


def test_the_sum_is_divided_by_the_planned_number_of_users_not_the_drawn_one(world: None) -> None:
    plan, rows = tiny_shop.plan(noise_multiplier=0.0), gradients_of_users()
    found = step_gradient(plan, rows, num_workers=1)
    np.testing.assert_allclose(found, clipped_mean(rows, clip=1.0, expected=32), atol=1e-6)
    assert not np.allclose(found, clipped_mean(rows, clip=1.0, expected=len(rows)), atol=1e-3)


def test_two_workers_clip_and_average_as_one_does(
    world: None, two_workers: list[dict[str, Any]]
) -> None:
    alone = step_gradient(tiny_shop.plan(noise_multiplier=0.0), gradients_of_users(), num_workers=1)
    for worker in two_workers:
        np.testing.assert_allclose(worker["clipped"], alone, atol=1e-6)


def test_without_privacy_nothing_is_charged_clipped_or_noised(world: None) -> None:
    config = PrivacyConfig(enabled=False, noise_multiplier=4.5, expected_batch_users=32)
    plan = PrivacyPlan.for_update(config, num_steps=5, num_count_releases=1)
    assert plan.reserved is None
    sampler = plan.sampler(3, plan.rng(0, 0))
    assert (len(sampler), sampler.sampling_prob) == (5, config.sampling_prob)
    rows = gradients_of_users()
    found = step_gradient(plan, rows, num_workers=1)
    np.testing.assert_allclose(found, rows.sum(0).numpy() / 32, rtol=1e-5)
    assert np.linalg.norm(found) > 100, "the outliers are in it"
    assert not noise(1000, plan).any()
