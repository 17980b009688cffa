"""What to do about a canary, given what was measured and the step that its rollout is at.

    Measurement, phase, step, time in it -> decide() -> Decision -> controller

A pure table, so that every case can be tested. Waiting is the only answer to missing evidence, and
the deadline of an analysis is the only end of waiting: a canary that cannot be shown to be safe is
not promoted. A canary that answers users is rolled back as soon as it is proven to be worse, at
whatever step, also while a person has paused the rollout.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from raysys.config import RolloutConfig, Step
from raysys.ledger.records import RolloutPhase
from raysys.rollout.analysis import Measurement

DecisionKind = Literal["advance", "pause", "rollback", "wait"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What the controller is to do, and why."""

    kind: DecisionKind
    reason: str


def decide(
    measurement: Measurement,
    *,
    phase: RolloutPhase,
    step: Step | None,
    step_s: float,
    config: RolloutConfig,
) -> Decision:
    """Decides on one look.

    Args:
      measurement: The newest look at the traffic of the present weight.
      phase: Of the rollout; only `canary` goes on by itself.
      step: The pause or analysis that it is at, None once all are done.
      step_s: Seconds that the step has run.
      config: The rollout's rules.
    """
    if measurement.phase == "failed":
        return Decision(kind="rollback", reason=measurement.reason)
    if phase != "canary" or step is None:
        return Decision(kind="wait", reason="a person has to resume, promote or abort")
    if step.pause is not None:
        return _after_pause(step.pause.duration_s, step_s)
    if measurement.phase == "successful":
        return Decision(kind="advance", reason=measurement.reason)
    if step_s < config.deadline_s:
        return Decision(kind="wait", reason=measurement.reason)
    return Decision(
        kind=config.on_deadline,
        reason=f"still inconclusive after {step_s:.0f} s (rollout.deadline_s is "
        f"{config.deadline_s:g}): {measurement.reason}",
    )


def _after_pause(duration_s: float | None, step_s: float) -> Decision:
    if duration_s is None:
        return Decision(kind="wait", reason="a person has to resume, promote or abort")
    if step_s < duration_s:
        return Decision(kind="wait", reason=f"{duration_s - step_s:.0f} s of the pause are left")
    return Decision(kind="advance", reason=f"the pause of {duration_s:g} s is over")
