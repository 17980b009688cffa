"""Canary analysis: judges a canary's traffic so far against stable's over the same time.

    VersionCounters x 2 -> judge() -> Measurement -> policy.decide()

Do more requests go bad (fail, or answer late)? Do fewer lead to a click, or to a purchase? Do the
chosen items stand lower? Is the canary slow, or broken? Each question gets bounds that hold over
all looks together, so one may look every second and act on the first clear answer.

How the error probability is spent. A canary that is harmless can only be failed wrongly, and any
question at any weight of the rollout could do so: they share the probability (`_SHARES`, split
evenly over the weights). A canary beyond tolerance can only be passed wrongly, and all questions
that a pass asks must agree: each has the whole of it (an intersection-union test, Berger 1982). So
a rollout ends wrongly with at most that probability.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from raysys.config import RolloutConfig
from raysys.rollout.counters import SURFACES, VersionCounters
from raysys.rollout.questions import (
    P99,
    Difference,
    Mean,
    compare_p99,
    mean_difference,
    rate_increase,
)

AnalysisPhase = Literal["successful", "failed", "inconclusive"]

MIN_USER_BUCKETS = 30
"""Buckets with matured requests, of each version, that bounds of means need: they rest on sums over
users being about normal, and 30 buckets are about 36 users or more."""
MIN_RANKED = 100
"""Answers with an outcome of known rank, of each version, that NDCG is compared on."""
_SHARES = {"bad": 1 / 3, "ctr": 1 / 3, "conversion": 1 / 12, "ndcg": 1 / 12, "p99": 1 / 12}
_SURFACE_SHARE = 1 / 12 / (3 * len(SURFACES))
"""Of each question about one surface: bad, CTR, conversion."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VersionTotals:
    """What one version did, over all users."""

    num_requests: int
    num_bad: int
    num_matured: int
    num_converted: int
    num_user_buckets: int
    """Buckets of users that have matured requests."""
    num_invalid: int = 0
    num_clicked: int = 0

    @classmethod
    def of(cls, counters: VersionCounters, surface: int | slice = slice(None)) -> VersionTotals:
        """Sums counters over the buckets, and over all surfaces or of one."""
        return cls(
            num_requests=int(counters.num_requests[surface].sum()),
            num_bad=int(counters.num_bad[surface].sum()),
            num_matured=int(counters.num_matured[surface].sum()),
            num_converted=int(counters.num_converted[surface].sum()),
            num_user_buckets=int(_buckets(counters.num_matured[surface])),
            num_invalid=int(counters.num_invalid[surface].sum()),
            num_clicked=int(counters.num_clicked[surface].sum()),
        )


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """Both versions' counters, and what the judge makes of them."""

    canary: VersionCounters
    stable: VersionCounters
    config: RolloutConfig
    min_requests: int

    def to_fail(self, share: float) -> float:
        return self.config.error_probability * share / self.config.num_stages

    def totals(self, surface: int | slice = slice(None)) -> tuple[VersionTotals, VersionTotals]:
        return VersionTotals.of(self.canary, surface), VersionTotals.of(self.stable, surface)


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
    look = _Look(
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
        bad_rate_increase=_bad(look, slice(None), _SHARES["bad"]),
        conversion_difference=None,
        surfaces=_surfaces(look),
    )
    if few := _missing(look, "num_requests", "answered {} requests"):
        return _decided(found, *_without_minimum(look, found, few))
    found = dataclasses.replace(found, p99=_p99(look))
    if few := _missing(look, "num_matured", "has {} requests old enough to judge"):
        return _decided(found, *_without_outcomes(look, found, few))
    found = dataclasses.replace(
        found,
        ctr_difference=_outcome(look, "num_clicked", slice(None), _SHARES["ctr"]),
        conversion_difference=_outcome(look, "num_converted", slice(None), _SHARES["conversion"]),
        ndcg_difference=_ndcg(look),
    )
    return _decided(found, *_verdict(look, found))


def _decided(found: Measurement, phase: AnalysisPhase, reason: str) -> Measurement:
    return dataclasses.replace(found, phase=phase, reason=reason)


def _without_minimum(look: _Look, found: Measurement, few: str) -> tuple[AnalysisPhase, str]:
    """What needs no minimum of requests: a broken canary shows at once."""
    most = look.config.max_invalid
    if found.canary.num_invalid > most:
        return "failed", (
            f"{found.canary.num_invalid} of {found.canary.num_requests} canary answers had scores "
            f"that are no numbers, tolerated are {most} (rollout.max_invalid)"
        )
    bad = found.bad_rate_increase
    if bad is not None and bad.low > look.config.max_bad_rate_increase:
        return "failed", _describe_bad(look, bad)
    return "inconclusive", few


def _without_outcomes(look: _Look, found: Measurement, few: str) -> tuple[AnalysisPhase, str]:
    """What is known before any request has matured."""
    phase, reason = _without_minimum(look, found, few)
    if phase == "failed":
        return phase, reason
    if found.p99 is not None and found.p99.is_exceeded:
        return "failed", _describe_p99(found.p99)
    for surface in _sliced(look, "num_requests"):
        bad = _bad(look, surface, _SURFACE_SHARE) if _looks_bad(look, surface) else None
        if bad is not None and bad.low > look.config.max_bad_rate_increase:
            return "failed", _describe_bad(look, bad, surface)
    return phase, reason


def _verdict(look: _Look, found: Measurement) -> tuple[AnalysisPhase, str]:
    phase, reason = _without_outcomes(look, found, "")
    if phase == "failed":
        return phase, reason
    for difference, described, tolerance in _outcomes(look, found):
        if _is_proven_drop(difference, tolerance):
            return "failed", described
    config, bad = look.config, found.bad_rate_increase
    assert bad is not None, "there are requests"
    if bad.high > config.max_bad_rate_increase:
        return "inconclusive", _describe_bad(look, bad)
    p99 = found.p99
    if p99 is not None and p99.limit_ms is not None and p99.canary_ms > p99.limit_ms:
        return "inconclusive", _describe_p99(p99)
    return _pass_by_outcomes(look, found)


def _pass_by_outcomes(look: _Look, found: Measurement) -> tuple[AnalysisPhase, str]:
    ctr, conversion = found.ctr_difference, found.conversion_difference
    assert ctr is not None and conversion is not None, "nothing is missing"
    if ctr.low <= -look.config.tolerated_ctr_drop:
        return "inconclusive", _describe_outcome(look, ctr, "num_clicked")
    tolerated = conversion.low > -look.config.max_conversion_drop
    has_purchases = found.canary.num_converted or found.stable.num_converted
    described = (
        _describe_outcome(look, conversion, "num_converted")
        if has_purchases and not tolerated
        else _describe_outcome(look, ctr, "num_clicked")
    )
    return ("successful" if tolerated else "inconclusive"), described


def _outcomes(look: _Look, found: Measurement) -> Iterator[tuple[Difference, str, float]]:
    """Each difference in what came of the answers, how it is told, and what is tolerated."""
    config = look.config
    for name, tolerance, whole in (
        ("num_clicked", config.tolerated_ctr_drop, found.ctr_difference),
        ("num_converted", config.max_conversion_drop, found.conversion_difference),
    ):
        if whole is not None:
            yield whole, _describe_outcome(look, whole, name), tolerance
        for surface in _sliced(look, "num_matured"):
            sliced = _outcome(look, name, surface, _SURFACE_SHARE)
            yield sliced, _describe_outcome(look, sliced, name, surface), tolerance
    if found.ndcg_difference is not None:
        yield (
            found.ndcg_difference,
            _describe_ndcg(look, found.ndcg_difference),
            config.max_ndcg_drop,
        )


def _is_proven_drop(difference: Difference, tolerance: float) -> bool:
    return difference.high < 0 and difference.low <= -tolerance


def _bad(look: _Look, surface: int | slice, share: float) -> Difference | None:
    canary = _summed(look.canary.num_bad[surface], look.canary.num_requests[surface])
    stable = _summed(look.stable.num_bad[surface], look.stable.num_requests[surface])
    if min(canary[1].sum(), stable[1].sum()) == 0:
        return None
    return rate_increase(
        canary, stable, to_fail=look.to_fail(share), to_pass=look.config.error_probability
    )


def _looks_bad(look: _Look, surface: int) -> bool:
    """Whether bounds of a surface's bad rate, which take time, could fail the canary."""
    canary, stable = look.totals(surface)
    increase = canary.num_bad / canary.num_requests - stable.num_bad / stable.num_requests
    return increase > look.config.max_bad_rate_increase


def _outcome(look: _Look, name: str, surface: int | slice, share: float) -> Difference:
    config = look.config
    arms = [
        _summed(getattr(arm, name)[surface], arm.num_matured[surface])
        for arm in (look.canary, look.stable)
    ]
    clicked = name == "num_clicked"
    return mean_difference(
        *arms,
        to_fail=look.to_fail(share),
        to_pass=config.error_probability,
        tolerance=config.tolerated_ctr_drop if clicked else config.max_conversion_drop,
    )


def _ndcg(look: _Look) -> Difference | None:
    arms = [(arm.sum_ndcg, arm.num_ranked) for arm in (look.canary, look.stable)]
    if any(n.sum() < MIN_RANKED or (n > 0).sum() < MIN_USER_BUCKETS for _, n in arms):
        return None
    return mean_difference(
        *arms,
        to_fail=look.to_fail(_SHARES["ndcg"]),
        to_pass=look.config.error_probability,
        tolerance=look.config.max_ndcg_drop,
    )


def _p99(look: _Look) -> P99 | None:
    histograms = look.canary.num_by_latency, look.stable.num_by_latency
    if min(counts.sum() for counts in histograms) < look.min_requests:
        return None
    return compare_p99(
        *histograms,
        max_ms=look.config.max_p99_ms,
        max_ratio=look.config.max_p99_ratio,
        error_probability=look.to_fail(_SHARES["p99"]),
    )


def _missing(look: _Look, name: str, has: str) -> str | None:
    needed = f"needs {look.min_requests} (rollout.min_requests)"
    for arm, totals in zip(("canary", "stable"), look.totals(), strict=True):
        if getattr(totals, name) < look.min_requests:
            return f"{arm} {has.format(getattr(totals, name))} and {needed}"
        if name == "num_matured" and totals.num_user_buckets < MIN_USER_BUCKETS:
            return (
                f"the users of {arm} fill {totals.num_user_buckets} of the buckets by which they "
                f"are told apart, {MIN_USER_BUCKETS} are needed: too few users"
            )
    return None


def _sliced(look: _Look, name: str) -> list[int]:
    """Surfaces with enough of both versions; none if all traffic is of one surface."""
    arms = [getattr(arm, name) for arm in (look.canary, look.stable)]
    if sum(bool(any(arm[i].any() for arm in arms)) for i in range(len(SURFACES))) < 2:
        return []
    return [
        i
        for i in range(len(SURFACES))
        if all(arm[i].sum() >= look.min_requests for arm in arms)
        and all((arm[i] > 0).sum() >= MIN_USER_BUCKETS for arm in arms)
    ]


def _surfaces(look: _Look) -> dict[str, dict[str, VersionTotals]]:
    pairs = ((name, look.totals(i)) for i, name in enumerate(SURFACES))
    return {
        name: {"canary": canary, "stable": stable}
        for name, (canary, stable) in pairs
        if canary.num_requests or stable.num_requests
    }


def _summed(sums: Any, requests: Any) -> Mean:
    """Sums over surfaces, where there is more than one."""
    return (sums.sum(axis=0), requests.sum(axis=0)) if sums.ndim == 2 else (sums, requests)


def _buckets(counts: Any) -> int:
    return int(((counts.sum(axis=0) if counts.ndim == 2 else counts) > 0).sum())


def _on(surface: int | slice) -> str:
    return f"on surface {SURFACES[surface]}, " if isinstance(surface, int) else ""


def _describe_bad(look: _Look, bad: Difference, surface: int | slice = slice(None)) -> str:
    canary, stable = look.totals(surface)
    return (
        f"{_on(surface)}{canary.num_bad} of {canary.num_requests} canary answers and "
        f"{stable.num_bad} of {stable.num_requests} stable answers were bad: {_range(bad)}, "
        f"tolerated up to {look.config.max_bad_rate_increase:+.2%}"
    )


def _describe_outcome(
    look: _Look, difference: Difference, name: str, surface: int | slice = slice(None)
) -> str:
    canary, stable = look.totals(surface)
    clicked = name == "num_clicked"
    drop = look.config.tolerated_ctr_drop if clicked else look.config.max_conversion_drop
    return (
        f"{_on(surface)}{getattr(canary, name)} of {canary.num_matured} canary answers and "
        f"{getattr(stable, name)} of {stable.num_matured} stable answers "
        f"{'were clicked' if clicked else 'converted'}: {_range(difference)}, tolerated down to "
        f"{-drop:+.2%}"
    )


def _describe_ndcg(look: _Look, ndcg: Difference) -> str:
    return (
        f"NDCG by outcome, of {look.canary.num_ranked.sum()} canary answers and "
        f"{look.stable.num_ranked.sum()} stable answers: {ndcg.estimate:+.4f}, between "
        f"{ndcg.low:+.4f} and {ndcg.high:+.4f}, tolerated down to {-look.config.max_ndcg_drop:+.4f}"
    )


def _describe_p99(p99: P99) -> str:
    proven = "proven" if p99.is_exceeded else "not proven yet"
    return (
        f"p99 of the canary is {p99.canary_ms:g} ms, of stable {p99.stable_ms:g} ms: over the "
        f"limit of {p99.limit_ms:g} ms, {proven}"
    )


def _range(difference: Difference) -> str:
    return f"{difference.estimate:+.2%}, between {difference.low:+.2%} and {difference.high:+.2%}"
