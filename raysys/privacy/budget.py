"""The budget of a model's whole life, folded from the ledger.

    State.spends + reservations of further updates -> check_reservation() | forecast()
    State.spends -> report_budget()

A started update counts in full from its reservation on. What it commits replaces the reservation.
If it is abandoned, the reservation stays, less the steps that were never permitted: noised
gradients of the others may have left the process, and nobody can prove that they did not.

Where a `root` is given, what is kept there of the composed loss is used (`privacy.kept`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from raysys.config import PrivacyConfig
from raysys.errors import BudgetExhaustedError
from raysys.ingest.groups import next_in_turn
from raysys.ledger.records import PrivacySpend, UserGroup
from raysys.ledger.state import State
from raysys.privacy.accounting import ACCOUNTANT, RELATION, UNIT, statement
from raysys.privacy.calibrate import MAX_UPDATES_COUNTED, most_that_fits
from raysys.privacy.composed import Composed
from raysys.privacy.kept import life_so_far
from raysys.storage import Root


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UpdateSpend:
    """What one update adds."""

    update_id: str
    status: str
    """`reserved`, `committed` or `abandoned`."""
    num_steps: int
    """Charged. Of a running update all that it reserved, of an abandoned one those that may have
    run."""
    noise_multiplier: float
    num_count_releases: int
    num_evaluations: int
    group: str | None
    """The users whom the steps read, None for all."""
    selection: str | None
    """The trials that it chose from, if it did."""
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
    """Further updates like `updates_like` that fit into what is left; None before the first one."""
    updates_like: str | None
    """The last update without a selection; the last one where all had one."""
    unit: str
    relation: str
    accountant: str
    updates: tuple[UpdateSpend, ...]

    @property
    def statement(self) -> str:
        """What an epsilon of the report is about."""
        return statement(self.delta)


def spent_epsilon(state: State, delta: float, root: Root | None = None) -> float:
    """Returns the epsilon of all updates so far, reserved and abandoned ones included."""
    return life_so_far(root, state).epsilon(delta)


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
    updates_left: int
    """Updates like the last of them that fit into what is left now."""
    epsilon_total: float
    delta: float
    unit: str
    relation: str
    accountant: str

    @property
    def statement(self) -> str:
        """What an epsilon of the forecast is about."""
        return statement(self.delta)


def forecast(
    state: State,
    further: Sequence[PrivacySpend],
    config: PrivacyConfig,
    root: Root | None = None,
) -> Forecast:
    """Returns what further updates of these spends would bring epsilon to."""
    spent = life_so_far(root, state)
    after = spent.plus(*further).epsilon(config.delta)
    return Forecast(
        epsilon_spent=spent.epsilon(config.delta),
        epsilon_alone=Composed.nothing().plus(*further).epsilon(config.delta),
        epsilon_after=after,
        epsilon_left=config.epsilon_total - after,
        updates_left=updates_left(spent, further[-1], config),
        epsilon_total=config.epsilon_total,
        delta=config.delta,
        unit=UNIT,
        relation=RELATION,
        accountant=ACCOUNTANT,
    )


def check_reservation(
    state: State,
    further: Sequence[PrivacySpend],
    config: PrivacyConfig,
    root: Root | None = None,
) -> float:
    """Returns the epsilon after further updates of these spends.

    Raises:
      BudgetExhaustedError: It would exceed `epsilon_total`.
    """
    spent = life_so_far(root, state)
    after = spent.plus(*further).epsilon(config.delta)
    if math.isinf(after):
        raise BudgetExhaustedError(
            f"privacy.delta: at {config.delta:g} there is no finite epsilon, since a selection by "
            "repetition was, or would be, charged at a delta that is not below it; set a larger "
            "privacy.delta, or a smaller tune.delta_fraction before the selection"
        )
    if after > config.epsilon_total:
        what = "this update" if len(further) == 1 else f"these {len(further)} updates"
        raise BudgetExhaustedError(
            f"{what} would bring epsilon to {after:.3f} of privacy.epsilon_total "
            f"{config.epsilon_total:g} (spent {spent.epsilon(config.delta):.3f}; "
            f"{statement(config.delta)}); nothing was read or spent: train fewer steps, "
            "with more noise, or decide on a larger budget"
        )
    return after


def report_budget(state: State, config: PrivacyConfig) -> BudgetReport:
    """Returns the spend by update and what is left, under the config's total and delta."""
    updates, composed = list[UpdateSpend](), Composed.nothing()
    for update_id, spend, status in state.spends:
        composed = composed.plus(spend)
        updates.append(
            UpdateSpend(
                update_id=update_id,
                status=status,
                num_steps=spend.num_steps,
                noise_multiplier=spend.noise_multiplier,
                num_count_releases=spend.num_count_releases,
                num_evaluations=spend.num_evaluations,
                group=_named(spend.group),
                selection=_selection(spend),
                epsilon_alone=_alone(spend, config.delta),
                epsilon_cumulative=composed.epsilon(config.delta),
            )
        )
    spent = updates[-1].epsilon_cumulative if updates else 0.0
    like, last = _next_like_the_last(state)
    return BudgetReport(
        enabled=config.enabled,
        epsilon_total=config.epsilon_total,
        delta=config.delta,
        epsilon_spent=spent,
        epsilon_left=max(config.epsilon_total - spent, 0.0),
        updates_left=updates_left(composed, last, config) if last else None,
        updates_like=like,
        unit=UNIT,
        relation=RELATION,
        accountant=ACCOUNTANT,
        updates=tuple(updates),
    )


def updates_left(spent: Composed, like: PrivacySpend, config: PrivacyConfig) -> int:
    """Returns how many more updates fit; cohorts go on taking turns, from that of `like` on."""
    turns = [like]

    def fits(num: int) -> bool:
        while len(turns) < num:
            group = next_in_turn(turns[-1].group)
            turns.append(dataclasses.replace(turns[-1], group=group))
        return spent.plus(*turns[:num]).epsilon(config.delta) <= config.epsilon_total

    return most_that_fits(fits, max(MAX_UPDATES_COUNTED, config.horizon or 0))


@functools.lru_cache
def _alone(spend: PrivacySpend, delta: float) -> float:
    return Composed.nothing().plus(spend).epsilon(delta)


def _next_like_the_last(state: State) -> tuple[str | None, PrivacySpend | None]:
    """Returns what the next update would spend if it were like the last one that trained once."""
    trained = [
        (name, spend)
        for name, spend, status in state.spends
        if status != "abandoned" and spend.num_steps and spend.selection is None
    ]
    for name, last in reversed(trained or [(name, spend) for name, spend, _ in state.spends]):
        return name, dataclasses.replace(last, group=next_in_turn(last.group))
    return None, None


def _named(group: UserGroup | None) -> str | None:
    return f"{group.scheme}:{group.index}" if group else None


def _selection(spend: PrivacySpend) -> str | None:
    if (selection := spend.selection) is None:
        return None
    on_average = " on average" if selection.method == "repeat" else ""
    users = f" on users {_named(selection.group)}" if selection.group else ""
    return (
        f"{selection.method}: {selection.mean_trials:g} trials{on_average} of "
        f"{selection.num_steps} steps, noise {selection.noise_multiplier:g}{users}"
    )
