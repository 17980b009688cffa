"""The encoder: cached activations stand for their texts, and order never matters."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize
from transformers import BertConfig, DistilBertConfig, DistilBertModel

from raysys.errors import ConfigError
from raysys.model.encoder import (
    TextEncoder,
    TokenActivations,
    cache_folder,
    cached_texts,
    load_cached,
    load_encoder,
    store_cached,
)
from raysys.model.encoder_files import BUNDLED, BUNDLED_SHA256, resolve_encoder, weights_sha256
from raysys.model.targets import DEFAULT_CUT, Cut
from raysys.storage import Root

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w3 w1", "w1 w3", "w7 w8 w9 w10 w11 w12 w13 w14 w15", ""]
TOLERANCE = 5e-3
"""Of a cosine: the cache has half precision."""


@pytest.fixture(scope="module")
def encoder(tiny_encoder: str) -> TextEncoder:
    return TextEncoder(tiny_encoder, 8)


@torch.no_grad()
def whole_model(encoder: TextEncoder, texts: Sequence[str]) -> NDArray[np.float32]:
    """Mean-pooled, normalised output of the whole encoder, one text at a time."""
    rows = []
    for text in texts:
        batch = encoder.tokenize([text])
        out = encoder.model(**batch).last_hidden_state
        rows.append(normalize(out.mean(1), dim=1))
    found: NDArray[np.float32] = torch.cat(rows).numpy()
    return found


def test_an_embedding_is_the_mean_pooled_output_of_the_whole_encoder(encoder: TextEncoder) -> None:
    expected = whole_model(encoder, TEXTS)
    np.testing.assert_allclose(encoder.embed(TEXTS), expected, atol=TOLERANCE)
    backwards = encoder.embed(TEXTS[::-1])
    assert abs(backwards - expected).max() > 10 * TOLERANCE, "texts differ by more than that"


def test_embeddings_come_in_the_order_of_the_texts_whatever_their_length(
    encoder: TextEncoder,
) -> None:
    """A batch is sorted by length inside; queries got one another's embeddings once."""
    together = encoder.embed(TEXTS)
    for text, found in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(found, encoder.embed([text])[0], atol=TOLERANCE)


def test_a_text_that_is_asked_for_twice_is_answered_twice(encoder: TextEncoder) -> None:
    found = encoder.embed(["w9", "w1 w2", "w9"])
    assert np.array_equal(found[0], found[2]) and not np.array_equal(found[0], found[1])


def test_small_batches_change_nothing(encoder: TextEncoder) -> None:
    one, many = (encoder.activations(TEXTS, batch_size=size).select(TEXTS) for size in (1, 99))
    np.testing.assert_allclose(
        one.hidden.astype(np.float32), many.hidden.astype(np.float32), atol=TOLERANCE
    )
    assert np.array_equal(one.lengths, many.lengths)


def test_a_text_is_cut_at_max_tokens_and_padding_is_zero(encoder: TextEncoder) -> None:
    activations = encoder.activations(TEXTS).select(TEXTS)
    # Two tokens more than words: [CLS] and [SEP].
    assert activations.lengths.tolist() == [7, 3, 4, 4, 8, 2]
    assert activations.hidden.dtype == np.float16
    for hidden, length in zip(activations.hidden, activations.lengths, strict=True):
        assert hidden[:length].any(-1).all() and not hidden[length:].any()


def test_a_selection_has_its_own_order_and_is_trimmed_to_its_longest(encoder: TextEncoder) -> None:
    some = encoder.activations(TEXTS).select(["w3 w1", "w9"])
    assert some.texts == ["w3 w1", "w9"] and some.hidden.shape == (2, 4, encoder.width)
    np.testing.assert_allclose(encoder.finish(some), encoder.embed(["w3 w1", "w9"]), atol=TOLERANCE)


def test_activations_survive_bytes_and_parts_of_different_lengths_join(
    encoder: TextEncoder,
) -> None:
    short, long = (encoder.activations(texts) for texts in (["w9"], ["w1 w2 w3 w4", "w5"]))
    back = TokenActivations.from_bytes(TokenActivations.concat([short, long]).to_bytes())
    assert sorted(back.texts) == ["w1 w2 w3 w4", "w5", "w9"]
    np.testing.assert_allclose(
        encoder.finish(back.select(["w9"])), encoder.finish(short), atol=TOLERANCE
    )


def test_the_cache_returns_what_it_was_given_and_a_repeated_write_adds_nothing(
    encoder: TextEncoder, tiny_encoder: str, local_root: Root
) -> None:
    folder = cache_folder(tiny_encoder, 8, DEFAULT_CUT)
    assert cached_texts(local_root, folder) == set()
    for texts in (TEXTS[:3], TEXTS[3:], TEXTS[2::-1]):
        store_cached(local_root, folder, encoder.activations(texts))
    assert cached_texts(local_root, folder) == set(TEXTS)
    assert len(local_root.list(folder)) == 2
    cached = load_cached(local_root, folder)
    np.testing.assert_allclose(
        encoder.finish(cached.select(TEXTS)), encoder.embed(TEXTS), atol=TOLERANCE
    )


def test_the_cache_is_named_by_weights_and_tokens(tiny_encoder: str) -> None:
    upper = Cut(num_layers=2, keeps_attention=False)
    settings = [(tiny_encoder, 8), (tiny_encoder, 9), (BUNDLED, 8)]
    names = {cache_folder(*each, cut) for each in settings for cut in (DEFAULT_CUT, upper)}
    assert len(names) == 6
    digest = weights_sha256(Path(tiny_encoder))[:16]
    assert {f"cache/activations/{digest}-8", f"cache/activations/{digest}-8-top2"} < names


def test_another_output_projection_changes_the_embedding(encoder: TextEncoder) -> None:
    own = encoder.model.encoder.layer[-1].output.dense.weight.detach().numpy()
    same, other = (
        encoder.with_weights({"encoder.layer.1.output.dense": weight}).embed(TEXTS)
        for weight in (own.copy(), own * 0.5)
    )
    assert np.array_equal(same, encoder.embed(TEXTS))
    assert abs(other - same).max() > 0.05


def test_threads_get_what_they_asked_for_by_their_own_version(encoder: TextEncoder) -> None:
    """Replicas embed queries of several versions at once, in threads, by one encoder."""
    query = encoder.model.encoder.layer[0].attention.self.query.weight.detach().numpy()
    versions = [
        encoder.with_weights({"encoder.layer.0.attention.self.query": query * factor})
        for factor in (1.0, 2.0, -1.0, 0.0)
    ]
    asked = [(version, text) for version in versions for text in TEXTS] * 5
    expected = [version.embed([text]) for version, text in asked]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda each: each[0].embed([each[1]]), asked))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert abs(expected[0] - expected[len(TEXTS)]).max() > 0.01, "the versions differ"


def test_the_bundled_encoder_is_the_published_one() -> None:
    assert weights_sha256(resolve_encoder(BUNDLED)) == BUNDLED_SHA256
    encoder = TextEncoder(BUNDLED, 16)
    assert encoder.width == 384
    assert encoder.layout.depth == 6
    texts = ["whole milk, dairy", "skimmed milk", "cat litter"]
    found = encoder.embed(texts)
    np.testing.assert_allclose(found, whole_model(encoder, texts), atol=TOLERANCE)
    assert found[0] @ found[1] > 0.6 > 0.3 > found[0] @ found[2]


def test_an_encoder_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match=r"model.encoder: DistilBertModel has no BERT-like last"):
        load_encoder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model.encoder: .* has no model.safetensors"):
        weights_sha256(tmp_path)
