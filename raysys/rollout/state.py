"""The rollout's legal transitions, as builders of the ledger record that makes each of them.

    log.transact(lambda state: start(state, "v0002-1a2b3c", weight_fraction=0.2, actor="operator"))

    (none) | promoted | rolled_back --start--> canary --promote--> promoted
                                               canary --abort----> rolled_back

A builder sees the folded ledger and returns the record to append, or raises and changes nothing.
Whoever loses the race for the next ledger entry decides anew on the new state, so of two
operators that promote and abort at once exactly one succeeds, and the other is told why not.
Words as in Argo Rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from raysys.errors import ConfigError, TransitionError, UnknownVersionError
from raysys.ledger.records import RolloutChanged, RolloutPhase
from raysys.ledger.state import State

Action = Literal["start", "promote", "abort"]

TRANSITIONS: Mapping[tuple[RolloutPhase | None, Action], RolloutPhase] = {
    (None, "start"): "canary",
    ("promoted", "start"): "canary",
    ("rolled_back", "start"): "canary",
    ("canary", "promote"): "promoted",
    ("canary", "abort"): "rolled_back",
}
"""(phase before, None if there never was a rollout; action) -> phase after. All else is refused."""


def start(state: State, version: str, *, weight_fraction: float, actor: str) -> RolloutChanged:
    """Puts a committed version on trial beside stable.

    Args:
      state: The ledger so far.
      version: The canary.
      weight_fraction: Share of users that it answers, in (0, 1).
      actor: `operator` or `controller`.

    Raises:
      ConfigError: The weight is not a share that leaves users to both versions.
      TransitionError: A canary is on trial already, or the version is stable already.
      UnknownVersionError: No version of that name was committed.
    """
    phase = _next_phase(state, "start")
    if not 0 < weight_fraction < 1:
        raise ConfigError(f"weight_fraction: expected a fraction in (0, 1), got {weight_fraction}")
    if version not in state.versions:
        known = ", ".join(state.versions) or "none: run an update first"
        raise UnknownVersionError(f"no version {version!r} was committed; known: {known}")
    stable = state.stable
    assert stable is not None, "there are versions, so one of them is stable"
    if version == stable:
        raise TransitionError(
            f"{version} is stable already and answers everyone; start another version"
        )
    return RolloutChanged(
        rollout_id=f"r{state.num_rollouts + 1:04d}",
        phase=phase,
        stable=stable,
        canary=version,
        previous=state.previous,
        weight_fraction=weight_fraction,
        actor=actor,
        reason=f"{version} on trial against {stable} with {weight_fraction:.2%} of users",
        measurement=None,
    )


def promote(
    state: State, *, actor: str, reason: str, measurement: Mapping[str, Any] | None = None
) -> RolloutChanged:
    """Makes the canary stable; the version that was stable becomes previous.

    Raises:
      TransitionError: No canary is on trial.
    """
    phase = _next_phase(state, "promote")
    rollout, canary = _on_trial(state)
    return RolloutChanged(
        rollout_id=rollout.rollout_id,
        phase=phase,
        stable=canary,
        canary=None,
        previous=rollout.stable,
        weight_fraction=0.0,
        actor=actor,
        reason=reason,
        measurement=measurement,
    )


def abort(
    state: State, *, actor: str, reason: str, measurement: Mapping[str, Any] | None = None
) -> RolloutChanged:
    """Takes the canary off trial; stable answers everyone again.

    Raises:
      TransitionError: No canary is on trial.
    """
    phase = _next_phase(state, "abort")
    rollout, _ = _on_trial(state)
    return RolloutChanged(
        rollout_id=rollout.rollout_id,
        phase=phase,
        stable=rollout.stable,
        canary=None,
        previous=rollout.previous,
        weight_fraction=0.0,
        actor=actor,
        reason=reason,
        measurement=measurement,
    )


def _next_phase(state: State, action: Action) -> RolloutPhase:
    before = state.rollout.phase if state.rollout else None
    after = TRANSITIONS.get((before, action))
    if after is None:
        raise TransitionError(f"cannot {action}: {_describe(state)}")
    return after


def _describe(state: State) -> str:
    rollout = state.rollout
    if rollout is None:
        return "there is no rollout yet; start one first"
    if rollout.phase == "canary":
        return (
            f"rollout {rollout.rollout_id} of {rollout.canary} is on trial; promote or abort it "
            "first"
        )
    return (
        f"rollout {rollout.rollout_id} was {rollout.phase} already ({rollout.reason}); start "
        "another one first"
    )


def _on_trial(state: State) -> tuple[RolloutChanged, str]:
    rollout = state.rollout
    assert rollout is not None and rollout.canary is not None, "phase canary has a canary"
    return rollout, rollout.canary
