"""Runs the trials of a selection on Ray Tune and brings the best one back.

    Trials -> select() -> Winner

Under privacy the number of trials and their hyperparameters are drawn before the first one starts;
all run to their end whatever they come to, with no clock and no look at each other; and nothing
about them goes through Ray Tune, which only starts them: what they try and what they find passes
between them and the driver's `Vault`. Without privacy Ray Tune's schedulers and searches choose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pickle
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune

from raysys.errors import RaysysError
from raysys.partitions.layout import staging
from raysys.privacy.selection import draw_num_trials, draw_values
from raysys.train.hush import Silence, hush
from raysys.train.output import TrainOutput
from raysys.train.search import (
    look_every,
    read_checkpoint,
    scheduler_of,
    search_of,
    space_of,
    values_of,
    write_checkpoint,
)
from raysys.train.trainer import use_gpu
from raysys.train.trial import Look, Trials, run_trial
from raysys.train.vault import Result, Vault

VaultActor = Any
"""Handle of the actor that is a `Vault`: Ray's own type knows its methods only in part."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Winner:
    """The best trial."""

    values: Mapping[str, object]
    output: TrainOutput
    score: float
    """With noise under privacy."""


def select(trials: Trials) -> Winner:
    """Runs all trials and returns the best.

    Raises:
      TrialError: One failed. Nothing of the others is returned.
      ConfigError: A search needs a package that is not installed.
    """
    vault: VaultActor = ray.remote(Vault).options(num_cpus=0).remote()
    try:
        return (_select_privately if trials.selection else _select_openly)(trials, vault)
    finally:
        ray.kill(vault)


def _select_privately(trials: Trials, vault: VaultActor) -> Winner:
    assert trials.selection is not None
    rng = random.SystemRandom()
    num_trials = draw_num_trials(trials.selection, rng)
    draws = [draw_values(trials.config.tune.space, rng) for _ in range(num_trials)]
    ray.get(vault.fill.remote(draws))
    silence = Silence()
    try:
        with hush():
            tune.Tuner(
                _trainable(_private_trial, trials, vault),
                tune_config=tune.TuneConfig(
                    num_samples=num_trials,
                    max_concurrent_trials=trials.config.tune.max_concurrent,
                    # One process runs many trials, and one folder on its disk is enough for all.
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: "trial",
                ),
                run_config=tune.RunConfig(
                    name=f"selection-{trials.update_id}",
                    storage_path="trials",
                    storage_filesystem=silence.filesystem,
                    callbacks=list(silence.callbacks),
                    failure_config=tune.FailureConfig(max_failures=0, fail_fast=True),
                    verbose=0,
                ),
            ).fit()
    finally:
        silence.forget()
    return _winner(vault)


def _select_openly(trials: Trials, vault: VaultActor) -> Winner:
    config = trials.config.tune
    search = search_of(config, trials.seed)
    filesystem, base = trials.root.arrow()
    tune.Tuner(
        _trainable(_open_trial, trials, vault),
        param_space=space_of(config.space),
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=math.ceil(config.mean_trials),
            reuse_actors=True,
            search_alg=search,
            scheduler=scheduler_of(config, trials.spend.num_steps),
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=f"{base}/{staging(trials.update_id)}",
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=0, fail_fast=True),
            verbose=1,
        ),
    ).fit()
    return _winner(vault)


def _trainable(trial: Callable[..., None], trials: Trials, vault: VaultActor) -> Callable[..., Any]:
    given = tune.with_parameters(trial, trials=trials, vault=vault)
    resources: dict[str, float] = {"cpu": trials.config.tune.cpus_per_trial}
    if use_gpu(dataclasses.replace(trials.config.train, num_workers=1, min_workers=0)):
        resources["gpu"] = 1
    return tune.with_resources(given, resources)  # type: ignore[no-any-return]


def _private_trial(config: dict[str, Any], trials: Trials, vault: VaultActor) -> None:
    """Ray Tune gets to know that it ended, and nothing else."""
    with hush():
        values = ray.get(vault.draw.remote())
        if values is None:
            return
        with _failing_all(trials, values, vault):
            (end,) = run_trial(trials, values)
            _offer(end, values, vault)


def _open_trial(config: dict[str, Any], trials: Trials, vault: VaultActor) -> None:
    space, start = trials.config.tune.space, tune.get_checkpoint()
    every = None if trials.config.tune.scheduler == "fifo" else look_every(trials.spend.num_steps)
    values = values_of(config, space)
    with _failing_all(trials, values, vault):
        for look in run_trial(trials, values, every=every, start=start and read_checkpoint(start)):
            if look.num_steps == trials.spend.num_steps:
                _offer(look, values, vault)
            with tempfile.TemporaryDirectory() as folder:
                tune.report(
                    {"score": look.score, "step": look.num_steps},
                    checkpoint=write_checkpoint(look.checkpoint, Path(folder)),
                )


def _offer(end: Look, values: Mapping[str, object], vault: VaultActor) -> None:
    result = Result(values=values, output=pickle.dumps(end.output), score=end.score)
    ray.get(vault.offer.remote(result))


@contextlib.contextmanager
def _failing_all(trials: Trials, values: Mapping[str, object], vault: VaultActor) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        kind = type(error).__name__
        reason = f"{error}" if isinstance(error, RaysysError) else kind
        if trials.selection is None and reason == kind:
            reason = " ".join(f"{kind}: {error}".split())
        ray.get(vault.fail.remote(values, reason))
        # Ray Tune writes down and prints what a trial raises; under privacy it learns from the
        # vault that it is over.
        if trials.selection is None:
            raise


def _winner(vault: VaultActor) -> Winner:
    try:
        best: Result = ray.get(vault.winner.remote())
    except ray.exceptions.RayTaskError as error:
        # As the actor raised it, and not with Ray's traceback around it.
        raise error.cause from None
    return Winner(values=best.values, output=pickle.loads(best.output), score=best.score)
