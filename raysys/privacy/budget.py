"""The budget of a model's whole life, folded from the ledger.

    State.spends + reservations of further updates -> check_reservation() | forecast()
    State.spends -> report_budget()

A started update counts in full from its reservation on. If it commits, what it spent replaces
the reservation; if it is abandoned, the reservation stays: noised gradients may have left the
process, and nobody can prove that they did not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from raysys.config import PrivacyConfig
from raysys.errors import BudgetExhaustedError
from raysys.ledger.records import PrivacySpend
from raysys.ledger.state import State
from raysys.privacy.accounting import ACCOUNTANT, RELATION, UNIT, epsilon

MAX_UPDATES_SHOWN = 1000
"""Further updates beyond which `updates_left` stops counting."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UpdateSpend:
    """What one update adds."""

    update_id: str
    status: str
    """`reserved`, `committed` or `abandoned`."""
    epsilon_alone: float
    epsilon_cumulative: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BudgetReport:
    """What was spent, what is left, and what the figures mean."""

    enabled: bool
    epsilon_total: float
    delta: float
    epsilon_spent: float
    epsilon_left: float
    updates_left: int | None
    """Further updates like the last one that fit into what is left; None before the first one."""
    unit: str
    relation: str
    accountant: str
    updates: tuple[UpdateSpend, ...]


def spent_epsilon(state: State, delta: float) -> float:
    """Returns the epsilon of all updates so far, reserved and abandoned ones included."""
    return epsilon([spend for _, spend, _ in state.spends], delta)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What further updates would spend, and what the figures mean."""

    epsilon_spent: float
    """So far, running and abandoned updates included."""
    epsilon_alone: float
    """Of the further updates by themselves."""
    epsilon_after: float
    epsilon_left: float
    """After them; negative if they would be refused."""
    epsilon_total: float
    delta: float
    unit: str
    relation: str
    accountant: str


def forecast(state: State, further: Sequence[PrivacySpend], config: PrivacyConfig) -> Forecast:
    """Returns what further updates of these spends would bring epsilon to."""
    spends = [spend for _, spend, _ in state.spends]
    after = epsilon([*spends, *further], config.delta)
    return Forecast(
        epsilon_spent=epsilon(spends, config.delta),
        epsilon_alone=epsilon(further, config.delta),
        epsilon_after=after,
        epsilon_left=config.epsilon_total - after,
        epsilon_total=config.epsilon_total,
        delta=config.delta,
        unit=UNIT,
        relation=RELATION,
        accountant=ACCOUNTANT,
    )


def check_reservation(
    state: State, further: Sequence[PrivacySpend], config: PrivacyConfig
) -> float:
    """Returns the epsilon after further updates of these spends.

    Raises:
      BudgetExhaustedError: It would exceed `epsilon_total`.
    """
    spends = [spend for _, spend, _ in state.spends]
    after = epsilon([*spends, *further], config.delta)
    if after > config.epsilon_total:
        what = "this update" if len(further) == 1 else f"these {len(further)} updates"
        raise BudgetExhaustedError(
            f"{what} would bring epsilon to {after:.3f} of privacy.epsilon_total "
            f"{config.epsilon_total:g} (spent {epsilon(spends, config.delta):.3f}, delta "
            f"{config.delta:g}, unit: a {UNIT}); nothing was read or spent: train fewer steps, "
            "with more noise, or decide on a larger budget"
        )
    return after


def report_budget(state: State, config: PrivacyConfig) -> BudgetReport:
    """Returns the spend by update and what is left, under the config's total and delta."""
    updates, so_far = [], []
    for update_id, spend, status in state.spends:
        so_far.append(spend)
        updates.append(
            UpdateSpend(
                update_id=update_id,
                status=status,
                epsilon_alone=epsilon([spend], config.delta),
                epsilon_cumulative=epsilon(so_far, config.delta),
            )
        )
    spent = updates[-1].epsilon_cumulative if updates else 0.0
    return BudgetReport(
        enabled=config.enabled,
        epsilon_total=config.epsilon_total,
        delta=config.delta,
        epsilon_spent=spent,
        epsilon_left=max(config.epsilon_total - spent, 0.0),
        updates_left=_updates_left(so_far, config) if so_far else None,
        unit=UNIT,
        relation=RELATION,
        accountant=ACCOUNTANT,
        updates=tuple(updates),
    )


def _updates_left(spends: list[PrivacySpend], config: PrivacyConfig) -> int:
    """Bisects for the most repetitions of the last spend that still fit."""

    def fits(num: int) -> bool:
        return epsilon([*spends, *[spends[-1]] * num], config.delta) <= config.epsilon_total

    low, high = 0, 1
    while high <= MAX_UPDATES_SHOWN and fits(high):
        low, high = high, high * 2
    high = min(high, MAX_UPDATES_SHOWN + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
