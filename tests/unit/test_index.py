"""The nearest items of a version: nothing missed, no filter that starves, same on every replica."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from usearch.index import Index

from raysys.config import RetrievalConfig
from raysys.serve.index import ItemIndex, build_graph
from raysys.serve.shelf import Shelves
from tests.fakes import FakeVersion, item_table

NUM, WIDTH, K = 4000, 64, 100


def normalised(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def random_vectors(num: int = NUM, seed: int = 0) -> np.ndarray:
    return normalised(np.random.default_rng(seed).normal(size=(num, WIDTH)))


def clustered_vectors(num: int = NUM, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num // 100, WIDTH))
    return normalised(
        centres[rng.integers(len(centres), size=num)] + 0.3 * rng.normal(size=(num, WIDTH))
    )


def index_of(vectors: np.ndarray, graph: Index | None = None) -> ItemIndex:
    return ItemIndex(vectors, np.arange(len(vectors), dtype=np.int32), graph)


def brute_force(vectors: np.ndarray, query: np.ndarray, num: int) -> list[int]:
    similarity = vectors.astype(np.float64) @ query
    return sorted(range(len(vectors)), key=lambda i: (-similarity[i], i))[:num]


def recall(index: ItemIndex, vectors: np.ndarray) -> float:
    """The share of the truly nearest that is found, over queries near and far from the items."""
    queries = normalised(vectors[::200] + 0.05 * random_vectors(len(vectors[::200]), seed=9))
    found = [
        len(set(index.nearest(query, K).tolist()) & set(brute_force(vectors, query, K)))
        for query in queries
    ]
    return float(np.mean(found)) / K


@pytest.mark.parametrize("vectors", [random_vectors(), clustered_vectors()], ids=["random", "near"])
def test_the_graph_finds_nearly_all_of_the_nearest(vectors: np.ndarray) -> None:
    assert recall(index_of(vectors, build_graph(vectors)), vectors) >= 0.95


def test_a_graph_of_few_edges_would_fail_the_test_of_recall() -> None:
    vectors = random_vectors()
    poor = Index(ndim=WIDTH, metric="ip", dtype="f16", connectivity=2, expansion_add=4)
    poor.add(np.arange(NUM), vectors, threads=1)
    poor.expansion_search = 4
    assert recall(index_of(vectors, poor), vectors) < 0.95


def test_without_a_graph_exactly_the_nearest_are_found_in_their_order() -> None:
    vectors = clustered_vectors(1000)
    for query in random_vectors(5, seed=3):
        assert index_of(vectors).nearest(query, 20).tolist() == brute_force(vectors, query, 20)


@pytest.mark.parametrize("with_graph", [False, True], ids=["exact", "graph"])
def test_a_filter_that_3_of_10000_items_pass_finds_all_3(with_graph: bool) -> None:
    num, rare = 10_000, [17, 4242, 9999]
    vectors = clustered_vectors(num)
    graph = build_graph(vectors[:, :16].copy()) if with_graph else None
    index = index_of(vectors[:, :16].copy(), graph)
    mask = np.zeros(num, np.bool_)
    mask[rare] = True
    query = vectors[0, :16]
    assert sorted(index.nearest(query, K, mask).tolist()) == rare
    # A filter after the search, which this one is not, would find none.
    after = index.nearest(query, K)
    assert not mask[after].any()


def test_the_same_texts_give_the_same_graph_byte_for_byte() -> None:
    vectors = random_vectors(1000)
    first, again = (bytes(build_graph(vectors).save()) for _ in range(2))
    assert first == again
    assert first != bytes(build_graph(vectors[::-1].copy()).save())


def test_items_of_one_text_are_all_found() -> None:
    vectors = random_vectors(3)
    index = ItemIndex(vectors, np.array([2, 0, 2, 1, 2], np.int32), None)
    assert index.nearest(vectors[2], 3).tolist() == [0, 2, 4]
    only_last = np.array([False, True, False, False, True])
    assert index.nearest(vectors[2], 3, only_last).tolist() == [4, 1]


GRAPHED = random_vectors(300, seed=5)[:, :8].copy()
TEXT_OF_ITEM = np.random.default_rng(1).integers(300, size=500).astype(np.int32)
INDEXES = {
    "exact": ItemIndex(GRAPHED, TEXT_OF_ITEM, None),
    "graph": ItemIndex(GRAPHED, TEXT_OF_ITEM, build_graph(GRAPHED)),
}


@pytest.mark.parametrize("kind", ["exact", "graph"])
@settings(max_examples=60, deadline=None)
@given(share=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0]), num=st.integers(1, 600),
       seed=st.integers(0, 99))  # fmt: skip
def test_as_many_items_are_found_as_there_are_that_pass(
    kind: str, share: float, num: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(500) < share
    found = INDEXES[kind].nearest(GRAPHED[seed], num, mask).tolist()
    assert len(found) == len(set(found)) == min(num, int(mask.sum()))
    assert mask[found].all()


def test_a_large_catalogue_gets_a_graph_once_for_all_versions_of_its_texts() -> None:
    table = item_table([f"i{i}" for i in range(60)])
    shelves = Shelves(RetrievalConfig(exact_below=50), ())
    one, other = FakeVersion("v1", table), FakeVersion("v2", table)
    assert shelves.prepare(one) is one
    graphs = [shelves.of(version).index._graph for version in (one, other)]
    assert graphs[0] is not None
    assert graphs[0] is graphs[1]
    small = Shelves(RetrievalConfig(exact_below=61), ())
    assert small.of(one).index._graph is None


def test_a_shelf_goes_with_its_version() -> None:
    shelves = Shelves(RetrievalConfig(), ())
    version = FakeVersion("v1")
    shelves.prepare(version)
    assert len(shelves._shelves) == 1
    del version
    assert len(shelves._shelves) == 0
