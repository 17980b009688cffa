"""The clip of our own gives what Opacus gives, and bounds what Opacus does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.optimizers import DistributedDPOptimizer, DPOptimizer

from raysys.errors import PrivacyError
from raysys.privacy.optimizer import DistributedPerUserOptimizer, PerUserOptimizer

SHAPES = ((3, 4), (5,), ())


def gradients(num_users: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-2, 3, num_users, dtype=dtype)
    return [
        torch.randn(num_users, *shape, generator=generator).to(dtype)
        * size.view(-1, *[1] * len(shape))
        for shape in SHAPES
    ]


def stepped(
    kind: type[DPOptimizer],
    batches: list[list[torch.Tensor]],
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> torch.Tensor:
    """Returns what the inner optimizer is given after these microbatches, as one vector."""
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    options = {
        "noise_multiplier": 0.7, "max_grad_norm": 1.5, "expected_batch_size": 4,
        "generator": torch.Generator().manual_seed(1),
    }  # fmt: skip
    optimizer = kind(torch.optim.SGD(parameters, lr=1.0), **(options | changes))
    for i, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        for parameter, sample in zip(parameters, batch, strict=True):
            parameter.grad_sample = sample.clone()  # type: ignore[attr-defined]
        optimizer.signal_skip_step(do_skip=i < len(batches) - 1)
        optimizer.step()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    reduction=st.sampled_from(["mean", "sum"]),
    noise=st.sampled_from([0.0, 0.7]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_step_is_that_of_opacus(
    sizes: list[int], seed: int, reduction: str, noise: float, dtype: torch.dtype
) -> None:
    batches = [gradients(size, dtype, seed + i) for i, size in enumerate(sizes)]
    changes: dict[str, Any] = {"loss_reduction": reduction, "noise_multiplier": noise}
    expected, found = (
        stepped(kind, batches, dtype, **changes) for kind in (DPOptimizer, PerUserOptimizer)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_distributed_step_is_that_of_opacus(world: None) -> None:
    batches = [gradients(3, torch.float32), gradients(2, torch.float32, 5)]
    expected, found = (
        stepped(kind, batches) for kind in (DistributedDPOptimizer, DistributedPerUserOptimizer)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_user_whose_gradient_is_not_finite_contributes_nothing(bad: float) -> None:
    batch = gradients(4, torch.float32)
    without = [sample[1:] for sample in batch]
    batch[0][0, 0, 0] = bad
    expected = stepped(PerUserOptimizer, [without], noise_multiplier=0.0)
    found = stepped(PerUserOptimizer, [batch], noise_multiplier=0.0)
    torch.testing.assert_close(found, expected)
    assert not stepped(DPOptimizer, [batch], noise_multiplier=0.0).isfinite().all()


def test_sums_of_half_precision_weights_are_rounded_after_the_noise() -> None:
    batch = gradients(64, torch.float32)
    exact = stepped(PerUserOptimizer, [batch])
    found = stepped(PerUserOptimizer, [batch], torch.bfloat16)
    assert found.dtype == torch.bfloat16
    ours = (found - exact).norm() / exact.norm()
    assert ours < 2**-8


def test_half_precision_weights_on_several_workers_are_refused(world: None) -> None:
    with pytest.raises(PrivacyError, match=r"a trained weight is torch.bfloat16"):
        stepped(DistributedPerUserOptimizer, [gradients(2, torch.float32)], torch.bfloat16)


def test_gradients_are_used_once() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = PerUserOptimizer(
        torch.optim.SGD([parameter], lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0,
        expected_batch_size=1,
    )  # fmt: skip
    parameter.grad_sample = torch.ones(2, 3)  # type: ignore[attr-defined]
    optimizer.step()
    with pytest.raises(ValueError, match="Gradients haven't been cleared"):
        optimizer.step()
