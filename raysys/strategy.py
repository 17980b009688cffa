"""How an update comes by its new weights: by training once, or as the best of several trials.

    Strategy.charge -> UpdateStarted;  Ready -> Strategy.train -> Outcome -> compare, gate, publish

`update` trains once, `select` runs trials; the rest of an update is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from raysys.config import Config
from raysys.ingest.features import FloatArray, IndexArray
from raysys.ingest.pipeline import Ingested
from raysys.ledger.records import UpdateStarted
from raysys.model.scorer import Head
from raysys.privacy.plan import PrivacyPlan
from raysys.reserve import Charge
from raysys.storage import Root
from raysys.train.loop import TrainJob
from raysys.train.output import TrainOutput

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """All that training starts from."""

    config: Config
    root: Root
    started: UpdateStarted
    privacy: PrivacyPlan
    ingested: Ingested
    head: Head
    """Of the previous version."""
    adapted_weights: Mapping[str, FloatArray] | None
    texts: list[str]
    text_of_item: IndexArray
    on_progress: Progress

    def job(self, config: Config, privacy: PrivacyPlan) -> TrainJob:
        """Returns the job of training under this config and plan."""
        return TrainJob.of(
            config,
            privacy,
            head=self.head,
            adapted_weights=self.adapted_weights,
            text_of_item=self.text_of_item,
            seed=self.started.seed,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of training."""

    output: TrainOutput
    config: Config
    """With which it was trained."""
    num_steps: int
    """For which it was trained."""
    selected: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """Dotted config key -> what a selection chose."""
    metrics: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """Of the selection, kept beside those of the comparison."""
    after_trials: bool = False
    """Whether held-out users of `Case.scores_trials` chose it, and cannot judge it too."""
    tells_time: bool = True
    """False where the time that the update took would tell what must not be told."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """How an update comes by its new weights, and what that is charged."""

    train: Callable[[Ready], Outcome]
    charge: Charge = lambda state, spend, key_id: spend
