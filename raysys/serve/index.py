"""Which items of a version are nearest to a vector by their text: exact, or by an HNSW graph.

    version.text_vectors -> ItemIndex -> nearest(query embedding, num, mask) -> item indexes

Items share texts, so texts are indexed. Below `exact_below` of them one matrix product finds the
nearest ones: no memory, no building, nothing missed. Above, a usearch graph in half precision does.
It is built by one thread, so that the same texts give the same graph, byte for byte, on every
replica; usearch holds no lock of Python's while it adds or searches. A filter never starves an
answer: where the graph finds too few items that pass, all that pass are compared.
Source: HNSW is Malkov and Yashunin (2016), arXiv 1603.09320.

Shape suffixes: N = items, M = distinct texts, d = width of the encoder.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

from raysys.ingest.features import FloatArray, IndexArray

Mask = NDArray[np.bool_]
"""(N,) whether an item may be found."""

CONNECTIVITY = 32
EXPANSION_ADD = 256
EXPANSION_SEARCH = 512
"""Recall@100 at d = 384: 0.99 of 10,000 random vectors, the worst there is, and 1.00 of clustered
ones, as texts are. With the library's 16, 128 and 64 it is 0.55 and 0.99."""
_MIN_SHARE = 1 / 3
"""Of items that pass a filter, for which the graph is asked for more and the others left out."""
_MIN_SHARE_OF_PRODUCT = 1 / 4
"""Of texts, below which copying their rows together is cheaper than multiplying all of them."""


class ItemIndex:
    """The nearest items of one version. Threads may share it."""

    def __init__(self, vectors: FloatArray, text_of_item: IndexArray, graph: Index | None) -> None:
        """Makes an index.

        Args:
          vectors: (M, d) of length 1.
          text_of_item: (N,) rows of `vectors`.
          graph: Of the rows of `vectors`; None to compare with all of them.
        """
        self._vectors = vectors
        self._text_of_item = text_of_item
        self._graph = graph
        self._items = np.argsort(text_of_item, kind="stable").astype(np.int32)
        texts = np.arange(len(vectors) + 1)
        self._starts = np.searchsorted(text_of_item[self._items], texts)
        """(M + 1,) where the items of each text begin in `_items`."""

    def nearest(self, vector: FloatArray, num: int, mask: Mask | None = None) -> IndexArray:
        """Returns the items whose texts are nearest to a vector, nearest first.

        Args:
          vector: (d,) of length 1.
          num: How many. Fewer come only where fewer pass the mask.
          mask: Which items to look among; default: all.
        """
        if self._graph is not None:
            found = self._by_graph(self._graph, vector, num, mask)
            if found is not None:
                return found
        return self._exactly(vector, num, mask)

    def _by_graph(
        self, graph: Index, vector: FloatArray, num: int, mask: Mask | None
    ) -> IndexArray | None:
        """Returns None where too few of what the graph found pass the mask."""
        share = 1.0 if mask is None else float(np.count_nonzero(mask)) / len(mask)
        if share < _MIN_SHARE:
            return None
        num_texts = min(int(num / share * 1.2) + 1, len(self._vectors))
        texts = np.asarray(graph.search(vector, num_texts, threads=1).keys, np.int64)
        found = self._items_of(texts, num, mask)
        return found if len(found) == num else None

    def _exactly(self, vector: FloatArray, num: int, mask: Mask | None) -> IndexArray:
        if mask is None:
            return self._items_of(_largest(self._vectors @ vector, num), num, None)
        texts = np.flatnonzero(np.bincount(self._text_of_item[mask], minlength=len(self._vectors)))
        if len(texts) >= _MIN_SHARE_OF_PRODUCT * len(self._vectors):
            similarity = (self._vectors @ vector)[texts]
        else:
            similarity = self._vectors[texts] @ vector
        return self._items_of(texts[_largest(similarity, num)], num, mask)

    def _items_of(self, texts: NDArray[np.int64], num: int, mask: Mask | None) -> IndexArray:
        """Returns the first `num` items of these texts that pass, text by text."""
        starts, ends = self._starts[texts], self._starts[texts + 1]
        counts = ends - starts
        # All places from each start to its end, without a loop over the texts.
        first = np.repeat(starts - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        items = self._items[first + np.arange(len(first))] if len(texts) else self._items[:0]
        return items[:num] if mask is None else items[mask[items]][:num]


def build_graph(vectors: FloatArray) -> Index:
    """Returns the HNSW graph of (M, d) vectors of length 1. Takes a second for 5,000 texts."""
    graph = Index(
        ndim=vectors.shape[1],
        metric="ip",
        dtype="f16",
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
        expansion_search=EXPANSION_SEARCH,
    )
    graph.add(np.arange(len(vectors)), vectors, threads=1)
    return graph


def digest(vectors: FloatArray) -> bytes:
    """Returns what names these vectors: versions of the same texts and encoder share a graph."""
    return hashlib.blake2b(np.ascontiguousarray(vectors).data, digest_size=16).digest()


def _largest(values: FloatArray, num: int) -> NDArray[np.int64]:
    """Returns the places of the `num` largest values, largest first; equal ones by place."""
    if num < len(values):
        bound = np.partition(values, len(values) - num)[len(values) - num]
        above = np.flatnonzero(values > bound)
        places = np.concatenate([above, np.flatnonzero(values == bound)[: num - len(above)]])
        places.sort()
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")]
