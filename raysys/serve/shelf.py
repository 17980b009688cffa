"""What a replica makes of a version besides its model, once, before the version takes requests.

    load -> Shelves.prepare(version) -> resident;  Shelves.of(version) -> Shelf, at each request

A shelf goes when its version does. Versions of the same texts and encoder share a graph.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

from raysys.config import RetrievalConfig, RuleConfig
from raysys.ingest.features import FloatArray, IndexArray, ItemTable
from raysys.partitions.schema import Surface
from raysys.serve.index import ItemIndex, Mask, build_graph, digest
from raysys.serve.ranker import Servable
from raysys.serve.rules import Rules, of_names
from raysys.serve.schema import Filters


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shelf:
    """The items of one version, as they are found and filtered. Shapes: N = items."""

    index: ItemIndex
    rules: Rules
    items: ItemTable
    popular: IndexArray
    """(N,) all items, the most popular first."""
    trending: IndexArray
    """Items that sell more than they used to, the fastest first."""
    num_candidates: int
    """Items to find for an answer."""

    def mask(
        self, filters: Filters | None, surface: Surface, excluded: IndexArray | None = None
    ) -> Mask | None:
        """Returns which items pass filters and are not blocked, (N,); None where all do.

        Args:
          excluded: Indexes of items that do not.
        """
        blocked = self.rules.blocked(surface)
        if filters is None and blocked is None and excluded is None:
            return None
        passes = np.ones(len(self.items), np.bool_) if blocked is None else ~blocked
        if excluded is not None:
            passes[excluded] = False
        if filters is not None:
            self._filter(passes, filters)
        return passes

    def _filter(self, passes: Mask, filters: Filters) -> None:
        items, price = self.items, self.items.price
        if filters.category is not None:
            passes &= of_names(items.category, items.category_names, filters.category)
        if filters.brand is not None:
            passes &= of_names(items.brand, items.brand_names, filters.brand)
        # A price of NaN, which is unknown, is in no range.
        if filters.min_price is not None:
            passes &= price >= np.float32(filters.min_price)
        if filters.max_price is not None:
            passes &= price <= np.float32(filters.max_price)
        if filters.exclude_items:
            passes[items.indexes_of(filters.exclude_items)] = False


class Shelves:
    """The shelves of all versions in memory. Threads may share it."""

    def __init__(self, retrieval: RetrievalConfig, rules: Sequence[RuleConfig]) -> None:
        self._retrieval = retrieval
        self._rules = rules
        self._lock = threading.Lock()
        self._shelves: weakref.WeakKeyDictionary[Servable, Shelf] = weakref.WeakKeyDictionary()
        self._graphs: weakref.WeakValueDictionary[bytes, Index] = weakref.WeakValueDictionary()

    def prepare(self, version: Servable) -> Servable:
        """Makes the shelf of a version that was loaded, and returns the version. Blocking."""
        self.of(version)
        version.probabilities(np.zeros(1, np.float32))  # an old version fits them at its first
        return version

    def of(self, version: Servable) -> Shelf:
        """Returns a version's shelf."""
        shelf = self._shelves.get(version)
        if shelf is None:
            with self._lock:  # a graph takes seconds: nobody builds it a second time
                shelf = self._shelves.get(version) or self._make(version)
                self._shelves[version] = shelf
        return shelf

    def _make(self, version: Servable) -> Shelf:
        items, vectors = version.items, version.text_vectors
        return Shelf(
            index=ItemIndex(vectors, version.text_of_item, self._graph(vectors)),
            rules=Rules(self._rules, items),
            items=items,
            popular=_falling(items.popularity),
            trending=_falling(items.trend)[: np.count_nonzero(items.trend > 0)],
            num_candidates=self._retrieval.num_candidates,
        )

    def _graph(self, vectors: FloatArray) -> Index | None:
        if len(vectors) < self._retrieval.exact_below:
            return None
        name = digest(vectors)
        graph = self._graphs.get(name)
        if graph is None:
            graph = build_graph(vectors)
            self._graphs[name] = graph
        return graph


def _falling(values: NDArray[np.float32]) -> IndexArray:
    return np.argsort(-values, kind="stable").astype(np.int32)
