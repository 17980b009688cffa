"""New weights are the previous ones plus alpha times the change, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.model.merge import interpolate
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
