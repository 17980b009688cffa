"""Turns what mechanisms ran into epsilon, with Google's `dp-accounting`.

    PrivacySpend, … -> epsilon(spends, delta)

Privacy loss distributions (PLD), composed over all updates of the model's life. Unit: a user.
Neighbouring relation: add or remove one user. Sources: Koskela et al. 2020 (arXiv 1906.03049);
Doroshenko et al. 2022 (arXiv 2207.04380).
"""

from __future__ import annotations

from collections.abc import Iterable

import dp_accounting
from dp_accounting import pld

from raysys.ledger.records import PrivacySpend

ACCOUNTANT = "PLD (dp-accounting), pessimistic"
UNIT = "user"
RELATION = "add or remove one user"


def event(spend: PrivacySpend) -> dp_accounting.DpEvent:
    """Returns the mechanisms of one update as the accountant's event."""
    step = dp_accounting.PoissonSampledDpEvent(
        spend.sampling_prob, dp_accounting.GaussianDpEvent(spend.noise_multiplier)
    )
    counts = dp_accounting.GaussianDpEvent(spend.count_noise_multiplier)
    repeated = ((step, spend.num_steps), (counts, spend.num_count_releases))
    return dp_accounting.ComposedDpEvent(
        [dp_accounting.SelfComposedDpEvent(one, num) for one, num in repeated if num]
    )


def epsilon(spends: Iterable[PrivacySpend], delta: float) -> float:
    """Returns the epsilon at `delta` of all spends composed; 0 for none.

    >>> spend = PrivacySpend(num_steps=195, sampling_prob=1024 / 200_000, noise_multiplier=1.0,
    ...                      num_count_releases=0, count_noise_multiplier=1.0)
    >>> round(epsilon([spend], 1e-6), 3)
    0.597
    """
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    merged = _merge(spends)
    if not merged:
        return 0.0
    for spend in merged:
        accountant.compose(event(spend))
    return float(accountant.get_epsilon(delta))


def _merge(spends: Iterable[PrivacySpend]) -> list[PrivacySpend]:
    """Joins spends of equal mechanisms: composition adds their steps, and it is far faster."""
    steps: dict[tuple[float, float], int] = {}
    counts: dict[float, int] = {}
    for spend in spends:
        step = (spend.sampling_prob, spend.noise_multiplier)
        steps[step] = steps.get(step, 0) + spend.num_steps
        noise = spend.count_noise_multiplier
        counts[noise] = counts.get(noise, 0) + spend.num_count_releases
    some = [
        PrivacySpend(num_steps=num, sampling_prob=prob, noise_multiplier=noise,
                     num_count_releases=0, count_noise_multiplier=1.0)
        for (prob, noise), num in steps.items() if num
    ]  # fmt: skip
    return some + [
        PrivacySpend(num_steps=0, sampling_prob=1.0, noise_multiplier=1.0,
                     num_count_releases=num, count_noise_multiplier=noise)
        for noise, num in counts.items() if num
    ]  # fmt: skip
