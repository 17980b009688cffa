"""kill -9 of a replica: what it acknowledged is stored; impressions of one interval are lost."""

from __future__ import annotations

import io
import socket
from typing import Any

import httpx
import polars as pl

from raysys.storage import Root
from tests.lone_replica import LoneReplica, lone_replica


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def rank(replica: LoneReplica) -> dict[str, Any]:
    body = {"user_id": "alice", "candidates": ["dates", "apple"]}
    response = httpx.post(f"{replica.url}/v1/rank", json=body, timeout=30)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_acknowledged_feedback_outlives_its_replica(root: Root) -> None:
    with lone_replica(root, free_port()) as replica:
        first, lost = rank(replica), rank(replica)
        events = [
            {"event_type": "click", "item_id": "apple", "rank": 1},
            {"event_type": "purchase", "item_id": "apple", "price": 2.5},
        ]
        body = {"request_id": first["request_id"], "events": events}
        answer = httpx.post(f"{replica.url}/v1/feedback", json=body, timeout=30)
        assert (answer.status_code, answer.json()) == (200, {"accepted": 2})
        replica.kill()
    rows = pl.concat(
        [pl.read_parquet(io.BytesIO(root.read_bytes(f.path))) for f in root.list("events")]
    )
    stored = rows.filter(pl.col("event_type") != "impression").sort("event_type")
    assert stored.select("event_type", "item_id", "position", "price", "request_id").rows() == [
        ("click", "apple", 1, None, first["request_id"]),
        ("purchase", "apple", None, 2.5, first["request_id"]),
    ]
    # The negative control: what nobody waited for was lost with the replica, from the interval on.
    assert lost["request_id"] not in rows["request_id"].to_list()
