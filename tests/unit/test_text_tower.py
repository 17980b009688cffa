"""The text tower is the whole PEFT model, and its adapters are PEFT's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch.nn.functional import normalize

from raysys.model.adapter import Adapter
from raysys.model.encoder import TextEncoder, TokenActivations, load_encoder
from raysys.model.encoder_files import BUNDLED, resolve_encoder
from raysys.model.text_tower import TextTower
from raysys.model.tower import build_tower
from tests import tiny_shop

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w3 w1", "w7 w8 w9 w10 w11 w12", "w2 w2"]
TOLERANCE = 5e-3
"""Of a cosine: the cache has half precision."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """An encoder with a delta that was trained, and the tower of the same weights."""

    encoder: TextEncoder
    activations: TokenActivations
    adapter: Adapter
    peft_model: PeftModel
    tower: TextTower


def adapt(name: str, *, train_lora_a: bool = False, moved: bool = True) -> Adapted:
    encoder = TextEncoder(name, 8)
    activations = encoder.activations(TEXTS).select(TEXTS)
    torch.manual_seed(4)
    config = tiny_shop.model_config(name, lora_rank=3, train_lora_a=train_lora_a)
    adapter = Adapter.fresh(encoder, config, {}, num_steps=1)
    ((_, layer),) = adapter.layers()
    if moved:
        size = layer.base_layer.weight.norm() / layer.lora_A["default"].weight.detach().norm()
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1 * float(size))
    tower = build_tower(adapter, activations)
    assert isinstance(tower, TextTower) and adapter.peft_model is not None
    return Adapted(
        encoder=encoder, activations=activations, adapter=adapter,
        peft_model=adapter.peft_model, tower=tower,
    )  # fmt: skip


@pytest.fixture(params=["tiny", "bundled"])
def name(request: pytest.FixtureRequest, tiny_encoder: str) -> str:
    return tiny_encoder if request.param == "tiny" else BUNDLED


@torch.no_grad()
def whole_model(
    model: torch.nn.Module, encoder: TextEncoder, texts: Sequence[str]
) -> NDArray[np.float32]:
    batch = encoder.tokenize(texts)
    mask = batch["attention_mask"][..., None]
    pooled = (model(**batch).last_hidden_state * mask).sum(1)
    out: NDArray[np.float32] = normalize(pooled, dim=1).numpy()
    return out


@pytest.mark.parametrize("train_lora_a", [False, True], ids=["B trained", "A and B trained"])
def test_the_tower_is_the_full_forward_pass_of_the_peft_model(
    name: str, train_lora_a: bool
) -> None:
    adapted = adapt(name, train_lora_a=train_lora_a)
    expected = whole_model(adapted.peft_model, adapted.encoder, TEXTS)
    index = torch.tensor([[[0, 1], [2, 3]], [[4, 4], [1, 0]]])
    with torch.no_grad():
        found = adapted.tower(index).numpy()
    np.testing.assert_allclose(found, expected[index.numpy()], atol=TOLERANCE)

    with adapted.peft_model.disable_adapter():
        without_the_delta = whole_model(adapted.peft_model, adapted.encoder, TEXTS)
    assert abs(without_the_delta - expected).max() > 5 * TOLERANCE


@pytest.mark.parametrize("train_lora_a", [False, True], ids=["B trained", "A and B trained"])
def test_a_fresh_delta_changes_nothing(tiny_encoder: str, train_lora_a: bool) -> None:
    adapted = adapt(tiny_encoder, train_lora_a=train_lora_a, moved=False)
    expected = TextEncoder(tiny_encoder, 8).finish(adapted.activations)
    np.testing.assert_allclose(adapted.tower.embed_all().numpy(), expected, atol=1e-6)


def test_both_ways_to_compute_give_the_same_embedding(tiny_encoder: str) -> None:
    closed, generic = (adapt(tiny_encoder, train_lora_a=a).tower for a in (False, True))
    torch.testing.assert_close(closed.embed_all(), generic.embed_all(), rtol=0, atol=1e-6)


def test_a_merged_matrix_in_the_shared_encoder_is_the_merged_peft_model(name: str) -> None:
    adapted = adapt(name)
    merged = adapted.adapter.weights()
    in_shared_encoder = TextEncoder(name, 8).with_weights(merged).embed(TEXTS)
    np.testing.assert_allclose(in_shared_encoder, adapted.tower.embed_all().numpy(), atol=TOLERANCE)

    unloaded = adapted.peft_model.merge_and_unload()
    expected = whole_model(unloaded, adapted.encoder, TEXTS)
    np.testing.assert_allclose(in_shared_encoder, expected, atol=TOLERANCE)
    assert abs(TextEncoder(name, 8).embed(TEXTS) - expected).max() > 5 * TOLERANCE


def test_saved_adapter_files_load_with_peft_and_give_the_same_embedding(
    name: str, tmp_path: Path
) -> None:
    adapted = adapt(name)
    adapted.peft_model.save_pretrained(str(tmp_path))
    encoder = TextEncoder(name, 8)
    loaded = PeftModel.from_pretrained(load_encoder(resolve_encoder(name)), str(tmp_path))
    expected = adapted.tower.embed_all().numpy()
    np.testing.assert_allclose(whole_model(loaded, encoder, TEXTS), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("train_lora_a", "expected"),
    [
        pytest.param(False, {"lora_b"}, id="B trained"),
        pytest.param(True, {"lora_a", "lora_b"}, id="A and B trained"),
    ],
)
def test_nothing_but_lora_is_trainable(
    tiny_encoder: str, train_lora_a: bool, expected: set[str]
) -> None:
    adapted = adapt(tiny_encoder, train_lora_a=train_lora_a)
    assert {n for n, p in adapted.tower.named_parameters() if p.requires_grad} == expected
    trainable = [n for n, p in adapted.peft_model.named_parameters() if p.requires_grad]
    assert all("lora_" in n for n in trainable) and len(trainable) == len(expected)


def test_padding_of_longer_texts_beside_it_does_not_change_a_text(tiny_encoder: str) -> None:
    adapted = adapt(tiny_encoder)
    alone = adapted.activations.select(["w9"])
    tower = build_tower(adapted.adapter, alone)
    torch.testing.assert_close(
        tower.embed_all()[0], adapted.tower.embed_all()[1], rtol=0, atol=1e-5
    )
