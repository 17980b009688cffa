"""New weights are the previous ones plus alpha times the change, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysys.model.merge import interpolate, merge_lora
from tests.tiny_shop import random_head


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0], ids="alpha {}".format)
def test_a_head_moves_alpha_of_the_way(alpha: float) -> None:
    previous, trained = random_head(seed=1), random_head(seed=2)
    new = interpolate(previous, trained, alpha)
    assert list(new.weights) == list(previous.weights)
    for name, value in new.weights.items():
        old, other = previous.weights[name], trained.weights[name]
        expected = old.astype(np.float64) + alpha * (other.astype(np.float64) - old)
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)
        assert value.dtype == np.float32
        assert (alpha == 0.0) == bool(np.array_equal(value, old))


def test_interpolation_leaves_both_heads_alone() -> None:
    previous, trained = random_head(seed=1), random_head(seed=2)
    interpolate(previous, trained, 0.5)
    for head, seed in ((previous, 1), (trained, 2)):
        same = random_head(seed=seed)
        assert all(np.array_equal(head.weights[k], v) for k, v in same.weights.items())


@pytest.mark.parametrize("lora_rank", [1, 4], ids="rank {}".format)
def test_a_merged_matrix_acts_as_the_matrix_and_the_delta_do(lora_rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    lora_a = torch.randn(lora_rank, 8, generator=generator)
    lora_b = torch.randn(6, lora_rank, generator=generator)
    x = torch.randn(5, 8, generator=generator)
    merged = torch.from_numpy(merge_lora(weight, lora_a, lora_b, 2.0))
    expected = x @ weight.T + 2.0 * (x @ lora_a.T) @ lora_b.T
    torch.testing.assert_close(x @ merged.T, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(x @ weight.T, expected, atol=0.1)


def test_a_fresh_delta_merges_to_the_very_same_matrix() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    merged = merge_lora(weight, torch.ones(4, 8), torch.zeros(6, 4), 2.0)
    assert np.array_equal(merged, weight.numpy())
