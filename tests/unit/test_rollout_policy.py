"""Every phase of measurement and rollout, at every kind of step, before and after its time."""

from __future__ import annotations

import dataclasses

import pytest

from raysys.config import Analysis, Pause, RolloutConfig, Step
from raysys.ledger.records import RolloutPhase
from raysys.rollout.analysis import AnalysisPhase, Measurement
from raysys.rollout.look import VersionTotals
from raysys.rollout.policy import Decision, DecisionKind, decide

CONFIG = RolloutConfig(deadline_s=3600.0)
ANALYSIS, PAUSE = Step(analysis=Analysis()), Step(pause=Pause(duration_s=600))
FOR_PERSON = Step(pause=Pause())
TOTALS = VersionTotals(
    num_requests=0, num_bad=0, num_matured=0, num_converted=0, num_user_buckets=0
)


def measured(phase: AnalysisPhase) -> Measurement:
    return Measurement(
        phase=phase,
        reason="as the figures say",
        canary=TOTALS,
        stable=TOTALS,
        bad_rate_increase=None,
        conversion_difference=None,
    )


def decided(
    phase: AnalysisPhase,
    step_s: float,
    step: Step | None = ANALYSIS,
    rollout: RolloutPhase = "canary",
    config: RolloutConfig = CONFIG,
) -> Decision:
    return decide(measured(phase), phase=rollout, step=step, step_s=step_s, config=config)


@pytest.mark.parametrize(
    ("phase", "step_s", "kind"),
    [
        ("failed", 0.0, "rollback"),
        ("failed", 9999.0, "rollback"),
        ("successful", 0.0, "advance"),
        ("successful", 9999.0, "advance"),
        ("inconclusive", 0.0, "wait"),
        ("inconclusive", 3599.9, "wait"),
        ("inconclusive", 3600.0, "rollback"),
    ],
)
def test_each_outcome_of_an_analysis_has_its_decision(
    phase: AnalysisPhase, step_s: float, kind: DecisionKind
) -> None:
    decision = decided(phase, step_s)
    assert decision.kind == kind
    assert "as the figures say" in decision.reason


@pytest.mark.parametrize("phase", ["successful", "inconclusive"])
def test_a_pause_ends_with_its_time_whatever_is_measured(phase: AnalysisPhase) -> None:
    assert decided(phase, 599.0, PAUSE).kind == "wait"
    assert "1 s of the pause are left" in decided(phase, 599.0, PAUSE).reason
    assert decided(phase, 600.0, PAUSE).kind == "advance"


@pytest.mark.parametrize("step", [ANALYSIS, PAUSE, FOR_PERSON, None])
@pytest.mark.parametrize("phase", ["successful", "inconclusive"])
def test_while_a_person_is_awaited_nothing_goes_on_by_itself(
    phase: AnalysisPhase, step: Step | None
) -> None:
    assert decided(phase, 9e9, step, "paused").kind == "wait"


@pytest.mark.parametrize("step", [ANALYSIS, PAUSE, FOR_PERSON, None])
@pytest.mark.parametrize("rollout", ["canary", "paused"])
def test_a_canary_that_is_proven_worse_is_rolled_back_at_any_step(
    rollout: RolloutPhase, step: Step | None
) -> None:
    assert decided("failed", 0.0, step, rollout).kind == "rollback"


def test_a_missed_deadline_is_named_in_the_reason() -> None:
    decision = decided("inconclusive", 4000.0)
    assert decision.reason.startswith(
        "still inconclusive after 4000 s (rollout.deadline_s is 3600)"
    )


def test_a_missed_deadline_may_ask_a_person_instead() -> None:
    config = dataclasses.replace(CONFIG, on_deadline="pause")
    assert decided("inconclusive", 4000.0, config=config).kind == "pause"
