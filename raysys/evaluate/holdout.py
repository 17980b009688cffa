"""The score of a selection's trial: how much better it ranks for half of the held-out users.

    cases below staging/ + a trial's weights -> holdout_gain() -> train.trial adds the noise

A sum over users of each one's change of NDCG@10 against the previous version, clipped: what one
user can move is the clip, ten times less than with NDCG@10 itself, and so is the noise. No cap on
how many users are scored and no mean over their number, which would let one user move others. The
other half judges the winner: the best of several is best by luck too, on those who chose it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from raysys.evaluate.compare import Weights, _score_all
from raysys.evaluate.metrics import ranking_metrics
from raysys.ingest.cases import Case, read_cases
from raysys.ingest.features import IndexArray, ItemTable, features
from raysys.ingest.pipeline import cases_path
from raysys.model.scorer import Head
from raysys.storage import Root
from raysys.train.output import TrainOutput


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HoldoutScore:
    """Scores trials of one update."""

    root: Root
    update_id: str
    num_shards: int
    items: ItemTable
    """The item statistics that were public when the window began."""
    text_of_item: IndexArray
    head: Head
    """Of the previous version."""
    max_difference: float

    def __call__(self, trained: TrainOutput) -> float:
        """Returns the score of a trial, of L2 sensitivity 1.

        Sensitive: noise it before it leaves.
        """
        before = Weights(head=self.head, text=trained.text_before)
        after, total = Weights(head=trained.head, text=trained.text_after), 0.0
        for shard in range(self.num_shards):
            for case in read_cases(self.root.read_bytes(cases_path(self.update_id, shard))):
                if case.scores_trials:
                    total += self._change(case, before, after)
        return total

    def _change(self, case: Case, before: Weights, after: Weights) -> float:
        """Returns one user's change of NDCG@10, in units of the clip, within [-1, 1]."""
        everything = np.arange(len(self.items), dtype=np.int32)
        shared = features(case.history, self.items, everything, now=case.now)
        old, new = (
            ranking_metrics(
                _score_all(case, self.text_of_item, weights, shared), case.positives, case.gains
            )[0]
            for weights in (before, after)
        )
        return float(np.clip((new - old) / self.max_difference, -1, 1))
