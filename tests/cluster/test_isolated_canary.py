"""A canary that ends its process, on a real Ray Serve: isolated, it costs no request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from raysys.ledger.records import UpdateCommitted
from raysys.rollout.controller import RolloutController
from raysys.rollout.state import abort, start
from raysys.serve.app import Canary, Ranker, RankerArgs
from raysys.storage import Root
from tests.cluster.test_serve import (
    CANARY,
    STABLE,
    Shop,
    Traffic,
    eventually,
    is_ready,
    resident,
)
from tests.fakes import FakeVersion


def load_deadly(root: Root, record: UpdateCommitted) -> FakeVersion:
    """A canary that passes every check, and ends its process at its tenth user."""
    assert record.version is not None
    version = FakeVersion(record.version)
    if record.version == CANARY:
        version.history = _Deadly(version)  # type: ignore[method-assign]
    return version


class _Deadly:
    def __init__(self, version: FakeVersion) -> None:
        self._inner, self._num_users = version.history, 0

    def __call__(self, user: str) -> Any:
        self._num_users += 1
        if self._num_users == 10:
            os._exit(1)
        return self._inner(user)


@pytest.fixture
def shop(ray_cluster: None, tmp_path: Path) -> Shop:
    shop = Shop(tmp_path)
    for version in (STABLE, CANARY):
        shop.commit(version)
    return shop


def run(shop: Shop, *, is_isolated: bool) -> Traffic:
    """Has the deadly canary on trial under traffic."""
    args = RankerArgs(config=str(shop.config), max_ts_age_s=1e9)
    serve.start(http_options={"host": "127.0.0.1", "port": int(shop.url.rpartition(":")[2])})
    controller = RolloutController.bind(str(shop.config))  # type: ignore[attr-defined]
    canary = Canary.bind(args, controller, load_deadly) if is_isolated else None  # type: ignore[attr-defined]
    application = Ranker.bind(args, controller, load_deadly, canary)  # type: ignore[attr-defined]
    serve.run(application, name="raysys", route_prefix="/")
    try:
        eventually(lambda: is_ready(shop), "never ready")
        with Traffic(shop) as traffic:
            eventually(lambda: len(traffic.answers) > 20, "no answers")
            shop.log.transact(lambda s: start(s, CANARY, weight_fraction=0.5, actor="operator"))
            if is_isolated:
                eventually(lambda: CANARY in resident(shop), "the canary was not loaded")
                eventually(lambda: CANARY in {v for _, v in traffic.answers}, "no canary answer")
                mark = len(traffic.answers)
                eventually(lambda: len(traffic.answers) > mark + 200, "no answers")
            else:
                eventually(lambda: bool(traffic.failures), "nothing failed")
        if shop.log.refresh().canary is not None:
            shop.log.transact(lambda s: abort(s, actor="operator", reason="enough"))
        return traffic
    finally:
        serve.shutdown()


def test_a_canary_that_ends_its_own_process_costs_no_request(shop: Shop) -> None:
    traffic = run(shop, is_isolated=True)
    assert traffic.failures == []
    assert {version for _, version in traffic.answers} == {STABLE, CANARY}


def test_without_isolation_the_same_canary_costs_requests(shop: Shop) -> None:
    """Negative control."""
    assert run(shop, is_isolated=False).failures
