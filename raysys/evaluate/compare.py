"""Scores the evaluation window with the previous and the new weights, on the same features.

    cases below staging/ --map--> metrics of each user --driver--> Comparison -> gate

The window is scored as of its beginning. Held-out users are never trained on, so before and after
are compared on them. The previous version is also scored on all users, before the new one has
seen the window: the prequential figure. Features are the same on both sides, so the difference is
that of the weights alone.

Shape suffixes: N = items, M = distinct texts, d = width of the encoder.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from raysys.config import EvaluateConfig
from raysys.evaluate.metrics import (
    METRIC_NAMES,
    Comparison,
    Interval,
    bootstrap_mean,
    ranking_metrics,
)
from raysys.ingest.cases import Case, read_cases
from raysys.ingest.example_set import NUM_ATTENDED
from raysys.ingest.features import FloatArray, IndexArray, ItemTable, features
from raysys.ingest.pipeline import cases_path
from raysys.model.scorer import Head, head_inputs, pool_history
from raysys.storage import Root


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What of a version matters to evaluation."""

    head: Head
    text: FloatArray
    """(M, d) normalised embeddings."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Arms:
    items: ItemTable
    text_of_item: IndexArray
    before: Weights
    after: Weights


def compare(
    root: Root,
    update_id: str,
    *,
    items: ItemTable,
    text_of_item: IndexArray,
    before: Weights,
    after: Weights,
    config: EvaluateConfig,
    num_shards: int,
) -> Comparison:
    """Compares two sets of weights on the update's evaluation window, all items as candidates.

    Args:
      items: The item statistics that were public when the window began.
      text_of_item: (N,) index of each item's text.
    """
    arms = ray.put(_Arms(items=items, text_of_item=text_of_item, before=before, after=after))
    rows = [{"shard": shard} for shard in range(num_shards)]
    evaluate = functools.partial(
        _evaluate_shard,
        root=root,
        update_id=update_id,
        arms=arms,
        max_users=-(-config.max_users // num_shards),
    )
    dataset = ray.data.from_items(rows, override_num_blocks=num_shards)
    taken = dataset.map(evaluate, num_cpus=0.5).take_all()
    return _summarise(
        np.concatenate([row["prequential"] for row in taken]),
        np.concatenate([row["holdout"] for row in taken]),
        config.num_bootstrap,
    )


def _score_all(
    case: Case, text_of_item: IndexArray, weights: Weights, shared: FloatArray
) -> FloatArray:
    """Returns a score for every item of the table, (N,)."""
    attended, attention = case.history.attention(NUM_ATTENDED)
    pooled = pool_history(weights.text[text_of_item[attended]], attention)
    by_history = None if pooled is None else (weights.text @ pooled)[text_of_item]
    return weights.head.score(head_inputs(shared, by_history, None))


def _evaluate_shard(
    row: dict[str, Any], root: Root, update_id: str, arms: ray.ObjectRef[_Arms], max_users: int
) -> dict[str, Any]:
    held = ray.get(arms)
    cases = list(read_cases(root.read_bytes(cases_path(update_id, row["shard"]))))
    # Held-out users first: the comparison needs all of them, the prequential figure a sample.
    cases = sorted(cases, key=lambda case: not case.held_out)[:max_users]
    prequential, holdout = [], []
    everything = np.arange(len(held.items), dtype=np.int32)
    for case in cases:
        shared = features(case.history, held.items, everything, now=case.now)
        old = _measure(case, held, held.before, shared)
        prequential.append(old)
        if case.held_out:
            holdout.append((old, _measure(case, held, held.after, shared)))
    num = len(METRIC_NAMES)
    return {
        "prequential": np.array(prequential, np.float64).reshape(-1, num),
        "holdout": np.array(holdout, np.float64).reshape(-1, 2, num),
    }


def _measure(
    case: Case, arms: _Arms, weights: Weights, shared: FloatArray
) -> tuple[float, float, float]:
    scores = _score_all(case, arms.text_of_item, weights, shared)
    return ranking_metrics(scores, case.positives, case.gains)


def _summarise(
    prequential: NDArray[np.float64], holdout: NDArray[np.float64], num_resamples: int
) -> Comparison:
    def intervals(values: NDArray[np.float64]) -> dict[str, Interval]:
        return {
            name: bootstrap_mean(values[:, i], num_resamples=num_resamples)
            for i, name in enumerate(METRIC_NAMES)
        }

    before, after = holdout[:, 0], holdout[:, 1]
    return Comparison(
        num_holdout_users=len(holdout),
        before=intervals(before),
        after=intervals(after),
        difference=intervals(after - before),
        num_prequential_users=len(prequential),
        prequential=intervals(prequential),
    )
