"""`POST /v1/rank` on a replica without Ray: the caller's candidates in their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from raysys.storage import Root
from tests.fakes import FakeReplica, FakeVersion
from tests.serving import (
    STABLE,
    error_of,
    make,
    one_version,
    order,
    rank,
)


@pytest.fixture
def replica(local_root: Root) -> FakeReplica:
    return make(local_root, one_version())


@pytest.fixture
def client(replica: FakeReplica) -> Iterator[TestClient]:
    with replica.client() as client:
        yield client


def test_an_answer_ranks_the_candidates_best_first(client: TestClient) -> None:
    answer = rank(client)
    assert set(answer) == {"request_id", "version", "ranking", "unknown_candidates"}
    assert answer["version"] == STABLE
    assert order(answer) == ["apple", "cheese", "dates"]
    first = answer["ranking"][0]
    assert (first["item_id"], first["score"], first["probability"]) == ("apple", 0.0, 0.5)
    assert answer["unknown_candidates"] == []


def test_k_limits_the_answer(client: TestClient) -> None:
    assert order(rank(client, k=2)) == ["apple", "cheese"]
    assert len(rank(client, k=1000)["ranking"]) == 3


def test_equal_scores_are_ranked_by_item_id_in_any_order_of_candidates(local_root: Root) -> None:
    level = FakeVersion(STABLE, score=np.zeros_like)
    with make(local_root, one_version(), level).client() as client:
        for candidates in (["dates", "apple", "cheese"], ["cheese", "dates", "apple"]):
            assert order(rank(client, candidates=candidates)) == ["apple", "cheese", "dates"]


def test_a_history_in_the_request_takes_the_place_of_the_known_one(
    client: TestClient, replica: FakeReplica
) -> None:
    assert order(rank(client, history=["dates", "never seen"]))[0] == "dates"
    version = replica.available[STABLE]
    assert isinstance(version, FakeVersion)
    assert version.users == []


def test_the_version_sees_the_pseudonym_the_query_and_the_time(
    client: TestClient, replica: FakeReplica
) -> None:
    rank(client, query="cheddar", ts=1_500_000_000.5)
    version = replica.available[STABLE]
    assert isinstance(version, FakeVersion)
    assert version.users == [replica.pseudonymizer.pseudonym("alice")]
    assert (version.queries[-1], version.times[-1]) == ("cheddar", 1_500_000_000.5)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        pytest.param({"candidates": []}, 422, "candidates: has 0 entries; send", id="empty"),
        pytest.param(
            {"candidates": [f"i{i}" for i in range(1001)]},
            422,
            "candidates: has 1001 entries; send at most 1000",
            id="too-many",
        ),
        pytest.param(
            {"candidates": ["apple", "bread", "apple"]},
            422,
            "candidates: 'apple' stand twice; send each candidate once",
            id="duplicated",
        ),
        pytest.param(
            {"candidates": ["apple", *(f"x{i}" for i in range(8))]},
            422,
            "candidates: 'x0', 'x1', 'x2', 'x3', 'x4' and 3 more are not in the catalogue",
            id="unknown",
        ),
        pytest.param({}, 422, "candidates: is missing; send it", id="missing"),
        pytest.param({"candidates": "apple"}, 422, "candidates: expected a valid list", id="text"),
        pytest.param({"candidates": [1]}, 422, "candidates.0: expected a valid string", id="int"),
        pytest.param({"candidates": [" "]}, 422, "candidates.0: expected text", id="blank"),
        pytest.param(
            {"candidates": ["apple"], "kk": 3}, 422, "kk: is an unknown key", id="unknown-key"
        ),
        pytest.param({"candidates": ["apple"], "k": 0}, 422, "k: expected greater", id="k-0"),
        pytest.param(
            {"candidates": ["apple"], "surface": "tv"}, 422, "surface: expected 'search'", id="tv"
        ),
        pytest.param(
            {"candidates": ["apple"], "ts": 1e300}, 422, "ts: expected less than", id="far-future"
        ),
        pytest.param(
            {"candidates": ["apple"], "user_id": "x" * 300}, 422, "user_id: expected", id="long-id"
        ),
        pytest.param(["apple"], 422, "the body is not a JSON object", id="no-object"),
    ],
)
def test_a_bad_request_gets_one_line_that_names_the_value(
    client: TestClient, body: Any, status: int, message: str
) -> None:
    response = client.post("/v1/rank", json=body)
    assert error_of(response, status).startswith(message)
