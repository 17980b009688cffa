"""Short inputs keep factors: the same norms and clipped sums, and Opacus may not read them."""

from __future__ import annotations

import pytest
import torch
from opacus.optimizers import DPOptimizer

from raysys.privacy.clipping import FactoredGradients, PerUserGradients
from raysys.privacy.clipping.samples import dense
from raysys.privacy.optimizer import PerUserOptimizer, user_norms
from tests.per_user import (
    USER_OF_ROW,
    Clip,
    Scorer,
    by_engine,
    make_batch,
    make_scorer,
    one_by_one,
    samples,
    worst_error,
)

NUM_USERS = 4
ONE_ROW_EACH = torch.arange(NUM_USERS)
CLIP = 0.01


def factored_scorer(dtype: torch.dtype = torch.float32) -> tuple[Scorer, torch.Tensor]:
    """Texts of 6 tokens and rank 12: factors are smaller."""
    return make_scorer("LoRA of rank 12", dtype), make_batch(NUM_USERS)


def clipped_sum(module: Scorer) -> torch.Tensor:
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = PerUserOptimizer(
        torch.optim.SGD(trained, lr=0.0), noise_multiplier=0.0, max_grad_norm=CLIP,
        expected_batch_size=1,
    )  # fmt: skip
    optimizer.step()
    total = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    optimizer.zero_grad(set_to_none=True)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factors_stand_for_the_per_user_gradients(dtype: torch.dtype) -> None:
    module, ids = factored_scorer(dtype)
    expected = one_by_one(module, ids, ONE_ROW_EACH, NUM_USERS)
    found = by_engine(module, ids, ONE_ROW_EACH, NUM_USERS, keep_factors=True)
    assert not any(dense(sample).requires_grad for sample in found.values())
    kinds = {name: isinstance(sample, FactoredGradients) for name, sample in found.items()}
    assert kinds == {name: "lora_" in name for name in found}
    assert worst_error({n: dense(sample) for n, sample in found.items()}, expected) < 1e-5
    norms = torch.cat([e.flatten(1) for e in expected.values()], 1).norm(dim=1)
    torch.testing.assert_close(user_norms(list(found.values())), norms)


@pytest.mark.parametrize("loudness", [1.0, 1e4, float("inf")], ids="loudness {:g}".format)
def test_the_clipped_sum_is_that_of_whole_gradients(loudness: float) -> None:
    module, ids = factored_scorer(torch.float64)
    scale = torch.tensor([loudness, 1.0, 1.0, 1.0])
    by_engine(module, ids, ONE_ROW_EACH, NUM_USERS, scale)
    if loudness == float("inf"):
        by_others = one_by_one(module, ids[1:], ONE_ROW_EACH[:-1], NUM_USERS - 1)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.grad_sample = by_others[name]  # type: ignore[attr-defined]
    expected = Clip(norm=CLIP).total(module)
    by_engine(module, ids, ONE_ROW_EACH, NUM_USERS, scale, keep_factors=True)
    torch.testing.assert_close(clipped_sum(module), expected)


def test_users_of_several_rows_keep_factors_of_all_their_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(40, 30, bias=False)
    x = torch.randn(6, 2, 40, generator=generator)
    for keep in (False, True):
        layer.weight.grad_sample = None  # type: ignore[attr-defined]
        with PerUserGradients(layer, keep_factors=keep) as engine:
            with engine.rows(torch.tensor([0, 0, 1, 1, 2, 2]), 3):
                out = layer(x)
            engine.backward(out.square().view(3, -1).sum(1))
        found = layer.weight.grad_sample
        assert isinstance(found, FactoredGradients) == keep
        if not keep:
            expected = found
    assert isinstance(found, FactoredGradients) and found.shape == expected.shape == (3, 30, 40)
    torch.testing.assert_close(found.dense(), expected)


def test_users_of_unequal_rows_and_longer_inputs_have_whole_gradients() -> None:
    module, ids = factored_scorer()
    for rows, users, num in ((make_batch(), USER_OF_ROW, 5), (ids, ONE_ROW_EACH // 2, 2)):
        by_engine(module, rows, users, num, keep_factors=True)
        assert all(isinstance(sample, torch.Tensor) for sample in samples(module).values())
        Clip(norm=CLIP).total(module)


def test_a_layer_used_twice_has_the_sum_of_both() -> None:
    module, ids = factored_scorer()
    module.head.requires_grad_(False)
    found = []
    for keep in (False, True):
        with PerUserGradients(module, keep_factors=keep) as engine:
            with engine.rows(None, NUM_USERS):
                losses = module(ids) * module(ids.flip(1))
            engine.backward(losses)
        found.append(samples(module))
        for parameter in module.parameters():
            parameter.grad_sample = None  # type: ignore[attr-defined]
    assert worst_error(found[1], found[0]) < 1e-5


def test_norms_hold_where_terms_cancel() -> None:
    """Two tokens all but undo each other: Gram matrices lose the rest, and the clip with it."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(1, 1, 64, generator=generator).expand(1, 2, 64) * 1e3
    first, change = torch.randn(2, 1, 1, 64, generator=generator)
    right = torch.cat([first, -first + 1e-4 * change], 1)
    exact = (left.double().transpose(1, 2) @ right.double()).flatten(1).norm()
    found = FactoredGradients(left, right).norms[0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0.0)

    gram = ((left @ left.transpose(1, 2)) * (right @ right.transpose(1, 2))).sum().clamp(min=0)
    assert abs(float(gram.sqrt() / exact) - 1) > 0.01


def test_opacus_own_optimizer_refuses_factors() -> None:
    module, ids = factored_scorer()
    by_engine(module, ids, ONE_ROW_EACH, NUM_USERS, keep_factors=True)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = DPOptimizer(
        torch.optim.SGD(trained, lr=0.0), noise_multiplier=0.0, max_grad_norm=1.0,
        expected_batch_size=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="Unexpected grad_sample type"):
        optimizer.step()
