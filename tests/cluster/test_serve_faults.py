"""Whatever dies, no request fails; and a canary with any planted fault is rolled back by itself.

Two replicas behind HAProxy, users who ask and click all the time, and the ledger as the judge of
which version may have answered when.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from raysys.rollout.state import abort, promote, start
from tests.cluster.test_serve import Shop, eventually, kill_controller, served
from tests.faulty_versions import load_faulty
from tests.helpers import write_config
from tests.serve_load import Users, without_weight

STABLE = "v0001-stable"
RULES = """
rollout:
  weight_fraction: 0.5
  min_requests: 150
  interval_s: 0.5
  latency_slo_ms: 80.0
  max_bad_rate_increase: 0.1
  max_ctr_drop: 0.3
  max_conversion_drop: 0.3
  max_ndcg_drop: 0.3
"""


class FaultyShop(Shop):
    """A shop whose versions are as faulty as their names say."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.config = write_config(folder, self.root.uri, RULES)
        self.folder = folder / "root"
        self._num_versions = 1

    def commit_next(self, fault: str) -> str:
        """Commits a version with a fault and returns its name."""
        self._num_versions += 1
        version = f"v{self._num_versions:04}-{fault}"
        self.commit(version)
        return version

    def start(self, version: str) -> None:
        self.log.transact(lambda state: start(state, version, weight_fraction=0.5, actor="test"))


@pytest.fixture(scope="module")
def shop(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyShop]:
    shop = FaultyShop(tmp_path_factory.mktemp("shop"))
    with served(shop, load_faulty, stable=STABLE, num_replicas=2):
        yield shop


@pytest.fixture
def quiet(shop: FaultyShop) -> FaultyShop:
    """The shop with nothing on trial, and its stable version on all replicas."""
    if shop.log.refresh().canary is not None:
        shop.log.transact(lambda state: abort(state, actor="test", reason="the test before"))
    return shop


def replica_pids() -> list[int]:
    """The processes of the ranking replicas of this test's Ray."""
    return [
        child.pid
        for child in psutil.Process().children(recursive=True)
        if "ServeReplica:raysys:Ranker" in "".join(child.cmdline())
    ]


def assert_all_was_allowed(shop: FaultyShop, users: Users) -> None:
    assert users.failures == []
    assert len(users.answers) > 100
    entries = list(shop.log.entries())
    assert without_weight(users.answers, entries, STABLE) == []


def test_the_load_notices_a_stable_version_that_fails(ray_cluster: None, quiet: FaultyShop) -> None:
    """The negative control of all that follow: promoted by hand, `throws` has nobody behind it."""
    shop = quiet
    before = shop.log.refresh().stable
    assert before is not None
    bad = shop.commit_next("throws")
    with Users(shop.url) as users:
        shop.start(bad)
        shop.log.transact(lambda state: promote(state, actor="test", reason="unwise"))
        eventually(lambda: len(users.failures) > 5, "the load saw no failure")
        assert "500" in users.failures[0]
        shop.start(before)
        shop.log.transact(lambda state: promote(state, actor="test", reason="back"))
        eventually(lambda: users.newest() == {before}, "stable did not come back")


def test_a_replica_that_is_killed_costs_no_request(quiet: FaultyShop) -> None:
    shop = quiet
    eventually(lambda: len(replica_pids()) == 2, "there are not two replicas")
    victim = replica_pids()[0]
    with Users(shop.url) as users:
        users.newest()
        os.kill(victim, signal.SIGKILL)
        users.newest(200)
        eventually(
            lambda: victim not in (pids := replica_pids()) and len(pids) == 2,
            "the replica was not replaced",
        )
        users.newest(100)
    assert_all_was_allowed(shop, users)


def test_swaps_and_weights_change_under_load_without_a_controller(quiet: FaultyShop) -> None:
    shop = quiet
    canary = shop.commit_next("equal")
    with Users(shop.url) as users:
        shop.start(canary)
        eventually(lambda: canary in users.newest(), "the canary never answered")
        kill_controller()
        stable = shop.log.refresh().stable
        assert users.newest(100) == {stable, canary}  # replicas keep the split
        if shop.log.refresh().canary is not None:
            shop.log.transact(lambda state: abort(state, actor="test", reason="weight to 0"))
        eventually(lambda: canary not in users.newest(), "the abort reached nobody")
        shop.start(canary)
        shop.log.transact(lambda state: promote(state, actor="test", reason="swap"))
        eventually(lambda: users.newest() == {canary}, "the promotion reached nobody")
        users.newest(100)
    assert_all_was_allowed(shop, users)


def test_an_object_store_that_is_away_costs_no_ranking(quiet: FaultyShop) -> None:
    shop = quiet
    away = shop.folder.with_name("away")
    with Users(shop.url) as users:
        users.newest()
        shop.folder.rename(away)
        shop.folder.write_text("the store is away")  # or a writer would make a new, empty one
        try:
            users.newest(200)
            refused = feedback_status(shop)
        finally:
            shop.folder.unlink()
            away.rename(shop.folder)
        users.newest(50)
    assert refused == 503  # never acknowledged what is not stored
    assert feedback_status(shop) == 200
    assert_all_was_allowed(shop, users)


def feedback_status(shop: FaultyShop) -> int:
    """The status of a click on an answer."""
    with httpx.Client(timeout=30) as client:
        body = {"candidates": ["i000"], "ts": 1_500_000_000}
        answer = client.post(f"{shop.url}/v1/rank", json=body).json()
        event = {"event_type": "click", "item_id": "i000", "ts": 1_500_000_000}
        body = {"request_id": answer["request_id"], "events": [event]}
        return client.post(f"{shop.url}/v1/feedback", json=body).status_code


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("throws", "were bad"),
        ("nan", "scores that are no numbers"),
        ("slow", "p99|were bad"),
        ("random", "were clicked|NDCG"),
        ("strange", "were bad"),
        ("shifted", "were clicked|NDCG"),
    ],
)
def test_a_faulty_canary_is_rolled_back_by_itself(
    quiet: FaultyShop, fault: str, reason: str
) -> None:
    shop = quiet
    canary = shop.commit_next(fault)
    before = shop.log.refresh().stable
    with Users(shop.url, clicks=True, num_threads=12, pause_s=0.0) as users:
        shop.start(canary)
        eventually(lambda: shop.log.refresh().canary is None, f"no verdict on {canary}")
        eventually(lambda: users.newest() == {before}, "the rollback did not reach all replicas")
    rollout = shop.log.refresh().rollout
    assert rollout is not None
    assert (rollout.phase, rollout.actor) == ("rolled_back", "controller"), rollout.reason
    assert re.search(reason, rollout.reason), rollout.reason
    assert_all_was_allowed(shop, users)


def test_an_equal_canary_is_promoted_by_itself(quiet: FaultyShop) -> None:
    shop = quiet
    canary = shop.commit_next("equal")
    with Users(shop.url, clicks=True, num_threads=12, pause_s=0.0) as users:
        shop.start(canary)
        eventually(lambda: shop.log.refresh().canary is None, "no verdict")
        eventually(lambda: users.newest() == {canary}, "the promotion did not reach all replicas")
    rollout = shop.log.refresh().rollout
    assert rollout is not None
    assert (rollout.phase, rollout.actor, rollout.stable) == ("promoted", "controller", canary)
    assert_all_was_allowed(shop, users)
