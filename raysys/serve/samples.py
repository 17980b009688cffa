"""One request and one answer of each endpoint, as /docs shows them: plain data, tried by tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

_REQUEST_ID = "00ff00ff00ff00ff.5dc.v0002-1a2b3c.search.ab12.user.r0001.canary.7.a7f8efbdcf7ff553"
_SCORED = {"item_id": "sku-1", "rank": 1, "score": 1.25, "probability": 0.31}
_ANSWERED = {"request_id": _REQUEST_ID, "version": "v0002-1a2b3c"}
_RANKED = {**_ANSWERED, "ranking": [_SCORED]}
_ROLLOUT = {
    "sequence": 12,
    "rollout_id": "r0001",
    "phase": "canary",
    "step_index": 1,
    "stable": "v0001-9f8e7d",
    "canary": "v0002-1a2b3c",
    "previous": None,
    "weight_fraction": 0.05,
    "measurement": None,
}
_OFF_TRIAL = {"step_index": None, "canary": None, "weight_fraction": 0.0}
_ABORTED = {**_ROLLOUT, **_OFF_TRIAL, "sequence": 13, "phase": "rolled_back"}
_PROMOTED = {
    **_ROLLOUT,
    **_OFF_TRIAL,
    "sequence": 13,
    "phase": "promoted",
    "stable": "v0002-1a2b3c",
    "previous": "v0001-9f8e7d",
}

REQUESTS: Mapping[str, Any] = {
    "/v1/rank": {
        "user_id": "alice",
        "candidates": ["sku-1", "sku-2"],
        "query": "oat milk",
        "surface": "search",
    },
    "/v1/search": {
        "user_id": "alice",
        "query": "oat milk",
        "filters": {"category": ["drinks"], "max_price": 5.0},
        "k": 10,
    },
    "/v1/recommend": {"history": ["sku-7"], "k": 5, "exclude_seen": True},
    "/v1/ads": {"user_id": "alice", "candidates": [{"item_id": "sku-1", "bid": 0.8}]},
    "/v1/feedback": {
        "request_id": _REQUEST_ID,
        "events": [{"event_type": "purchase", "item_id": "sku-1", "price": 2.49, "quantity": 2}],
    },
    "/v1/rollout/start": {"version": "v0002-1a2b3c", "weight": 0.05},
    "/v1/rollout/pause": {"reason": "a sale begins"},
    "/v1/rollout/resume": {"reason": "the sale is over"},
    "/v1/rollout/promote": {"reason": "good enough"},
    "/v1/rollout/abort": {"reason": "customers complain"},
}
"""Path -> body."""

ANSWERS: Mapping[str, Any] = {
    "/v1/rank": {**_RANKED, "unknown_candidates": ["sku-2"]},
    "/v1/search": _RANKED,
    "/v1/recommend": _RANKED,
    "/v1/ads": {
        **_ANSWERED,
        "ranking": [{**_SCORED, "bid": 0.8, "expected_value": 0.248}],
        "unknown_candidates": [],
        "num_below_reserve": 0,
    },
    "/v1/feedback": {"accepted": 1},
    "/v1/versions": {
        "versions": [
            {
                "version": "v0001-9f8e7d",
                "roles": ["stable"],
                "num_items": 50_000,
                "encoder": "onnx",
            }
        ],
        "missing": {"v0002-1a2b3c": "is being loaded"},
    },
    "/v1/rollout": _ROLLOUT,
    "/v1/rollout/start": _ROLLOUT,
    "/v1/rollout/pause": {**_ROLLOUT, "sequence": 13, "phase": "paused"},
    "/v1/rollout/resume": {**_ROLLOUT, "sequence": 14},
    "/v1/rollout/promote": _PROMOTED,
    "/v1/rollout/abort": _ABORTED,
    "/v1/healthz": {"status": "ok"},
    "/v1/readyz": {"status": "ok"},
}
"""Path -> body of the 200."""


def add_samples(app: FastAPI) -> None:
    """Puts the samples into the schema of an app that has all its endpoints."""
    for route in app.routes:
        if isinstance(route, APIRoute) and route.include_in_schema:
            route.openapi_extra = _samples(route.path)


def _samples(path: str) -> dict[str, Any]:
    answer = {"content": {"application/json": {"example": ANSWERS[path]}}}
    found: dict[str, Any] = {"responses": {"200": answer}}
    if path in REQUESTS:
        found["requestBody"] = {"content": {"application/json": {"example": REQUESTS[path]}}}
    return found
