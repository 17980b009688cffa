"""What the API's schema tells: errors, tokens and samples, of every endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from raysys.config import HttpConfig
from raysys.serve.api import create_api
from raysys.serve.samples import ANSWERS, REQUESTS
from raysys.storage import Root
from tests.fakes import FakeReplica


@pytest.fixture
def api(local_root: Root) -> FastAPI:
    return create_api(FakeReplica(local_root, {}).replica, HttpConfig())


def operations(api: FastAPI) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in api.openapi()["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_every_endpoint_tells_its_errors_in_the_one_shape(api: FastAPI) -> None:
    for path, method, operation in operations(api):
        errors = {int(s) for s in operation["responses"] if s != "200"}
        expected = {500, 503} if method == "get" else {400, 408, 413, 415, 422, 500, 503}
        assert errors >= expected, path
        for status in errors:
            schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorAnswer"), (path, status)
        assert "Retry-After" in operation["responses"]["503"]["headers"], path


def test_exactly_what_changes_the_rollout_needs_a_token(api: FastAPI) -> None:
    for path, method, operation in operations(api):
        is_steering = method == "post" and path.startswith("/v1/rollout/")
        assert ("security" in operation) == is_steering, path
        assert ({"401", "403", "409"} <= set(operation["responses"])) == is_steering, path
    schemes = api.openapi()["components"]["securitySchemes"]
    assert [(s["type"], s["scheme"]) for s in schemes.values()] == [("http", "bearer")]


def test_every_endpoint_has_samples_that_it_would_take_and_give(api: FastAPI) -> None:
    routes = [r for r in api.routes if isinstance(r, APIRoute) and r.include_in_schema]
    assert {route.path for route in routes} == set(ANSWERS)
    assert {route.path for route in routes if route.body_field} == set(REQUESTS)
    for route in routes:
        route.response_model.model_validate(ANSWERS[route.path])
        unknown = set(ANSWERS[route.path]) - set(route.response_model.model_fields)
        assert not unknown, route.path
        if route.body_field:
            _, problems = route.body_field.validate(REQUESTS[route.path], loc=("body",))
            assert not problems, route.path
    for path, method, operation in operations(api):
        answer = operation["responses"]["200"]["content"]["application/json"]
        shown = {k: v for k, v in ANSWERS[path].items() if v is not None}  # FastAPI drops nulls
        assert answer["example"] == shown and "schema" in answer
        if method == "post":
            body = operation["requestBody"]["content"]["application/json"]
            assert body["example"] == REQUESTS[path] and "schema" in body
