"""What the API writes of its answers: who was shown what, by which version, with what chance."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from raysys.ledger.records import Record
from raysys.partitions.schema import EVENT_SCHEMA
from raysys.storage import Root
from tests.fakes import FakeReplica, FakeVersion
from tests.helpers import committed, rollout, started

STABLE, CANARY = "v0001-aaaaaa", "v0002-bbbbbb"
WEIGHT = 0.2


def two_versions() -> list[Record]:
    records: list[Record] = []
    for update_id, version in (("u0001-aaaaaa", STABLE), ("u0002-bbbbbb", CANARY)):
        start = started(update_id, partitions=())
        records += [start, committed(start, version=version)]
    return records


def replica_of(
    root: Root,
    *records: Record,
    canary: FakeVersion | Exception | None = None,
    sample_fraction: float = 1.0,
) -> FakeReplica:
    versions: Mapping[str, FakeVersion | Exception] = {
        STABLE: FakeVersion(STABLE),
        CANARY: canary or FakeVersion(CANARY),
    }
    return FakeReplica(root, versions, [*two_versions(), *records], sample_fraction=sample_fraction)


def rank_for(client: TestClient, user: str, **headers: str) -> dict[str, Any]:
    body = {"user_id": user, "candidates": ["dates", "apple"], "query": "x", "surface": "search"}
    response = client.post("/v1/rank", json=body, headers=headers)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def written(root: Root) -> pl.DataFrame:
    """The rows in the order of their answers and positions."""
    files = [pl.read_parquet(io.BytesIO(root.read_bytes(f.path))) for f in root.list("events")]
    return pl.concat([pl.DataFrame(schema=EVENT_SCHEMA), *files])


class TestPropensity:
    def test_is_the_share_of_the_side_that_answered(self, local_root: Root) -> None:
        with replica_of(local_root, rollout(weight_fraction=WEIGHT)).client() as client:
            for n in range(50):
                rank_for(client, f"user-{n}")
        by_version = dict(written(local_root).select("version", "propensity").unique().iter_rows())
        assert by_version == {STABLE: 1 - WEIGHT, CANARY: WEIGHT}

    def test_weighs_what_was_shown_back_to_one_answer_a_request(self, local_root: Root) -> None:
        """Inverse propensities add up to the requests, for each version: what they are for."""
        num_users = 400
        with replica_of(local_root, rollout(weight_fraction=0.5)).client() as client:
            for n in range(num_users):
                rank_for(client, f"user-{n}")
        first = written(local_root).filter(pl.col("position") == 1)
        for version in (STABLE, CANARY):
            answered = first.filter(pl.col("version") == version)
            estimate = (1 / answered["propensity"]).sum()
            assert abs(estimate - num_users) < 4 * num_users**0.5

    def test_is_1_without_a_canary_and_for_a_forced_version(self, local_root: Root) -> None:
        with replica_of(local_root, rollout(weight_fraction=WEIGHT)).client() as client:
            assert rank_for(client, "alice", **{"X-Raysys-Version": CANARY})["version"] == CANARY
        assert written(local_root)["propensity"].to_list() == [1.0, 1.0]
        other = Root(f"{local_root.uri}/other")
        with replica_of(other).client() as client:
            rank_for(client, "alice")
        assert written(other)["propensity"].to_list() == [1.0, 1.0]

    def test_is_1_while_the_canary_is_not_loaded_since_all_get_stable(
        self, local_root: Root
    ) -> None:
        away = ValueError("no such artifact")
        on_trial = rollout(weight_fraction=0.5)
        with replica_of(local_root, on_trial, canary=away).client() as client:
            for n in range(10):
                rank_for(client, f"user-{n}")
        assert set(written(local_root)["propensity"]) == {1.0}

    def test_is_unknown_where_stable_answers_for_a_canary_that_failed(
        self, local_root: Root
    ) -> None:
        def nan_for_two(scores: np.ndarray) -> np.ndarray:
            return scores if len(scores) > 2 else scores * np.nan  # its check ranks all four

        canary = FakeVersion(CANARY, score=nan_for_two)
        on_trial = rollout(weight_fraction=0.5)
        with replica_of(local_root, on_trial, canary=canary).client() as client:
            for n in range(20):
                rank_for(client, f"user-{n}")
        rows = written(local_root)
        assert set(rows["version"]) == {STABLE}
        assert set(rows["propensity"]) == {0.5, None}


def test_rows_say_all_that_training_may_want(local_root: Root) -> None:
    with replica_of(local_root).client() as client:
        answer = rank_for(client, "alice")
    rows = written(local_root).select(
        "request_id", "version", "surface", "query", "item_id", "position", "sample_fraction"
    )
    assert rows.rows() == [
        (answer["request_id"], STABLE, "search", "x", item["item_id"], item["rank"], 1.0)
        for item in answer["ranking"]
    ]


def test_a_sampled_replica_keeps_whole_answers_and_says_so_with_feedback(
    local_root: Root,
) -> None:
    with replica_of(local_root, sample_fraction=0.5).client() as client:
        for n in range(40):
            request_id = rank_for(client, f"user-{n}")["request_id"]
            event = {"event_type": "click", "item_id": "apple"}
            body = {"request_id": request_id, "events": [event]}
            if n < 5:
                assert client.post("/v1/feedback", json=body).status_code == 200
    rows = written(local_root)
    assert set(rows["sample_fraction"]) == {0.5}
    shown = rows.filter(pl.col("event_type") == "impression").group_by("request_id").len()
    assert set(shown["len"]) == {2} and 5 < len(shown) < 35
    assert len(rows.filter(pl.col("event_type") == "click")) == 5


@pytest.mark.parametrize(("rank", "status"), [(1, 200), (2, 200), (3, 422), (0, 422), (1001, 422)])
def test_a_rank_is_one_of_the_answer_or_is_refused(
    local_root: Root, rank: int, status: int
) -> None:
    with replica_of(local_root).client() as client:
        request_id = rank_for(client, "alice")["request_id"]
        event = {"event_type": "click", "item_id": "apple", "rank": rank}
        body = {"request_id": request_id, "events": [event]}
        response = client.post("/v1/feedback", json=body)
    assert response.status_code == status
    if rank == 3:
        expected = "events.0.rank: 3 is beyond the 2 items of the answer; send the item's rank"
        assert response.json()["error"].startswith(expected)
