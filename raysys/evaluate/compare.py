"""Scores the evaluation window with the previous and the new weights, on the same features.

    cases below staging/ --map--> metrics of each user --driver--> Comparison -> gate
    with evaluate.private: --map--> sums over users --driver--> + noise -> Comparison -> gate

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
from raysys.evaluate.calibrate import center_of, finite
from raysys.evaluate.metrics import (
    METRIC_NAMES,
    Comparison,
    Interval,
    bootstrap_mean,
    place_metrics,
    places,
    ranking_metrics,
    share_below,
)
from raysys.evaluate.odds import Bins, Odds
from raysys.evaluate.platt import fit_halves
from raysys.evaluate.private import KNOTS, Figures, Release, auc_masses, bins_of
from raysys.ingest.cases import Case, read_cases
from raysys.ingest.example_set import NUM_ATTENDED
from raysys.ingest.features import FloatArray, IndexArray, ItemTable, UserHistory, features
from raysys.ingest.pipeline import cases_path
from raysys.ingest.tasks import run_tasks
from raysys.model.scorer import Head, head_inputs, pool_history
from raysys.storage import Root


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What of a version matters to evaluation."""

    head: Head
    text: FloatArray
    """(M, d) normalised embeddings."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arms:
    """The two sets of weights and what both are judged on."""

    items: ItemTable
    text_of_item: IndexArray
    before: Weights
    after: Weights

    def reference(self) -> FloatArray:
        """Returns the new weights' scores of all items for a user of whom nothing is known, (N,).

        Public, as the weights and the item statistics are.
        """
        everything = np.arange(len(self.items), dtype=np.int32)
        nobody = features(UserHistory.empty(), self.items, everything, now=self.items.as_of)
        return self.after.head.score(head_inputs(nobody, None, None))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How scores are counted for calibration."""

    center: float
    bins: Bins


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
    after_trials: bool = False,
    logs_impressions: bool = False,
) -> Comparison:
    """Compares two sets of weights on the update's evaluation window, all items as candidates.

    The scores of the new weights are also what they are calibrated by.

    Args:
      items: The item statistics that were public when the window began.
      text_of_item: (N,) index of each item's text.
      after_trials: Leaves out the users who chose the weights: see `Case.scores_trials`.
      logs_impressions: Whether a private calibration is of what is shown; another finds out.
    """
    arms = Arms(items=items, text_of_item=text_of_item, before=before, after=after)
    reference = arms.reference()
    scale = Scale(center=center_of(reference), bins=bins_of(config))
    release = Release.of(config, "shown" if logs_impressions else "taken", len(items))
    evaluate = functools.partial(
        _evaluate_shard,
        root=root,
        update_id=update_id,
        arms=ray.put(arms),
        scale=scale,
        release=release if config.private else None,
        config=config,
        num_shards=num_shards,
        after_trials=after_trials,
    )
    taken = run_tasks(evaluate, range(num_shards), num_cpus=0.5)
    if config.private:
        total = np.sum([answer["total"] for answer in taken], axis=0)
        # Once, here: a task may run again, and would draw other noise for the same sums.
        noised = release.noise(total)
        public = scale.bins.count(finite(reference) - scale.center) / len(reference)
        fitted = release.fit(noised, scale.center, public)
        return dataclasses.replace(release.comparison(noised), calibration=fitted)
    num = len(METRIC_NAMES)
    compared = _summarise(
        np.concatenate([np.reshape(answer["prequential"], (-1, num)) for answer in taken]),
        np.concatenate([np.reshape(answer["holdout"], (-1, 2, num)) for answer in taken]),
        config.num_bootstrap,
    )
    halves = np.sum([answer["odds"] for answer in taken], axis=0)
    return dataclasses.replace(compared, calibration=fit_halves(halves, scale.center, len(items)))


def _score_all(
    case: Case, text_of_item: IndexArray, weights: Weights, shared: FloatArray
) -> FloatArray:
    """Returns a score for every item of the table, (N,)."""
    pooled = _pooled(case, text_of_item, weights)
    by_history = None if pooled is None else (weights.text @ pooled)[text_of_item]
    return weights.head.score(head_inputs(shared, by_history, None))


def _score_shown(case: Case, arms: Arms) -> FloatArray:
    """Returns the new weights' scores of what was shown."""
    shared = features(case.history, arms.items, case.shown, now=case.now)
    pooled = _pooled(case, arms.text_of_item, arms.after)
    text = arms.after.text[arms.text_of_item[case.shown]]
    return arms.after.head.score(
        head_inputs(shared, None if pooled is None else text @ pooled, None)
    )


def _pooled(case: Case, text_of_item: IndexArray, weights: Weights) -> FloatArray | None:
    attended, attention = case.history.attention(NUM_ATTENDED)
    return pool_history(weights.text[text_of_item[attended]], attention)


def _evaluate_shard(
    shard: int,
    root: Root,
    update_id: str,
    arms: ray.ObjectRef[Arms],
    scale: Scale,
    release: Release | None,
    config: EvaluateConfig,
    num_shards: int,
    after_trials: bool,
) -> dict[str, Any]:
    stored = read_cases(root.read_bytes(cases_path(update_id, shard)))
    cases = chosen(list(stored), config, num_shards, after_trials)
    figures = measure(cases, ray.get(arms), scale)
    if release is not None:
        return {"total": release.total(figures).tolist()}
    both = np.stack([figures.before, figures.after], axis=1)
    half = np.array([case.half for case in cases], np.int64)
    return {
        "prequential": figures.before[figures.is_ranked].tolist(),
        "holdout": both[figures.held_out & figures.is_ranked].tolist(),
        "odds": [figures.odds.totals(half == which).tolist() for which in (0, 1)],
    }


def chosen(
    cases: list[Case], config: EvaluateConfig, num_shards: int, after_trials: bool = False
) -> list[Case]:
    """Returns the cases of a shard that are scored."""
    if after_trials:
        cases = [case for case in cases if not case.user_scores_trials]
    if config.private:
        return [case for case in cases if case.draw < config.sample_fraction]
    most = -(-config.max_users // num_shards)
    # Held-out users first: the comparison needs all of them, the prequential figure a sample.
    ranked = sorted((case for case in cases if case.is_ranked), key=lambda case: not case.held_out)
    return ranked[:most] + [case for case in cases if not case.is_ranked][:most]


def measure(cases: list[Case], arms: Arms, scale: Scale) -> Figures:
    """Scores each case with the previous weights, and held-out ones with the new ones too."""
    num, everything = len(cases), np.arange(len(arms.items), dtype=np.int32)
    before = np.zeros((num, len(METRIC_NAMES)))
    after, masses = before.copy(), np.zeros((num, len(KNOTS)))
    odds = Odds.empty(num, scale.bins)
    for i, case in enumerate(cases):
        if not case.is_ranked:
            odds.set_shown(i, case, _score_shown(case, arms), scale.center, scale.bins)
            continue
        shared = features(case.history, arms.items, everything, now=case.now)
        scores = _score_all(case, arms.text_of_item, arms.before, shared)
        found = places(scores, case.positives)
        before[i] = place_metrics(found, case.gains, len(scores))
        masses[i] = auc_masses(share_below(found, len(scores)))
        if case.held_out:
            scores = _score_all(case, arms.text_of_item, arms.after, shared)
            after[i] = ranking_metrics(scores, case.positives, case.gains)
            odds.set_taken(i, case, scores, scale.center, scale.bins)
    is_ranked = np.array([case.is_ranked for case in cases], bool)
    held_out = np.array([case.held_out for case in cases], bool)
    return Figures(
        held_out=held_out, is_ranked=is_ranked, before=before, after=after, masses=masses, odds=odds
    )


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
