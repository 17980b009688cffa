"""What to do about a canary, given what was measured and how long it has been on trial.

    Measurement, age -> decide() -> Decision -> controller

A pure table, so that every case can be tested. Waiting is the only answer to missing evidence, and
the deadline is the only end of waiting: a canary that cannot be shown to be safe is not promoted.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from raysys.config import RolloutConfig
from raysys.rollout.analysis import Measurement

DecisionKind = Literal["promote", "rollback", "wait"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What the controller is to do, and why."""

    kind: DecisionKind
    reason: str


def decide(measurement: Measurement, age_s: float, config: RolloutConfig) -> Decision:
    """Decides on one look.

    Args:
      measurement: The newest look at the rollout's traffic.
      age_s: Seconds since the rollout started.
      config: Its `deadline_s` ends an inconclusive trial.
    """
    if measurement.phase == "failed":
        return Decision(kind="rollback", reason=measurement.reason)
    if measurement.phase == "successful":
        return Decision(kind="promote", reason=measurement.reason)
    if age_s >= config.deadline_s:
        return Decision(
            kind="rollback",
            reason=f"still inconclusive after {age_s:.0f} s (rollout.deadline_s is "
            f"{config.deadline_s:g}): {measurement.reason}",
        )
    return Decision(kind="wait", reason=measurement.reason)
