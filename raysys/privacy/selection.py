"""Which trials a selection runs and what they cost, decided before any data is read. Pure.

    Config, the update's spend, life so far -> plan_selection() -> .spend, reserved in the ledger
    SelectionSpend -> draw_num_trials(), draw_values(), noise_score() -> train.tune, which runs them

`repeat` draws the number of trials from a truncated negative binomial, runs each on hyperparameters
drawn independently, and releases the best one alone. What that costs grows slowly with the mean
number, if nothing else leaves: not the number, not a loser's score, and no trial may stop or be
dropped for what it came to. Source: Papernot and Steinke, "Hyperparameter
Tuning with Renyi Differential Privacy" (arXiv 2110.03620), Definition 1 and Theorem 2.

    P(K = k) = (1-g)^k / (g^-eta - 1) * prod_{l<k} (l + eta) / (l + 1)    for k = 1, 2, …
    eta -> 0: (1-g)^k / (k log(1/g)), logarithmic;    eta = 1: g (1-g)^(k-1), geometric
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from raysys.config import Config
from raysys.errors import ConfigError, PrivacyError
from raysys.ingest.groups import tuning_group
from raysys.ledger.records import PrivacySpend, SelectionSpend
from raysys.privacy.composed import Composed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SelectionPlan:
    """What a selection will spend."""

    spend: PrivacySpend
    """Of the whole update, trials included."""
    epsilon_by_method: Mapping[str, float]
    """Epsilon of the model's whole life after it, by each way of charging the trials that was
    asked about. The least decides."""

    @property
    def selection(self) -> SelectionSpend:
        """The trials."""
        assert self.spend.selection is not None
        return self.spend.selection


def check_space(config: Config) -> None:
    """Refuses a selection among nothing.

    Raises:
      ConfigError: `tune.space` is empty.
    """
    if not config.tune.space:
        raise ConfigError(
            "tune.space: expected values to choose from, for example `train.learning_rate: "
            "[2.0e-4, 5.0e-4]`, got none"
        )


def check_choice(config: Config, *, is_first: bool) -> None:
    """Refuses a selection whose trials would all be the same, which costs as if they were not.

    Args:
      is_first: Whether the update starts from no version.

    Raises:
      ConfigError: No key of `tune.space` that is in force has two values.
    """
    idle = "train.learning_rate" if is_first else "train.bootstrap_learning_rate"
    no_adapter = config.model.adapter == "none" and "model.adapter" not in config.tune.space
    choices = [
        key
        for key, values in config.tune.space.items()
        if key != idle
        and len(set(map(str, values))) > 1
        and not (no_adapter and key.startswith("model."))
    ]
    if not choices:
        of = "the first one" if is_first else "one that starts from a version"
        raise ConfigError(
            "tune.space: expected two values of a key that this update reads, got "
            f"{ {key: list(values) for key, values in config.tune.space.items()} }: all trials "
            f"would be the same; an update that is {of} does not read {idle}"
        )


def plan_selection(
    config: Config, update: PrivacySpend, life: Composed, key_id: str
) -> SelectionPlan:
    """Returns the cheapest way to run the trials that `tune.method` admits.

    Args:
      update: What an update without selection would spend.
      life: What the model lost so far, on top of which methods are compared.
      key_id: Names the key of the pseudonyms by which `shard` splits users.

    Raises:
      ConfigError: The users are split another way already.
      PrivacyError: The one method that is admitted has no bound.
    """
    if config.tune.method == "shard" and update.group is not None:
        raise ConfigError(
            "tune.method: expected auto, repeat or compose with privacy.cohorts "
            f"{config.privacy.cohorts}, whose split of the users another split would cross, got "
            "'shard'"
        )
    ways: dict[str, PrivacySpend] = {
        method: _spend(config, update, method, key_id)
        for method in ("repeat", "compose")
        if config.tune.method in (method, "auto", "shard") and _can(method, config)
    }
    costs = {
        method: _epsilon_after(life, spend, config.privacy.delta, alone=len(ways) == 1)
        for method, spend in ways.items()
    }
    return SelectionPlan(spend=ways[min(costs, key=costs.__getitem__)], epsilon_by_method=costs)


def _epsilon_after(life: Composed, spend: PrivacySpend, delta: float, *, alone: bool) -> float:
    """Returns infinity for a method that has no bound, if there is another one to take."""
    try:
        return life.plus(spend).epsilon(delta)
    except PrivacyError:
        if alone:
            raise
        return math.inf


def _can(method: str, config: Config) -> bool:
    """With a mean of 1 there is nothing random about the number of trials."""
    return method == "compose" or config.tune.mean_trials > 1


def _spend(
    config: Config, update: PrivacySpend, method: Literal["repeat", "compose"], key_id: str
) -> PrivacySpend:
    tune, repeat = config.tune, method == "repeat"
    sharded = tune.method == "shard"
    tried = tuning_group(tune.shard_fraction, key_id) if sharded else update.group
    noise = least_noise_multiplier(config, update)
    num_trials = math.ceil(tune.mean_trials)
    selection = SelectionSpend(
        method=method,
        num_steps=update.num_steps,
        sampling_prob=update.sampling_prob,
        noise_multiplier=noise,
        score_noise_multiplier=tune.score_noise_multiplier,
        num_trials=0 if repeat else num_trials,
        mean_trials=tune.mean_trials if repeat else float(num_trials),
        shape=tune.shape if repeat else 0.0,
        delta=tune.delta_fraction * config.privacy.delta if repeat else 0.0,
        group=tried,
    )
    return dataclasses.replace(
        update,
        # The best trial's weights are the release, unless they came from a share of the users.
        num_steps=update.num_steps if sharded else 0,
        noise_multiplier=noise,
        group=(
            tuning_group(tune.shard_fraction, key_id, tuned_on=False) if sharded else update.group
        ),
        selection=selection,
    )


def least_noise_multiplier(config: Config, update: PrivacySpend) -> float:
    """Returns the least noise that a trial may draw; that of the update where none is drawn.

    Its Renyi divergence is the largest at every order, so it is the per-order maximum over all
    candidates, by which a selection among candidates of unequal noise is charged.
    """
    drawn = config.tune.space.get("privacy.noise_multiplier", (update.noise_multiplier,))
    return min(float(str(noise)) for noise in drawn)


def draw_values(space: Mapping[str, Sequence[object]], rng: random.Random) -> dict[str, object]:
    """Returns one value of each key, uniform and independent of all earlier draws."""
    return {key: rng.choice(values) for key, values in space.items()}


def draw_num_trials(selection: SelectionSpend, rng: random.Random) -> int:
    """Returns how many trials to run. Sensitive under `repeat`: never log, record or tell it."""
    if selection.method == "compose":
        return selection.num_trials
    uniform = rng.random()
    for num, probability in _num_trials(selection.mean_trials, selection.shape):
        uniform -= probability
        # Far in the tail the rest of the probability is less than the sum's rounding error.
        if uniform < 0 or (num > selection.mean_trials and probability < 1e-18):
            return num
    raise AssertionError("the distribution has no end")


def noise_score(total: float, selection: SelectionSpend) -> float:
    """Returns a score of L2 sensitivity 1 with its noise, from the operating system's entropy."""
    return total + float(np.random.default_rng().normal(0.0, selection.score_noise_multiplier))


def num_trials_quantile(mean: float, shape: float, fraction: float) -> int:
    """Returns the number of trials that is exceeded with probability 1 - `fraction` at most.

    >>> [num_trials_quantile(10, shape, 0.99) for shape in (0, 1)]
    [81, 44]
    """
    total = 0.0
    for num, probability in _num_trials(mean, shape):
        total += probability
        if total >= fraction:
            return num
    raise AssertionError("the distribution has no end")


def _num_trials(mean: float, shape: float) -> Iterator[tuple[int, float]]:
    """Yields (k, P(K = k)) for k = 1, 2, …"""
    gamma = halting_probability(mean, shape)
    growth = -math.log(gamma)
    exponent = shape * growth
    probability = (1 - gamma) / growth * (exponent / math.expm1(exponent) if exponent else 1)
    for num in itertools.count(1):
        yield num, probability
        probability *= (1 - gamma) * (num + shape) / (num + 1)


def halting_probability(mean: float, shape: float) -> float:
    """Returns the parameter g in (0, 1) of the distribution of this mean, above 1.

    >>> halting_probability(10, 1)
    0.1
    """
    if shape == 1:
        return 1 / mean
    low, high = 1e-300, 1.0
    while high > low * (1 + 1e-12):
        # In logarithms first: g spans many orders of magnitude at large means.
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _mean(middle, shape) > mean else (low, middle)
    return low


def _mean(gamma: float, shape: float) -> float:
    """Falls from infinity to 1 as `gamma` rises from 0 to 1."""
    growth = -math.log(gamma)
    exponent = shape * growth
    factor = exponent / -math.expm1(-exponent) if exponent else 1
    return factor / growth * (1 / gamma - 1)
