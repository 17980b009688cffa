"""The rollout's legal transitions, as builders of the ledger record that makes each of them.

    log.transact(lambda state: start(state, "v0002-1a2b3c", rules=config.rollout, actor="operator"))

    (none) | promoted | rolled_back --start--> canary | paused
    canary --advance--> canary | paused | promoted        the controller, to the next step
    canary --pause----> paused
    paused --resume---> canary | paused | promoted        a person, also as an approval
    canary | paused --promote--> promoted
    canary | paused --abort----> rolled_back

In phase canary the controller goes on by itself, in phase paused only a person does. A builder sees
the folded ledger and returns the record to append, or raises and changes nothing. Whoever loses the
race for the next ledger entry decides anew on the new state, so of two operators that promote and
abort at once exactly one succeeds, and the other is told why not. Words as in Argo Rollouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from raysys.config import RolloutConfig, Step, parse_rollout
from raysys.errors import ConfigError, TransitionError, UnknownVersionError
from raysys.ledger.records import RolloutChanged, RolloutPhase
from raysys.ledger.state import State

Action = Literal["start", "advance", "pause", "resume", "promote", "abort"]

_ON_TRIAL: frozenset[RolloutPhase] = frozenset({"canary", "paused"})
_STARTED = frozenset[RolloutPhase]({"canary", "paused"})
_FURTHER = frozenset[RolloutPhase]({"canary", "paused", "promoted"})
TRANSITIONS: Mapping[tuple[RolloutPhase | None, Action], frozenset[RolloutPhase]] = {
    (None, "start"): _STARTED,
    ("promoted", "start"): _STARTED,
    ("rolled_back", "start"): _STARTED,
    ("canary", "advance"): _FURTHER,
    ("canary", "pause"): frozenset({"paused"}),
    ("paused", "resume"): _FURTHER,
    ("canary", "promote"): frozenset({"promoted"}),
    ("paused", "promote"): frozenset({"promoted"}),
    ("canary", "abort"): frozenset({"rolled_back"}),
    ("paused", "abort"): frozenset({"rolled_back"}),
}
"""(phase before, None if there never was a rollout; action) -> phases that may follow, by the plan.
All else is refused."""


def rules_of(state: State, otherwise: RolloutConfig | None = None) -> RolloutConfig:
    """Returns what judges the last rollout: what was recorded when it started.

    Args:
      otherwise: Judges a rollout that recorded no rules, as those of older releases.

    Raises:
      ConfigError: Another release recorded rules that this one does not know.
    """
    if state.rollout_rules is None:
        # Without rules there is one plan only, whatever the file says by now.
        return dataclasses.replace(otherwise or RolloutConfig(), steps=(), require_approval=False)
    return parse_rollout(state.rollout_rules)


def current_step(state: State, rules: RolloutConfig) -> Step | None:
    """Returns the pause or analysis that the rollout is at; None without one, or once all are
    done."""
    rollout = state.rollout
    if rollout is None or rollout.phase not in _ON_TRIAL:
        return None
    return rules.plan[rollout.step_index] if rollout.step_index < len(rules.plan) else None


def is_awaiting_person(step: Step | None) -> bool:
    """Whether a step ends only when somebody resumes: a pause without a time, or after the last."""
    return step is None or (step.pause is not None and step.pause.duration_s is None)


def start(
    state: State,
    version: str,
    *,
    actor: str,
    rules: RolloutConfig | None = None,
    weight_fraction: float | None = None,
) -> RolloutChanged:
    """Puts a committed version on trial beside stable.

    Args:
      state: The ledger so far.
      version: The canary.
      actor: `operator`, `controller`, or whoever else asks.
      rules: Steps and thresholds, which are recorded. Without, one weight and one analysis, judged
        by the controller's config.
      weight_fraction: Share of users that it answers first, in (0, 1); the rules' by default.

    Raises:
      ConfigError: The weight is not a share that leaves users to both versions.
      TransitionError: A canary is on trial already, or the version is stable already.
      UnknownVersionError: No version of that name was committed.
    """
    _check(state, "start")
    if weight_fraction is not None and not 0 < weight_fraction < 1:
        raise ConfigError(f"weight_fraction: expected a fraction in (0, 1), got {weight_fraction}")
    judged_by = rules or RolloutConfig()
    if weight_fraction is not None:
        judged_by = judged_by.with_first_weight(weight_fraction)
    if version not in state.versions:
        known = ", ".join(state.versions) or "none: run an update first"
        raise UnknownVersionError(f"no version {version!r} was committed; known: {known}")
    stable = state.stable
    assert stable is not None, "there are versions, so one of them is stable"
    if version == stable:
        raise TransitionError(
            f"{version} is stable already and answers everyone; start another version"
        )
    first, weight = judged_by.plan[1], judged_by.plan[0].set_weight
    assert weight is not None, "a plan starts with a weight"
    return RolloutChanged(
        rollout_id=f"r{state.num_rollouts + 1:04d}",
        phase="paused" if is_awaiting_person(first) else "canary",
        stable=stable,
        canary=version,
        previous=state.previous,
        weight_fraction=weight,
        actor=actor,
        reason=f"{version} on trial against {stable} with {weight:.2%} of users",
        measurement=None,
        step_index=1,
        rules=judged_by.rules() if rules else None,
    )


def advance(
    state: State, *, actor: str, reason: str, measurement: Mapping[str, Any] | None = None
) -> RolloutChanged:
    """Goes to the next step, since what the present one waits for has come.

    After the last step the canary is promoted, or waits for approval if the rules ask for it.

    Raises:
      TransitionError: No canary is on trial, or it is paused.
    """
    _check(state, "advance")
    rules = rules_of(state)
    return _next(state, rules, actor, reason, measurement, approved=not rules.require_approval)


def pause(
    state: State, *, actor: str, reason: str, measurement: Mapping[str, Any] | None = None
) -> RolloutChanged:
    """Keeps the canary at its weight until somebody resumes.

    Raises:
      TransitionError: No canary is on trial, or it is paused already.
    """
    _check(state, "pause")
    return dataclasses.replace(_on_trial(state), phase="paused", **_by(actor, reason, measurement))


def resume(state: State, *, actor: str, reason: str) -> RolloutChanged:
    """Goes on with the step that was paused; ends a pause of the plan; approves what waits for it.

    Raises:
      TransitionError: No canary is paused.
    """
    _check(state, "resume")
    rules = rules_of(state)
    if is_awaiting_person(current_step(state, rules)):
        done = _on_trial(state).step_index >= len(rules.plan)
        return _next(state, rules, actor, reason, None, done or not rules.require_approval)
    return dataclasses.replace(_on_trial(state), phase="canary", **_by(actor, reason, None))


def promote(
    state: State, *, actor: str, reason: str, measurement: Mapping[str, Any] | None = None
) -> RolloutChanged:
    """Makes the canary stable; the version that was stable becomes previous.

    Raises:
      TransitionError: No canary is on trial.
    """
    _check(state, "promote")
    rollout = _on_trial(state)
    assert rollout.canary is not None
    return dataclasses.replace(
        _ended(rollout, actor, reason, measurement),
        phase="promoted",
        stable=rollout.canary,
        previous=rollout.stable,
    )


def abort(
    state: State, *, actor: str, reason: str, measurement: Mapping[str, Any] | None = None
) -> RolloutChanged:
    """Takes the canary off trial; stable answers everyone again.

    Raises:
      TransitionError: No canary is on trial.
    """
    _check(state, "abort")
    rollout = _on_trial(state)
    return dataclasses.replace(_ended(rollout, actor, reason, measurement), phase="rolled_back")


def _next(
    state: State,
    rules: RolloutConfig,
    actor: str,
    reason: str,
    measurement: Mapping[str, Any] | None,
    approved: bool,
) -> RolloutChanged:
    rollout = _on_trial(state)
    index, weight, stage = rollout.step_index + 1, rollout.weight_fraction, rollout.stage
    if index >= len(rules.plan) and approved:
        return promote(state, actor=actor, reason=reason, measurement=measurement)
    if index < len(rules.plan) and (grown := rules.plan[index].set_weight) is not None:
        index, weight, stage = index + 1, grown, stage + 1
    step = rules.plan[index] if index < len(rules.plan) else None
    return dataclasses.replace(
        rollout,
        phase="paused" if is_awaiting_person(step) else "canary",
        step_index=index,
        weight_fraction=weight,
        stage=stage,
        **_by(actor, reason, measurement),
    )


def _ended(
    rollout: RolloutChanged, actor: str, reason: str, measurement: Mapping[str, Any] | None
) -> RolloutChanged:
    by = _by(actor, reason, measurement)
    return dataclasses.replace(rollout, canary=None, weight_fraction=0.0, **by)


def _by(actor: str, reason: str, measurement: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"actor": actor, "reason": reason, "measurement": measurement, "rules": None}


def _check(state: State, action: Action) -> None:
    before = state.rollout.phase if state.rollout else None
    if (before, action) not in TRANSITIONS:
        raise TransitionError(f"cannot {action}: {_describe(state)}")


def _describe(state: State) -> str:
    rollout = state.rollout
    if rollout is None:
        return "there is no rollout yet; start one first"
    if rollout.phase == "canary":
        return (
            f"rollout {rollout.rollout_id} of {rollout.canary} is on trial; promote, pause or "
            "abort it first"
        )
    if rollout.phase == "paused":
        return (
            f"rollout {rollout.rollout_id} of {rollout.canary} is paused ({rollout.reason}); "
            "resume, promote or abort it first"
        )
    return (
        f"rollout {rollout.rollout_id} was {rollout.phase} already ({rollout.reason}); start "
        "another one first"
    )


def _on_trial(state: State) -> RolloutChanged:
    rollout = state.rollout
    assert rollout is not None and rollout.canary is not None, "on trial is a canary"
    return rollout
