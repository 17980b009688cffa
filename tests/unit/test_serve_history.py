"""No endpoint shows another user's history.

The API is for the shop's own servers, so a caller may ask for any user. What an answer for Alice
holds is chosen by her history, and may recommend what is in it; an explanation gives it as one
number, and names no item of it. Answers for anyone else do not depend on it at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from raysys.ingest.features import UserHistory
from raysys.storage import Root
from tests.fakes import ITEMS, FakeReplica, FakeVersion
from tests.serving import STABLE, on_trial, one_version

SECRET = "pregnancy-test"
CATALOGUE = (*ITEMS, SECRET)
ADS = [{"item_id": item, "bid": 1.0} for item in ITEMS]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/rank": {"candidates": list(ITEMS), "explain": True},
    "/v1/search": {"query": "bread", "explain": True, "filters": {"exclude_items": [SECRET]}},
    "/v1/recommend": {"explain": True, "exclude_seen": True},
    "/v1/ads": {"candidates": ADS, "explain": True},
}
STATUS = ["/v1/versions", "/v1/rollout", "/v1/healthz", "/v1/readyz"]


class Knowing(FakeVersion):
    """A version that knows what some users bought."""

    def __init__(self, histories: dict[str, list[str]]) -> None:
        super().__init__(STABLE, CATALOGUE)
        self.histories = histories

    def history(self, user: str) -> UserHistory:
        return self.history_of(self.histories.get(user, []), 0.0)


class Telling(Knowing):
    """Names what an item is explained by."""

    def history(self, user: str) -> UserHistory:
        self.items_of_user = self.histories.get(user, [])
        return super().history(user)

    def explain(self, *args: Any, **options: Any) -> dict[str, np.ndarray]:
        parts = super().explain(*args, **options)
        return {**parts, **{f"bought {item}": parts["base"] for item in self.items_of_user}}


class Mixing(Knowing):
    """Takes the history of whoever bought most for everyone's."""

    def history(self, user: str) -> UserHistory:
        return self.history_of(max(self.histories.values(), key=len, default=[]), 0.0)


def ask_everything(client: TestClient, user: str | None) -> list[Any]:
    """All that the endpoints say to a caller who asks for a user, without what is random."""
    asked = {} if user is None else {"user_id": user}
    answers = [client.post(path, json={**body, **asked}) for path, body in BODIES.items()]
    answers += [
        client.post(path, json={**body, **asked}, headers={"X-Raysys-Version": STABLE})
        for path, body in BODIES.items()
    ]
    bad = [{"k": 0}, {"candidates": ["nothing"], "filters": {}, "query": ""}]
    answers += [client.post(path, json={**asked, **body}) for path in BODIES for body in bad]
    answers += [client.get(path) for path in [*STATUS, "/openapi.json", "/docs"]]
    event = {"event_type": "click", "item_id": "apple"}
    for request_id in (answers[0].json()["request_id"], "made-up"):
        body = {"request_id": request_id, "events": [event], **asked}
        answers.append(client.post("/v1/feedback", json=body))
    assert {response.status_code for response in answers} == {200, 404, 422}
    return [_without_ids(response.text) for response in answers]


def _without_ids(text: str) -> Any:
    if not text.startswith("{"):
        return text
    answer = json.loads(text)
    answer.pop("request_id", None)
    return answer


class Shop:
    def __init__(self, folder: Path, kind: type[Knowing]) -> None:
        self.version = kind({})
        root = Root((folder / kind.__name__).as_uri())
        self.replica = FakeReplica(root, {STABLE: self.version}, one_version())

    def plant(self, user: str) -> None:
        """Has a user buy the secret."""
        self.version.histories[self.replica.pseudonymizer.pseudonym(user)] = [SECRET, "cheese"]


def leaks(folder: Path, kind: type[Knowing]) -> tuple[bool, bool]:
    """Whether the secret is named to who asks for Alice, and whether others' answers change."""
    shop = Shop(folder, kind)
    with shop.replica.client() as client:
        before = {user: ask_everything(client, user) for user in ("bob", "carol", None)}
        shop.plant("alice")
        to_alice = json.dumps(ask_everything(client, "alice"))
        after = {user: ask_everything(client, user) for user in ("bob", "carol", None)}
    # An answer to a recommendation without exclude_seen may have the item: it is asked for her.
    return SECRET in to_alice, before != after


def test_a_history_is_named_to_nobody_and_changes_no_other_users_answers(tmp_path: Path) -> None:
    assert leaks(tmp_path, Knowing) == (False, False)


@pytest.mark.parametrize(("broken", "found"), [(Telling, (True, False)), (Mixing, (False, True))])
def test_a_version_that_tells_or_mixes_histories_is_found(
    tmp_path: Path, broken: type[Knowing], found: tuple[bool, bool]
) -> None:
    """Negative control."""
    assert leaks(tmp_path, broken) == found


def test_her_own_answers_do_depend_on_her_history(tmp_path: Path) -> None:
    """Negative control: the planted history is in use."""
    shop = Shop(tmp_path, Knowing)
    with shop.replica.client() as client:
        before = ask_everything(client, "alice")
        shop.plant("alice")
        assert ask_everything(client, "alice") != before
        (first, *_) = client.post("/v1/recommend", json={"user_id": "alice"}).json()["ranking"]
        assert first["item_id"] in (SECRET, "cheese")


@pytest.fixture
def trial(local_root: Root) -> Iterator[TestClient]:
    names = ("v0001-aaaaaa", "v0002-bbbbbb")
    with FakeReplica(local_root, {n: FakeVersion(n) for n in names}, on_trial()).client() as client:
        yield client


def test_feedback_with_anothers_request_id_says_nothing_of_that_user(trial: TestClient) -> None:
    answer = trial.post("/v1/rank", json={"user_id": "alice", "candidates": ["apple"]}).json()
    event = {"event_type": "click", "item_id": "apple"}
    body = {"request_id": answer["request_id"], "user_id": "bob", "events": [event]}
    response = trial.post("/v1/feedback", json=body)
    assert response.status_code == 422
    assert "alice" not in response.text and answer["request_id"] not in response.text
