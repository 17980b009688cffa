"""Users are Poisson-sampled: independently, by one probability, empty steps included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from raysys.privacy.sampling import PoissonSampler

NUM_USERS, PROB = 10_000, 0.0256
MEAN, STD = 256.0, 15.8


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
    sampler = PoissonSampler(num_users=NUM_USERS, num_steps=2000, sampling_prob=PROB)
    assert looks_poisson(batch_sizes(sampler))


def test_batches_of_a_fixed_size_do_not_pass_for_poisson_sampling() -> None:
    assert not looks_poisson(np.full(2000, MEAN))


def test_every_user_takes_part_equally_often() -> None:
    drawn = masks(PoissonSampler(num_users=200, num_steps=4000, sampling_prob=0.25)).mean(0)
    standard_error = np.sqrt(0.25 * 0.75 / 4000)
    assert abs(drawn - 0.25).max() < 6 * standard_error


def test_users_take_part_independently_of_one_another_and_of_earlier_steps() -> None:
    drawn = masks(PoissonSampler(num_users=50, num_steps=20_000, sampling_prob=0.25))
    assert abs(correlation(drawn[:, :-1], drawn[:, 1:])) < 0.006
    assert abs(correlation(drawn[:-1], drawn[1:])) < 0.006


def test_masks_of_two_ranks_are_uncorrelated(two_workers: list[dict[str, Any]]) -> None:
    first, second = (worker["masks"] for worker in two_workers)
    assert abs(correlation(first, second)) < 5 / np.sqrt(first.size)
    assert first.sum() > 0


def test_a_seed_that_ranks_share_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = PoissonSampler(num_users=NUM_USERS, num_steps=20, sampling_prob=PROB)
    assert abs(correlation(masks(sampler), masks(sampler))) < 5 / np.sqrt(20 * NUM_USERS)

    seeded = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda: seeded(7))
    assert correlation(masks(sampler), masks(sampler)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("num_users", "sampling_prob"),
    [pytest.param(0, 0.5, id="no users"), pytest.param(3, 1e-9, id="almost never")],
)
def test_steps_without_a_user_are_kept(num_users: int, sampling_prob: float) -> None:
    sampler = PoissonSampler(num_users=num_users, num_steps=7, sampling_prob=sampling_prob)
    assert [len(users) for users in sampler] == [0] * 7 == [0] * len(sampler)


def test_a_probability_of_one_takes_everyone() -> None:
    sampler: Iterator[NDArray[np.int64]] = iter(
        PoissonSampler(num_users=4, num_steps=2, sampling_prob=1.0)
    )
    assert [users.tolist() for users in sampler] == [[0, 1, 2, 3]] * 2
