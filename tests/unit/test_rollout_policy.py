"""Every phase before and after the deadline."""

from __future__ import annotations

import pytest

from raysys.config import RolloutConfig
from raysys.rollout.analysis import AnalysisPhase, Measurement, VersionTotals
from raysys.rollout.policy import DecisionKind, decide

CONFIG = RolloutConfig(deadline_s=3600.0)
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


@pytest.mark.parametrize(
    ("phase", "age_s", "kind"),
    [
        ("failed", 0.0, "rollback"),
        ("failed", 9999.0, "rollback"),
        ("successful", 0.0, "promote"),
        ("successful", 9999.0, "promote"),
        ("inconclusive", 0.0, "wait"),
        ("inconclusive", 3599.9, "wait"),
        ("inconclusive", 3600.0, "rollback"),
    ],
)
def test_each_phase_has_its_decision(
    phase: AnalysisPhase, age_s: float, kind: DecisionKind
) -> None:
    decision = decide(measured(phase), age_s, CONFIG)
    assert decision.kind == kind
    assert "as the figures say" in decision.reason


def test_a_missed_deadline_is_named_in_the_reason() -> None:
    decision = decide(measured("inconclusive"), 4000.0, CONFIG)
    assert decision.reason.startswith(
        "still inconclusive after 4000 s (rollout.deadline_s is 3600)"
    )
