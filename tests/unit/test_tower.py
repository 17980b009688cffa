"""Whatever an update adapts: tower, merged matrices and PEFT's own files are one model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch.nn.functional import normalize
from transformers import BertTokenizerFast, RobertaConfig, RobertaModel

from raysys.model.adapter import NAME, Adapter, activations_cut, merged_weight
from raysys.model.encoder import TextEncoder
from raysys.model.encoder_files import BUNDLED
from raysys.model.targets import Cut
from raysys.model.text_tower import TextTower
from raysys.model.tower import FrozenTower, LayerTower, Tower, build_tower
from tests import tiny_shop

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w3 w1", "w7 w8 w9 w10 w11 w12", "w2 w2"]
TOLERANCE = 6e-3
"""Of a cosine: the cache has half precision."""
KINDS = {
    "B trained": {"adapter": "lora"},
    "A and B trained": {"adapter": "lora", "train_lora_a": True},
    "AdaLoRA": {"adapter": "adalora"},
}
TARGETS = {
    "last projection": {"target_modules": ("output.dense",)},
    "query and value": {"target_modules": ("query", "value")},
    "inner projection": {"target_modules": ("intermediate.dense",)},
    "attention's projection": {"target_modules": ("attention.output.dense",)},
    "all of two layers": {"target_modules": ("all-linear",), "num_adapted_layers": 2},
}
Weights = dict[str, NDArray[np.float32]]


shared = functools.cache(TextEncoder)
"""The one encoder of a name: adapters and versions copy its modules, and share its tensors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """An encoder with a delta as if trained, and the tower of the same weights."""

    encoder: TextEncoder
    adapter: Adapter
    tower: Tower

    @property
    def peft_model(self) -> PeftModel:
        assert self.adapter.peft_model is not None
        return self.adapter.peft_model


def adapt(
    name: str, base: Mapping[str, NDArray[np.float32]] | None = None, *, moved: bool = True,
    **changes: Any,
) -> Adapted:  # fmt: skip
    config = tiny_shop.model_config(name, lora_rank=3, **changes)
    encoder = shared(name, 8)
    cut = activations_cut(config, base or ())
    activations = encoder.activations(TEXTS, cut).select(TEXTS)
    torch.manual_seed(4)
    adapter = Adapter.fresh(encoder, config, base or {}, num_steps=10)
    if moved:
        move(adapter)
    return Adapted(
        encoder=encoder, adapter=adapter, tower=build_tower(adapter, activations)
    )  # fmt: skip


@torch.no_grad()
def move(adapter: Adapter, share: float = 0.3) -> None:
    """Gives each delta a share of its matrix's norm."""
    for _, layer in adapter.layers():
        is_adalora = config_is_adalora(adapter)
        factor = layer.lora_E[NAME] if is_adalora else layer.lora_B[NAME].weight
        torch.nn.init.normal_(factor)
        factor.mul_(share * layer.base_layer.weight.norm() / layer.get_delta_weight(NAME).norm())


def config_is_adalora(adapter: Adapter) -> bool:
    return adapter.config.adapter == "adalora"


def earlier(name: str, *modules: str, seed: int = 0) -> Weights:
    """What earlier updates made of these modules."""
    rng, found = np.random.default_rng(seed), {}
    for module in modules:
        weight = own_weight(name, module)
        found[module] = (weight + rng.normal(0, weight.std(), weight.shape)).astype(np.float32)
    return found


def own_weight(name: str, module: str) -> NDArray[np.float32]:
    weight: NDArray[np.float32] = shared(name, 8).model.get_parameter(f"{module}.weight").numpy()
    return weight


@torch.no_grad()
def whole_model(model: torch.nn.Module, encoder: TextEncoder) -> NDArray[np.float32]:
    """Every text alone through every layer."""
    rows = []
    for text in TEXTS:
        batch = encoder.tokenize([text])
        rows.append(normalize(model(**batch).last_hidden_state.mean(1), dim=1))
    found: NDArray[np.float32] = torch.cat(rows).numpy()
    return found


@pytest.fixture(params=[None, "attention below", "lower layer"])
def base(request: pytest.FixtureRequest, tiny_encoder: str) -> Weights:
    """What earlier updates of the line have changed."""
    modules = {
        None: (),
        "attention below": ("encoder.layer.1.attention.self.key", "encoder.layer.1.output.dense"),
        "lower layer": ("encoder.layer.0.intermediate.dense",),
    }
    return earlier(tiny_encoder, *modules[request.param])


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_is_the_full_forward_pass_of_the_peft_model(
    tiny_encoder: str, base: Weights, kind: str, targets: str
) -> None:
    adapted = adapt(tiny_encoder, base, **KINDS[kind], **TARGETS[targets])
    expected = whole_model(adapted.peft_model, adapted.encoder)
    index = torch.tensor([[[0, 1], [2, 3]], [[4, 4], [1, 0]]])
    with torch.no_grad():
        found = adapted.tower(index).numpy()
    np.testing.assert_allclose(found, expected[index.numpy()], atol=TOLERANCE)
    np.testing.assert_allclose(adapted.tower.embed_all().numpy(), expected, atol=TOLERANCE)

    with adapted.peft_model.disable_adapter():
        without_the_delta = whole_model(adapted.peft_model, adapted.encoder)
    assert abs(without_the_delta - expected).max() > 5 * TOLERANCE
    without_earlier_deltas = shared(tiny_encoder, 8).embed(TEXTS)
    assert not base or abs(without_earlier_deltas - without_the_delta).max() > 5 * TOLERANCE


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_matrices_in_the_shared_encoder_are_the_peft_model(
    tiny_encoder: str, base: Weights, kind: str, targets: str
) -> None:
    adapted = adapt(tiny_encoder, base, **KINDS[kind], **TARGETS[targets])
    weights = adapted.adapter.weights()
    assert weights.keys() == base.keys() | set(adapted.adapter.modules)
    encoder = shared(tiny_encoder, 8)
    own = encoder.embed(TEXTS)
    found = encoder.with_weights(weights).embed(TEXTS)
    np.testing.assert_allclose(found, adapted.tower.embed_all().numpy(), atol=1e-5)
    assert np.array_equal(encoder.embed(TEXTS), own), "the shared encoder stays what it was"
    assert abs(own - found).max() > 5 * TOLERANCE

    for name in weights.keys() - set(adapted.adapter.modules):
        assert np.array_equal(weights[name], base[name])
    for name in adapted.adapter.modules:
        assert abs(weights[name] - base.get(name, own_weight(tiny_encoder, name))).max() > 1e-2
    unloaded = adapted.peft_model.merge_and_unload()
    np.testing.assert_allclose(whole_model(unloaded, encoder), found, atol=TOLERANCE)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_delta_changes_nothing(
    tiny_encoder: str, base: Weights, kind: str, targets: str
) -> None:
    adapted = adapt(tiny_encoder, base, moved=False, **KINDS[kind], **TARGETS[targets])
    previous = shared(tiny_encoder, 8).with_weights(base).embed(TEXTS)
    np.testing.assert_allclose(adapted.tower.embed_all().numpy(), previous, atol=TOLERANCE)
    for name, weight in adapted.adapter.weights().items():
        assert np.array_equal(weight, base.get(name, own_weight(tiny_encoder, name)))


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_files_load_with_peft_on_the_previous_version(
    tiny_encoder: str, base: Weights, tmp_path: Path, kind: str, targets: str
) -> None:
    adapted = adapt(tiny_encoder, base, **KINDS[kind], **TARGETS[targets])
    adapted.peft_model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    previous = shared(tiny_encoder, 8).with_weights(base).model
    loaded = PeftModel.from_pretrained(previous, str(tmp_path)).get_base_model()
    for name in adapted.adapter.modules:
        found = merged_weight(loaded.get_submodule(name))
        np.testing.assert_allclose(found, adapted.adapter.weights()[name], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_scales_the_delta_of_every_module(tiny_encoder: str, kind: str) -> None:
    adapter = adapt(tiny_encoder, **KINDS[kind], **TARGETS["all of two layers"]).adapter
    whole = adapter.weights()
    adapter.finish(0.25)
    assert len(whole) == 12
    for name, weight in adapter.weights().items():
        old = own_weight(tiny_encoder, name)
        assert abs(weight - old).max() > 1e-2
        np.testing.assert_allclose(weight, old + 0.25 * (whole[name] - old), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", TARGETS)
def test_nothing_but_the_delta_is_trainable(tiny_encoder: str, kind: str, targets: str) -> None:
    adapted = adapt(tiny_encoder, **KINDS[kind], **TARGETS[targets])
    trainable = {id(p) for p in adapted.tower.parameters() if p.requires_grad}
    expected = set()
    for _, layer in adapted.adapter.layers():
        factors = [layer.lora_A[NAME], layer.lora_B[NAME]]
        if kind == "AdaLoRA":
            expected |= {id(factor) for factor in (*factors, layer.lora_E[NAME])}
        else:
            trained = factors if kind == "A and B trained" else factors[1:]
            expected |= {id(factor.weight) for factor in trained}
    assert trainable == expected
    whole = {id(p) for p in adapted.peft_model.parameters() if p.requires_grad}
    assert whole == expected


def test_the_default_takes_the_closed_form_whatever_came_before(tiny_encoder: str) -> None:
    assert isinstance(adapt(tiny_encoder).tower, TextTower)
    below = earlier(tiny_encoder, "encoder.layer.0.attention.self.key")
    assert isinstance(adapt(tiny_encoder, below).tower, TextTower)
    assert isinstance(adapt(tiny_encoder, adapter="adalora").tower, LayerTower)
    assert isinstance(adapt(tiny_encoder, target_modules=("query",)).tower, LayerTower)


def test_both_towers_compute_the_same(tiny_encoder: str) -> None:
    adapted = adapt(tiny_encoder, train_lora_a=True)
    activations = adapted.encoder.activations(TEXTS).select(TEXTS)
    general = LayerTower(adapted.adapter, activations)
    torch.testing.assert_close(general.embed_all(), adapted.tower.embed_all(), rtol=0, atol=1e-6)


def test_without_an_adapter_the_previous_versions_texts_stay(
    tiny_encoder: str, base: Weights
) -> None:
    adapted = adapt(tiny_encoder, base, adapter="none")
    assert isinstance(adapted.tower, FrozenTower) and adapted.adapter.peft_model is None
    assert not [p for p in adapted.tower.parameters() if p.requires_grad]
    expected = shared(tiny_encoder, 8).with_weights(base).embed(TEXTS)
    np.testing.assert_allclose(adapted.tower.embed_all().numpy(), expected, atol=1e-6)
    adapted.adapter.finish(0.5)
    assert adapted.adapter.weights().keys() == base.keys()


def test_padding_of_longer_texts_beside_it_does_not_change_a_text(tiny_encoder: str) -> None:
    tower = adapt(tiny_encoder, **KINDS["AdaLoRA"], **TARGETS["all of two layers"]).tower
    with torch.no_grad():
        alone = tower(torch.tensor([[1]]))[0, 0]
        beside = tower(torch.tensor([[1, 3]]))[0, 0]
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "MiniLM"])
@pytest.mark.parametrize("keeps_attention", [True, False], ids=["feed-forward", "layer"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_activations_at_any_cut_stand_for_their_texts(
    name: str, tiny_encoder: str, roberta: str, num_layers: int, keeps_attention: bool
) -> None:
    encoder = shared({"BERT": tiny_encoder, "RoBERTa": roberta, "MiniLM": BUNDLED}[name], 8)
    cut = Cut(num_layers=num_layers, keeps_attention=keeps_attention)
    expected = whole_model(encoder.model, encoder)
    activations = encoder.activations(TEXTS, cut, batch_size=2).select(TEXTS)
    assert activations.cut == cut
    np.testing.assert_allclose(encoder.finish(activations), expected, atol=TOLERANCE)
    higher = encoder.advance(activations, Cut())
    assert higher.cut == Cut()
    np.testing.assert_allclose(encoder.finish(higher), encoder.finish(activations), atol=1e-5)
    if cut != Cut():
        mistaken = encoder.finish(dataclasses.replace(activations, cut=Cut()))
        assert abs(mistaken - expected).max() > 5 * TOLERANCE


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("roberta")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(60))]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = RobertaModel(
            RobertaConfig(
                vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=32, initializer_range=0.5,
                pad_token_id=0, type_vocab_size=2,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder)
    return str(folder)
