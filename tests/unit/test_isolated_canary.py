"""A canary in another process answers as if it were here, and costs no request when it fails."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from raysys.config import RolloutConfig
from raysys.ledger.records import Record
from raysys.serve.answer import Ranking, Task
from raysys.serve.candidates import Given
from raysys.serve.isolated import (
    RemoteCanary,
    RemoteError,
    RemoteStatus,
    RemoteVersion,
)
from raysys.serve.ranker import InvalidScoresError, ScoresError
from raysys.serve.router import assign
from raysys.serve.schema import ApiError
from raysys.storage import Root
from tests.fakes import ITEMS, FakeReplica, FakeVersion
from tests.helpers import FakeClock, committed, rollout, started

STABLE, CANARY = "v0001-aaaaaa", "v0002-bbbbbb"
STATUS = RemoteStatus(num_items=4, encoder_runtime="onnx")
TASK = Task(selection=Given(["apple"]), surface="search", when=0.0, user="alice")
USERS = [f"user-{i}" for i in range(40)]
CANARY_USERS = [
    user for user in USERS if assign(user, rollout_id="r0001", weight_fraction=0.2) == "canary"
]


class Process:
    """The other process: a service of its own, by way of pickles as Ray has it, and faults."""

    def __init__(self, replica: FakeReplica) -> None:
        self._replica = replica
        self.fault: Exception | None = None
        self.is_hung = False
        self.num_calls = 0

    async def rank(self, name: str, task: Task) -> Ranking | RemoteError:
        self.num_calls += 1
        await self._fail()
        sent = pickle.loads(pickle.dumps((name, task)))
        answer = await self._replica.service.rank_for_others(*sent)
        return pickle.loads(pickle.dumps(answer))  # type: ignore[no-any-return]

    async def status(self, name: str) -> RemoteStatus | None:
        await self._fail()
        await self._replica.replica.follower.start()
        version = self._replica.service.versions.get(name)
        await self._replica.replica.follower.stop()
        return STATUS if version else None

    async def _fail(self) -> None:
        if self.is_hung:
            await asyncio.sleep(60)
        if self.fault:
            raise self.fault


def on_trial() -> list[Record]:
    first, second = started("u0001-aaaaaa"), started("u0002-bbbbbb", partitions=())
    return [
        first, committed(first, version=STABLE), second, committed(second, version=CANARY),
        rollout("canary"),
    ]  # fmt: skip


class Isolated:
    """An ingress replica that has not got the canary, and the process that has."""

    def __init__(self, root: Root, **canary: Any) -> None:
        config = RolloutConfig()
        there = FakeReplica(
            root, {STABLE: FakeVersion(STABLE), CANARY: FakeVersion(CANARY, **canary)}, on_trial()
        )
        self.here = FakeReplica(root, {STABLE: FakeVersion(STABLE)}, (), config)
        self.process = Process(there)
        self.here.service.remote = RemoteCanary(self.process, timeout_s=0.2)
        self.here.service.versions._loads_canary = False


@pytest.fixture
def isolated(local_root: Root) -> Isolated:
    return Isolated(local_root)


@pytest.fixture
def client(isolated: Isolated) -> Iterator[TestClient]:
    with isolated.here.client() as client:
        yield client


def rank(client: TestClient, user: str, **headers: str) -> httpx.Response:
    body = {"user_id": user, "candidates": ["dates", "apple", "cheese"]}
    response: httpx.Response = client.post("/v1/rank", json=body, headers=headers)
    return response


def versions_of(client: TestClient) -> dict[str, str]:
    answers = {user: rank(client, user) for user in USERS}
    assert {answer.status_code for answer in answers.values()} == {200}
    return {user: answer.json()["version"] for user, answer in answers.items()}


def test_the_canarys_users_are_answered_by_the_other_process(
    client: TestClient, isolated: Isolated
) -> None:
    found = versions_of(client)
    assert {user for user, version in found.items() if version == CANARY} == set(CANARY_USERS)
    assert isolated.process.num_calls == len(CANARY_USERS)
    tally = isolated.here.service.tally
    assert tally is not None
    assert tally.report(0.0).canary.num_requests.sum() == len(CANARY_USERS)
    listed = {v["version"]: v for v in client.get("/v1/versions").json()["versions"]}
    assert listed[CANARY]["roles"] == ["canary"] and listed[CANARY]["num_items"] == 4


def test_it_can_be_named_by_header(client: TestClient) -> None:
    answer = rank(client, "alice", **{"X-Raysys-Version": CANARY})
    assert answer.json()["version"] == CANARY


@pytest.mark.parametrize("is_hung", [False, True], ids=["dead", "hung"])
def test_a_process_that_does_not_answer_costs_no_request_and_counts_against_the_canary(
    client: TestClient, isolated: Isolated, is_hung: bool
) -> None:
    assert CANARY in versions_of(client).values()
    isolated.process.num_calls = 0
    isolated.process.is_hung, isolated.process.fault = is_hung, ConnectionError("the actor died")
    assert set(versions_of(client).values()) == {STABLE}
    assert isolated.process.num_calls < len(CANARY_USERS), "not each of them waited"
    tally = isolated.here.service.tally
    assert tally is not None
    assert tally.report(0.0).canary.num_bad.sum() == len(CANARY_USERS)
    failed = [o for _, o in isolated.here.metrics.outcomes if o == "canary_failed"]
    assert len(failed) == len(CANARY_USERS)


def test_a_request_that_is_to_blame_is_told_so(client: TestClient, isolated: Isolated) -> None:
    answer = client.post("/v1/rank", json={"user_id": CANARY_USERS[0], "candidates": ["nothing"]})
    assert answer.status_code == 422 and "'nothing' are not in the catalogue" in answer.text
    assert isolated.process.num_calls == 1


def test_invalid_scores_stay_invalid_on_their_way(local_root: Root) -> None:
    def score(scores: np.ndarray) -> np.ndarray:
        """Good for the whole catalogue, as the check asks for it, and not for a request's three."""
        return scores if len(scores) == len(ITEMS) else scores * np.float32("nan")

    isolated = Isolated(local_root, score=score)
    with isolated.here.client() as client:
        assert rank(client, CANARY_USERS[0]).json()["version"] == STABLE
    assert isolated.here.metrics.outcomes == [(STABLE, "canary_invalid")]


def test_a_process_that_is_not_up_yet_leaves_the_canarys_users_with_stable(
    local_root: Root,
) -> None:
    isolated = Isolated(local_root)
    isolated.process.fault = ConnectionError("no replica yet")
    with isolated.here.client() as client:
        assert set(versions_of(client).values()) == {STABLE}
    assert {o for _, o in isolated.here.metrics.outcomes} == {"ok", "canary_not_loaded"}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ApiError(422, "candidates: ..."), ApiError),
        (ScoresError("it failed"), ScoresError),
        (InvalidScoresError("NaN"), InvalidScoresError),
    ],
    ids=["request", "scores", "invalid"],
)
def test_errors_survive_the_way(error: Any, kind: type[Exception]) -> None:
    raised = pickle.loads(pickle.dumps(RemoteError.of(error))).raised()
    assert type(raised) is kind and str(raised) == str(error)
    assert getattr(raised, "status", None) == getattr(error, "status", None)


def test_after_a_rest_the_process_is_asked_again() -> None:
    class Once:
        num_calls = 0

        async def rank(self, name: str, task: Task) -> Ranking | RemoteError:
            self.num_calls += 1
            if self.num_calls == 1:
                raise ConnectionError("the actor died")
            return Ranking(version=name)

        async def status(self, name: str) -> RemoteStatus | None:
            return STATUS

    async def run() -> None:
        for _ in range(3):
            with pytest.raises(ScoresError):
                await version.rank(TASK)
        assert process.num_calls == 1
        clock.advance(1.1)
        assert (await version.rank(TASK)).version == CANARY

    process, clock = Once(), FakeClock()
    version = RemoteVersion(CANARY, STATUS, process, 0.2, clock)
    asyncio.run(run())
