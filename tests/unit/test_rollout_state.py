"""Every phase x action of the rollout, random races, and what each record says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import typing
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.config import Analysis, Pause, RolloutConfig, Step
from raysys.errors import ConfigError, TransitionError, UnknownVersionError
from raysys.ledger.records import (
    SCHEMA_VERSION,
    Entry,
    RolloutChanged,
    RolloutPhase,
    decode,
    encode,
)
from raysys.ledger.seal import seal
from raysys.ledger.state import State
from raysys.rollout.state import (
    TRANSITIONS,
    Action,
    abort,
    advance,
    current_step,
    pause,
    promote,
    resume,
    rules_of,
    start,
)
from tests.helpers import committed

PHASES: list[RolloutPhase | None] = [None, *typing.get_args(RolloutPhase)]
ACTIONS: tuple[Action, ...] = typing.get_args(Action)
ACT: dict[Action, Callable[[State], RolloutChanged]] = {
    "start": lambda state: start(state, "v3", weight_fraction=0.2, actor="operator"),
    "advance": lambda state: advance(state, actor="controller", reason="done"),
    "pause": lambda state: pause(state, actor="operator", reason="lunch"),
    "resume": lambda state: resume(state, actor="operator", reason="back"),
    "promote": lambda state: promote(state, actor="operator", reason="better"),
    "abort": lambda state: abort(state, actor="operator", reason="worse"),
}
RAMP = RolloutConfig(
    steps=(
        Step(set_weight=0.05),
        Step(pause=Pause(duration_s=600)),
        Step(analysis=Analysis()),
        Step(set_weight=0.2),
        Step(pause=Pause()),
        Step(analysis=Analysis(min_requests=500)),
    )
)


def state_in(phase: RolloutPhase | None) -> State:
    """A ledger of versions v1, v2, v3 whose rollout of v2 stands in `phase`."""
    state = State(committed=tuple(committed(version=name) for name in ("v1", "v2", "v3")))
    if phase is None:
        return state
    state = append(state, start(state, "v2", weight_fraction=0.5, actor="operator"))
    if phase == "canary":
        return state
    actions: dict[RolloutPhase, Action] = {
        "paused": "pause",
        "promoted": "promote",
        "rolled_back": "abort",
    }
    return append(state, ACT[actions[phase]](state))


def append(state: State, record: RolloutChanged, at: float = 0.0) -> State:
    return state.apply(Entry(sequence=state.sequence + 1, at=at, record=record))


def ramp(rules: RolloutConfig = RAMP) -> State:
    state = state_in(None)
    return append(state, start(state, "v2", rules=rules, actor="operator"))


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
        assert record.phase in expected
        assert append(state, record).rollout == record


def test_the_table_allows_exactly_ten_transitions() -> None:
    assert set(TRANSITIONS) == {
        *((phase, "start") for phase in (None, "promoted", "rolled_back")),
        *itertools.product(("canary", "paused"), ("promote", "abort")),
        ("canary", "advance"),
        ("canary", "pause"),
        ("paused", "resume"),
    }


def test_a_plan_is_gone_through_step_by_step() -> None:
    state, found = ramp(), []
    while state.canary is not None:
        assert state.rollout is not None
        found.append((state.rollout.phase, state.rollout.step_index, state.weight_fraction))
        act: Action = "resume" if state.rollout.phase == "paused" else "advance"
        state = append(state, ACT[act](state))
    assert found == [
        ("canary", 1, 0.05),
        ("canary", 2, 0.05),
        ("paused", 4, 0.2),
        ("canary", 5, 0.2),
    ]
    assert state.rollout is not None
    assert (state.rollout.phase, state.stable) == ("promoted", "v2")


def test_each_weight_has_traffic_of_its_own() -> None:
    state = ramp()
    stages = []
    for act in ("advance", "advance", "resume"):
        state = append(state, ACT[typing.cast(Action, act)](state))
        assert state.rollout is not None
        stages.append(state.rollout.stage)
    assert stages == [0, 1, 1]


def test_approval_is_waited_for_after_the_last_step_and_a_resume_gives_it() -> None:
    state = ramp(RolloutConfig(require_approval=True))
    state = append(state, ACT["advance"](state))
    assert state.rollout is not None
    assert (state.rollout.phase, state.stable, state.canary) == ("paused", "v1", "v2")
    state = append(state, ACT["resume"](state))
    assert (state.rollout and state.rollout.phase, state.stable) == ("promoted", "v2")


def test_who_resumes_the_last_pause_of_a_plan_has_not_approved_yet() -> None:
    steps = (Step(set_weight=0.5), Step(pause=Pause()))
    state = ramp(RolloutConfig(steps=steps, require_approval=True))
    assert append(state, ACT["resume"](state)).canary == "v2"
    state = ramp(RolloutConfig(steps=steps))
    assert append(state, ACT["resume"](state)).stable == "v2"


def test_a_pause_by_a_person_stops_the_clock_of_the_step() -> None:
    state = ramp()
    state = append(state, ACT["pause"](state), at=200.0)
    state = append(state, ACT["resume"](state), at=5000.0)
    assert (state.rollout_step_s, state.rollout_changed_at) == (200.0, 5000.0)
    state = append(state, ACT["pause"](state), at=5100.0)
    assert state.rollout_step_s == 300.0
    state = append(state, ACT["resume"](state), at=6000.0)
    state = append(state, ACT["advance"](state), at=7000.0)
    assert state.rollout_step_s == 0.0


def test_who_resumes_what_the_controller_paused_gives_the_step_its_whole_time_again() -> None:
    state = ramp()
    state = append(state, pause(state, actor="controller", reason="deadline"), at=700.0)
    state = append(state, ACT["resume"](state), at=900.0)
    assert state.rollout_step_s == 0.0


def test_what_judges_a_rollout_is_recorded_and_no_secret_with_it() -> None:
    rules = dataclasses.replace(RAMP, max_ctr_drop=0.01, webhook_url="https://chat.example/T0K3N")
    state = ramp(rules)
    assert rules_of(state) == dataclasses.replace(rules, webhook_url=None)
    assert state.rollout is not None
    written = encode(Entry(sequence=7, at=1.5, record=state.rollout))
    assert b"T0K3N" not in written
    assert decode(written, sequence=7).record == state.rollout
    state = append(state, ACT["advance"](state))
    assert rules_of(state).max_ctr_drop == 0.01


def test_a_record_of_an_older_release_still_reads_and_may_be_ended() -> None:
    body = json.loads(encode(Entry(sequence=1, at=1.5, record=ACT["start"](state_in(None)))))
    for key in ("hash", "step_index", "stage", "rules"):
        del body[key]
    old = decode(seal({**body, "schema_version": 3}), sequence=1).record
    assert isinstance(old, RolloutChanged)
    state = append(state_in(None), old)
    config = RolloutConfig(steps=RAMP.steps, require_approval=True, max_conversion_drop=0.07)
    rules = rules_of(state, config)
    assert (rules.num_stages, rules.max_conversion_drop) == (1, 0.07)
    assert current_step(state, rules) == Step(analysis=Analysis())
    assert append(state, ACT["advance"](state)).stable == "v3"
    assert append(state, ACT["abort"](state)).stable == "v1"
    assert SCHEMA_VERSION > 3


rules_drawn = st.sampled_from([None, RAMP, dataclasses.replace(RAMP, require_approval=True)])


@given(rules_drawn, st.lists(st.tuples(st.sampled_from(ACTIONS), st.booleans()), max_size=25))
def test_any_sequence_of_racing_actions_keeps_the_promises(
    rules: RolloutConfig | None, actions: list[tuple[Action, bool]]
) -> None:
    """`True` is an action that was decided on the state before the last, as the loser of a race."""
    state = before = state_in(None)
    for action, is_late in actions:
        seen = before if is_late else state
        act = ACT[action] if action != "start" else lambda s: start(s, "v3", rules=rules, actor="o")
        try:
            act(seen)
            record = act(state)  # the log decides anew on the newest state
        except TransitionError:
            continue
        before, state = state, append(state, record)
        check_invariants(before, state)


def check_invariants(before: State, after: State) -> None:
    old, new = before.rollout, after.rollout
    assert new is not None
    on_trial = new.phase in ("canary", "paused")
    assert (new.weight_fraction > 0) == on_trial == (new.canary is not None)
    if old is not None and old.rollout_id == new.rollout_id:
        assert old.phase in ("canary", "paused"), "an end is final: of two racing ends one succeeds"
        assert not on_trial or new.weight_fraction >= old.weight_fraction
        assert not on_trial or new.step_index >= old.step_index
        if new.phase == "promoted":
            assert (new.stable, new.previous) == (old.canary, old.stable)
        else:
            assert (new.stable, new.previous) == (old.stable, old.previous)
    else:
        assert on_trial
        assert new.stable == before.stable


@pytest.mark.parametrize("second", ["promote", "abort", "advance"])
@pytest.mark.parametrize("first", ["promote", "abort"])
def test_of_two_racing_ends_exactly_one_succeeds(first: Action, second: Action) -> None:
    state = append(state_in("canary"), ACT[first](state_in("canary")))
    with pytest.raises(TransitionError, match=f"cannot {second}: rollout r0001 was"):
        ACT[second](state)


def test_a_first_weight_must_stay_below_the_second() -> None:
    with pytest.raises(ConfigError, match=r"steps\[3\].set_weight: expected .* more than 0.3"):
        start(state_in(None), "v2", rules=RAMP, weight_fraction=0.3, actor="operator")


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
