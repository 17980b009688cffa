"""The health check after training: each kind of broken stack is refused, a sound one passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysys.errors import HealthError
from raysys.model.adapter import Adapter
from raysys.model.encoder import TextEncoder, TokenActivations
from raysys.model.scorer import Head
from raysys.train import health, loop, output
from raysys.train.loop import Trained, TrainJob, train_on_shards
from raysys.train.step import Stepper
from tests import tiny_shop

ReloadCheck = Callable[..., None]
ADAPTED = "encoder.layer.1.output.dense"
PREVIOUS = np.random.default_rng(3).normal(size=(16, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def activations(tiny_encoder: str) -> TokenActivations:
    texts = tiny_shop.distinct_texts()
    return TextEncoder(tiny_encoder, 8).activations(texts).select(texts)


@pytest.fixture(params=[None, {ADAPTED: PREVIOUS}], ids=["first version", "later version"])
def job(request: pytest.FixtureRequest, tiny_encoder: str) -> TrainJob:
    return tiny_shop.train_job(
        tiny_encoder, adapted_weights=request.param, train={"alpha": 0.5}, learning_rate=0.1
    )


def train(job: TrainJob, activations: TokenActivations) -> Trained:
    shard = tiny_shop.shard(tiny_shop.outcomes(40)).examples
    return train_on_shards(job, [shard], activations, num_workers=1, on_step=lambda step: None)


def adapted_layer(trained: Trained) -> Any:
    assert trained.peft_model is not None
    return trained.peft_model.get_base_model().get_submodule(ADAPTED)


def reload(
    folder: Path, written: Trained, trained: Trained, job: TrainJob, activations: TokenActivations
) -> None:
    output.write_output(folder, written, encoder=job.model.encoder)
    output.require_reloads(folder, trained, job, activations)


def test_a_sound_run_reloads_to_the_same_scores(
    job: TrainJob, activations: TokenActivations, world: None, tmp_path: Path
) -> None:
    trained = train(job, activations)
    reload(tmp_path, trained, trained, job, activations)
    text = trained.text_after
    scores = health.probe_scores(trained.head, text)
    assert scores.shape == (len(text),) and np.ptp(scores) > 0.1
    assert not np.allclose(scores, health.probe_scores(job.head, text))
    assert not np.allclose(scores, health.probe_scores(trained.head, trained.text_before))


def test_a_head_that_is_not_restored_is_refused(
    job: TrainJob, activations: TokenActivations, world: None, tmp_path: Path
) -> None:
    """sentence-transformers #3936: the trained head was saved, another one was loaded."""
    trained = train(job, activations)
    initial = dataclasses.replace(trained, head=job.head)
    with pytest.raises(HealthError, match="the version as reloaded scores up to"):
        reload(tmp_path, initial, trained, job, activations)


@pytest.mark.parametrize("name", Head.decayed_frequency(8).weights, ids=str)
def test_each_weight_of_the_head_matters_to_the_probe(name: str) -> None:
    head = tiny_shop.random_head()
    text = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
    weights = dict(head.weights)
    weights[name] = weights[name] * 1.001
    expected, found = (health.probe_scores(h, text) for h in (head, Head(weights=weights)))
    health.require_same_scores("itself", expected, expected.copy())
    with pytest.raises(HealthError, match="scores up to"):
        health.require_same_scores("another", expected, found)


def test_scores_are_compared_to_six_digits() -> None:
    expected = np.array([0.5, -2.0], np.float32)
    health.require_same_scores("v", expected, expected + np.float32(1e-6))
    for wrong in (expected + 4e-6, expected * np.nan):
        with pytest.raises(HealthError):
            health.require_same_scores("v", expected, wrong)


def test_an_adapter_that_is_not_the_trained_one_is_refused(
    job: TrainJob, activations: TokenActivations, world: None, tmp_path: Path
) -> None:
    """opacus #820: what the optimizer moves is not what the model holds, and so saves."""
    trained = train(job, activations)
    lora_b = adapted_layer(trained).lora_B["default"]
    lora_b.weight = torch.nn.Parameter(torch.zeros_like(lora_b.weight))
    with pytest.raises(HealthError, match="the adapter as reloaded scores up to"):
        reload(tmp_path, trained, trained, job, activations)


def test_a_merge_that_is_not_of_the_trained_adapter_is_refused(
    job: TrainJob, activations: TokenActivations, world: None, tmp_path: Path
) -> None:
    trained = train(job, activations)
    before = adapted_layer(trained).base_layer.weight.detach().numpy()
    stale = dataclasses.replace(trained, adapted_weights={ADAPTED: before})
    with pytest.raises(HealthError, match="it is not the trained one that is merged"):
        reload(tmp_path, stale, stale, job, activations)


def test_an_optimizer_of_copies_of_the_models_weights_is_refused(
    job: TrainJob, activations: TokenActivations, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """opacus #820 the other way round. The clipped gradients still reach the model's weights."""
    adamw = torch.optim.AdamW

    class OfCopies(adamw):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> None:
            held = [p for group in self.param_groups for p in group["params"]]
            copies = [torch.nn.Parameter(p.detach().clone()) for p in held]
            for copy, parameter in zip(copies, held, strict=True):
                copy.grad = parameter.grad
            adamw(copies, lr=0.1).step()

    monkeypatch.setattr(torch.optim, "AdamW", OfCopies)
    with pytest.raises(HealthError, match=r"training left tower\.lora_b unchanged"):
        train(job, activations)


@pytest.mark.parametrize("which", ["LayerNorm.weight", "word_embeddings", "base_layer.weight"])
def test_a_frozen_weight_that_changed_is_refused(
    job: TrainJob,
    activations: TokenActivations,
    world: None,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
) -> None:
    touched: dict[str, torch.nn.Parameter] = {}
    build, run = loop.build_tower, Stepper.run

    def remember(adapter: Adapter, *args: Any) -> Any:
        named = adapter.encoder.model.named_parameters()
        touched.update({name: p for name, p in named if which in name})
        return build(adapter, *args)

    def touch(self: Stepper, step: int) -> None:
        run(self, step)
        with torch.no_grad():
            next(iter(touched.values())).view(-1)[0] += 1e-6

    monkeypatch.setattr(loop, "build_tower", remember)
    train(job, activations)
    monkeypatch.setattr(Stepper, "run", touch)
    with pytest.raises(HealthError, match=rf"training changed .*{which}.*, which is frozen \(1 "):
        train(job, activations)


def test_digests_are_of_what_is_frozen_and_of_nothing_else(
    job: TrainJob, tiny_encoder: str
) -> None:
    encoder = TextEncoder(tiny_encoder, 8)
    model = Adapter.fresh(encoder, job.model, {}, num_steps=5).encoder.model
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert set(health.frozen_digests([model])) == frozen
    assert any("word_embeddings" in name for name in frozen)
    assert any("lora_A" in name for name in frozen), "train_lora_a is off"
    assert not any("lora_B" in name for name in frozen)
