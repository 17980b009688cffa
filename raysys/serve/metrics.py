"""What replicas and the rollout controller tell Prometheus, by version, surface and outcome.

    RankService -> RayMetrics        METRICS: name -> kind, tags -> Ray's agent -> ray_<name>
    ledger State -> ControllerMetrics

Ray's own Serve metrics know no model version, hence these. METRICS is the API of the dashboards:
`k8s/monitoring/dashboard.json` is checked against it. Ray puts `ray_` before each name, and adds
tags of its own, such as `NodeAddress` and `SessionName`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, Protocol, get_args

from ray.util.metrics import Counter, Gauge, Histogram

from raysys.config import Config
from raysys.ledger.records import RolloutPhase
from raysys.ledger.state import State
from raysys.rollout.shadow import ShadowCounts
from raysys.serve.feedback import EventFile
from raysys.serve.shadow import Outcome as ShadowOutcome
from raysys.storage import Root

Outcome = Literal[
    "ok", "slow", "failed", "canary_failed", "canary_invalid", "canary_not_loaded", "forced"
]
"""How a request was answered. `canary_failed`: by stable, after the canary failed;
`canary_invalid`: the same, after the canary gave scores that are no numbers;
`canary_not_loaded`: by stable, since the canary is not resident yet; `forced`: by header."""
FELL_BACK: tuple[Outcome, ...] = ("canary_failed", "canary_invalid")
"""Outcomes by which stable answered in the canary's place."""

LATENCY_BOUNDARIES_MS = [1, 2, 3, 5, 7.5, 10, 15, 25, 50, 75, 100, 150, 200, 300, 500, 1000, 2500]

Kind = Literal["counter", "gauge", "histogram"]


@dataclasses.dataclass(frozen=True, slots=True)
class Described:
    """One metric: its tags are the labels that queries may use."""

    kind: Kind
    description: str
    tags: tuple[str, ...] = ()


REQUESTS = "raysys_requests_total"
LATENCY = "raysys_request_latency_ms"
SHOWN = "raysys_items_shown_total"
FEEDBACK = "raysys_feedback_events_total"
REJECTED = "raysys_rejected_total"
WRITTEN = "raysys_events_written_total"
DROPPED = "raysys_events_dropped_total"
WEIGHT = "raysys_rollout_weight_fraction"
RESIDENT = "raysys_version_resident"
LOAD_FAILING = "raysys_version_load_failing"
SHADOW_REQUESTS = "raysys_shadow_requests_total"
SHADOW_OVERLAP = "raysys_shadow_overlap"
SHADOW_TAU = "raysys_shadow_tau"
PHASE = "raysys_rollout_phase"
STEP = "raysys_rollout_step"
EPSILON_SPENT = "raysys_privacy_epsilon_spent"
EPSILON_LEFT = "raysys_privacy_epsilon_left"

_ANSWER = ("version", "surface", "outcome")
METRICS: Mapping[str, Described] = {
    REQUESTS: Described("counter", "Requests by how they were answered", _ANSWER),
    LATENCY: Described(
        "histogram", "Milliseconds in the replica, from parsed request to answer", _ANSWER
    ),
    SHOWN: Described(
        "counter", "Items of answers, impressions kept or not", ("version", "surface")
    ),
    FEEDBACK: Described(
        "counter", "Feedback events stored: outcome is click, cart or purchase", _ANSWER
    ),
    REJECTED: Described("counter", "Requests refused for want of room, by endpoint", ("endpoint",)),
    WRITTEN: Described("counter", "Rows of events that are durable", ("file",)),
    DROPPED: Described("counter", "Impressions lost while the object store was away", ("file",)),
    WEIGHT: Described("gauge", "Share of users of the canary, as the replica follows it"),
    RESIDENT: Described("gauge", "1 for each version in memory, 0 once dropped", ("version",)),
    LOAD_FAILING: Described(
        "gauge", "1 for each version that should be in memory and cannot be loaded", ("version",)
    ),
    SHADOW_REQUESTS: Described(
        "counter",
        "Requests drawn for shadow scoring, by what became of them",
        ("version", "outcome"),
    ),
    SHADOW_OVERLAP: Described("gauge", "Mean overlap@k of the canary with stable", ("version",)),
    SHADOW_TAU: Described("gauge", "Mean Kendall tau-b of the canary with stable", ("version",)),
    PHASE: Described("gauge", "1 for the phase that the rollout is in", ("phase",)),
    STEP: Described("gauge", "Step of the rollout, from 0"),
    EPSILON_SPENT: Described("gauge", "Privacy budget spent"),
    EPSILON_LEFT: Described("gauge", "Privacy budget left"),
}
"""Every metric of raysys' own. `version` is the canary's in those of the shadow."""


class Metrics(Protocol):
    """What a replica reports; tests count in memory."""

    def ranked(
        self, *, version: str, surface: str, outcome: Outcome, latency_ms: float
    ) -> None: ...
    def shown(self, *, version: str, surface: str, num_items: int) -> None: ...
    def feedback(self, *, version: str, surface: str, kinds: Iterable[str]) -> None: ...
    def rejected(self, endpoint: str) -> None: ...
    def written(self, file: EventFile, num_events: int) -> None: ...
    def dropped(self, file: EventFile, num_events: int) -> None: ...
    def state(
        self, *, weight_fraction: float, resident: Iterable[str], failing: Iterable[str]
    ) -> None: ...
    def shadowed(self, *, version: str, outcome: ShadowOutcome, counts: ShadowCounts) -> None: ...


class RayMetrics:
    """`Metrics` by way of Ray's agent."""

    def __init__(self) -> None:
        self._requests, self._latency = _counter(REQUESTS), _histogram(LATENCY)
        self._shown, self._feedback = _counter(SHOWN), _counter(FEEDBACK)
        self._rejected = _counter(REJECTED)
        self._written, self._dropped = _counter(WRITTEN), _counter(DROPPED)
        self._weight = _gauge(WEIGHT)
        self._resident, self._failing = _Flags(RESIDENT, "version"), _Flags(LOAD_FAILING, "version")
        self._shadow = _counter(SHADOW_REQUESTS)
        self._overlap, self._tau = _gauge(SHADOW_OVERLAP), _gauge(SHADOW_TAU)

    def ranked(self, *, version: str, surface: str, outcome: Outcome, latency_ms: float) -> None:
        """Counts one request."""
        tags = {"version": version, "surface": surface, "outcome": outcome}
        self._requests.inc(1, tags)
        self._latency.observe(latency_ms, tags)

    def shown(self, *, version: str, surface: str, num_items: int) -> None:
        """Counts the items of one answer."""
        if num_items:
            self._shown.inc(num_items, {"version": version, "surface": surface})

    def feedback(self, *, version: str, surface: str, kinds: Iterable[str]) -> None:
        """Counts stored feedback events."""
        for kind in kinds:
            self._feedback.inc(1, {"version": version, "surface": surface, "outcome": kind})

    def rejected(self, endpoint: str) -> None:
        """Counts a request that found no room."""
        self._rejected.inc(1, {"endpoint": endpoint})

    def written(self, file: EventFile, num_events: int) -> None:
        """Counts rows that are durable."""
        if num_events:
            self._written.inc(num_events, {"file": file})

    def dropped(self, file: EventFile, num_events: int) -> None:
        """Counts rows that could not be kept."""
        self._dropped.inc(num_events, {"file": file})

    def state(
        self, *, weight_fraction: float, resident: Iterable[str], failing: Iterable[str]
    ) -> None:
        """Reports the rollout's weight, and the versions that are in memory or should be."""
        self._weight.set(weight_fraction)
        self._resident.set(set(resident))
        self._failing.set(set(failing))

    def shadowed(self, *, version: str, outcome: ShadowOutcome, counts: ShadowCounts) -> None:
        """Counts a request that was drawn for shadow scoring, and reports the means so far."""
        self._shadow.inc(1, {"version": version, "outcome": outcome})
        if counts.overlap is not None:
            self._overlap.set(counts.overlap, {"version": version})
        if counts.tau is not None:
            self._tau.set(counts.tau, {"version": version})


class ControllerMetrics:
    """What the ledger says of rollout and budget, as the controller's process reports it."""

    def __init__(
        self, epsilon_spent: Callable[[State], float], epsilon_total: float | None
    ) -> None:
        """Reports budgets by `epsilon_spent`, which takes its time; none without a total."""
        self._epsilon_spent = epsilon_spent
        self._epsilon_total = epsilon_total
        self._phase, self._step = _Flags(PHASE, "phase", get_args(RolloutPhase)), _gauge(STEP)
        self._spent, self._left = _gauge(EPSILON_SPENT), _gauge(EPSILON_LEFT)
        self._reported: object = None

    def __call__(self, state: State) -> None:
        """Reports a state of the ledger. Blocking."""
        rollout = state.rollout
        self._phase.set({rollout.phase} if rollout else set())
        self._step.set(rollout.step_index if rollout else 0)
        if self._epsilon_total is None or self._reported == state.spends:
            return
        spent = self._epsilon_spent(state)
        self._spent.set(spent)
        self._left.set(max(0.0, self._epsilon_total - spent))
        self._reported = state.spends


def controller_metrics(config: Config, root: Root) -> ControllerMetrics:
    """Returns what reports a shop's rollout and budget."""

    def epsilon_spent(state: State) -> float:
        from raysys.privacy.budget import spent_epsilon  # the accountant takes a second to load

        return spent_epsilon(state, config.privacy.delta, root)

    total = config.privacy.epsilon_total if config.privacy.enabled else None
    return ControllerMetrics(epsilon_spent, total)


class _Flags:
    """A gauge that is 1 for some values of a tag, and 0 for others that it was 1 for."""

    def __init__(self, name: str, tag: str, known: Sequence[str] = ()) -> None:
        self._gauge = _gauge(name)
        self._tag = tag
        self._known = set(known)

    def set(self, values: Collection[str]) -> None:
        self._known |= set(values)
        for value in self._known:
            self._gauge.set(float(value in values), {self._tag: value})


def _counter(name: str) -> Counter:
    return Counter(name, *_described(name, "counter"))


def _gauge(name: str) -> Gauge:
    return Gauge(name, *_described(name, "gauge"))


def _histogram(name: str) -> Histogram:
    description, tags = _described(name, "histogram")
    boundaries = [float(boundary) for boundary in LATENCY_BOUNDARIES_MS]
    return Histogram(name, description, boundaries, tags)


def _described(name: str, kind: Kind) -> tuple[str, tuple[str, ...]]:
    described = METRICS[name]
    assert described.kind == kind, name
    return described.description, described.tags
