"""Names of what is adapted are resolved exactly, and the cut lies below all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysys.config import ModelConfig
from raysys.errors import ConfigError
from raysys.model.adapter import activations_cut
from raysys.model.encoder import load_encoder
from raysys.model.encoder_files import BUNDLED, resolve_encoder
from raysys.model.targets import (
    ALL_LINEAR,
    DEFAULT_CUT,
    Cut,
    Layout,
    adapted_modules,
    cut_of,
    layout,
    layout_of,
)

LINEAR = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
BERT = Layout(depth=6, linear=LINEAR)


@pytest.mark.parametrize("name", ["tiny", BUNDLED])
def test_the_layout_is_known_without_loading_the_weights(name: str, tiny_encoder: str) -> None:
    folder = resolve_encoder(tiny_encoder if name == "tiny" else name)
    assert layout_of(folder) == layout(load_encoder(folder))
    assert layout_of(folder) == Layout(depth=2 if name == "tiny" else 6, linear=LINEAR)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        pytest.param(["output.dense"], ["output.dense"], id="the feed-forward block's alone"),
        pytest.param(["attention.output.dense"], ["attention.output.dense"], id="the other one"),
        pytest.param(
            ["value", "query"], ["attention.self.query", "attention.self.value"], id="by their end"
        ),
        pytest.param(["self.key"], ["attention.self.key"], id="by a longer end"),
        pytest.param(["query", ALL_LINEAR], LINEAR, id="all"),
    ],
)
def test_a_target_is_one_module_of_each_adapted_layer(
    targets: list[str], expected: list[str]
) -> None:
    for num_layers in (1, 3):
        found = adapted_modules(BERT, targets, num_layers)
        layers = range(6 - num_layers, 6)
        assert found == tuple(f"encoder.layer.{i}.{name}" for i in layers for name in expected)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        pytest.param("q_proj", "no module q_proj; a layer of the encoder has", id="no"),
        pytest.param("uery", "no module uery", id="an end that is no whole name"),
        pytest.param(
            "dense",
            "dense may be attention.output.dense or intermediate.dense or output.dense;",
            id="three of them",
        ),
    ],
)  # fmt: skip
def test_a_target_that_is_not_exactly_one_module_is_refused_in_one_line(
    target: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.target_modules: {message}") as caught:
        adapted_modules(BERT, ["query", target], 1)
    assert "\n" not in str(caught.value) and "all-linear" in str(caught.value)
    assert all(name in str(caught.value) for name in LINEAR)


def test_more_layers_than_there_are_are_refused() -> None:
    assert len(adapted_modules(BERT, ["query"], 6)) == 6
    with pytest.raises(ConfigError, match=r"^model\.num_adapted_layers: the encoder has 6 "):
        adapted_modules(BERT, ["query"], 7)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        pytest.param([], DEFAULT_CUT, id="nothing"),
        pytest.param(["5.output.dense"], DEFAULT_CUT, id="as ever"),
        pytest.param(["5.intermediate.dense", "5.output.dense"], DEFAULT_CUT, id="feed-forward"),
        pytest.param(
            ["5.output.dense", "5.attention.output.dense"],
            Cut(num_layers=1, keeps_attention=False),
            id="attention",
        ),
        pytest.param(
            ["5.output.dense", "3.output.dense"],
            Cut(num_layers=3, keeps_attention=False),
            id="a lower layer's feed-forward",
        ),
        pytest.param(
            ["0.attention.self.key"], Cut(num_layers=6, keeps_attention=False), id="everything"
        ),
    ],
)
def test_the_cut_lies_below_all_that_is_changed(modules: list[str], expected: Cut) -> None:
    found = cut_of([f"encoder.layer.{name}" for name in modules], depth=6)
    assert found == expected
    assert found.first_layer(6) == 6 - expected.num_layers


def test_each_cut_has_a_cache_of_its_own_and_the_default_the_oldest() -> None:
    cuts = [Cut(num_layers=n, keeps_attention=k) for n in (1, 2, 12) for k in (True, False)]
    assert len({cut.suffix for cut in cuts}) == len(cuts)
    assert DEFAULT_CUT.suffix == ""


@pytest.mark.parametrize(
    ("changes", "changed", "expected"),
    [
        pytest.param({}, [], DEFAULT_CUT, id="as ever"),
        pytest.param({"adapter": "none"}, [], DEFAULT_CUT, id="head alone"),
        pytest.param(
            {"target_modules": ("query",)}, [], Cut(num_layers=1, keeps_attention=False), id="query"
        ),
        pytest.param(
            {}, ["encoder.layer.0.attention.self.key"],
            Cut(num_layers=2, keeps_attention=False), id="after one that changed more",
        ),
        pytest.param(
            {"adapter": "none"}, ["encoder.layer.1.attention.self.key"],
            Cut(num_layers=1, keeps_attention=False), id="head alone after one that changed more",
        ),
    ],
)  # fmt: skip
def test_the_cut_is_below_this_update_and_all_before_it(
    tiny_encoder: str, changes: dict[str, Any], changed: list[str], expected: Cut
) -> None:
    assert activations_cut(ModelConfig(encoder=tiny_encoder, **changes), changed) == expected


def test_the_head_alone_needs_no_module_of_any_name(tiny_encoder: str) -> None:
    named = {"target_modules": ("q_proj",), "encoder": tiny_encoder}
    activations_cut(ModelConfig(adapter="none", **named))
    with pytest.raises(ConfigError, match="no module q_proj"):
        activations_cut(ModelConfig(**named))


def test_an_encoder_of_another_architecture_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    from transformers import DistilBertConfig

    DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="DistilBertModel has no BERT-like last layer"):
        layout_of(tmp_path)
