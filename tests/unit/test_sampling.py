"""Users are Poisson-sampled: independently, by one probability, empty steps included."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from raysys.privacy.sampling import PoissonSampler
from tests import tiny_shop
from tests.broken_engines import FixedSize

NUM_USERS, PROB = 10_000, 0.0256
MEAN, STD = 256.0, 15.8


def poisson(**values: Any) -> PoissonSampler:
    return PoissonSampler(**values, rng=np.random.default_rng())


def batch_sizes(sampler: PoissonSampler) -> NDArray[np.float64]:
    return np.array([len(users) for users in sampler], np.float64)


def looks_poisson(sizes: NDArray[np.float64]) -> bool:
    """Within 5 standard errors of the mean and of the standard deviation."""
    num = len(sizes)
    return bool(
        abs(sizes.mean() - MEAN) < 5 * STD / np.sqrt(num)
        and abs(sizes.std() - STD) < 5 * STD / np.sqrt(2 * num)
    )


def correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def masks(sampler: PoissonSampler) -> NDArray[np.float32]:
    out = np.zeros((len(sampler), sampler.num_users), np.float32)
    for mask, users in zip(out, sampler, strict=True):
        mask[users] = 1
    return out


def test_batch_sizes_have_the_mean_and_spread_of_poisson_sampling() -> None:
    sampler = poisson(num_users=NUM_USERS, num_steps=2000, sampling_prob=PROB)
    assert looks_poisson(batch_sizes(sampler))


def test_batches_of_a_fixed_size_do_not_pass_for_poisson_sampling() -> None:
    sizes = batch_sizes(
        FixedSize(
            num_users=NUM_USERS, num_steps=100, sampling_prob=PROB, rng=np.random.default_rng()
        )
    )
    assert sizes.std() == 0 and sizes.mean() == MEAN
    assert not looks_poisson(sizes)


def test_every_user_takes_part_equally_often() -> None:
    drawn = masks(poisson(num_users=200, num_steps=4000, sampling_prob=0.25)).mean(0)
    standard_error = np.sqrt(0.25 * 0.75 / 4000)
    assert abs(drawn - 0.25).max() < 6 * standard_error


def test_users_take_part_independently_of_one_another_and_of_earlier_steps() -> None:
    drawn = masks(poisson(num_users=50, num_steps=20_000, sampling_prob=0.25))
    assert abs(correlation(drawn[:, :-1], drawn[:, 1:])) < 0.006
    assert abs(correlation(drawn[:-1], drawn[1:])) < 0.006


def test_masks_of_two_ranks_are_uncorrelated(two_workers: list[dict[str, Any]]) -> None:
    first, second = (worker["masks"] for worker in two_workers)
    assert abs(correlation(first, second)) < 5 / np.sqrt(first.size)
    assert first.sum() > 0


def test_a_seed_that_ranks_share_is_noticed() -> None:
    samplers = [poisson(num_users=NUM_USERS, num_steps=20, sampling_prob=PROB) for _ in range(2)]
    assert abs(correlation(*map(masks, samplers))) < 5 / np.sqrt(20 * NUM_USERS)

    shared = [np.random.default_rng(7) for _ in samplers]
    samplers = [dataclasses.replace(s, rng=rng) for s, rng in zip(samplers, shared, strict=True)]
    assert correlation(*map(masks, samplers)) == pytest.approx(1)


def test_under_privacy_no_seed_repeats_what_a_worker_draws() -> None:
    draws = [tiny_shop.plan(enabled=True).rng(7, 0).random(5).tolist() for _ in range(2)]
    assert draws[0] != draws[1]


def test_without_privacy_the_seed_does_and_ranks_differ() -> None:
    plan = tiny_shop.plan(enabled=False)
    draws = [plan.rng(7, rank).random(5).tolist() for rank in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("num_users", "sampling_prob"),
    [pytest.param(0, 0.5, id="no users"), pytest.param(3, 1e-9, id="almost never")],
)
def test_steps_without_a_user_are_kept(num_users: int, sampling_prob: float) -> None:
    sampler = poisson(num_users=num_users, num_steps=7, sampling_prob=sampling_prob)
    assert [len(users) for users in sampler] == [0] * 7 == [0] * len(sampler)


def test_a_probability_of_one_takes_everyone() -> None:
    sampler: Iterator[NDArray[np.int64]] = iter(
        poisson(num_users=4, num_steps=2, sampling_prob=1.0)
    )
    assert [users.tolist() for users in sampler] == [[0, 1, 2, 3]] * 2
