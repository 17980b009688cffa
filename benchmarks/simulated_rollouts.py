"""Simulated rollouts, without HTTP or Ray: how often the judge errs, and how soon it sees a loss.

    PYTHONPATH=.:benchmarks python -c "import simulated_rollouts as s; print(s.run(200))"

A shop whose users have habits of their own and come back: 20,000 users, each with a click rate
drawn from a beta law around 10 %, who come in sessions of three requests. 20 % of them see the
canary. The judge looks after every 1,000 requests, as the controller does, and the first verdict
ends the rollout; after 200 looks it is inconclusive, which at the deadline is a rollback.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from raysys.config import RolloutConfig
from raysys.rollout.analysis import judge
from raysys.rollout.counters import (
    LATENCY_BOUNDARIES_MS,
    NUM_BUCKETS,
    SURFACES,
    VersionCounters,
)

CONFIG = RolloutConfig(min_requests=500, max_ctr_drop=0.015, max_conversion_drop=0.01)
"""Of 10 points of CTR, a loss of 1.5 is tolerated, of 2 is not: that is the 20 % to be caught."""

Look = tuple[VersionCounters, VersionCounters]
Verdict = Callable[[Look], str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shop:
    """The traffic of one simulated rollout."""

    ctr: float = 0.1
    ctr_factor: float = 1.0
    """The canary's click rate over stable's."""
    purchases_per_click: float = 0.2
    bad_rate: float = 0.005
    bad_factor: float = 1.0
    """The canary's bad rate over stable's."""
    median_latency_ms: float = 0.0
    """Lognormal, with a p99 of three times the median. 0 counts no latencies."""
    latency_factor: float = 1.0
    """The canary's latency over stable's."""
    weight_fraction: float = 0.2
    num_users: int = 20_000
    requests_per_look: int = 1000
    session_length: int = 3
    max_looks: int = 200


def looks(rng: np.random.Generator, shop: Shop) -> Iterator[Look]:
    """Yields the counters of canary and stable at each look."""
    on_canary = rng.random(shop.num_users) < shop.weight_fraction
    bucket = rng.integers(0, NUM_BUCKETS, shop.num_users)
    surface = rng.integers(0, len(SURFACES), shop.num_users)
    habit = rng.beta(9 * shop.ctr, 9 * (1 - shop.ctr), shop.num_users)
    habit *= np.where(on_canary, shop.ctr_factor, 1.0)
    activity = rng.gamma(1.0, 1.0, shop.num_users).cumsum()
    arms = {True: VersionCounters.zeros(), False: VersionCounters.zeros()}
    num_sessions = shop.requests_per_look // shop.session_length
    for _ in range(shop.max_looks):
        chosen = np.searchsorted(activity, rng.random(num_sessions) * activity[-1])
        users = np.repeat(chosen, shop.session_length)
        clicked = rng.random(len(users)) < habit[users]
        bought = clicked & (rng.random(len(users)) < shop.purchases_per_click)
        badness = np.where(on_canary[users], shop.bad_factor, 1.0)
        bad = rng.random(len(users)) < shop.bad_rate * badness
        for arm, sums in arms.items():
            mine = on_canary[users] == arm
            at = surface[users[mine]], bucket[users[mine]]
            np.add.at(sums.num_requests, at, 1)
            np.add.at(sums.num_matured, at, 1)
            np.add.at(sums.num_bad, at, bad[mine])
            np.add.at(sums.num_clicked, at, clicked[mine])
            np.add.at(sums.num_converted, at, bought[mine])
        if shop.median_latency_ms:
            _add_latencies(rng, shop, users, on_canary, bucket, arms)
        yield arms[True].copy(), arms[False].copy()


def _add_latencies(
    rng: np.random.Generator,
    shop: Shop,
    users: NDArray[np.int64],
    on_canary: NDArray[np.bool_],
    bucket: NDArray[np.int64],
    arms: dict[bool, VersionCounters],
) -> None:
    latency_ms = shop.median_latency_ms * rng.lognormal(0.0, 0.47, len(users))
    latency_ms *= np.where(on_canary[users], shop.latency_factor, 1.0)
    bins = np.searchsorted(LATENCY_BOUNDARIES_MS, latency_ms)
    for arm, sums in arms.items():
        mine = on_canary[users] == arm
        np.add.at(sums.num_by_latency, (bucket[users[mine]], bins[mine]), 1)


def by_judge(look: Look) -> str:
    """The verdict of one look, by the analysis that the controller uses."""
    return judge(*look, CONFIG).phase


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What became of many rollouts."""

    num_rollouts: int
    num_failed: int
    num_successful: int
    num_inconclusive: int
    median_requests: float
    """Requests of both versions until the verdict."""

    @property
    def rolled_back_fraction(self) -> float:
        """Share that was rolled back; an inconclusive one is, at its deadline."""
        return (self.num_failed + self.num_inconclusive) / self.num_rollouts

    @property
    def failed_fraction(self) -> float:
        """Share that was proven to be worse."""
        return self.num_failed / self.num_rollouts


def run(
    num_rollouts: int, *, seed: int = 0, verdict: Verdict = by_judge, **changes: float
) -> Summary:
    """Simulates rollouts, each with a seed of its own, up to the first look that decides."""
    shop = dataclasses.replace(Shop(), **changes)  # type: ignore[arg-type]
    found: collections.Counter[str] = collections.Counter()
    requests = []
    for number in range(num_rollouts):
        phase, num = "inconclusive", 0
        for look in looks(np.random.default_rng((seed, number)), shop):
            num += shop.requests_per_look
            phase = verdict(look)
            if phase != "inconclusive":
                break
        found[phase] += 1
        requests.append(num)
    return Summary(
        num_rollouts=num_rollouts,
        num_failed=found["failed"],
        num_successful=found["successful"],
        num_inconclusive=found["inconclusive"],
        median_requests=statistics.median(requests),
    )
