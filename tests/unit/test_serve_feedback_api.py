"""`POST /v1/feedback` on a replica without Ray: durable, counted once, of the right user."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient

from raysys.errors import StorageUnavailableError
from raysys.partitions.schema import EVENT_SCHEMA
from raysys.storage import Root
from tests.serving import (
    CANARY,
    CANARY_USER,
    STABLE,
    error_of,
    events,
    make,
    on_trial,
    one_version,
    order,
    rank,
)


@pytest.fixture
def client(local_root: Root) -> Iterator[TestClient]:
    with make(local_root, one_version()).client() as client:
        yield client


def test_feedback_is_durable_when_it_is_acknowledged(client: TestClient, local_root: Root) -> None:
    answer = rank(client, surface="search", query="fruit")
    body = {
        "request_id": answer["request_id"],
        "events": [
            {"event_type": "click", "item_id": "apple", "ts": 1_500_000_000},
            {"event_type": "purchase", "item_id": "apple", "price": 2.5, "quantity": 3},
        ],
    }
    assert client.post("/v1/feedback", json=body).json() == {"accepted": 2}
    rows = events(local_root).filter(pl.col("event_type") != "impression").sort("ts")
    assert rows["event_type"].to_list() == ["click", "purchase"]
    assert rows["request_id"].unique().to_list() == [answer["request_id"]]
    assert rows["version"].unique().to_list() == [STABLE]
    assert rows["price"].to_list() == [None, 2.5]
    assert local_root.list("events/dt=2017-07-14")


def test_impressions_become_rows_of_the_contract(local_root: Root) -> None:
    replica = make(local_root, one_version())
    with replica.client() as client:
        answer = rank(client, query="fruit", surface="search", k=2, ts=1_500_000_000)
    rows = events(local_root).sort("position")
    assert rows.schema == EVENT_SCHEMA
    assert rows["item_id"].to_list() == order(answer)
    assert rows["position"].to_list() == [1, 2]
    assert rows["query"].to_list() == ["fruit", "fruit"]
    assert rows["event_id"].n_unique() == 2
    assert rows["user_id"].to_list() == [replica.pseudonymizer.pseudonym("alice")] * 2
    assert rows["user_key_id"].to_list() == [replica.pseudonymizer.key_id] * 2
    assert [Path(f.path).parent.name for f in local_root.list("events")] == ["dt=2017-07-14"]


def test_a_raw_user_id_is_written_nowhere(local_root: Root, tmp_path: Path) -> None:
    replica = make(local_root, on_trial())
    with replica.client() as client:
        answer = rank(client, "secret-user", request_id="secret-session")
        event = {"event_type": "click", "item_id": "apple"}
        body = {"request_id": answer["request_id"], "user_id": "secret-user", "events": [event]}
        assert client.post("/v1/feedback", json=body).status_code == 200
    assert "secret" not in json.dumps(answer)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert b"secret" not in path.read_bytes(), path
    assert "secret" not in events(local_root).write_csv()


def test_feedback_that_is_sent_twice_counts_and_trains_once(local_root: Root) -> None:
    replica = make(local_root, on_trial())
    with replica.client() as client:
        answer = rank(client, CANARY_USER)
        event = {"event_type": "click", "item_id": "apple"}
        body = {"request_id": answer["request_id"], "events": [event]}
        for _ in range(3):
            assert client.post("/v1/feedback", json=body).status_code == 200
        assert replica.service.tally is not None
        replica.service.tally.acknowledge(0)
        report = replica.service.tally.report(time.time() + 5)
        assert [c.arm for c in report.conversions] == ["canary"]
    clicks = events(local_root).filter(pl.col("event_type") == "click")
    assert (len(clicks), clicks["event_id"].n_unique()) == (3, 1)


@pytest.mark.parametrize("change", ["", "x", "."])
def test_a_request_id_that_was_not_signed_here_is_a_404(client: TestClient, change: str) -> None:
    request_id = rank(client)["request_id"]
    forged = request_id.replace(".user.", ".-.", 1) + change if not change else request_id + change
    body = {"request_id": forged, "events": [{"event_type": "click", "item_id": "apple"}]}
    response = client.post("/v1/feedback", json=body)
    assert "send the request_id that the items were answered with" in error_of(response, 404)


def test_feedback_of_another_user_is_refused(client: TestClient) -> None:
    event = {"event_type": "click", "item_id": "apple"}
    body = {"request_id": rank(client)["request_id"], "user_id": "bob", "events": [event]}
    assert error_of(client.post("/v1/feedback", json=body), 422).startswith("user_id: is not")


def test_a_session_may_get_a_user_before_its_feedback(client: TestClient) -> None:
    event = {"event_type": "purchase", "item_id": "apple"}
    request_id = rank(client, None, request_id="session-1")["request_id"]
    body = {"request_id": request_id, "user_id": "bob", "events": [event]}
    assert client.post("/v1/feedback", json=body).status_code == 200


@pytest.mark.parametrize(
    ("events_sent", "message"),
    [
        ([], "events: has 0 entries; send at least 1"),
        ([{"event_type": "impression", "item_id": "a"}], "events.0.event_type: expected 'click'"),
        ([{"event_type": "click"}], "events.0.item_id: is missing"),
        ([{"event_type": "click", "item_id": "a", "price": -1}], "events.0.price: expected"),
    ],
    ids=["none", "impression", "no-item", "negative-price"],
)
def test_bad_feedback_is_refused(client: TestClient, events_sent: Any, message: str) -> None:
    body = {"request_id": rank(client)["request_id"], "events": events_sent}
    assert error_of(client.post("/v1/feedback", json=body), 422).startswith(message)


def test_feedback_that_could_not_be_stored_is_a_503_and_is_not_counted(
    local_root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = make(local_root, on_trial())

    def unavailable(path: str, data: bytes) -> None:
        raise StorageUnavailableError("no answer in 5 s")

    with replica.client() as client:
        answer = rank(client, CANARY_USER)
        body = {
            "request_id": answer["request_id"],
            "events": [{"event_type": "click", "item_id": "apple"}],
        }
        with monkeypatch.context() as patch:
            patch.setattr(local_root, "put", unavailable)
            assert "send it again" in error_of(client.post("/v1/feedback", json=body), 503)
            assert rank(client, CANARY_USER)["version"] == CANARY
        assert client.post("/v1/feedback", json=body).status_code == 200
        assert replica.service.tally is not None
        replica.service.tally.acknowledge(0)
        assert len(replica.service.tally.report(time.time() + 5).conversions) == 1
    # Impressions waited for the store to come back.
    assert events(local_root).filter(pl.col("event_type") == "impression").height == 6
