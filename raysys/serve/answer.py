"""Ranks what was selected with one version, and writes the answer.

    Task x version -> choose -> score -> probabilities -> rules -> Ranking -> JSON bytes

The JSON is written from columns at once: models of a hundred items, made only to be written and
checked again, would cost a request more than its scores do.

Shape suffixes: K = candidates, R = items shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from raysys.ingest.features import FloatArray, IndexArray, UserHistory
from raysys.partitions.schema import Surface
from raysys.serve.candidates import Chosen, Selection
from raysys.serve.ranker import InvalidScoresError, Servable, score
from raysys.serve.rules import Touched
from raysys.serve.shelf import Shelf


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a request wants, whichever version answers it."""

    selection: Selection
    surface: Surface
    query: str | None = None
    k: int | None = None
    """Items to show; None for all."""
    explain: bool = False
    when: float
    """UNIX seconds of the request."""
    user: str
    """Raw id, or a name that no user has."""
    history: Sequence[str] | None = None
    """Items to take for the user's history."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """What is shown, in its order: columns of R items each."""

    version: str
    item_ids: Sequence[str] = ()
    scores: Sequence[float] = ()
    probabilities: Sequence[float] = ()
    bids: Sequence[float] | None = None
    expected_values: Sequence[float] | None = None
    parts: Sequence[dict[str, float]] | None = None
    """What each score is made of, where that was asked for."""
    rules: Sequence[Sequence[str]] | None = None
    unknown: Sequence[str] = ()
    num_below_reserve: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Scored:
    """Candidates with what they are ranked by, columns of K each."""

    items: IndexArray
    scores: FloatArray
    chances: FloatArray
    bids: NDArray[np.float64] | None

    @property
    def worth(self) -> NDArray[np.float64] | None:
        return None if self.bids is None else self.chances.astype(np.float64) * self.bids

    def take(self, places: NDArray[np.int64]) -> _Scored:
        bids = None if self.bids is None else self.bids[places]
        return _Scored(
            items=self.items[places],
            scores=self.scores[places],
            chances=self.chances[places],
            bids=bids,
        )


def rank_with(
    version: Servable,
    shelf: Shelf,
    task: Task,
    history: UserHistory,
    check: Callable[[Chosen], None],
) -> Ranking:
    """Returns what a version shows for a task.

    Args:
      check: Raises if what was chosen is not to be ranked.

    Raises:
      InvalidScoresError: Scores or probabilities are of another number, or not finite.
    """
    chosen = task.selection.choose(version, shelf, history, task.query, task.k or 0)
    check(chosen)
    scored, num_below = _at_reserve(_score(version, chosen, task, history), chosen.reserve)
    worth = scored.worth
    arranged = shelf.rules.arrange(
        task.surface, task.query, scored.items, scored.scores if worth is None else worth
    )
    shown = arranged.order[: task.k]
    columns = scored.take(shown)
    ids = version.items.ids
    ranking = Ranking(
        version=version.name,
        item_ids=[ids[item] for item in columns.items.tolist()],
        scores=(arranged.values[shown] if worth is None else columns.scores).tolist(),
        probabilities=columns.chances.tolist(),
        bids=None if columns.bids is None else columns.bids.tolist(),
        expected_values=None if worth is None else worth[shown].tolist(),
        unknown=chosen.unknown,
        num_below_reserve=num_below,
    )
    if not task.explain:
        return ranking
    return dataclasses.replace(
        ranking,
        parts=_parts(version, task, history, columns.items),
        rules=_labels(arranged.touched, shown),
    )


def _score(version: Servable, chosen: Chosen, task: Task, history: UserHistory) -> _Scored:
    if not len(chosen.items):
        none = np.zeros(0, np.float32)
        return _Scored(items=chosen.items, scores=none, chances=none, bids=chosen.bids)
    scores = score(version, history, chosen.items, task.when, task.query)
    chances = version.probabilities(scores)
    # Written so that a NaN fails.
    if chances.shape != scores.shape or not np.all((chances >= 0) & (chances <= 1)):
        raise InvalidScoresError(
            f"version {version.name} gave probabilities that are not in [0, 1]"
        )
    return _Scored(items=chosen.items, scores=scores, chances=chances, bids=chosen.bids)


def _at_reserve(scored: _Scored, reserve: float) -> tuple[_Scored, int]:
    """Returns those that reach the reserve, and how many do not."""
    worth = scored.worth
    if worth is None:
        return scored, 0
    reaching = np.flatnonzero(worth >= reserve)
    return scored.take(reaching), len(worth) - len(reaching)


def _parts(
    version: Servable, task: Task, history: UserHistory, items: IndexArray
) -> list[dict[str, float]]:
    if not len(items):
        return []
    parts = version.explain(history, items, now=task.when, query=task.query)
    if not all(np.isfinite(values).all() for values in parts.values()):
        raise InvalidScoresError(
            f"version {version.name} explains scores by parts that are not finite"
        )
    rows = zip(*(values.tolist() for values in parts.values()), strict=True)
    return [dict(zip(parts, row, strict=True)) for row in rows]


def _labels(touched: Touched, shown: NDArray[np.int64]) -> list[Sequence[str]]:
    return [touched.get(place, ()) for place in shown.tolist()]


def render(ranking: Ranking, request_id: str, *, names_unknown: bool) -> bytes:
    """Returns the answer as JSON: a model of `serve.schema`, field by field.

    Args:
      names_unknown: Whether the caller named candidates, and so is told which are unknown.
    """
    answer: dict[str, Any] = {
        "request_id": request_id,
        "version": ranking.version,
        "ranking": _items(ranking),
    }
    if names_unknown:
        answer["unknown_candidates"] = ranking.unknown
    if ranking.bids is not None:
        answer["num_below_reserve"] = ranking.num_below_reserve
    return to_json(answer)


def _items(ranking: Ranking) -> list[dict[str, Any]]:
    columns = zip(ranking.item_ids, ranking.scores, ranking.probabilities, strict=True)
    items: list[dict[str, Any]] = [
        {"item_id": item_id, "rank": rank, "score": score, "probability": probability}
        for rank, (item_id, score, probability) in enumerate(columns, 1)
    ]
    further: dict[str, Sequence[Any] | None] = {
        "bid": ranking.bids,
        "expected_value": ranking.expected_values,
        "explain": ranking.parts,
        "rules": ranking.rules,
    }
    for name, values in further.items():
        if values is not None:
            for item, value in zip(items, values, strict=True):
                item[name] = value
    return items
