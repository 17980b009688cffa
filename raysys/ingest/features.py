"""What the ranker knows about a user and an item besides text: one function for all times.

    UserHistory x ItemTable x candidates x now -> features() -> (num_candidates, NUM_FEATURES)

Ingest calls it for training examples, evaluation for held-out users and the replica for live
requests, so training and serving cannot differ. Nothing here looks past `now`. Scales are fixed
constants: a scale fitted to data would leak and would not carry to another shop.

Shape suffixes: K = candidates, H = distinct items in a history, N = items of the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DAY_S = 86_400.0

FEATURE_NAMES = (
    "own_decayed_count",
    "own_count",
    "own_bought",
    "own_recency_week",
    "own_recency_month",
    "own_share",
    "own_cycle",
    "own_cycle_known",
    "popularity",
    "trend",
    "price",
    "price_known",
    "category_share",
    "category_count",
    "brand_share",
    "has_history",
)
NUM_FEATURES = len(FEATURE_NAMES)

FloatArray = NDArray[np.float32]
IndexArray = NDArray[np.int32]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UserHistory:
    """What one user did before `as_of`, one row for each distinct item, sorted by item index."""

    items: IndexArray
    """(H,) indexes into the item table."""
    count: NDArray[np.float64]
    """(H,) outcomes, each weighted by its gain over the largest gain."""
    decayed: NDArray[np.float64]
    """(H,) the same, halved every half-life, as of `as_of`."""
    first_ts: NDArray[np.float64]
    last_ts: NDArray[np.float64]
    as_of: float
    """UNIX seconds."""

    @classmethod
    def empty(cls) -> UserHistory:
        """The history of a user of whom nothing is known."""
        none = np.zeros(0, np.float64)
        return cls(items=np.zeros(0, np.int32), count=none, decayed=none, first_ts=none,
                   last_ts=none, as_of=0.0)  # fmt: skip

    def extend(
        self,
        items: IndexArray,
        times: NDArray[np.float64],
        weights: NDArray[np.float64],
        *,
        as_of: float,
        half_life_s: float,
    ) -> UserHistory:
        """Returns the history after further events, all of them at or before `as_of`."""
        unique, place = np.unique(np.concatenate([self.items, items]), return_inverse=True)
        old_decayed = self.decayed * _decay(as_of - self.as_of, half_life_s)
        new_decayed = weights * _decay(as_of - times, half_life_s)
        first, last = np.full(len(unique), np.inf), np.full(len(unique), -np.inf)
        np.minimum.at(first, place, np.concatenate([self.first_ts, times]))
        np.maximum.at(last, place, np.concatenate([self.last_ts, times]))
        return UserHistory(
            items=unique.astype(np.int32),
            count=_sums(place, np.concatenate([self.count, weights]), len(unique)),
            decayed=_sums(place, np.concatenate([old_decayed, new_decayed]), len(unique)),
            first_ts=first,
            last_ts=last,
            as_of=as_of,
        )

    def most_recent(self, max_items: int) -> UserHistory:
        """Returns the `max_items` items bought last."""
        if len(self.items) <= max_items:
            return self
        keep = np.sort(np.argsort(-self.last_ts, kind="stable")[:max_items])
        return UserHistory(
            items=self.items[keep], count=self.count[keep], decayed=self.decayed[keep],
            first_ts=self.first_ts[keep], last_ts=self.last_ts[keep], as_of=self.as_of,
        )  # fmt: skip

    def attention(self, max_items: int) -> tuple[IndexArray, FloatArray]:
        """Returns the items that stand for the user's taste in text, and weights that sum to 1."""
        top = np.argsort(-self.decayed, kind="stable")[:max_items]
        weights = self.decayed[top]
        total = weights.sum()
        return self.items[top], (weights / total if total > 0 else weights).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ItemTable:
    """The catalogue as the ranker sees it. Indexes never change from update to update."""

    ids: list[str]
    texts: list[str]
    category: IndexArray
    """(N,) codes; -1 where the shop gave none."""
    brand: IndexArray
    price: FloatArray
    """(N,) in the shop's currency; NaN where unknown."""
    popularity: FloatArray
    """(N,) noised decayed counts as of `as_of`, never negative."""
    trend: FloatArray
    """(N,) log ratio of the newest period to the average, in [-1, 1]; 0 where unknown."""
    as_of: float
    half_life_s: float
    category_names: tuple[str, ...] = ()
    """By code."""
    brand_names: tuple[str, ...] = ()
    _index: dict[str, int] | None = dataclasses.field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def index_of(self, item_id: str) -> int | None:
        """Returns the item's index, None if the catalogue has no such item."""
        return self._lookup().get(item_id)

    def indexes_of(self, item_ids: Sequence[str]) -> IndexArray:
        """Returns the indexes of those items that the catalogue has."""
        found = map(self._lookup().get, item_ids)
        return np.array([i for i in found if i is not None], np.int32)

    def published(self, items: IndexArray, now: float | NDArray[np.float64]) -> Published:
        """Returns what is public of these items at `now`, UNIX seconds."""
        elapsed = np.maximum(now - self.as_of, 0)
        popularity = self.popularity[items] * _decay(elapsed, self.half_life_s)
        return Published(popularity=popularity.astype(np.float32), trend=self.trend[items])

    def _lookup(self) -> dict[str, int]:
        # Made on first use: most tables of an update never look an id up.
        if self._index is None:
            made = {item_id: i for i, item_id in enumerate(self.ids)}
            object.__setattr__(self, "_index", made)
            return made
        return self._index


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Item statistics as of one request: they change, so what waits for its label keeps them."""

    popularity: FloatArray
    """(K,) decayed to the request."""
    trend: FloatArray
    """(K,)."""


def features(
    history: UserHistory,
    items: ItemTable,
    candidates: IndexArray,
    *,
    now: float,
    published: Published | None = None,
) -> FloatArray:
    """Returns `FEATURE_NAMES` for each candidate, (K, NUM_FEATURES).

    Args:
      history: The user's events before `now`.
      candidates: (K,) indexes into `items`.
      now: UNIX seconds of the request.
      published: What was public at `now`, where `items` is of another time.
    """
    out = np.zeros((len(candidates), NUM_FEATURES), np.float32)
    _item_features(out, items, candidates, published or items.published(candidates, now))
    if len(history.items):
        _own_features(out, history, items, candidates, now)
    return out


def _item_features(
    out: FloatArray, items: ItemTable, candidates: IndexArray, published: Published
) -> None:
    out[:, 8] = np.log1p(published.popularity) / 4
    out[:, 9] = published.trend
    price = items.price[candidates]
    known = np.isfinite(price) & (price > 0)
    out[:, 10] = np.where(known, np.log1p(np.where(known, price, 0)) / 4, 0)
    out[:, 11] = known


def _own_features(
    out: FloatArray, history: UserHistory, items: ItemTable, candidates: IndexArray, now: float
) -> None:
    decay = _decay(max(now - history.as_of, 0), items.half_life_s)
    decayed = history.decayed * decay
    total = decayed.sum() + 1e-9
    out[:, 15] = 1.0
    for column, codes in ((12, items.category), (14, items.brand)):
        mine, theirs = codes[history.items], codes[candidates]
        # As many as these items need: a look at all codes of a large catalogue would cost more.
        by_code = np.bincount(mine + 1, decayed, theirs.max(initial=-1) + 2)
        by_code[0] = 0.0  # code -1 is "unknown", which is not a shared taste
        out[:, column] = by_code[theirs + 1] / total
        if column == 12:
            out[:, 13] = np.log1p(by_code[theirs + 1]) / 2

    place = np.minimum(np.searchsorted(history.items, candidates), len(history.items) - 1)
    bought = history.items[place] == candidates
    place = place[bought]
    age_days = np.maximum(now - history.last_ts[place], 0) / DAY_S
    out[bought, 0] = np.log1p(decayed[place])
    out[bought, 1] = np.log1p(history.count[place]) / 2
    out[bought, 2] = 1.0
    out[bought, 3] = np.exp(-age_days / 7)
    out[bought, 4] = np.exp(-age_days / 28)
    out[bought, 5] = decayed[place] / total
    span_days = (history.last_ts[place] - history.first_ts[place]) / DAY_S
    repeated = span_days > 0.5
    interval_days = span_days / np.maximum(history.count[place] - 1, 1)
    cycle = np.minimum(age_days / np.maximum(interval_days, 1), 3) / 3
    out[bought, 6] = np.where(repeated, cycle, 0)
    out[bought, 7] = repeated


def _decay(elapsed_s: float | NDArray[np.float64], half_life_s: float) -> NDArray[np.float64]:
    return np.exp2(-np.asarray(elapsed_s, np.float64) / half_life_s)


def _sums(place: NDArray[np.int64], values: NDArray[np.float64], num: int) -> NDArray[np.float64]:
    out: NDArray[np.float64] = np.bincount(place, values, num).astype(np.float64)
    return out
