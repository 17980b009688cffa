"""bfloat16 in the adapted layers: close scores, and norms, gradients and weights in float32.

There is no GPU in the tests: the CPU's autocast takes the same way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from raysys.model import text_tower
from raysys.model.encoder import TextEncoder, TokenActivations
from raysys.train import loop
from raysys.train.checkpoint import Checkpoints
from raysys.train.loop import Trained, train_on_shards
from raysys.train.step import Stepper
from tests import tiny_shop

ADAPTED = "encoder.layer.1.output.dense"


@pytest.fixture(scope="module")
def activations(tiny_encoder: str) -> TokenActivations:
    texts = tiny_shop.distinct_texts()
    return TextEncoder(tiny_encoder, 8).activations(texts).select(texts)


@pytest.fixture
def train(tiny_encoder: str, activations: TokenActivations, world: None) -> Any:
    shard = tiny_shop.shard(tiny_shop.outcomes(40)).examples

    def run(precision: str, **changes: Any) -> Trained:
        job = tiny_shop.train_job(tiny_encoder, train={"precision": precision}, **changes)
        return train_on_shards(job, [shard], activations, num_workers=1, on_step=lambda step: None)

    return run


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Of each forward pass."""
    seen: list[torch.Tensor] = []
    forward = loop.RankerModule.forward

    def spy(self: Any, **batch: torch.Tensor) -> torch.Tensor:
        seen.append(forward(self, **batch))
        return seen[-1]

    monkeypatch.setattr(loop.RankerModule, "forward", spy)
    return seen


@pytest.mark.parametrize("train_lora_a", [False, True], ids=["B trained", "A and B trained"])
def test_scores_in_bf16_are_those_of_fp32_but_for_its_digits(
    train: Any, scores: list[torch.Tensor], train_lora_a: bool
) -> None:
    plan = tiny_shop.plan(enabled=False, num_steps=3)
    for precision in ("fp32", "bf16"):
        train(precision, plan=plan, model={"train_lora_a": train_lora_a}, learning_rate=0.05)
    exact, half = scores[:3], scores[3:]
    assert all(x.dtype == torch.float32 for x in scores)
    worst = max(float((a - b).abs().max().detach()) for a, b in zip(exact, half, strict=True))
    assert 0 < worst < 0.02


def test_per_user_gradients_and_moments_and_weights_are_fp32(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = set[torch.dtype]()
    run = Stepper._set_gradients

    def spy(self: Stepper, batch: Any) -> None:
        run(self, batch)
        for _, parameter in self._module.trainable():
            dtypes.update({parameter.dtype, parameter.grad_sample.dtype})
            dtypes.update(value.dtype for value in self._adam.state.get(parameter, {}).values())

    monkeypatch.setattr(Stepper, "_set_gradients", spy)
    trained = train("bf16", model={"train_lora_a": True})
    assert dtypes == {torch.float32}
    assert trained.adapted_weights[ADAPTED].dtype == np.float32


@pytest.mark.parametrize("is_broken", [False, True], ids=["as it is", "broken"])
def test_norms_get_fp32(train: Any, monkeypatch: pytest.MonkeyPatch, is_broken: bool) -> None:
    """The broken one keeps its constants in bf16, so that the sum before the norm is bf16 too."""
    products, norms = set[torch.dtype](), set[torch.dtype]()
    norm, product, keep = (
        text_tower.layer_norm, text_tower.per_user_linear, text_tower.TextTower._keep,
    )  # fmt: skip

    def spy_norm(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        norms.add(x.dtype)
        return norm(x, *(p.to(x.dtype) if isinstance(p, torch.Tensor) else p for p in rest))

    def spy_product(*args: torch.Tensor) -> torch.Tensor:
        out = product(*args)
        products.add(out.dtype) if out.requires_grad else None
        return out

    def keep_half(self: Any, name: str, constant: torch.Tensor) -> None:
        keep(self, name, constant.bfloat16() if name == "base" else constant)

    monkeypatch.setattr(text_tower, "layer_norm", spy_norm)
    monkeypatch.setattr(text_tower, "per_user_linear", spy_product)
    if is_broken:
        monkeypatch.setattr(text_tower.TextTower, "_keep", keep_half)
    train("bf16", model={"train_lora_a": True})
    assert torch.bfloat16 in products
    assert (norms == {torch.float32}) is not is_broken


def test_without_a_gpu_nothing_is_bf16_unless_it_is_asked_for(
    train: Any, scores: list[torch.Tensor]
) -> None:
    plan = tiny_shop.plan(enabled=False, num_steps=2)
    for precision in ("fp32", "auto"):
        train(precision, plan=plan)
    for exact, found in zip(scores[:2], scores[2:], strict=True):
        assert torch.equal(exact, found)
    config = tiny_shop.train_job("unused").train
    assert loop._is_half(config, torch.device("cuda"))
    assert not loop._is_half(config, torch.device("cpu"))


def left_behind(module: torch.nn.Module) -> list[str]:
    """Names the tensors of a module that do not move with it. `meta` is a device without data."""
    module.to("meta")
    return [
        name
        for part in module.modules()
        for name, value in {**vars(part), **part._parameters, **part._buffers}.items()
        if isinstance(value, torch.Tensor) and value.device.type != "meta"
    ]


@pytest.mark.parametrize("train_lora_a", [False, True], ids=["B trained", "A and B trained"])
def test_the_model_moves_to_another_device_as_a_whole(
    tiny_encoder: str,
    activations: TokenActivations,
    monkeypatch: pytest.MonkeyPatch,
    train_lora_a: bool,
) -> None:
    head = tiny_shop.train_job(tiny_encoder).head
    config = tiny_shop.model_config(tiny_encoder, train_lora_a=train_lora_a)

    def module() -> torch.nn.Module:
        encoder = TextEncoder(tiny_encoder, 8)
        adapter = loop.Adapter.fresh(encoder, config, {}, num_steps=5)
        return loop.RankerModule(loop.build_tower(adapter, activations), loop.HeadModule(head))

    assert left_behind(module()) == []
    plain = lambda tower, name, constant: vars(tower).update({name: constant})  # noqa: E731
    monkeypatch.setattr(text_tower.TextTower, "_keep", plain)
    assert left_behind(module()) == ["base", "lora_input", "mask"]


def test_a_checkpoint_is_kept_on_the_cpu(
    train: Any, local_root: Any, tiny_encoder: str, activations: TokenActivations
) -> None:
    shard = tiny_shop.shard(tiny_shop.outcomes(40)).examples
    store = Checkpoints(local_root, "u1")
    train_on_shards(
        tiny_shop.train_job(tiny_encoder, train={"precision": "bf16"}), [shard], activations,
        num_workers=1, on_step=lambda step: None, checkpoints=store,
    )  # fmt: skip
    tensors = store.load(store.latest()).tensors
    assert all(value.device.type == "cpu" for value in tensors.values())
    assert {value.dtype for value in tensors.values()} == {torch.float32}
