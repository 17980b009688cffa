"""AdaLoRA's ranks follow from noised gradients alone, and its regularisation from the weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from opacus.optimizers import DPOptimizer
from peft import PeftModel

from raysys.errors import PrivacyError
from raysys.privacy.adalora import RankPattern, add_orthogonal_gradients, allocate_ranks
from raysys.privacy.clipping import PerUserGradients
from raysys.privacy.optimizer import PerUserOptimizer
from tests.per_user import USER_OF_ROW, USERS, Scorer, listwise, make_batch, make_scorer

NUM_STEPS = 20
"""PEFT's schedule in `tests.per_user`: decisions from step 4 on, the last one at 16."""
Gradients = dict[str, torch.Tensor]


@dataclasses.dataclass(kw_only=True)
class Recorded:
    """What a private run left behind."""

    noised: list[Gradients] = dataclasses.field(default_factory=list)
    """By step: what the inner optimizer was given."""
    raw: list[Gradients] = dataclasses.field(default_factory=list)
    """By step: the sum over users before clip and noise. Exists only here, to do wrong with."""
    decisions: list[RankPattern | None] = dataclasses.field(default_factory=list)


def adapter(module: Scorer) -> PeftModel:
    assert isinstance(module.encoder, PeftModel)
    return module.encoder


def private_optimizer(module: Scorer, **changes: Any) -> DPOptimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    options: dict[str, Any] = {
        "noise_multiplier": 1.0, "max_grad_norm": 0.5, "expected_batch_size": USERS,
        "generator": torch.Generator().manual_seed(3),
    }  # fmt: skip
    return PerUserOptimizer(torch.optim.SGD(trained, lr=0.1), **(options | changes))


def run(module: Scorer, *, weight: float = 0.0) -> Recorded:
    recorded = Recorded()
    model, optimizer = adapter(module), private_optimizer(module)
    if weight:
        model.peft_config["default"].orth_reg_weight = weight  # type: ignore[attr-defined]
        optimizer.attach_step_hook(lambda _: add_orthogonal_gradients(model))
    with PerUserGradients(module) as engine:
        for step in range(1, NUM_STEPS + 1):
            with engine.rows(USER_OF_ROW, USERS):
                scores = module(make_batch(seed=step))
            engine.backward(listwise(scores, USER_OF_ROW, USERS))
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            recorded.raw.append({n: p.grad_sample.sum(0) for n, p in trained.items()})  # type: ignore[attr-defined]
            optimizer.step()
            recorded.noised.append({n: _copy(p.grad) for n, p in trained.items()})
            recorded.decisions.append(allocate_ranks(model, optimizer, step))
            optimizer.zero_grad(set_to_none=True)
    return recorded


def recomputed(gradients: list[Gradients]) -> list[RankPattern | None]:
    """Decides from recorded gradients by PEFT itself, without data, loss or engine."""
    model = adapter(make_scorer("AdaLoRA"))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    inner = torch.optim.SGD(trained.values(), lr=0.1)
    decisions = []
    for step, by_name in enumerate(gradients, 1):
        for name, parameter in trained.items():
            parameter.grad = by_name[name].clone()
        inner.step()
        model.base_model.update_and_allocate(step)  # type: ignore[operator]
        decisions.append(model.peft_config["default"].rank_pattern)  # type: ignore[attr-defined]
    return decisions


def _copy(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    return gradient.clone()


@pytest.mark.parametrize("weight", [0.0, 0.5], ids=["plain", "with orthogonal regularisation"])
def test_rank_decisions_recomputed_from_noised_gradients_alone_are_the_same(weight: float) -> None:
    recorded = run(make_scorer("AdaLoRA"), weight=weight)
    kept = [sum(map(sum, d.values())) for d in recorded.decisions if d is not None]
    assert kept[0] > kept[-1] == 4 * 2, "ranks shrink to the target of 2 for each of 4 layers"
    assert recomputed(recorded.noised) == recorded.decisions


def test_raw_gradients_would_decide_otherwise() -> None:
    recorded = run(make_scorer("AdaLoRA"))
    assert recomputed(recorded.raw) != recorded.decisions


@pytest.mark.parametrize("state", ["before the step", "after zero_grad", "after a skipped step"])
def test_ranks_are_allocated_right_after_a_private_step_only(state: str) -> None:
    module = make_scorer("AdaLoRA")
    model, optimizer = adapter(module), private_optimizer(module)
    with PerUserGradients(module) as engine, engine.rows(USER_OF_ROW, USERS):
        scores = module(make_batch())
    engine.backward(listwise(scores, USER_OF_ROW, USERS))
    if state == "after a skipped step":
        optimizer.signal_skip_step()
    if state != "before the step":
        optimizer.step()
    if state == "after zero_grad":
        optimizer.zero_grad(set_to_none=True)
    with pytest.raises(PrivacyError, match="no noised gradient; allocate ranks after"):
        allocate_ranks(model, optimizer, 4)


def test_ordinary_gradients_decide_nothing() -> None:
    module = make_scorer("AdaLoRA")
    module(make_batch()).sum().backward()
    with pytest.raises(PrivacyError, match="no noised gradient"):
        allocate_ranks(adapter(module), private_optimizer(module), 4)


def test_only_adalora_has_ranks_to_allocate() -> None:
    module = make_scorer("LoRA")
    with pytest.raises(PrivacyError, match="expected AdaLoRA, found LoraModel"):
        allocate_ranks(adapter(module), private_optimizer(module), 1)


def test_the_orthogonal_gradient_is_that_of_pefts_regularisation() -> None:
    model = adapter(make_scorer("AdaLoRA", torch.float64))
    config: Any = model.peft_config["default"]
    factors = {n: p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    terms = []
    for name, p in factors.items():
        square = p @ p.T if "lora_A" in name else p.T @ p
        terms.append((square - torch.eye(len(square), dtype=p.dtype)).norm())
    loss = config.orth_reg_weight * torch.stack(terms).mean()
    expected = torch.autograd.grad(loss, list(factors.values()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    add_orthogonal_gradients(model)
    for parameter, want in zip(factors.values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want)
        assert want.any()
