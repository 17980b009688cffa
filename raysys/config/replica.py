"""What a replica of the ranking application may take: threads, memory, time."""

from __future__ import annotations

import dataclasses

from raysys.config.checks import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, check


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaConfig:
    """How a replica encodes queries, and what a new version has to pass before it may answer."""

    encoder_threads: int = 1
    """Threads that encode one batch of queries. 1 suits several replicas on a machine; 2 make a
    query of 16 tokens a quarter faster where cores are idle."""
    max_cached_queries: int = 10_000
    """Queries whose embeddings are kept, of all versions together: 1.7 kB each with MiniLM."""
    max_query_batch: int = 16
    """Queries that are encoded at once. Others wait while a batch is encoded, for the next one."""
    query_wait_ms: float = 0.0
    """How long the first query of a batch waits for others where none is being encoded. 0 suits
    latency: batches form by themselves as soon as queries come faster than they are encoded."""
    check_timeout_s: float = 120.0
    """Seconds within which a version passes its check in a process of its own, or is refused."""
    check_max_bytes: int = 4 * 2**30
    """Resident memory of that process above which the version is refused. A replica needs about
    as much for the version, less 200 MB."""
    isolate_canary: bool = False
    """Whether the canary answers in a deployment of its own, whose process it cannot take others
    down with. That costs a process with all versions in it, and a hop for its requests."""
    canary_timeout_ms: float = 500.0
    """With `isolate_canary`: how long a request waits for it before stable answers instead."""

    def __post_init__(self) -> None:
        check(self, "replica", AT_LEAST_1, "encoder_threads", "max_query_batch")
        check(self, "replica", AT_LEAST_1, "max_cached_queries", "check_max_bytes")
        check(self, "replica", NOT_NEGATIVE, "query_wait_ms")
        check(self, "replica", POSITIVE, "check_timeout_s", "canary_timeout_ms")
