"""Canary analysis: judges a canary's traffic so far against stable's over the same time.

    VersionCounters x 2 -> judge() -> Measurement -> policy.decide()

Two questions: do more requests go bad (fail, or answer late), and do fewer convert? Each gets
bounds for "canary minus stable" that hold over all looks together, so one may look every second and
act on the first clear answer. Requests of one user are correlated, which is measured and paid for.

How the error probability is spent. A canary that is harmless can only be failed wrongly, and
either question could do so: each may with half of the probability. A canary beyond tolerance can
only be passed wrongly, and both questions must agree to pass it: each has the whole of it (an
intersection-union test, Berger 1982). So a rollout ends wrongly with at most that probability.

Suffixes: _c = canary, _s = stable.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from raysys.config import RolloutConfig
from raysys.rollout.bounds import (
    cluster_variance,
    design_effect,
    drift_margin,
    rate_lower_bound,
    rate_upper_bound,
)
from raysys.rollout.counters import Counts, VersionCounters

AnalysisPhase = Literal["successful", "failed", "inconclusive"]

MIN_USER_BUCKETS = 30
"""Buckets with matured requests, of each version, that the conversion bounds need: they rest on
sums over users being about normal, and 30 buckets are about 36 users or more."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VersionTotals:
    """What one version did, over all users."""

    num_requests: int
    num_bad: int
    num_matured: int
    num_converted: int
    num_user_buckets: int
    """Buckets of users that have matured requests."""

    @classmethod
    def of(cls, counters: VersionCounters) -> VersionTotals:
        """Sums counters over the buckets."""
        return cls(
            num_requests=int(counters.num_requests.sum()),
            num_bad=int(counters.num_bad.sum()),
            num_matured=int(counters.num_matured.sum()),
            num_converted=int(counters.num_converted.sum()),
            num_user_buckets=int((counters.num_matured > 0).sum()),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A rate of the canary minus that of stable."""

    estimate: float
    low: float
    high: float
    """Each bound holds over all looks; the module's docstring says with which probability."""


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

    def to_json(self) -> dict[str, Any]:
        """Returns what the ledger and the API keep of it: finite numbers, text and None."""
        return dataclasses.asdict(self)


def judge(canary: VersionCounters, stable: VersionCounters, config: RolloutConfig) -> Measurement:
    """Judges all traffic of one rollout so far.

    FAILED: the canary's bad rate is proven to exceed stable's by more than tolerated (from the
    first requests on: this bound needs no minimum), or its conversion is proven to be lower and
    not proven to be within tolerance. SUCCESSFUL: both are proven to be within tolerance, on at
    least `config.min_requests` requests of each version. Otherwise INCONCLUSIVE.
    """
    totals_c, totals_s = VersionTotals.of(canary), VersionTotals.of(stable)
    bad = _bad_rate_increase(canary, stable, config)
    missing = _missing(totals_c, totals_s, config)
    conversion = None if missing else _conversion_difference(canary, stable, config)
    phase, reason = _verdict(totals_c, totals_s, bad, conversion, missing, config)
    return Measurement(
        phase=phase,
        reason=reason,
        canary=totals_c,
        stable=totals_s,
        bad_rate_increase=bad,
        conversion_difference=conversion,
    )


def _bad_rate_increase(
    canary: VersionCounters, stable: VersionCounters, config: RolloutConfig
) -> Difference | None:
    bad_c, n_c = _independent_counts(canary.num_bad, canary.num_requests)
    bad_s, n_s = _independent_counts(stable.num_bad, stable.num_requests)
    if min(n_c, n_s) == 0:
        return None
    # Each version's own bound takes half of the level, since either may be wrong.
    to_fail, to_pass = config.error_probability / 4, config.error_probability / 2
    return Difference(
        estimate=bad_c / n_c - bad_s / n_s,
        low=rate_lower_bound(bad_c, n_c, to_fail) - rate_upper_bound(bad_s, n_s, to_fail),
        high=rate_upper_bound(bad_c, n_c, to_pass) - rate_lower_bound(bad_s, n_s, to_pass),
    )


def _independent_counts(events_b: Counts, requests_b: Counts) -> tuple[float, float]:
    """Counts one user's ten failures as fewer, since they are not the evidence of ten users."""
    effect = design_effect(events_b, requests_b)
    return events_b.sum() / effect, requests_b.sum() / effect


def _missing(canary: VersionTotals, stable: VersionTotals, config: RolloutConfig) -> str | None:
    for name, totals in (("canary", canary), ("stable", stable)):
        needed = f"needs {config.min_requests} (rollout.min_requests)"
        if totals.num_requests < config.min_requests:
            return f"{name} answered {totals.num_requests} requests and {needed}"
        if totals.num_matured < config.min_requests:
            return f"{name} has {totals.num_matured} requests old enough to judge and {needed}"
        if totals.num_user_buckets < MIN_USER_BUCKETS:
            return (
                f"the users of {name} fill {totals.num_user_buckets} of the buckets by which they "
                f"are told apart, {MIN_USER_BUCKETS} are needed: too few users"
            )
    return None


def _conversion_difference(
    canary: VersionCounters, stable: VersionCounters, config: RolloutConfig
) -> Difference:
    estimate = _conversion_rate(canary) - _conversion_rate(stable)
    variance = _conversion_variance(canary, stable)
    # The bounds are to be tight when they are as wide as the tolerance: then it is decided.
    scale = config.max_conversion_drop
    return Difference(
        estimate=estimate,
        low=estimate - drift_margin(variance, config.error_probability, scale=scale),
        high=estimate + drift_margin(variance, config.error_probability / 2, scale=scale),
    )


def _conversion_rate(counters: VersionCounters) -> float:
    return float(counters.num_converted.sum() / counters.num_matured.sum())


def _conversion_variance(canary: VersionCounters, stable: VersionCounters) -> float:
    """The larger of two estimates: of each version by itself, and as if the versions were equal.

    A small canary that happens to have few conversions would by itself look precise as well as
    poor, and would be failed too often. One conversion and one other request are added, so that
    no conversions at all do not look like certainty.
    """
    arms = [(arm.num_converted, arm.num_matured) for arm in (canary, stable)]
    apart = sum(cluster_variance(converted, matured) for converted, matured in arms)
    num_matured = sum(matured.sum() for _, matured in arms)
    num_converted = min(sum(converted.sum() for converted, _ in arms), num_matured)
    rate = (num_converted + 1) / (num_matured + 2)
    effect = sum(design_effect(*arm) * arm[1].sum() for arm in arms) / num_matured
    equal = effect * rate * (1 - rate) * sum(1 / matured.sum() for _, matured in arms)
    return float(max(apart, equal))


def _verdict(
    canary: VersionTotals,
    stable: VersionTotals,
    bad: Difference | None,
    conversion: Difference | None,
    missing: str | None,
    config: RolloutConfig,
) -> tuple[AnalysisPhase, str]:
    if bad is not None and bad.low > config.max_bad_rate_increase:
        return "failed", _describe_bad(canary, stable, bad, config)
    if missing is not None:
        return "inconclusive", missing
    assert bad is not None and conversion is not None, "nothing is missing"
    bad_tolerated = bad.high <= config.max_bad_rate_increase
    conversion_tolerated = conversion.low > -config.max_conversion_drop
    described = _describe_conversion(canary, stable, conversion, config)
    if conversion.high < 0 and not conversion_tolerated:
        return "failed", described
    if not bad_tolerated:
        return "inconclusive", _describe_bad(canary, stable, bad, config)
    return ("successful" if conversion_tolerated else "inconclusive"), described


def _describe_bad(
    canary: VersionTotals, stable: VersionTotals, bad: Difference, config: RolloutConfig
) -> str:
    return (
        f"{canary.num_bad} of {canary.num_requests} canary answers and {stable.num_bad} of "
        f"{stable.num_requests} stable answers were bad: {_range(bad)}, tolerated up to "
        f"{config.max_bad_rate_increase:+.2%}"
    )


def _describe_conversion(
    canary: VersionTotals, stable: VersionTotals, conversion: Difference, config: RolloutConfig
) -> str:
    return (
        f"{canary.num_converted} of {canary.num_matured} canary answers and "
        f"{stable.num_converted} of {stable.num_matured} stable answers converted: "
        f"{_range(conversion)}, tolerated down to {-config.max_conversion_drop:+.2%}"
    )


def _range(difference: Difference) -> str:
    return f"{difference.estimate:+.2%}, between {difference.low:+.2%} and {difference.high:+.2%}"
