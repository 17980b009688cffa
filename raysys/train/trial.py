"""One trial of a selection: trains with its own hyperparameters and scores itself.

    Trials, values -> run_trial() -> Look: output and score, once at its end, or more often

It runs in one process, on all users that trials may read, whatever `train.num_workers` says: trials
beside each other use a cluster better than workers of one trial would. Under privacy the score gets
its noise here, before it leaves the process that computed it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from raysys.config import Config, with_values
from raysys.ingest.example_set import ExampleSet, map_examples
from raysys.ingest.features import FloatArray, IndexArray
from raysys.ingest.pipeline import examples_path, trial_examples_path
from raysys.ledger.records import PrivacySpend, SelectionSpend
from raysys.model.adapter import activations_cut
from raysys.model.encoder import TokenActivations, cache_folder, load_cached
from raysys.model.scorer import Head
from raysys.privacy.plan import PrivacyPlan
from raysys.privacy.selection import noise_score
from raysys.storage import Root
from raysys.train.checkpoint import Checkpoint, Checkpoints
from raysys.train.group import group_of_one
from raysys.train.loop import Trained, TrainJob, train_on_shards
from raysys.train.output import TrainOutput, read_output, require_reloads, write_output


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trials:
    """What all trials of a selection share."""

    config: Config
    selection: SelectionSpend | None
    """None without privacy."""
    spend: PrivacySpend
    """Steps of each trial; those with other noise than this draw it."""
    head: Head
    """Of the previous version."""
    adapted_weights: Mapping[str, FloatArray] | None
    texts: list[str]
    text_of_item: IndexArray
    seed: int
    root: Root
    update_id: str
    num_shards: int
    own_users: bool
    """Whether trials read other users than the update trains on."""
    score: Callable[[TrainOutput], float]
    """Of L2 sensitivity 1."""

    def config_of(self, values: Mapping[str, object]) -> Config:
        """Returns the config of a trial."""
        return with_values(self.config, values)

    def job(self, values: Mapping[str, object]) -> TrainJob:
        """Returns the job of a trial."""
        config = self.config_of(values)
        plan = plan_steps(config, self.spend, values)
        assert self.selection is None or plan.spend.noise_multiplier >= (
            self.selection.noise_multiplier
        ), "the least noise of the space is what is charged"
        return TrainJob.of(
            config,
            plan,
            head=self.head,
            adapted_weights=self.adapted_weights,
            text_of_item=self.text_of_item,
            seed=self.seed,
        )


def plan_steps(config: Config, spend: PrivacySpend, values: Mapping[str, object]) -> PrivacyPlan:
    """Returns the plan of training with hyperparameters that were drawn: their noise, if any."""
    noise = float(str(values.get("privacy.noise_multiplier", spend.noise_multiplier)))
    return PrivacyPlan.of(config.privacy, dataclasses.replace(spend, noise_multiplier=noise))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """A trial as it stands after some of its steps. Sensitive, unless it is the best one's end."""

    num_steps: int
    output: TrainOutput
    score: float
    """With noise under privacy."""
    checkpoint: Checkpoint
    """To go on from."""


def run_trial(
    trials: Trials,
    values: Mapping[str, object],
    *,
    every: int | None = None,
    start: Checkpoint | None = None,
) -> Iterator[Look]:
    """Runs a trial of these hyperparameters.

    Args:
      every: Steps between two looks; None looks at the end alone, as it must be under privacy:
        a look that is not charged may decide nothing.
      start: Where to go on from.

    Raises:
      RaysysError: Training failed, as its subclass says.
    """
    assert every is None or trials.selection is None, "an intermediate score is not charged"
    job, held = trials.job(values), _Held(start)
    path = trial_examples_path if trials.own_users else examples_path
    shards = [
        map_examples(trials.root, path(trials.update_id, shard))
        for shard in range(trials.num_shards)
    ]
    cut = activations_cut(job.model, job.adapted_weights or ())
    folder = cache_folder(job.model.encoder, job.model.max_tokens, cut)
    activations = load_cached(trials.root, folder).select(trials.texts)
    num_steps = trials.spend.num_steps
    while held.latest() < num_steps:
        until = min(held.latest() + (every or num_steps), num_steps)
        trained = _train(job, shards, activations, held, until)
        with tempfile.TemporaryDirectory() as directory:
            write_output(Path(directory), trained, encoder=job.model.encoder)
            require_reloads(Path(directory), trained, job, activations)
            output = read_output(Path(directory))
        score = trials.score(output)
        if trials.selection is not None:
            score = noise_score(score, trials.selection)
        yield Look(num_steps=until, output=output, score=score, checkpoint=held.load(held.latest()))


def _train(
    job: TrainJob,
    shards: list[ExampleSet],
    activations: TokenActivations,
    held: _Held,
    until: int,
) -> Trained:
    with group_of_one():
        return train_on_shards(
            job,
            shards,
            activations,
            num_workers=1,
            on_step=lambda step: None,
            next_steps=lambda done: range(done, until),
            checkpoints=held,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )


class _Held(Checkpoints):
    """The newest checkpoint of a trial, in memory."""

    def __init__(self, start: Checkpoint | None) -> None:
        self._held = start

    def save(self, checkpoint: Checkpoint) -> None:
        self._held = checkpoint

    def latest(self) -> int:
        return self._held.num_steps if self._held else 0

    def load(self, num_steps: int) -> Checkpoint:
        assert self._held is not None and self._held.num_steps == num_steps
        return self._held
