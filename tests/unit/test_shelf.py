"""A real version's items are found by their text, for its users, on a real encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raysys.config import RetrievalConfig
from raysys.model.encoder import TextEncoder, weights_sha256
from raysys.registry.loaded import LoadedVersion, VersionWeights
from raysys.registry.version import Manifest
from raysys.serve.answer import Task, rank_with
from raysys.serve.candidates import Found, Given, Recommended
from raysys.serve.ranker import Servable
from raysys.serve.schema import Filters
from raysys.serve.shelf import Shelves
from tests import tiny_shop

NOW = tiny_shop.WINDOW_START


@pytest.fixture(scope="module")
def version(tiny_encoder: str) -> LoadedVersion:
    items, texts = tiny_shop.item_states()[-1].table(), tiny_shop.distinct_texts()
    weights = VersionWeights(
        head=tiny_shop.random_head(),
        adapted_weights={},
        texts=texts,
        text=TextEncoder(tiny_encoder, 8).embed(texts),
    )
    manifest = Manifest(
        version="v0001-aaaaaa", update_id="u0001-aaaaaa", base_version=None, encoder=tiny_encoder,
        encoder_sha256=weights_sha256(Path(tiny_encoder)), max_tokens=8, lora_rank=4,
        adapter="head", adapted_modules=(), alpha=1.0, state="u0001-aaaaaa",
    )  # fmt: skip
    return LoadedVersion(manifest, weights, items, {})


def shelves(**changes: int) -> Shelves:
    return Shelves(RetrievalConfig(**changes), ())


@pytest.mark.parametrize("exact_below", [1, 1000], ids=["graph", "exact"])
def test_the_text_of_an_item_finds_it_and_all_others_of_that_text(
    version: LoadedVersion, exact_below: int
) -> None:
    shelf = shelves(exact_below=exact_below).of(version)
    texts = version.items.texts
    for item, text in enumerate(texts):
        of_text = [other for other, theirs in enumerate(texts) if theirs == text]
        assert item in of_text
        near = shelf.index.nearest(version.embed_query(text), len(of_text))
        assert near.tolist() == of_text


def test_what_is_found_is_ranked_as_if_the_caller_had_named_it(version: LoadedVersion) -> None:
    shelf = shelves(num_candidates=10).of(version)
    history = version.history_of(["i03", "i25"], NOW)
    for selection, query in (
        (Found(filters=None), "w3 w4"),
        (Recommended(filters=None, exclude_seen=False), None),
    ):
        found = rank_with(
            version, shelf,
            Task(selection=selection, surface="search", query=query, when=NOW, user="u"),
            history, lambda chosen: None,
        )  # fmt: skip
        assert len(found.item_ids) == 10
        named = rank_with(
            version, shelf,
            Task(selection=Given(sorted(found.item_ids)), surface="search", query=query, when=NOW,
                 user="u"),
            history, lambda chosen: None,
        )  # fmt: skip
        assert named.item_ids == found.item_ids
        np.testing.assert_allclose(named.scores, found.scores, rtol=1e-6)


def test_categories_prices_and_missing_brands_of_a_real_table(version: LoadedVersion) -> None:
    shelf = shelves().of(version)
    assert version.items.category_names == ("w50", "w51", "w52", "w53")
    assert version.items.brand_names == ()
    second = Filters(category=["w51"], min_price=12.0, max_price=14.0)
    mask = shelf.mask(second, "search")
    assert mask is not None
    assert [version.items.ids[i] for i in np.flatnonzero(mask)] == ["i11", "i12", "i13"]
    nobody = shelf.mask(Filters(brand=["acme"]), "search")
    assert nobody is not None and not nobody.any()
    assert shelf.mask(None, "search") is None


def test_a_loaded_version_is_servable(version: LoadedVersion) -> None:
    servable: Servable = version
    assert shelves().prepare(servable) is version
