"""Schemathesis over the API's own schema: no 5xx, and nothing that the schema does not say.

Each operation gets the boundary cases that its schema suggests, then random ones, valid and not:
unicode, huge numbers, wrong types, missing and unknown keys, methods that there are not. The seed
is fixed, so that each run sends the same.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events

from raysys.config import HttpConfig
from raysys.serve.api import create_api
from raysys.storage import Root
from tests.fakes import ITEMS, FakeReplica, FakeVersion, serving
from tests.unit.test_serve_steering import CANARY, STABLE, TOKEN, two_versions

NUM_RANDOM = 25
"""Random cases of each operation, besides those that its schema suggests."""
CALM = HttpConfig(max_body_bytes=200_000)


@dataclasses.dataclass
class Found:
    """What came of a run."""

    problems: dict[str, str] = dataclasses.field(default_factory=dict)
    """Operation and check -> the first failure, and how to repeat it."""
    statuses: defaultdict[str, set[int]] = dataclasses.field(
        default_factory=lambda: defaultdict(set)
    )
    """Operation -> the statuses that it was seen to answer."""
    num_cases: int = 0


def fuzz(api: FastAPI, sharpen: Callable[[str, Any], None], num_random: int = NUM_RANDOM) -> Found:
    """Sends an API all sorts of requests, and checks the answers by its schema."""
    raw = {
        "seed": 20_261_124,
        "headers": {"Authorization": f"Bearer {TOKEN}"},
        "continue-on-failure": True,
        "generation": {
            "max-examples": num_random,
            "deterministic": True,
            "database": "none",
            "no-shrink": True,
        },
        # The schema cannot say which items, versions and times there are: a 422 is right then.
        "checks": {"positive_data_acceptance": {"enabled": False}},
    }
    found = Found()
    with serving(api) as port:
        url = f"http://127.0.0.1:{port}"
        config = SchemathesisConfig.from_dict(raw)
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)

        @schemathesis.hook
        def before_call(context: Any, case: Any, kwargs: Any) -> None:
            sharpen(url, case)

        try:
            for event in engine.from_schema(schema).execute():
                assert not isinstance(event, events.NonFatalError | events.FatalError), event
                if isinstance(event, events.ScenarioFinished):
                    _note(event.recorder, found)
        finally:
            schemathesis.hooks.unregister(before_call)
    return found


def _note(recorder: Any, found: Found) -> None:
    for interaction in recorder.interactions.values():
        found.num_cases += 1
        found.statuses[recorder.label].add(interaction.response.status_code)
    for checks in recorder.checks.values():
        for check in checks:
            if check.failure_info is not None:
                failure = check.failure_info
                text = f"{failure.failure.title}: {failure.failure.message}\n{failure.code_sample}"
                found.problems.setdefault(f"{recorder.label} {check.name}", text)


class Sharpener:
    """Puts names that exist in half of the cases, where random ones would all be unknown."""

    def __init__(self) -> None:
        self._num = 0

    def __call__(self, url: str, case: Any) -> None:
        self._num += 1
        if self._num % 2 or case.method != "POST":
            return
        if case.path.startswith("/v1/rollout/"):
            self._prepare(url, case.path.rpartition("/")[2])
        for name in [name for name in case.headers if name.lower() == "x-raysys-version"]:
            case.headers[name] = STABLE
        if isinstance(case.body, dict):
            self._sharpen(url, case.path, case.body)

    def _sharpen(self, url: str, path: str, body: dict[str, Any]) -> None:
        for part in [body, *(body.get("events") or [] if path == "/v1/feedback" else [])]:
            if isinstance(part, dict) and isinstance(part.get("ts"), int | float):
                part["ts"] = 1_500_000_000
        candidates = body.get("candidates")
        if isinstance(candidates, list) and candidates:
            known = list(ITEMS[: len(candidates)])
            if all(isinstance(candidate, str) for candidate in candidates):
                body["candidates"] = known
            elif all(isinstance(candidate, dict) for candidate in candidates):
                ads = zip(candidates, known, strict=False)
                body["candidates"] = [{**ad, "item_id": item} for ad, item in ads]
        if path == "/v1/feedback" and isinstance(body.get("request_id"), str):
            answer = httpx.post(f"{url}/v1/rank", json={"candidates": ["apple"]}).json()
            body["request_id"] = answer["request_id"]
        if path == "/v1/rollout/start" and isinstance(body.get("version"), str):
            body["version"] = self._not_stable(url)

    def _prepare(self, url: str, action: str) -> None:
        """Brings the rollout to where the action is legal."""
        before = {"start": ["abort"], "resume": ["start", "pause"], "pause": ["start", "resume"]}
        for step in before.get(action, ["start"]):
            body = {"version": self._not_stable(url)} if step == "start" else {}
            headers = {"Authorization": f"Bearer {TOKEN}"}
            httpx.post(f"{url}/v1/rollout/{step}", json=body, headers=headers)

    def _not_stable(self, url: str) -> str:
        stable = httpx.get(f"{url}/v1/rollout").json()["stable"]
        return CANARY if stable == STABLE else STABLE


@pytest.fixture
def replica(local_root: Root) -> FakeReplica:
    versions = {name: FakeVersion(name) for name in (STABLE, CANARY)}
    return FakeReplica(local_root, versions, two_versions())


@pytest.fixture
def config(tmp_path: Path) -> HttpConfig:
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    tokens.chmod(0o600)
    return dataclasses.replace(CALM, token_file=str(tokens))


def test_whatever_is_sent_the_answer_is_one_that_the_schema_tells(
    replica: FakeReplica, config: HttpConfig
) -> None:
    api = create_api(replica.replica, config)
    found = fuzz(api, Sharpener())
    assert not found.problems, "\n\n".join(f"{k}: {v}" for k, v in found.problems.items())
    operations = {
        f"{method.upper()} {path}"
        for path, methods in api.openapi()["paths"].items()
        for method in methods
    }
    assert set(found.statuses) == operations
    assert found.num_cases > 30 * len(operations) / 2
    for operation, statuses in found.statuses.items():
        assert 200 in statuses, f"{operation} was never seen to succeed"
        assert max(statuses) < 500, operation


def planted(fault: Callable[[dict[str, Any]], Any]) -> FastAPI:
    api = FastAPI()

    @api.post("/v1/rank")
    async def rank(body: dict[str, Any]) -> dict[str, int]:
        answer: dict[str, int] = fault(body)
        return answer

    return api


def raises_on_some(body: dict[str, Any]) -> Any:
    if len(json.dumps(body)) % 5 == 0:
        raise RuntimeError("a bug that some bodies meet")
    return {"rank": 1}


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (raises_on_some, "not_a_server_error"),
        (lambda body: JSONResponse({"rank": 1}, 418), "status_code_conformance"),
        (lambda body: JSONResponse({"rank": "first"}), "response_schema_conformance"),
        (lambda body: PlainTextResponse("1"), "content_type_conformance"),
    ],
    ids=["500", "undocumented-status", "wrong-body", "wrong-content-type"],
)
def test_a_planted_fault_is_found(fault: Callable[[dict[str, Any]], Any], check: str) -> None:
    """Negative control."""
    found = fuzz(planted(fault), lambda url, case: None)
    assert f"POST /v1/rank {check}" in found.problems


def test_two_runs_send_the_same() -> None:
    def run() -> list[str]:
        sent: list[str] = []
        fuzz(
            planted(lambda body: {"rank": 1}),
            lambda url, case: sent.append(f"{case.method} {case.path} {case.body!r}"),
            num_random=10,
        )
        return sent

    first = run()
    assert len(first) > 10
    assert run() == first
