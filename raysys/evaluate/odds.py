"""What calibration needs of each held-out user: how often, and at which scores, an event happens.

    scores of a case (evaluation has them already) -> Odds, one row a user -> private | platt

Two events: an outcome of what was shown (`shown`), of logged requests without a query, and that an
item is taken in the window (`taken`), of all items. A case is of one of them. Scores count as
offsets from a public centre, in bins. A user weighs the same however many candidates there were:
rates, not counts.

Shape suffixes: U = users, E = events, K = candidates of a user, B = bins, M = nodes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.evaluate.calibrate import Event
from raysys.evaluate.estimate import Array
from raysys.ingest.cases import Case
from raysys.ingest.features import FloatArray

EVENTS: tuple[Event, ...] = ("shown", "taken")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bins:
    """Where scores are counted, as offsets from the centre; what is beyond counts at the ends."""

    edges: Array
    """(B + 1,) rising."""
    num_nodes: int
    """Points that stand for one bin."""

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def middles(self) -> Array:
        """(B,)."""
        return (self.edges[:-1] + self.edges[1:]) / 2

    @property
    def nodes(self) -> Array:
        """(M,) offsets that stand for the bins, `num_nodes` for each."""
        middles = (np.arange(self.num_nodes) + 0.5) / self.num_nodes
        nodes: Array = self.edges[:-1, None] + np.diff(self.edges)[:, None] * middles
        return nodes.reshape(-1)

    def count(self, offsets: Array) -> Array:
        """Returns how many of (K,) offsets are in each bin, (B,)."""
        place = np.searchsorted(self.edges[1:-1], offsets, side="right")
        return np.bincount(place, minlength=len(self)).astype(np.float64)

    def clip(self, offsets: Array) -> Array:
        """Returns offsets no further than the ends, (K,)."""
        clipped: Array = np.clip(offsets, self.edges[0], self.edges[-1])
        return clipped

    def spread(self, masses: Array) -> Array:
        """Returns the mass of each node, (M,), from that of the bins, (B,).

        Within a bin the mass falls by e with each unit away from the centre, as log odds of rare
        events do: spread evenly, a wide bin's far end would count for most of its odds.
        """
        weight = np.exp(-np.abs(self.nodes)).reshape(len(masses), self.num_nodes)
        shares: Array = weight / weight.sum(axis=1, keepdims=True)
        return (masses[:, None] * shares).reshape(-1)


FINE = Bins(edges=np.linspace(-40.0, 40.0, 801), num_nodes=1)
COARSE = Bins(
    edges=np.array([-4.5, -1.5, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.5, 8.5, 12.0]), num_nodes=8
)
"""For sums that are noised. Few, since the noise of each counts; narrow where positives score."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Odds:
    """One row a case; zeros where it is not of the event, or a score is not finite."""

    is_fitted: NDArray[np.bool_]
    """(U, E)."""
    num_pairs: Array
    """(U, E) candidates."""
    rate: Array
    """(U, E) share of the candidates that are positives."""
    lift: Array
    """(U, E) sum of the positives' offsets over the number of candidates."""
    candidates: Array
    """(U, E, B) share of the candidates in each bin."""
    positives: Array
    """(U, E, B) share of the candidates that are positives in each bin."""

    @classmethod
    def empty(cls, num_users: int, bins: Bins) -> Odds:
        """Rows to be filled."""
        shape = (num_users, len(EVENTS))
        return cls(
            is_fitted=np.zeros(shape, bool),
            num_pairs=np.zeros(shape),
            rate=np.zeros(shape),
            lift=np.zeros(shape),
            candidates=np.zeros((*shape, len(bins))),
            positives=np.zeros((*shape, len(bins))),
        )

    def __getitem__(self, rows: Any) -> Odds:
        """Returns some of the users' rows."""
        return Odds(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})

    def set_taken(
        self, user: int, case: Case, scores: FloatArray, center: float, bins: Bins
    ) -> None:
        """Fills a user's row from the scores of all items, (N,)."""
        is_taken = np.zeros(len(scores), bool)
        is_taken[case.positives] = True
        self._set(user, "taken", scores.astype(np.float64) - center, is_taken, bins)

    def set_shown(
        self, user: int, case: Case, scores: FloatArray, center: float, bins: Bins
    ) -> None:
        """Fills a user's row from the scores of `case.shown`."""
        offsets = scores.astype(np.float64) - center
        self._set(user, "shown", offsets, case.shown_positive, bins)

    def _set(
        self, user: int, event: Event, offsets: Array, is_positive: NDArray[np.bool_], bins: Bins
    ) -> None:
        if not np.isfinite(offsets).all():
            return
        at, num = (user, EVENTS.index(event)), len(offsets)
        self.is_fitted[at] = True
        self.num_pairs[at] = num
        self.rate[at] = is_positive.mean()
        self.lift[at] = bins.clip(offsets[is_positive]).sum() / num
        self.candidates[at] = bins.count(offsets) / num
        self.positives[at] = bins.count(offsets[is_positive]) / num

    def totals(self, users: NDArray[np.bool_]) -> Array:
        """Returns sums over these users, (E, 4 + 2 B): number, pairs, rate, lift, shares."""
        columns = (self.is_fitted, self.num_pairs, self.rate, self.lift)
        plain = np.stack([column[users].sum(axis=0) for column in columns], axis=1)
        shares = [part[users].sum(axis=0) for part in (self.candidates, self.positives)]
        return np.concatenate([plain, *shares], axis=1)
