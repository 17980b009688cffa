"""Turns what mechanisms ran into epsilon, with Google's `dp-accounting`.

    PrivacySpend, … -> epsilon(spends, delta)
    PrivacySpend    -> event()

Privacy loss distributions (PLD), composed over all updates of the model's life. Unit: a user.
Neighbouring relation: add or remove one user. Sources: Koskela et al. 2020 (arXiv 1906.03049);
Doroshenko et al. 2022 (arXiv 2207.04380).
"""

from __future__ import annotations

from collections.abc import Iterable

import dp_accounting

from raysys.ledger.records import PrivacySpend
from raysys.privacy.charges import charges
from raysys.privacy.composed import Composed

ACCOUNTANT = "PLD (dp-accounting), pessimistic"
UNIT = "user"
RELATION = "add or remove one user"


def statement(delta: float) -> str:
    """Returns what an epsilon is about; it stands wherever one is printed.

    >>> statement(1e-4)
    'unit: a user; neighbours: add or remove one user; delta 0.0001; accountant: PLD \
(dp-accounting), pessimistic'
    """
    return f"unit: a {UNIT}; neighbours: {RELATION}; delta {delta:g}; accountant: {ACCOUNTANT}"


def event(spend: PrivacySpend) -> dp_accounting.DpEvent:
    """Returns the mechanisms of one update as the accountant's event, whoever's data they read."""
    return dp_accounting.ComposedDpEvent(
        [dp_accounting.SelfComposedDpEvent(one.event, one.num) for one in charges(spend)]
    )


def epsilon(spends: Iterable[PrivacySpend], delta: float) -> float:
    """Returns the epsilon at `delta` of all spends composed, for the worst of users; 0 for none.

    It composes all anew, in fine steps of the privacy loss. The ledger's life is composed update by
    update instead: `privacy.composed`.

    >>> spend = PrivacySpend(num_steps=195, sampling_prob=1024 / 200_000, noise_multiplier=1.0,
    ...                      num_count_releases=0, count_noise_multiplier=1.0)
    >>> round(epsilon([spend], 1e-6), 3)
    0.597
    """
    return Composed.at_once(spends).epsilon(delta)
