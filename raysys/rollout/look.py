"""One look at a canary: both versions' counters, and every figure that the judge asks for.

VersionCounters x 2, rules -> Look -> rates, differences, p99, over all traffic and by surface

Who asks says with how much of the error probability; `SHARES` says how it is split.
"""

from __future__ import annotations

import dataclasses
from typing import Any

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

MIN_USER_BUCKETS = 30
"""Buckets with matured requests, of each version, that bounds of means need: they rest on sums over
users being about normal, and 30 buckets are about 36 users or more."""
MIN_RANKED = 100
"""Answers with an outcome of known rank, of each version, that NDCG is compared on."""
SHARES = {"bad": 1 / 3, "ctr": 1 / 3, "conversion": 1 / 12, "ndcg": 1 / 12, "p99": 1 / 12}
SURFACE_SHARE = 1 / 12 / (3 * len(SURFACES))
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
class Look:
    """Both versions' counters, and the rules that they are judged by."""

    canary: VersionCounters
    stable: VersionCounters
    config: RolloutConfig
    min_requests: int

    def to_fail(self, share: float) -> float:
        """Returns the chance that a question of this share may fail an equal canary."""
        return self.config.error_probability * share / self.config.num_stages

    def totals(self, surface: int | slice = slice(None)) -> tuple[VersionTotals, VersionTotals]:
        """Returns what canary and stable did, on all surfaces or on one."""
        return VersionTotals.of(self.canary, surface), VersionTotals.of(self.stable, surface)


def bad_rate_increase(look: Look, surface: int | slice, share: float) -> Difference | None:
    """Returns how many more bad answers the canary gives; None before both answered."""
    canary = _summed(look.canary.num_bad[surface], look.canary.num_requests[surface])
    stable = _summed(look.stable.num_bad[surface], look.stable.num_requests[surface])
    if min(canary[1].sum(), stable[1].sum()) == 0:
        return None
    return rate_increase(
        canary, stable, to_fail=look.to_fail(share), to_pass=look.config.error_probability
    )


def looks_bad(look: Look, surface: int) -> bool:
    """Returns whether bounds of a surface's bad rate, which take time, could fail the canary."""
    canary, stable = look.totals(surface)
    increase = canary.num_bad / canary.num_requests - stable.num_bad / stable.num_requests
    return increase > look.config.max_bad_rate_increase


def outcome_difference(look: Look, name: str, surface: int | slice, share: float) -> Difference:
    """Returns the difference in CTR (`num_clicked`) or conversion (`num_converted`)."""
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


def ndcg_difference(look: Look) -> Difference | None:
    """Returns the difference in NDCG by outcome; None on too few outcomes of known rank."""
    arms = [(arm.sum_ndcg, arm.num_ranked) for arm in (look.canary, look.stable)]
    if any(n.sum() < MIN_RANKED or (n > 0).sum() < MIN_USER_BUCKETS for _, n in arms):
        return None
    return mean_difference(
        *arms,
        to_fail=look.to_fail(SHARES["ndcg"]),
        to_pass=look.config.error_probability,
        tolerance=look.config.max_ndcg_drop,
    )


def latency(look: Look) -> P99 | None:
    """Returns both versions' p99 and what limits it; None on too few answers."""
    histograms = look.canary.num_by_latency, look.stable.num_by_latency
    if min(counts.sum() for counts in histograms) < look.min_requests:
        return None
    return compare_p99(
        *histograms,
        max_ms=look.config.max_p99_ms,
        max_ratio=look.config.max_p99_ratio,
        error_probability=look.to_fail(SHARES["p99"]),
    )


def missing(look: Look, name: str, has: str) -> str | None:
    """Returns of what there is too little to judge; None if there is enough."""
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


def sliced(look: Look, name: str) -> list[int]:
    """Returns the surfaces with enough of both versions; none if all traffic is of one surface."""
    arms = [getattr(arm, name) for arm in (look.canary, look.stable)]
    if sum(bool(any(arm[i].any() for arm in arms)) for i in range(len(SURFACES))) < 2:
        return []
    return [
        i
        for i in range(len(SURFACES))
        if all(arm[i].sum() >= look.min_requests for arm in arms)
        and all((arm[i] > 0).sum() >= MIN_USER_BUCKETS for arm in arms)
    ]


def by_surface(look: Look) -> dict[str, dict[str, VersionTotals]]:
    """Returns surface -> totals of both versions, of surfaces that have traffic."""
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
