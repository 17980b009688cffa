"""What every endpoint refuses: malformed bodies, wrong types, times far from now."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from raysys.storage import Root
from tests.serving import (
    CANDIDATES,
    error_of,
    make,
    one_version,
    rank,
)


@pytest.fixture
def client(local_root: Root) -> Iterator[TestClient]:
    with make(local_root, one_version()).client() as client:
        yield client


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"candidates": [', 400, "the body is not JSON"),
        (b"", 422, "the body is not a JSON object"),
        (b"\x80", 400, "the body is not UTF-8 (byte 0)"),
        (b'{"candidates": ["apple"], "ts": NaN}', 422, "NaN is no number in JSON"),
        (b'{"candidates": ["\\ud800"]}', 422, "the body has half a character"),
        (b"[" * 100_000, 400, "the body has more than 16 lists"),
    ],
    ids=["cut-off", "empty", "not-utf8", "nan", "lone-surrogate", "deeply-nested"],
)
def test_a_malformed_body_gets_a_4xx(
    client: TestClient, body: bytes, status: int, message: str
) -> None:
    response = client.post("/v1/rank", content=body, headers={"Content-Type": "application/json"})
    assert error_of(response, status).startswith(message)


def test_an_unknown_path_and_a_wrong_method_get_the_same_shape(client: TestClient) -> None:
    assert error_of(client.get("/v1/nothing"), 404).startswith("GET /v1/nothing: Not Found")
    assert error_of(client.get("/v1/rank"), 405).startswith("GET /v1/rank: Method Not Allowed")


@pytest.mark.parametrize("ts", [12.0, 1e9, 4e9], ids=["1970", "long ago", "to come"])
def test_a_time_far_from_now_is_refused_and_writes_no_partition(
    local_root: Root, ts: float
) -> None:
    replica = make(local_root, one_version(), max_ts_age_s=3600.0)
    with replica.client() as client:
        now = rank(client, ts=time.time() - 60)
        body = {"candidates": CANDIDATES, "ts": ts}
        assert "ts:" in error_of(client.post("/v1/rank", json=body), 422)
        event = {"event_type": "click", "item_id": "apple", "ts": ts}
        feedback = {"request_id": now["request_id"], "events": [event]}
        assert "ts:" in error_of(client.post("/v1/feedback", json=feedback), 422)
    assert len(local_root.list_folders("events")) <= 1


def test_the_openapi_schema_names_the_error_shape(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert {"/v1/rank", "/v1/feedback", "/v1/versions", "/v1/rollout"} <= set(schema["paths"])
    refusal = schema["paths"]["/v1/rank"]["post"]["responses"]["422"]
    assert refusal["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")
