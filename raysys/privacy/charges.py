"""What the mechanisms of an update are to the accountant, and whose data each of them read.

    PrivacySpend -> charges() -> [Charge: an event, how often, whose users] -> privacy.composed

Source of selections: Papernot and Steinke 2022 (arXiv 2110.03620).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator

import dp_accounting
from dp_accounting import rdp
from dp_accounting.dp_event import RepeatAndSelectDpEvent

from raysys.errors import PrivacyError
from raysys.ledger.records import PrivacySpend, SelectionSpend, UserGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpsilonDelta:
    """An event that dp-accounting lacks: of a mechanism no more is known than its guarantee."""

    epsilon: float
    delta: float


_MOST_EPSILON = 500.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Charge:
    """A mechanism that ran a number of times on the data of some users."""

    event: dp_accounting.DpEvent
    """Of one run: a Gaussian, a Poisson-sampled Gaussian, or an (epsilon, delta) guarantee."""
    num: int
    """At least 1."""
    group: UserGroup | None
    """Whose data it read; None for everyone's."""


def charges(spend: PrivacySpend) -> list[Charge]:
    """Returns what an update is charged, and to whom.

    Raises:
      PrivacyError: A selection by repetition has no finite bound at its delta.
    """
    found = [
        (_step(spend.sampling_prob, spend.noise_multiplier), spend.num_steps, spend.group),
        (_gaussian(spend.count_noise_multiplier), spend.num_count_releases, None),
        (_gaussian(spend.evaluation_noise_multiplier), spend.num_evaluations, None),
    ]
    if (selection := spend.selection) is not None and selection.method == "repeat":
        found.append((_repeat_and_select(selection), 1, selection.group))
    elif selection is not None:
        found += [
            (one, num * selection.num_trials, selection.group) for one, num in _trial(selection)
        ]
    return [Charge(event=one, num=num, group=group) for one, num, group in found if num]


def _gaussian(noise_multiplier: float) -> dp_accounting.DpEvent:
    return dp_accounting.GaussianDpEvent(noise_multiplier)


def _step(sampling_prob: float, noise_multiplier: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(sampling_prob, _gaussian(noise_multiplier))


def _trial(selection: SelectionSpend) -> list[tuple[dp_accounting.DpEvent, int]]:
    """Returns the mechanisms of one trial, its score included, each with its number of runs."""
    step = _step(selection.sampling_prob, selection.noise_multiplier)
    return [(step, selection.num_steps), (_gaussian(selection.score_noise_multiplier), 1)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops warnings of orders that the accountant leaves out, which costs tightness alone."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@functools.cache
def _repeat_and_select(selection: SelectionSpend) -> dp_accounting.DpEvent:
    """Returns the (epsilon, delta) of a random number of trials, from their Renyi divergences.

    Nobody knows its privacy loss distribution, but that of an (epsilon, delta) guarantee dominates
    it (Papernot and Steinke, theorem 2; Kairouz et al. 2015 for the domination).
    """
    trial = dp_accounting.ComposedDpEvent(
        [dp_accounting.SelfComposedDpEvent(one, num) for one, num in _trial(selection) if num]
    )
    accountant = rdp.RdpAccountant()
    with _quiet():
        accountant.compose(RepeatAndSelectDpEvent(trial, selection.mean_trials, selection.shape))
        bound = float(accountant.get_epsilon(selection.delta)) if selection.delta > 0 else math.inf
    # Beyond it the privacy loss cannot be written as a distribution: e^epsilon overflows. Zero is
    # what the accountant makes of a divergence that came out negative.
    if not 0 < bound <= _MOST_EPSILON:
        raise PrivacyError(
            f"a selection of {selection.mean_trials:g} trials on average has no epsilon below "
            f"{_MOST_EPSILON:g} at delta {selection.delta:g}; give it a larger delta, or trials "
            "and their scores more noise"
        )
    return EpsilonDelta(epsilon=bound, delta=selection.delta)
