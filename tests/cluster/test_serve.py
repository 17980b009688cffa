"""The application on a real Ray Serve: canary, kill of the controller, promotion by traffic."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from raysys.config import load_config
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ledger.log import Log
from raysys.ledger.records import Record
from raysys.rollout.controller import RolloutController
from raysys.rollout.state import abort, start
from raysys.serve.app import Ranker, RankerArgs
from raysys.serve.router import assign
from raysys.storage import Root
from tests.fakes import load_fake
from tests.helpers import committed, started, write_config

STABLE, CANARY = "v0001-aaaaa1", "v0002-aaaaa2"
ROLLOUT = """
rollout:
  weight_fraction: 0.5
  min_requests: 150
  interval_s: 0.5
  latency_slo_ms: 5000.0
  max_bad_rate_increase: 0.3
  max_conversion_drop: 0.5
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Shop:
    """A shop's ledger, and clients of its ranking application."""

    def __init__(self, folder: Path) -> None:
        self.root = Root((folder / "root").as_uri())
        self.log = Log(self.root)
        self.config = write_config(folder, self.root.uri, ROLLOUT)
        keys = load_config(self.config).pseudonyms
        self.key_id = Pseudonymizer.from_config(keys).key_id
        self.url = f"http://127.0.0.1:{free_port()}"

    def commit(self, version: str) -> None:
        begun = started(f"u{version[1:]}", partitions=(), user_key_id=self.key_id)
        for record in (begun, committed(begun, version=version)):
            self._append(record)

    def rank(self, client: httpx.Client, user: str) -> dict[str, Any]:
        body = {"user_id": user, "candidates": ["dates", "apple"], "ts": 1_500_000_000}
        response = client.post(f"{self.url}/v1/rank", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def _append(self, record: Record) -> None:
        self.log.transact(lambda state: record)


class Traffic:
    """Requests in the background, all of whose answers are kept."""

    def __init__(self, shop: Shop, *, with_feedback: bool = False) -> None:
        self.answers: list[tuple[str, str]] = []
        self.failures: list[str] = []
        self._shop, self._with_feedback = shop, with_feedback
        self._ended = threading.Event()
        self._users = itertools.count()
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._ended.is_set():
                user = f"user-{next(self._users)}"
                try:
                    answer = self._shop.rank(client, user)
                    self.answers.append((user, answer["version"]))
                    if self._with_feedback and len(self.answers) % 2:
                        self._send_feedback(client, answer["request_id"])
                except (AssertionError, httpx.HTTPError) as error:
                    self.failures.append(repr(error))
                time.sleep(0.01)

    def _send_feedback(self, client: httpx.Client, request_id: str) -> None:
        event = {"event_type": "click", "item_id": "apple", "ts": 1_500_000_000}
        body = {"request_id": request_id, "events": [event]}
        response = client.post(f"{self._shop.url}/v1/feedback", json=body)
        assert response.status_code == 200, response.text


def eventually(check: Callable[[], bool], what: str, timeout_s: float = 60.0) -> float:
    """Waits for something to become true and returns the seconds that took."""
    begun = time.monotonic()
    while not check():
        assert time.monotonic() - begun < timeout_s, what
        time.sleep(0.05)
    return time.monotonic() - begun


@contextlib.contextmanager
def served(shop: Shop, load: Any, *, stable: str = STABLE, num_replicas: int = 1) -> Iterator[None]:
    """Has real replicas serve a shop whose versions `load` makes, `stable` being the first."""
    shop.commit(stable)
    args = RankerArgs(
        config=str(shop.config),
        max_ts_age_s=1e9,
        feedback_interval_s=0.1,
        impressions_interval_s=0.5,
    )
    port = int(shop.url.rpartition(":")[2])
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    controller = RolloutController.bind(str(shop.config))  # type: ignore[attr-defined]
    ranker = Ranker.options(num_replicas=num_replicas)  # type: ignore[attr-defined]
    serve.run(ranker.bind(args, controller, load), name="raysys", route_prefix="/")
    eventually(lambda: is_ready(shop), "never ready")
    yield
    serve.shutdown()


@pytest.fixture(scope="module")
def shop(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    shop = Shop(tmp_path_factory.mktemp("shop"))
    with served(shop, load_fake):
        yield shop


def is_ready(shop: Shop) -> bool:
    try:
        return httpx.get(f"{shop.url}/v1/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def resident(shop: Shop) -> set[str]:
    answer = httpx.get(f"{shop.url}/v1/versions", timeout=5).json()
    return {version["version"] for version in answer["versions"]}


def test_a_rollout_runs_from_start_to_abort_and_again_to_promotion(shop: Shop) -> None:
    """One story, since a deployment takes seconds to start."""
    with Traffic(shop) as before:
        eventually(lambda: len(before.answers) > 20, "no answers")
    assert {version for _, version in before.answers} == {STABLE}

    # A version that is committed later is started as a canary: it loads beside the traffic.
    with Traffic(shop) as traffic:
        shop.commit(CANARY)
        shop.log.transact(lambda s: start(s, CANARY, weight_fraction=0.5, actor="operator"))
        eventually(lambda: CANARY in resident(shop), "the canary was not loaded")
        mark = len(traffic.answers)
        eventually(lambda: len(traffic.answers) > mark + 100, "no answers")

        # The controller dies. The replica keeps the split.
        kill_controller()
        killed = len(traffic.answers)
        eventually(lambda: len(traffic.answers) > killed + 50, "no answers without a controller")
        by_arm = Counter(
            assign(user, rollout_id="r0001", weight_fraction=0.5) == "canary"
            for user, version in traffic.answers[mark + 10 :]
            if version == CANARY
        )
        assert set(by_arm) == {True}

        # The next controller goes on where the ledger stands.
        if shop.log.refresh().canary is not None:
            shop.log.transact(lambda s: abort(s, actor="operator", reason="enough"))
        eventually(lambda: newest(traffic) == {STABLE}, "the abort did not reach the replica")
    assert traffic.failures == []

    # The same version once more, now with feedback: traffic decides.
    shop.log.transact(lambda s: start(s, CANARY, weight_fraction=0.5, actor="operator"))
    with Traffic(shop, with_feedback=True) as traffic:
        eventually(lambda: phase(shop) == "promoted", "no verdict")
        eventually(lambda: newest(traffic) == {CANARY}, "the promotion did not reach the replica")
    assert traffic.failures == []
    rollout = shop.log.refresh().rollout
    assert rollout is not None
    assert (rollout.actor, rollout.stable, rollout.previous) == ("controller", CANARY, STABLE)
    assert rollout.measurement is not None
    assert rollout.measurement["canary"]["num_clicked"] > 0
    assert resident(shop) == {CANARY, STABLE}
    eventually(lambda: bool(shop.root.list("events/dt=2017-07-14")), "no events were written")


def kill_controller() -> None:
    name = next(
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if "RolloutController" in actor["name"]
    )
    ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)


def newest(traffic: Traffic) -> set[str]:
    """The versions of the newest answers, enough of them to have come from both arms."""
    mark = len(traffic.answers)
    eventually(lambda: len(traffic.answers) >= mark + 20, "no answers")
    return {version for _, version in traffic.answers[mark:]}


def phase(shop: Shop) -> str | None:
    rollout = shop.log.refresh().rollout
    return rollout.phase if rollout else None
