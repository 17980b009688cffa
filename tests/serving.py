"""A replica on a small ledger, and what tests of its HTTP API ask it."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import polars as pl
from fastapi.testclient import TestClient

from raysys.config import RolloutConfig
from raysys.ledger.records import Record
from raysys.partitions.schema import EVENT_SCHEMA
from raysys.serve.router import assign
from raysys.storage import Root
from tests.fakes import ITEMS, FakeReplica, FakeVersion
from tests.helpers import committed, rollout, started

STABLE, CANARY = "v0001-aaaaaa", "v0002-bbbbbb"
CANDIDATES = ["dates", "apple", "cheese"]
CANARY_USER = next(
    f"user-{i}"
    for i in range(100)
    if assign(f"user-{i}", rollout_id="r0001", weight_fraction=0.2) == "canary"
)
STABLE_USER = next(
    f"user-{i}"
    for i in range(100)
    if assign(f"user-{i}", rollout_id="r0001", weight_fraction=0.9) == "stable"
)


def one_version() -> list[Record]:
    start = started("u0001-aaaaaa")
    return [start, committed(start, version=STABLE)]


def two_versions() -> list[Record]:
    start = started("u0002-bbbbbb", partitions=())
    return [*one_version(), start, committed(start, version=CANARY)]


def on_trial() -> list[Record]:
    return [*two_versions(), rollout("canary")]


def make(
    root: Root,
    records: list[Record],
    stable: FakeVersion | Exception | None = None,
    canary: FakeVersion | Exception | None = None,
    config: RolloutConfig | None = None,
    item_ids: Sequence[str] = (),
    max_ts_age_s: float = math.inf,
    **more: Any,
) -> FakeReplica:
    versions = {
        STABLE: FakeVersion(STABLE) if stable is None else stable,
        CANARY: FakeVersion(CANARY) if canary is None else canary,
    }
    return FakeReplica(root, versions, records, config, item_ids, max_ts_age_s, **more)


def post(
    client: TestClient, path: str, body: Mapping[str, Any], version: str = ""
) -> dict[str, Any]:
    headers = {"X-Raysys-Version": version} if version else {}
    response = client.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def rank(client: TestClient, user: str | None = "alice", **body: Any) -> dict[str, Any]:
    return post(client, "/v1/rank", {"user_id": user, "candidates": CANDIDATES, **body})


def order(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["ranking"]]


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    message: str = response.json()["error"]
    assert "\n" not in message
    return message


def events(root: Root) -> pl.DataFrame:
    files = [info.path for info in root.list("events")]
    frames = [pl.read_parquet(io.BytesIO(root.read_bytes(path))) for path in files]
    return pl.concat(frames) if frames else pl.DataFrame(schema=EVENT_SCHEMA)


def eventually(check: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def nan_scores(scores: np.ndarray) -> np.ndarray:
    return np.full_like(scores, np.nan)


def raising(scores: np.ndarray) -> np.ndarray:
    raise RuntimeError("a bug in the model")


def cut_off(scores: np.ndarray) -> np.ndarray:
    return scores[:-1]


def unless_checked(fault: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """Lets the check of a new version pass: that one scores all items at once."""
    return lambda scores: fault(scores) if len(scores) < len(ITEMS) else scores
