"""Where a rollout stands, for people and for whoever is notified.

ledger State -> progress() -> cli, webhook, API
"""

from __future__ import annotations

import dataclasses

from raysys.config import RolloutConfig
from raysys.ledger.state import State
from raysys.rollout.state import current_step, rules_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The step that a canary on trial is at."""

    step: int
    """From 1; one more than `num_steps` once all are done."""
    num_steps: int
    doing: str
    """The step in a few words."""
    waits_for: str
    """What has to come before it goes on."""

    def describe(self) -> str:
        """Returns one line."""
        where = f"step {self.step} of {self.num_steps}" if self.step <= self.num_steps else "done"
        return f"{where}, {self.doing}: waits for {self.waits_for}"


def step_seconds(state: State, now: float) -> float:
    """Returns how long the present step has run, without the pauses that people made."""
    rollout, since = state.rollout, state.rollout_changed_at
    if rollout is None or since is None or rollout.phase != "canary":
        return state.rollout_step_s
    return state.rollout_step_s + max(0.0, now - since)


def progress(state: State, config: RolloutConfig, now: float) -> Progress | None:
    """Returns where the rollout stands; None if no canary is on trial.

    Args:
      state: The ledger so far.
      config: Judges a rollout that recorded no rules.
      now: UNIX time.

    Raises:
      ConfigError: The rollout recorded rules that this release does not know.
    """
    rollout = state.rollout
    if rollout is None or rollout.canary is None:
        return None
    rules = rules_of(state, config)
    step = current_step(state, rules)
    return Progress(
        step=rollout.step_index + 1,
        num_steps=len(rules.plan),
        doing="all steps done" if step is None else step.describe(),
        waits_for=_waits_for(state, rules, step_seconds(state, now)),
    )


def _waits_for(state: State, rules: RolloutConfig, step_s: float) -> str:
    rollout, step = state.rollout, current_step(state, rules)
    assert rollout is not None
    if rollout.phase == "paused":
        return "approval by `raysys rollout resume`" if step is None else "`raysys rollout resume`"
    assert step is not None, "after the last step a rollout is paused or ended"
    if step.pause is not None:
        return f"the rest of the pause, {max(0.0, (step.pause.duration_s or 0.0) - step_s):.0f} s"
    left_s = max(0.0, rules.deadline_s - step_s)
    return f"evidence, for {left_s:.0f} s more, then {rules.on_deadline}"
