"""Which items a version ranks for a request: those that the caller names, or those that it finds.

    rank, ads   Given        -> the caller's candidates, and which of them the version does not know
    search      Found        -> nearest to the query
    recommend   Recommended  -> bought before, nearest to the history, popular, trending

Filters and blocks hold while items are found, not after: however rare what passes is, it is found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raysys.ingest.example_set import NUM_ATTENDED
from raysys.ingest.features import IndexArray, UserHistory
from raysys.model.scorer import pool_history
from raysys.partitions.schema import Surface
from raysys.serve.index import Mask
from raysys.serve.ranker import Servable
from raysys.serve.schema import AdCandidate, Filters
from raysys.serve.shelf import Shelf


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What is ranked. Shapes: K = candidates that the version knows."""

    items: IndexArray
    """(K,) item indexes, each once."""
    unknown: Sequence[str] = ()
    """Candidates that the version does not know."""
    bids: NDArray[np.float64] | None = None
    """(K,) of ads."""
    reserve: float = 0.0
    """Ads of which showing is worth less are left out."""


class Selection(Protocol):
    """How one endpoint comes to its candidates."""

    def choose(
        self, version: Servable, shelf: Shelf, history: UserHistory, query: str | None, k: int
    ) -> Chosen: ...


class Given:
    """The caller's candidates."""

    def __init__(self, item_ids: Sequence[str]) -> None:
        self.item_ids = item_ids

    def choose(
        self, version: Servable, shelf: Shelf, history: UserHistory, query: str | None, k: int
    ) -> Chosen:
        """Looks the candidates up."""
        items = version.items.indexes_of(self.item_ids)
        if len(items) == len(self.item_ids):
            return Chosen(items=items)
        unknown = [item for item in self.item_ids if version.items.index_of(item) is None]
        return Chosen(items=items, unknown=unknown)


class GivenAds(Given):
    """The caller's candidates, with bids."""

    def __init__(self, candidates: Sequence[AdCandidate], reserve: float) -> None:
        super().__init__([candidate.item_id for candidate in candidates])
        self._reserve = reserve
        self._bid_of = {candidate.item_id: candidate.bid for candidate in candidates}

    def choose(
        self, version: Servable, shelf: Shelf, history: UserHistory, query: str | None, k: int
    ) -> Chosen:
        """Looks the candidates up."""
        chosen = super().choose(version, shelf, history, query, k)
        gone = set(chosen.unknown)
        bids = [bid for item, bid in self._bid_of.items() if item not in gone]
        return dataclasses.replace(chosen, bids=np.array(bids, np.float64), reserve=self._reserve)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The items nearest to the query."""

    filters: Filters | None
    surface: Surface = "search"

    def choose(
        self, version: Servable, shelf: Shelf, history: UserHistory, query: str | None, k: int
    ) -> Chosen:
        """Searches the version's items."""
        assert query is not None, "a search has a query"
        mask = shelf.mask(self.filters, self.surface)
        num = max(shelf.num_candidates, k)
        near = shelf.index.nearest(version.embed_query(query), num, mask)
        return Chosen(items=_distinct(_pinned(shelf, self.surface, query, mask), near))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recommended:
    """What the user may want: own items first, then similar, popular and trending ones in turn."""

    filters: Filters | None
    exclude_seen: bool
    surface: Surface = "recommend"

    def choose(
        self, version: Servable, shelf: Shelf, history: UserHistory, query: str | None, k: int
    ) -> Chosen:
        """Chooses from the version's items."""
        seen = history.items if self.exclude_seen else None
        mask = shelf.mask(self.filters, self.surface, seen)
        num = max(shelf.num_candidates, k)
        own = _first(history.items[np.argsort(-history.decayed, kind="stable")], num // 2, mask)
        popular, trending = _first(shelf.popular, num, mask), _first(shelf.trending, num, mask)
        lists = [_similar(version, shelf, history, num, mask), popular, trending]
        found = _distinct(own, _in_turn([list_ for list_ in lists if len(list_)]))[:num]
        return Chosen(items=_distinct(_pinned(shelf, self.surface, query, mask), found))


def _similar(
    version: Servable, shelf: Shelf, history: UserHistory, num: int, mask: Mask | None
) -> IndexArray:
    attended, attention = history.attention(NUM_ATTENDED)
    pooled = pool_history(version.text_vectors[version.text_of_item[attended]], attention)
    none = np.zeros(0, np.int32)
    return none if pooled is None else shelf.index.nearest(pooled, num, mask)


def _pinned(shelf: Shelf, surface: Surface, query: str | None, mask: Mask | None) -> IndexArray:
    """Pins show items that were not found too, but none that does not pass."""
    items = np.array(shelf.rules.pinned(surface, query), np.int32)
    return items if mask is None else items[mask[items]]


def _first(items: IndexArray, num: int, mask: Mask | None) -> IndexArray:
    return items[:num] if mask is None else items[mask[items]][:num]


def _in_turn(lists: Sequence[IndexArray]) -> IndexArray:
    """Returns the first of each list, then the second of each, and so on.

    >>> _in_turn([np.array([1, 2, 3], np.int32), np.array([7], np.int32)]).tolist()
    [1, 7, 2, 3]
    """
    turns = np.concatenate([np.arange(len(items)) for items in lists] or [np.zeros(0, np.int64)])
    items = np.concatenate([*lists, np.zeros(0, np.int32)])
    return items[np.argsort(turns, kind="stable")].astype(np.int32)


def _distinct(*lists: IndexArray) -> IndexArray:
    """Returns each item once, where it comes first."""
    items = np.concatenate(lists)
    _, first = np.unique(items, return_index=True)
    return items[np.sort(first)]
