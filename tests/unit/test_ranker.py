"""The ranker that is trained and the scorer that serves are one function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from raysys.ingest.features import (
    DAY_S,
    FEATURE_NAMES,
    NUM_FEATURES,
    ItemTable,
    UserHistory,
    features,
)
from raysys.model.adapter import Adapter
from raysys.model.encoder import TextEncoder
from raysys.model.ranker import HeadModule, RankerModule
from raysys.model.scorer import NUM_INPUTS, Head, head_inputs, pool_history
from raysys.model.text_tower import TextTower
from raysys.model.tower import build_tower
from tests import tiny_shop

SHAPE = (3, 2, 6)


@pytest.fixture(scope="module")
def tower(tiny_encoder: str) -> TextTower:
    encoder = TextEncoder(tiny_encoder, 8)
    activations = encoder.activations(tiny_shop.distinct_texts())
    adapter = Adapter.fresh(encoder, tiny_shop.model_config(tiny_encoder), {}, num_steps=1)
    tower = build_tower(adapter, activations)
    assert isinstance(tower, TextTower)
    torch.nn.init.normal_(tower.lora_b, std=0.2)
    return tower


def test_the_numpy_scorer_is_the_torch_module(tower: TextTower) -> None:
    rng = np.random.default_rng(0)
    head = tiny_shop.random_head()
    text = tower.embed_all().numpy()
    shown = rng.normal(size=(*SHAPE, NUM_FEATURES)).astype(np.float32)
    index = rng.integers(len(text), size=SHAPE)
    history, query = np.zeros((2, *SHAPE[:2], text.shape[1]), np.float32)
    expected = np.zeros(SHAPE, np.float32)
    for user, request in np.ndindex(SHAPE[:2]):
        # A user without history, and every second request without a query.
        attended = rng.integers(len(text), size=0 if user == 0 else 4)
        attention = rng.dirichlet(np.ones(len(attended))) if len(attended) else np.zeros(0)
        pooled = pool_history(text[attended], attention.astype(np.float32))
        asked = text[rng.integers(len(text))] if request else None
        candidates = text[index[user, request]]
        inputs = head_inputs(
            shown[user, request],
            None if pooled is None else candidates @ pooled,
            None if asked is None else candidates @ asked,
        )
        expected[user, request] = head.score(inputs)
        history[user, request] = 0 if pooled is None else pooled
        query[user, request] = 0 if asked is None else asked
    with torch.no_grad():
        found = RankerModule(tower, HeadModule(head))(
            features=torch.from_numpy(shown),
            text_index=torch.from_numpy(index),
            history_text=torch.from_numpy(history),
            query_text=torch.from_numpy(query),
        )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["first.weight", "second.bias", "last.weight", "skip.weight"])
def test_a_weight_that_the_two_do_not_share_is_noticed(name: str) -> None:
    head = tiny_shop.random_head()
    other = Head(weights={**head.weights, name: head.weights[name] + 0.1})
    inputs = np.random.default_rng(0).normal(size=(1, 9, NUM_INPUTS)).astype(np.float32)
    with torch.no_grad():
        found = HeadModule(head)(torch.from_numpy(inputs))[0].numpy()
    np.testing.assert_allclose(found, head.score(inputs[0]), rtol=1e-4, atol=1e-5)
    assert abs(found - other.score(inputs[0])).max() > 1e-2


def test_a_head_survives_the_module_and_is_not_shared_with_it() -> None:
    head = tiny_shop.random_head()
    module = HeadModule(head)
    copy = module.head()
    assert copy.weights.keys() == head.weights.keys()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    for name, value in head.weights.items():
        assert np.array_equal(copy.weights[name], value)


def test_training_changes_the_head_and_lora_and_nothing_else(tower: TextTower) -> None:
    module = RankerModule(tower, HeadModule(tiny_shop.random_head()))
    assert sorted(name for name, _ in module.trainable()) == [
        "head.first.bias", "head.first.weight", "head.last.weight", "head.second.bias",
        "head.second.weight", "head.skip.weight", "tower.lora_b",
    ]  # fmt: skip


def _bought(times: dict[int, list[float]], now: float) -> UserHistory:
    events = [(item, now - days * DAY_S) for item, ages in times.items() for days in ages]
    items, ts = zip(*events, strict=True)
    return UserHistory.empty().extend(
        np.array(items, np.int32), np.array(ts), np.ones(len(ts)),
        as_of=now, half_life_s=tiny_shop.HALF_LIFE_S,
    )  # fmt: skip


def _table(popularity: NDArray[np.float64]) -> ItemTable:
    num = len(popularity)
    return ItemTable(
        ids=[f"i{i}" for i in range(num)], texts=["w1"] * num,
        category=np.arange(num, dtype=np.int32) % 3, brand=np.full(num, -1, np.int32),
        price=np.linspace(1, 9, num).astype(np.float32), popularity=popularity.astype(np.float32),
        trend=np.linspace(-1, 1, num).astype(np.float32), as_of=0.0,
        half_life_s=tiny_shop.HALF_LIFE_S,
    )  # fmt: skip


def _first_scores(popularity: NDArray[np.float64], history: UserHistory) -> NDArray[np.float32]:
    everything = np.arange(len(popularity), dtype=np.int32)
    shown = features(history, _table(popularity), everything, now=history.as_of)
    cosines = np.random.default_rng(0).normal(size=(2, len(popularity))).astype(np.float32)
    return Head.decayed_frequency(32).score(head_inputs(shown, *cosines))


def test_training_starts_from_the_ranking_by_personal_decayed_frequency() -> None:
    ages = {3: [1.0, 40.0], 5: [2.0, 9.0, 16.0], 8: [30.0], 9: [80.0, 81.0, 82.0]}
    history = _bought(ages, now=100 * DAY_S)
    scores = _first_scores(np.full(12, 50.0), history)
    by_frequency = history.items[np.argsort(-history.decayed)]
    assert by_frequency.tolist() == [5, 3, 8, 9]
    assert np.argsort(-scores, kind="stable")[:4].tolist() == by_frequency.tolist()
    others = np.setdiff1d(np.arange(12), by_frequency)
    assert np.ptp(scores[others]) == 0 and scores[others].max() < scores[by_frequency].min()

    by_count = history.items[np.argsort(-history.count, kind="stable")]
    assert by_count.tolist() != by_frequency.tolist(), "counts without decay rank otherwise"


def test_what_a_user_never_bought_is_first_ranked_by_popularity() -> None:
    popularity = np.random.default_rng(1).permutation(12) * 10.0
    history = _bought({0: [1.0]}, now=100 * DAY_S)
    scores = _first_scores(popularity, history)
    assert np.argmax(scores) == 0
    assert np.argsort(-scores[1:]).tolist() == np.argsort(-popularity[1:]).tolist()


def test_the_untrained_head_reads_two_features_and_no_text() -> None:
    skip = Head.decayed_frequency(32).weights["skip.weight"][0]
    read = {FEATURE_NAMES[i] for i in np.flatnonzero(skip[:NUM_FEATURES])}
    assert read == {"own_decayed_count", "popularity"}
    assert not skip[NUM_FEATURES:].any()
