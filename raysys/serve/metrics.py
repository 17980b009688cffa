"""What a replica tells Prometheus, by version, surface and outcome.

    raysys_requests_total, raysys_request_latency_ms, raysys_feedback_events_total,
    raysys_events_dropped_total, raysys_rollout_weight_fraction, raysys_version_resident

Ray's own Serve metrics know no model version, hence these. Names are the API of the dashboards.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

from ray.util.metrics import Counter, Gauge, Histogram

Outcome = Literal[
    "ok", "slow", "failed", "canary_failed", "canary_invalid", "canary_not_loaded", "forced"
]
"""How a request was answered. `canary_failed`: by stable, after the canary failed;
`canary_invalid`: the same, after the canary gave scores that are no numbers;
`canary_not_loaded`: by stable, since the canary is not resident yet; `forced`: by header."""

LATENCY_BOUNDARIES_MS = [1, 2, 3, 5, 7.5, 10, 15, 25, 50, 75, 100, 150, 200, 300, 500, 1000, 2500]


class Metrics(Protocol):
    """What the service reports; tests count in memory."""

    def ranked(
        self, *, version: str, surface: str, outcome: Outcome, latency_ms: float
    ) -> None: ...
    def feedback(self, *, version: str, surface: str, num_events: int) -> None: ...
    def dropped(self, num_events: int) -> None: ...
    def state(self, *, weight_fraction: float, resident: Iterable[str]) -> None: ...


class RayMetrics:
    """`Metrics` by way of Ray's agent."""

    def __init__(self) -> None:
        tags = ("version", "surface", "outcome")
        self._requests = Counter(
            "raysys_requests_total", "Rank requests by how they were answered", tags
        )
        self._latency = Histogram(
            "raysys_request_latency_ms",
            "Milliseconds in the replica, from parsed request to answer",
            boundaries=LATENCY_BOUNDARIES_MS,
            tag_keys=tags,
        )
        self._feedback = Counter(
            "raysys_feedback_events_total", "Feedback events stored", ("version", "surface")
        )
        self._dropped = Counter(
            "raysys_events_dropped_total", "Impressions lost while the object store was away"
        )
        self._weight = Gauge("raysys_rollout_weight_fraction", "Share of users of the canary")
        self._resident = Gauge(
            "raysys_version_resident", "1 for each version in memory, 0 once dropped", ("version",)
        )
        self._known: set[str] = set()

    def ranked(self, *, version: str, surface: str, outcome: Outcome, latency_ms: float) -> None:
        """Counts one rank request."""
        tags = {"version": version, "surface": surface, "outcome": outcome}
        self._requests.inc(1, tags)
        self._latency.observe(latency_ms, tags)

    def feedback(self, *, version: str, surface: str, num_events: int) -> None:
        """Counts stored feedback events."""
        self._feedback.inc(num_events, {"version": version, "surface": surface})

    def dropped(self, num_events: int) -> None:
        """Counts impressions that could not be kept."""
        self._dropped.inc(num_events)

    def state(self, *, weight_fraction: float, resident: Iterable[str]) -> None:
        """Reports the rollout's weight and the versions in memory."""
        self._weight.set(weight_fraction)
        now = set(resident)
        self._known |= now
        for version in self._known:
            self._resident.set(float(version in now), {"version": version})
