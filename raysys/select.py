"""An update whose model is the best of several trials: what jobs/tune.py runs.

    plan_selection -> reserve -> ingest -> trials -> the best one -> compare -> gate -> … as update

It is charged before it starts, committed with its version and replayed like any update; only how it
comes by its weights is its own. Nothing of the trials that lost is released.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import yaml

from raysys.config import Config
from raysys.evaluate.holdout import HoldoutScore
from raysys.ledger.records import PrivacySpend, UpdateCommitted
from raysys.ledger.state import State
from raysys.model.adapter import activations_cut, check_targets, models_of_trials
from raysys.model.catalogue import encode_new_texts
from raysys.partitions.discover import EVERYTHING, PartitionRange
from raysys.privacy.kept import life_so_far
from raysys.privacy.selection import check_choice, check_space, plan_selection
from raysys.storage import Root
from raysys.strategy import Outcome, Progress, Ready, Strategy
from raysys.train.output import TrainOutput
from raysys.train.trial import Trials, plan_steps
from raysys.train.tune import Winner, select
from raysys.update import run_update, train_once


def run_selection(
    config: Config,
    on_progress: Progress = lambda line: None,
    start_ray: Callable[[], None] = lambda: None,
    within: PartitionRange = EVERYTHING,
) -> UpdateCommitted:
    """Runs one update by selection and returns its commit record, `selected` included.

    Raises:
      ConfigError: `tune.space` is empty, or a search needs what is not installed.
      TrialError: A trial failed. The selection stays charged.
      RaysysError: As `run_update`.
    """
    check_space(config)
    check_targets(config)
    strategy = Strategy(
        train=select_best,
        charge=functools.partial(charge_selection, config),
    )
    return run_update(config, on_progress, start_ray, within, strategy)


def charge_selection(
    config: Config, state: State, update: PrivacySpend, key_id: str
) -> PrivacySpend:
    """Returns what the update reserves: its releases, and the trials by the cheapest method."""
    check_choice(config, is_first=state.head_version is None)
    life = life_so_far(Root(config.root), state)
    return plan_selection(config, update, life, key_id).spend


def select_best(ready: Ready) -> Outcome:
    """Runs the trials; the best one's weights are the new ones."""
    reserved = ready.started.reserved
    selection = reserved.selection if reserved else None
    spend = ready.privacy.spend
    if selection is not None:
        spend = dataclasses.replace(spend, num_steps=selection.num_steps, group=selection.group)
    ready.on_progress(_announcement(ready))
    trials = Trials(
        config=ready.config,
        selection=selection,
        spend=spend,
        head=ready.head,
        adapted_weights=ready.adapted_weights,
        texts=ready.texts,
        text_of_item=ready.text_of_item,
        seed=ready.started.seed,
        root=ready.root,
        update_id=ready.started.update_id,
        num_shards=ready.ingested.num_shards,
        own_users=selection is not None and selection.group != ready.privacy.group,
        score=HoldoutScore(
            root=ready.root,
            update_id=ready.started.update_id,
            num_shards=ready.ingested.num_shards,
            items=ready.ingested.items_before,
            text_of_item=ready.text_of_item,
            head=ready.head,
            max_difference=ready.config.tune.max_difference,
        ),
    )
    _encode_for(trials)
    best = select(trials)
    ready.on_progress(f"selected, to be put into the config:\n{fragment(best.values)}")
    config = trials.config_of(best.values)
    return Outcome(
        output=_trained_on_others(ready, config, best) if trials.own_users else best.output,
        config=config,
        num_steps=spend.num_steps,
        selected=best.values,
        metrics={"selection": _told(best.score, ready)},
        after_trials=True,
        tells_time=selection is None or selection.method == "compose",
    )


def _trained_on_others(ready: Ready, config: Config, best: Winner) -> TrainOutput:
    """Trains on the users that no trial read, with what the best one chose."""
    privacy = plan_steps(config, ready.privacy.spend, best.values)
    return train_once(dataclasses.replace(ready, config=config, privacy=privacy)).output


def _encode_for(trials: Trials) -> None:
    """Caches the activations below the lowest layer that each of the trials may adapt."""
    models = models_of_trials(trials.config)
    cuts = {activations_cut(model, trials.adapted_weights or ()): model for model in models}
    for cut, model in cuts.items():
        encode_new_texts(trials.root, model, trials.texts, cut)


def _told(score: float, ready: Ready) -> dict[str, object]:
    """Returns the best trial's score as it is recorded, with its noise and what that is like."""
    tune, reserved = ready.config.tune, ready.started.reserved
    return {
        "holdout_ndcg10_gain_sum": score * tune.max_difference,
        "noise_std": tune.score_noise_multiplier * tune.max_difference if reserved else 0.0,
    }


def _announcement(ready: Ready) -> str:
    reserved = ready.started.reserved
    if reserved is None or reserved.selection is None:
        return f"runs {ready.config.tune.mean_trials:g} trials, NOT PRIVATE"
    selection = reserved.selection
    num = (
        f"a random number of trials, {selection.mean_trials:g} on average"
        if selection.method == "repeat"
        else f"{selection.num_trials} trials"
    )
    return f"runs {num} (method {selection.method}); only the best one will be told of"


def fragment(values: Mapping[str, object]) -> str:
    """Returns the values as the config has them.

    >>> print(fragment({"model.lora_rank": 4, "train.alpha": 0.5, "model.target_modules": ["q"]}))
    model: {lora_rank: 4, target_modules: [q]}
    train: {alpha: 0.5}
    """
    sections: dict[str, dict[str, object]] = {}
    for key, value in sorted(values.items()):
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return "\n".join(
        f"{section}: {yaml.safe_dump(found, default_flow_style=True, width=1000).strip()}"
        for section, found in sections.items()
    )
