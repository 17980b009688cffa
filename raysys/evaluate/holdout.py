"""The score of a selection's trial: how well it ranks for the held-out users of the window.

    cases below staging/ + a trial's weights -> holdout_ndcg10_sum() -> train.tune adds the noise

A sum over users, each scored by themselves, so that one user moves it by no more than 1: no cap on
how many are scored, no mean over their number.
"""

from __future__ import annotations

import numpy as np

from raysys.evaluate.compare import Weights, _score_all
from raysys.evaluate.metrics import ranking_metrics
from raysys.ingest.cases import read_cases
from raysys.ingest.features import IndexArray, ItemTable, features
from raysys.ingest.pipeline import cases_path
from raysys.storage import Root


def holdout_ndcg10_sum(
    weights: Weights,
    *,
    root: Root,
    update_id: str,
    items: ItemTable,
    text_of_item: IndexArray,
    num_shards: int,
) -> float:
    """Returns the sum of NDCG@10 over held-out users, all items as candidates.

    Its L2 sensitivity is 1: a user adds between 0 and 1. Sensitive: noise it before it leaves.
    """
    everything, total = np.arange(len(items), dtype=np.int32), 0.0
    for shard in range(num_shards):
        for case in read_cases(root.read_bytes(cases_path(update_id, shard))):
            if case.held_out:
                shared = features(case.history, items, everything, now=case.now)
                scores = _score_all(case, text_of_item, weights, shared)
                total += ranking_metrics(scores, case.positives, case.gains)[0]
    return total
