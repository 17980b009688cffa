"""Every phase x action of the rollout, and what each record says."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Callable

import pytest

from raysys.errors import ConfigError, TransitionError, UnknownVersionError
from raysys.ledger.records import Entry, RolloutChanged, RolloutPhase
from raysys.ledger.state import State
from raysys.rollout.state import TRANSITIONS, Action, abort, promote, start
from tests.helpers import committed

PHASES: list[RolloutPhase | None] = [None, *typing.get_args(RolloutPhase)]
ACTIONS: tuple[Action, ...] = typing.get_args(Action)
ACT: dict[Action, Callable[[State], RolloutChanged]] = {
    "start": lambda state: start(state, "v3", weight_fraction=0.2, actor="operator"),
    "promote": lambda state: promote(state, actor="operator", reason="better"),
    "abort": lambda state: abort(state, actor="operator", reason="worse"),
}


def state_in(phase: RolloutPhase | None) -> State:
    """A ledger of versions v1, v2, v3 whose rollout of v2 stands in `phase`."""
    state = State(committed=tuple(committed(version=name) for name in ("v1", "v2", "v3")))
    if phase is None:
        return state
    state = append(state, start(state, "v2", weight_fraction=0.5, actor="operator"))
    if phase == "promoted":
        return append(state, ACT["promote"](state))
    if phase == "rolled_back":
        return append(state, ACT["abort"](state))
    return state


def append(state: State, record: RolloutChanged) -> State:
    return state.apply(Entry(sequence=state.sequence + 1, at=0.0, record=record))


@pytest.mark.parametrize(("phase", "action"), list(itertools.product(PHASES, ACTIONS)))
def test_each_action_in_each_phase_is_done_or_refused_as_the_table_says(
    phase: RolloutPhase | None, action: Action
) -> None:
    state = state_in(phase)
    expected = TRANSITIONS.get((phase, action))
    if expected is None:
        with pytest.raises(TransitionError, match=f"cannot {action}: .*first"):
            ACT[action](state)
    else:
        record = ACT[action](state)
        assert record.phase == expected
        assert append(state, record).rollout == record


def test_the_table_allows_exactly_five_transitions() -> None:
    assert set(TRANSITIONS) == {
        (None, "start"),
        ("promoted", "start"),
        ("rolled_back", "start"),
        ("canary", "promote"),
        ("canary", "abort"),
    }


def test_starting_keeps_stable_and_gives_the_canary_its_share() -> None:
    record = start(state_in(None), "v2", weight_fraction=0.2, actor="operator")
    assert (record.stable, record.canary, record.previous) == ("v1", "v2", None)
    assert (record.rollout_id, record.weight_fraction) == ("r0001", 0.2)


def test_promoting_makes_the_canary_stable_and_stable_previous() -> None:
    record = promote(state_in("canary"), actor="controller", reason="ok", measurement={"n": 1})
    assert (record.stable, record.canary, record.previous) == ("v2", None, "v1")
    assert (record.weight_fraction, record.measurement) == (0.0, {"n": 1})


def test_aborting_leaves_stable_and_previous_as_they_were() -> None:
    state = state_in("promoted")
    state = append(state, start(state, "v3", weight_fraction=0.1, actor="operator"))
    record = abort(state, actor="operator", reason="bad")
    assert (record.stable, record.canary, record.previous) == ("v2", None, "v1")
    assert (record.rollout_id, record.weight_fraction) == ("r0002", 0.0)


def test_a_rolled_back_version_may_be_tried_again() -> None:
    record = start(state_in("rolled_back"), "v2", weight_fraction=0.1, actor="operator")
    assert (record.rollout_id, record.stable, record.canary) == ("r0002", "v1", "v2")


def test_the_previous_version_may_be_put_on_trial_again() -> None:
    record = start(state_in("promoted"), "v1", weight_fraction=0.1, actor="operator")
    assert (record.stable, record.canary, record.previous) == ("v2", "v1", "v1")


def test_an_unknown_version_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(UnknownVersionError, match=r"'v9'.*v1, v2, v3"):
        start(state_in(None), "v9", weight_fraction=0.2, actor="operator")


def test_without_any_version_the_remedy_is_an_update() -> None:
    with pytest.raises(UnknownVersionError, match="run an update first"):
        start(State(), "v1", weight_fraction=0.2, actor="operator")


def test_stable_cannot_be_its_own_canary() -> None:
    with pytest.raises(TransitionError, match="v1 is stable already"):
        start(state_in(None), "v1", weight_fraction=0.2, actor="operator")


@pytest.mark.parametrize("weight", [-0.1, 0.0, 1.0, float("nan"), float("inf")])
def test_a_weight_that_leaves_one_version_without_users_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="weight_fraction"):
        start(state_in(None), "v2", weight_fraction=weight, actor="operator")


def test_builders_leave_the_state_alone() -> None:
    state = state_in("canary")
    before = dataclasses.replace(state)
    ACT["promote"](state)
    ACT["abort"](state)
    assert state == before
