"""The noise with which the budget lasts for `privacy.horizon` updates, and how long it lasts.

    Config -> noise_multiplier_of() -> privacy.spend
    Config -> updates_paid()        -> raysys plan, raysys doctor

Nothing here looks at the ledger: every process that reads the config finds the same noise. It
counts on the first update training for `train.bootstrap_num_steps`, and on one release of item
counts an update, which is that of a day or, with the defaults, of up to a week of partitions. What
an update really takes is decided when it is planned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from raysys.config import DEFAULT_NOISE_MULTIPLIER, Config, PrivacyConfig
from raysys.errors import ConfigError
from raysys.ledger.records import PrivacySpend
from raysys.privacy.accounting import statement
from raysys.privacy.composed import COARSE, Composed
from raysys.privacy.spend import life, update_spend, with_noise

_LOWEST, _STEP, _NUM_STEPS = 0.5, 1.005, 1600
"""Noise multipliers that are tried: 0.5 times powers of 1.005, up to about 1,460."""
MAX_UPDATES_COUNTED = 1000
"""Updates beyond which nobody counts on, unless the horizon is farther."""


def at_least(num_updates: int) -> str:
    """Returns a number of updates as it is told: nobody counts beyond `MAX_UPDATES_COUNTED`."""
    return f"at least {num_updates}" if num_updates >= MAX_UPDATES_COUNTED else f"{num_updates}"


def noise_multiplier_of(config: Config) -> float:
    """Returns the noise multiplier of a config's training steps.

    Raises:
      ConfigError: No noise makes the budget last for the horizon.
    """
    privacy = config.privacy
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    if privacy.horizon is None or not privacy.enabled:
        return DEFAULT_NOISE_MULTIPLIER
    first, later = _typical(config, DEFAULT_NOISE_MULTIPLIER)
    return _calibrated(first, later, privacy)


def updates_paid(config: Config) -> int:
    """Returns how many updates of a config the whole budget pays for, the first one included."""
    first, later = _typical(config, noise_multiplier_of(config))
    return _updates_paid(first, later, config.privacy)


def describe(config: Config, noise_multiplier: float) -> str:
    """Returns where a config's noise comes from, and for how many updates the whole budget pays."""
    privacy, paid = config.privacy, updates_paid(config)
    source = "as configured"
    if privacy.noise_multiplier is None:
        source = "the default" if privacy.horizon is None else "calibrated"
    lasts = (
        f"epsilon_total {privacy.epsilon_total:g} pays for {at_least(paid)} updates from the first "
        "one on"
    )
    if privacy.horizon is not None:
        lasts += f", privacy.horizon is {privacy.horizon}"
    return f"{noise_multiplier:g}, {source}: {lasts} ({statement(privacy.delta)})"


def most_that_fits(fits: Callable[[int], bool], limit: int) -> int:
    """Returns the greatest number up to `limit` that fits, where every smaller one fits too.

    >>> most_that_fits(lambda num: num <= 300, 1000), most_that_fits(lambda num: True, 1000)
    (300, 1000)
    """
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _typical(config: Config, noise: float) -> tuple[PrivacySpend, PrivacySpend]:
    """Returns the mechanisms of the first update and of each later one."""
    first, later = (
        update_spend(config, first=is_first, num_count_releases=1, noise_multiplier=noise)
        for is_first in (True, False)
    )
    return first, later


@functools.cache
def _calibrated(first: PrivacySpend, later: PrivacySpend, privacy: PrivacyConfig) -> float:
    assert privacy.horizon is not None
    spends = life(first, later, privacy.horizon, privacy.cohorts)

    def is_too_little(index: int) -> bool:
        found = Composed.at_once(with_noise(spends, _noise(index)), COARSE).epsilon(privacy.delta)
        return found > privacy.epsilon_total

    # From much noise down: the composed loss of too little noise is long, and slow to compose.
    low, high = -1, _NUM_STEPS - 1
    if is_too_little(high):
        raise ConfigError(
            f"privacy.horizon: no noise makes epsilon_total {privacy.epsilon_total:g} at delta "
            f"{privacy.delta:g} last for {privacy.horizon} updates, since their releases cost more "
            "than that; raise privacy.count_noise_multiplier, or shorten the horizon"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_too_little(middle) else (low, middle)
    return _noise(high)


@functools.cache
def _updates_paid(first: PrivacySpend, later: PrivacySpend, privacy: PrivacyConfig) -> int:
    def fits(num: int) -> bool:
        spends = life(first, later, num, privacy.cohorts)
        return Composed.at_once(spends, COARSE).epsilon(privacy.delta) <= privacy.epsilon_total

    return most_that_fits(fits, max(MAX_UPDATES_COUNTED, privacy.horizon or 0))


def _noise(index: int) -> float:
    return round(_LOWEST * _STEP**index, 4)
