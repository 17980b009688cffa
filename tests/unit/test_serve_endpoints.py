"""What the four endpoints that rank have in common: split, fallback, explanations, refusals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jsonschema
import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from raysys.config import BoostRule, RuleConfig
from raysys.serve.router import assign
from raysys.storage import Root
from tests.fakes import ITEMS, FakeVersion, item_table
from tests.serving import (
    CANARY,
    CANARY_USER,
    CANDIDATES,
    STABLE,
    STABLE_USER,
    cut_off,
    error_of,
    events,
    make,
    nan_scores,
    on_trial,
    one_version,
    order,
    post,
    raising,
    two_versions,
)

ADS = [{"item_id": item, "bid": 1.0} for item in CANDIDATES]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/rank": {"candidates": CANDIDATES},
    "/v1/search": {"query": "bread"},
    "/v1/recommend": {},
    "/v1/ads": {"candidates": ADS},
}
SURFACES = {
    "/v1/rank": "recommend",
    "/v1/search": "search",
    "/v1/recommend": "recommend",
    "/v1/ads": "ads",
}
each_endpoint = pytest.mark.parametrize("path", list(BODIES))


@pytest.fixture
def client(local_root: Root) -> Iterator[TestClient]:
    with make(local_root, one_version()).client() as client:
        yield client


def ask(client: TestClient, path: str, version: str = "", **body: Any) -> dict[str, Any]:
    return post(client, path, {**BODIES[path], **body}, version)


@each_endpoint
def test_users_are_split_and_counted_on_their_side(local_root: Root, path: str) -> None:
    replica = make(local_root, on_trial())
    users = [f"user-{i}" for i in range(60)]
    with replica.client() as client:
        answered = {user: ask(client, path, user_id=user)["version"] for user in users}
        assert replica.service.tally is not None
        report = replica.service.tally.report(time.time())
    arms = {user: assign(user, rollout_id="r0001", weight_fraction=0.2) for user in users}
    assert answered == {user: STABLE if arms[user] == "stable" else CANARY for user in users}
    assert report.canary.num_requests.sum() == list(arms.values()).count("canary") > 0
    assert report.canary.num_bad.sum() == report.stable.num_bad.sum() == 0


@each_endpoint
def test_a_header_forces_a_version_and_is_not_counted(local_root: Root, path: str) -> None:
    replica = make(local_root, on_trial())
    with replica.client() as client:
        assert ask(client, path, CANARY, user_id=STABLE_USER)["version"] == CANARY
        assert replica.service.tally is not None
        assert replica.service.tally.report(time.time()).canary.num_requests.sum() == 0
        headers = {"X-Raysys-Version": "v9"}
        response = client.post(path, json=BODIES[path], headers=headers)
        assert "version 'v9' is not resident" in error_of(response, 404)
    assert replica.metrics.outcomes == [(CANARY, "forced")]


@each_endpoint
@pytest.mark.parametrize("fault", [nan_scores, raising, cut_off])
def test_stable_answers_in_the_place_of_a_failing_canary(
    local_root: Root, path: str, fault: Callable[[np.ndarray], np.ndarray]
) -> None:
    items = [*ITEMS, "eggs"]  # so that no request scores as many items as the check does
    canary = FakeVersion(CANARY, items, score=only_after_checks(fault))
    replica = make(local_root, on_trial(), canary=canary)
    with replica.client() as client:
        answer = ask(client, path, user_id=CANARY_USER)
        assert answer["version"] == STABLE
        assert order(answer)
        assert replica.service.tally is not None
        report = replica.service.tally.report(time.time())
    assert (report.canary.num_bad.sum(), report.stable.num_requests.sum()) == (1, 0)
    outcome = "canary_failed" if fault is raising else "canary_invalid"
    assert replica.metrics.outcomes == [(STABLE, outcome)]


def only_after_checks(fault: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """Lets the first scores pass: those of the check of a new version."""
    seen: list[int] = []

    def scores_of(scores: np.ndarray) -> np.ndarray:
        seen.append(len(scores))
        return scores if len(seen) == 1 else fault(scores)

    return scores_of


@pytest.mark.parametrize("path", ["/v1/search", "/v1/recommend"])
def test_a_canary_that_finds_items_of_no_catalogue_is_bad(local_root: Root, path: str) -> None:
    wrong = FakeVersion(CANARY, ["wrong", "table"])
    replica = make(local_root, on_trial(), canary=wrong, item_ids=ITEMS)
    with replica.client() as client:
        assert ask(client, path, user_id=CANARY_USER)["version"] == STABLE
    assert replica.metrics.outcomes == [(STABLE, "canary_failed")]


@pytest.mark.parametrize("path", ["/v1/search", "/v1/recommend"])
def test_a_canary_that_finds_items_newer_than_stable_is_fine(local_root: Root, path: str) -> None:
    newer = FakeVersion(CANARY, [*ITEMS, "eggs"])
    replica = make(local_root, on_trial(), canary=newer, item_ids=[*ITEMS, "eggs"])
    with replica.client() as client:
        answer = ask(client, path, user_id=CANARY_USER)
        assert (answer["version"], order(answer)[-1]) == (CANARY, "eggs")
        assert "eggs" not in order(ask(client, path, user_id=STABLE_USER))


@pytest.mark.parametrize("path", ["/v1/search", "/v1/recommend"])
def test_a_category_that_another_version_knows_is_no_mistake(local_root: Root, path: str) -> None:
    newer = FakeVersion(CANARY, [*ITEMS, "eggs"])  # "eggs" is the first of category "other"
    replica = make(local_root, on_trial(), canary=newer, item_ids=[*ITEMS, "eggs"])
    with replica.client() as client:
        filters = {"category": ["other"]}
        assert order(ask(client, path, user_id=CANARY_USER, filters=filters)) == ["eggs"]
        assert order(ask(client, path, user_id=STABLE_USER, filters=filters)) == []
        filters = {"category": ["othr"]}
        response = client.post(path, json={**BODIES[path], "filters": filters})
        assert error_of(response, 422).startswith("filters.category: 'othr' is of no item")


@each_endpoint
def test_parts_add_up_to_the_score_and_rules_are_named(local_root: Root, path: str) -> None:
    rules = [RuleConfig(boost=BoostRule(category=("bakery",), add=0.25))]
    with make(local_root, one_version(), rules=rules).client() as client:
        answer = ask(client, path, history=["dates"], explain=True)
        plain = ask(client, path, history=["dates"])
    boosted = path != "/v1/ads"
    for item in answer["ranking"]:
        by_rule = 0.25 if item["rules"] else 0.0
        assert sum(item["explain"].values()) + by_rule == pytest.approx(item["score"])
        assert item["rules"] == (
            ["boost category=bakery +0.25"] if boosted and item["item_id"] == "bread" else []
        )
    assert order(answer)[0] == "dates"
    assert not {"explain", "rules"} & set(plain["ranking"][0])
    assert order(plain) == order(answer)


@each_endpoint
def test_feedback_counts_for_the_surface_of_the_answer(local_root: Root, path: str) -> None:
    replica = make(local_root, on_trial())
    with replica.client() as client:
        answer = ask(client, path, user_id=CANARY_USER)
        click = {"event_type": "click", "item_id": order(answer)[0]}
        body = {"request_id": answer["request_id"], "events": [click]}
        assert client.post("/v1/feedback", json=body).json() == {"accepted": 1}
        assert replica.service.tally is not None
        replica.service.tally.acknowledge(0)
        assert len(replica.service.tally.report(time.time() + 5).conversions) == 1
    clicks = events(local_root).filter(pl.col("event_type") == "click")
    assert clicks["surface"].to_list() == [SURFACES[path]]
    assert clicks["version"].to_list() == [CANARY]


@each_endpoint
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('"k": "3"', "k: expected a valid integer, got '3'"),
        ('"k": 3.0', "k: expected a valid integer, got 3.0"),
        ('"k": true', "k: expected a valid integer, got True"),
        ('"k": 0', "k: expected greater than or equal to 1, got 0"),
        ('"k": 1e400', "k: expected"),
        (f'"k": 1{"0" * 4000}', "k: expected less than or equal to 1000, got 1000"),
        ('"explain": "yes"', "explain: expected a valid boolean, got 'yes'"),
        ('"explain": 1', "explain: expected a valid boolean, got 1"),
        ('"ts": "1500000000"', "ts: expected a valid number, got '1500000000'"),
        ('"ts": -1', "ts: expected greater than or equal to 0, got -1"),
        ('"ts": NaN', "NaN is no number in JSON; send a finite one"),
        ('"user_id": 7', "user_id: expected a valid string"),
        ('"user_id": ""', "user_id: expected string should have at least 1 character"),
        ('"user_id": " \\t"', "user_id: expected text that is not blank and has no NUL"),
        ('"user_id": "a\\u0000b"', "user_id: expected text that is not blank and has no NUL"),
        ('"user_id": "\\ud800"', "the body has half a character"),
        (f'"user_id": "{"x" * 257}"', "user_id: expected string should have at most 256"),
        ('"history": "apple"', "history: expected a valid list, got 'apple'"),
        ('"history": ["\\u0000"]', "history.0: expected text that is not blank and has no NUL"),
        (f'"history": {json.dumps(["a"] * 1001)}', "history: has 1001 entries; send at most 1000"),
        ('"surprise": 1', "surprise: is an unknown key; leave it out, or see /docs"),
    ],
    ids=lambda value: value[:30],
)
def test_a_wrong_value_gets_one_line_that_names_it(
    client: TestClient, path: str, change: str, message: str
) -> None:
    body = json.dumps(BODIES[path])[:-1].rstrip("{")
    text = f"{body}, {change}}}" if BODIES[path] else f"{{{change}}}"
    response = client.post(path, content=text, headers={"Content-Type": "application/json"})
    assert error_of(response, 422).startswith(message)


@each_endpoint
@pytest.mark.parametrize(
    "user",
    ["Zoë", "用户", "\u202e\u200b", "a\nb", "😀" * 64, "x" * 256],
    ids=["accent", "cjk", "bidi", "newline", "emoji", "long"],
)
def test_any_other_text_is_an_id(client: TestClient, path: str, user: str) -> None:
    assert order(ask(client, path, user_id=user, history=[user]))


@each_endpoint
def test_a_whole_number_is_a_number(client: TestClient, path: str) -> None:
    assert order(ask(client, path, ts=1_500_000_000))


@each_endpoint
def test_answers_are_as_the_schema_of_docs_says(local_root: Root, path: str) -> None:
    with make(local_root, two_versions()).client() as client:
        document = client.get("/openapi.json").json()
        responses = document["paths"][path]["post"]["responses"]
        schema = responses["200"]["content"]["application/json"]["schema"]
        strict = {**_closed(document), **schema}
        for body in ({}, {"explain": True}, {"k": 1}, {"history": ["nothing known"]}):
            answer = ask(client, path, **body)
            jsonschema.validate(answer, strict)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**answer, "surprise": 1}, strict)


def _closed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas, with an error for each field that they do not name."""
    schemas = {
        name: {**schema, "additionalProperties": False}
        for name, schema in document["components"]["schemas"].items()
    }
    return {"components": {"schemas": schemas}}


@each_endpoint
def test_without_a_version_there_is_a_503(local_root: Root, path: str) -> None:
    with make(local_root, []).client() as client:
        response = client.post(path, json=BODIES[path])
        assert "no version is loaded yet" in error_of(response, 503)


@each_endpoint
def test_a_failing_stable_version_is_a_500_in_one_line(local_root: Root, path: str) -> None:
    stable = FakeVersion(STABLE, score=only_after_checks(raising))
    with make(local_root, one_version(), stable).client() as client:
        response = client.post(path, json=BODIES[path])
        assert "could not score the request" in error_of(response, 500)


def test_an_explanation_that_is_not_finite_is_a_failure_of_the_version(local_root: Root) -> None:
    stable = FakeVersion(STABLE)
    stable.explain = (  # type: ignore[method-assign]
        lambda history, candidates, *, now, query: {"all": np.full(len(candidates), np.inf)}
    )
    with make(local_root, one_version(), stable).client() as client:
        assert order(ask(client, "/v1/rank"))
        response = client.post("/v1/rank", json={**BODIES["/v1/rank"], "explain": True})
        assert "parts that are not finite" in error_of(response, 500)


def test_an_empty_catalogue_finds_nothing(local_root: Root) -> None:
    empty = FakeVersion(STABLE, item_table([]))
    with make(local_root, one_version(), empty).client() as client:
        for path in ("/v1/search", "/v1/recommend"):
            assert ask(client, path, explain=True)["ranking"] == []
