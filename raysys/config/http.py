"""The section `http`: what a replica takes from callers at once, and who may steer a rollout."""

from __future__ import annotations

import dataclasses

from raysys.config.checks import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, check


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HttpConfig:
    """Limits of one replica, and its tokens."""

    token_file: str = ""
    """File of the tokens that may steer a rollout, one a line; empty: `POST /v1/rollout/…` is off.
    Read anew for each of these requests, so that a token is replaced without a restart."""
    max_body_bytes: int = 1_000_000
    """A longer body is refused before it is read."""
    body_timeout_s: float = 10.0
    """A body that has not arrived after so long is refused: slow senders hold no place."""
    max_concurrent_requests: int = 16
    """Ranking requests worked on at once. They share one event loop, so that more of them only
    gain where queries are encoded together."""
    max_waiting_requests: int = 64
    """Ranking requests that wait for one of those places; further ones get a 503 at once."""
    max_waiting_feedback: int = 500
    """Requests with feedback that wait for their file; further ones get a 503 at once."""
    retry_after_s: int = 1
    """Seconds in the `Retry-After` of each 503."""

    def __post_init__(self) -> None:
        check(self, "http", POSITIVE, "body_timeout_s")
        check(self, "http", AT_LEAST_1, "max_body_bytes", "max_concurrent_requests")
        check(self, "http", AT_LEAST_1, "max_waiting_feedback", "retry_after_s")
        check(self, "http", NOT_NEGATIVE, "max_waiting_requests")
