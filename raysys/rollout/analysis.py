"""Canary analysis: judges a canary's traffic so far against stable's over the same time.

    VersionCounters x 2 -> judge() -> Measurement -> policy.decide()

Do more requests go bad (fail, or answer late)? Do fewer lead to a click, or to a purchase? Do the
chosen items stand lower? Is the canary slow, or broken? Each question gets bounds that hold over
all looks together, so one may look every second and act on the first clear answer.

How the error probability is spent. A canary that is harmless can only be failed wrongly, and any
question at any weight of the rollout could do so: they share the probability (`look.SHARES`, split
evenly over the weights). A canary beyond tolerance can only be passed wrongly, and all questions
that a pass asks must agree: each has the whole of it (an intersection-union test, Berger 1982). So
a rollout ends wrongly with at most that probability.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from raysys.config import RolloutConfig
from raysys.rollout.counters import VersionCounters
from raysys.rollout.look import (
    SHARES,
    SURFACE_SHARE,
    Look,
    VersionTotals,
    bad_rate_increase,
    by_surface,
    latency,
    looks_bad,
    missing,
    ndcg_difference,
    outcome_difference,
    sliced,
)
from raysys.rollout.questions import P99, Difference
from raysys.rollout.words import describe_bad, describe_ndcg, describe_outcome, describe_p99

AnalysisPhase = Literal["successful", "failed", "inconclusive"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The outcome of one look."""

    phase: AnalysisPhase
    reason: str
    """One sentence with the figures that decided."""
    canary: VersionTotals
    stable: VersionTotals
    bad_rate_increase: Difference | None
    """None until both versions answered something."""
    conversion_difference: Difference | None
    """None until both versions have enough matured requests and users."""
    ctr_difference: Difference | None = None
    """The same."""
    ndcg_difference: Difference | None = None
    """None until both versions also have enough outcomes of known rank."""
    p99: P99 | None = None
    """None until both versions have enough answers."""
    surfaces: dict[str, dict[str, VersionTotals]] = dataclasses.field(default_factory=dict)
    """Surface -> `canary` and `stable`, of those that have traffic."""

    def to_json(self) -> dict[str, Any]:
        """Returns what the ledger and the API keep of it: finite numbers, text and None."""
        return dataclasses.asdict(self)


def judge(
    canary: VersionCounters,
    stable: VersionCounters,
    config: RolloutConfig,
    *,
    min_requests: int | None = None,
) -> Measurement:
    """Judges all traffic that one weight of a rollout had so far.

    FAILED: an answer's scores were no numbers; or the canary's bad rate is proven to exceed
    stable's by more than tolerated (these from the first requests on); or its p99 is proven to be
    over the limit; or its CTR, conversion or NDCG is proven to be lower and not proven to be within
    tolerance; or a surface with enough traffic fails by bad rate, CTR or conversion. SUCCESSFUL:
    bad rate, CTR and conversion are proven to be within tolerance, and the observed p99 is, on at
    least `min_requests` requests of each version. Otherwise INCONCLUSIVE.

    Args:
      canary: Counts since the rollout got its present weight.
      stable: The same, over the same time.
      config: Thresholds.
      min_requests: Instead of the config's.
    """
    look = Look(
        canary=canary,
        stable=stable,
        config=config,
        min_requests=config.min_requests if min_requests is None else min_requests,
    )
    totals_c, totals_s = look.totals()
    found = Measurement(
        phase="inconclusive",
        reason="",
        canary=totals_c,
        stable=totals_s,
        bad_rate_increase=bad_rate_increase(look, slice(None), SHARES["bad"]),
        conversion_difference=None,
        surfaces=by_surface(look),
    )
    if few := missing(look, "num_requests", "answered {} requests"):
        return _decided(found, *_without_minimum(look, found, few))
    found = dataclasses.replace(found, p99=latency(look))
    if few := missing(look, "num_matured", "has {} requests old enough to judge"):
        return _decided(found, *_without_outcomes(look, found, few))
    found = dataclasses.replace(
        found,
        ctr_difference=outcome_difference(look, "num_clicked", slice(None), SHARES["ctr"]),
        conversion_difference=outcome_difference(
            look, "num_converted", slice(None), SHARES["conversion"]
        ),
        ndcg_difference=ndcg_difference(look),
    )
    return _decided(found, *_verdict(look, found))


def _decided(found: Measurement, phase: AnalysisPhase, reason: str) -> Measurement:
    return dataclasses.replace(found, phase=phase, reason=reason)


def _without_minimum(look: Look, found: Measurement, few: str) -> tuple[AnalysisPhase, str]:
    """What needs no minimum of requests: a broken canary shows at once."""
    most = look.config.max_invalid
    if found.canary.num_invalid > most:
        return "failed", (
            f"{found.canary.num_invalid} of {found.canary.num_requests} canary answers had scores "
            f"that are no numbers, tolerated are {most} (rollout.max_invalid)"
        )
    bad = found.bad_rate_increase
    if bad is not None and bad.low > look.config.max_bad_rate_increase:
        return "failed", describe_bad(look, bad)
    return "inconclusive", few


def _without_outcomes(look: Look, found: Measurement, few: str) -> tuple[AnalysisPhase, str]:
    """What is known before any request has matured."""
    phase, reason = _without_minimum(look, found, few)
    if phase == "failed":
        return phase, reason
    if found.p99 is not None and found.p99.is_exceeded:
        return "failed", describe_p99(found.p99)
    for surface in sliced(look, "num_requests"):
        if not looks_bad(look, surface):
            continue
        bad = bad_rate_increase(look, surface, SURFACE_SHARE)
        if bad is not None and bad.low > look.config.max_bad_rate_increase:
            return "failed", describe_bad(look, bad, surface)
    return phase, reason


def _verdict(look: Look, found: Measurement) -> tuple[AnalysisPhase, str]:
    phase, reason = _without_outcomes(look, found, "")
    if phase == "failed":
        return phase, reason
    for difference, described, tolerance in _outcomes(look, found):
        if _is_proven_drop(difference, tolerance):
            return "failed", described
    config, bad = look.config, found.bad_rate_increase
    assert bad is not None, "there are requests"
    if bad.high > config.max_bad_rate_increase:
        return "inconclusive", describe_bad(look, bad)
    p99 = found.p99
    if p99 is not None and p99.limit_ms is not None and p99.canary_ms > p99.limit_ms:
        return "inconclusive", describe_p99(p99)
    return _pass_by_outcomes(look, found)


def _pass_by_outcomes(look: Look, found: Measurement) -> tuple[AnalysisPhase, str]:
    ctr, conversion = found.ctr_difference, found.conversion_difference
    assert ctr is not None and conversion is not None, "nothing is missing"
    if ctr.low <= -look.config.tolerated_ctr_drop:
        return "inconclusive", describe_outcome(look, ctr, "num_clicked")
    if conversion.low <= -look.config.max_conversion_drop:
        return "inconclusive", describe_outcome(look, conversion, "num_converted")
    return "successful", describe_outcome(look, ctr, "num_clicked")


def _outcomes(look: Look, found: Measurement) -> Iterator[tuple[Difference, str, float]]:
    """Each difference in what came of the answers, how it is told, and what is tolerated."""
    config = look.config
    for name, tolerance, whole in (
        ("num_clicked", config.tolerated_ctr_drop, found.ctr_difference),
        ("num_converted", config.max_conversion_drop, found.conversion_difference),
    ):
        if whole is not None:
            yield whole, describe_outcome(look, whole, name), tolerance
        for surface in sliced(look, "num_matured"):
            there = outcome_difference(look, name, surface, SURFACE_SHARE)
            yield there, describe_outcome(look, there, name, surface), tolerance
    if found.ndcg_difference is not None:
        yield (
            found.ndcg_difference,
            describe_ndcg(look, found.ndcg_difference),
            config.max_ndcg_drop,
        )


def _is_proven_drop(difference: Difference, tolerance: float) -> bool:
    return difference.high < 0 and difference.low <= -tolerance
