"""The HTTP API on a replica without Ray: answers, refusals, split, fallback and feedback."""

from __future__ import annotations

import io
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from raysys.config import RolloutConfig
from raysys.errors import ArtifactError, StorageUnavailableError
from raysys.ledger.records import Record
from raysys.partitions.schema import EVENT_SCHEMA
from raysys.rollout.view import RolloutView
from raysys.serve.router import assign
from raysys.storage import Root
from tests.fakes import ITEMS, FakeReplica, FakeVersion
from tests.helpers import committed, rollout, started

STABLE, CANARY = "v0001-aaaaaa", "v0002-bbbbbb"
CANDIDATES = ["dates", "apple", "cheese"]
CANARY_USER = next(
    f"user-{i}"
    for i in range(100)
    if assign(f"user-{i}", rollout_id="r0001", weight_fraction=0.2) == "canary"
)
STABLE_USER = next(
    f"user-{i}"
    for i in range(100)
    if assign(f"user-{i}", rollout_id="r0001", weight_fraction=0.9) == "stable"
)


def one_version() -> list[Record]:
    start = started("u0001-aaaaaa")
    return [start, committed(start, version=STABLE)]


def two_versions() -> list[Record]:
    start = started("u0002-bbbbbb", partitions=())
    return [*one_version(), start, committed(start, version=CANARY)]


def on_trial() -> list[Record]:
    return [*two_versions(), rollout("canary")]


def make(
    root: Root,
    records: list[Record],
    stable: FakeVersion | Exception | None = None,
    canary: FakeVersion | Exception | None = None,
    config: RolloutConfig | None = None,
    item_ids: Sequence[str] = (),
    max_ts_age_s: float = math.inf,
) -> FakeReplica:
    versions = {
        STABLE: FakeVersion(STABLE) if stable is None else stable,
        CANARY: FakeVersion(CANARY) if canary is None else canary,
    }
    return FakeReplica(root, versions, records, config, item_ids, max_ts_age_s)


@pytest.fixture
def replica(local_root: Root) -> FakeReplica:
    return make(local_root, one_version())


@pytest.fixture
def client(replica: FakeReplica) -> Iterator[TestClient]:
    with replica.client() as client:
        yield client


def rank(client: TestClient, user: str | None = "alice", **body: Any) -> dict[str, Any]:
    response = client.post("/v1/rank", json={"user_id": user, "candidates": CANDIDATES, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def order(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["ranking"]]


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    message: str = response.json()["error"]
    assert "\n" not in message
    return message


def events(root: Root) -> pl.DataFrame:
    files = [info.path for info in root.list("events")]
    frames = [pl.read_parquet(io.BytesIO(root.read_bytes(path))) for path in files]
    return pl.concat(frames) if frames else pl.DataFrame(schema=EVENT_SCHEMA)


def eventually(check: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# Ranking


def test_an_answer_ranks_the_candidates_best_first(client: TestClient) -> None:
    answer = rank(client)
    assert set(answer) == {"request_id", "version", "ranking", "unknown_candidates"}
    assert answer["version"] == STABLE
    assert order(answer) == ["apple", "cheese", "dates"]
    first = answer["ranking"][0]
    assert (first["item_id"], first["score"], first["probability"]) == ("apple", 0.0, 0.5)
    assert answer["unknown_candidates"] == []


def test_k_limits_the_answer(client: TestClient) -> None:
    assert order(rank(client, k=2)) == ["apple", "cheese"]
    assert len(rank(client, k=1000)["ranking"]) == 3


def test_equal_scores_are_ranked_by_item_id_in_any_order_of_candidates(local_root: Root) -> None:
    level = FakeVersion(STABLE, score=np.zeros_like)
    with make(local_root, one_version(), level).client() as client:
        for candidates in (["dates", "apple", "cheese"], ["cheese", "dates", "apple"]):
            assert order(rank(client, candidates=candidates)) == ["apple", "cheese", "dates"]


def test_a_history_in_the_request_takes_the_place_of_the_known_one(
    client: TestClient, replica: FakeReplica
) -> None:
    assert order(rank(client, history=["dates", "never seen"]))[0] == "dates"
    version = replica.available[STABLE]
    assert isinstance(version, FakeVersion)
    assert version.users == []


def test_the_version_sees_the_pseudonym_the_query_and_the_time(
    client: TestClient, replica: FakeReplica
) -> None:
    rank(client, query="cheddar", ts=1_500_000_000.5)
    version = replica.available[STABLE]
    assert isinstance(version, FakeVersion)
    assert version.users == [replica.pseudonymizer.pseudonym("alice")]
    assert (version.queries[-1], version.times[-1]) == ("cheddar", 1_500_000_000.5)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        pytest.param({"candidates": []}, 422, "candidates: has 0 entries; send", id="empty"),
        pytest.param(
            {"candidates": [f"i{i}" for i in range(1001)]},
            422,
            "candidates: has 1001 entries; send at most 1000",
            id="too-many",
        ),
        pytest.param(
            {"candidates": ["apple", "bread", "apple"]},
            422,
            "candidates: 'apple' stand twice; send each candidate once",
            id="duplicated",
        ),
        pytest.param(
            {"candidates": ["apple", *(f"x{i}" for i in range(8))]},
            422,
            "candidates: 'x0', 'x1', 'x2', 'x3', 'x4' and 3 more are not in the catalogue",
            id="unknown",
        ),
        pytest.param({}, 422, "candidates: is missing; send it", id="missing"),
        pytest.param({"candidates": "apple"}, 422, "candidates: expected a valid list", id="text"),
        pytest.param({"candidates": [1]}, 422, "candidates.0: expected a valid string", id="int"),
        pytest.param({"candidates": [" "]}, 422, "candidates.0: expected text", id="blank"),
        pytest.param(
            {"candidates": ["apple"], "kk": 3}, 422, "kk: is an unknown key", id="unknown-key"
        ),
        pytest.param({"candidates": ["apple"], "k": 0}, 422, "k: expected greater", id="k-0"),
        pytest.param(
            {"candidates": ["apple"], "surface": "tv"}, 422, "surface: expected 'search'", id="tv"
        ),
        pytest.param(
            {"candidates": ["apple"], "ts": 1e300}, 422, "ts: expected less than", id="far-future"
        ),
        pytest.param(
            {"candidates": ["apple"], "user_id": "x" * 300}, 422, "user_id: expected", id="long-id"
        ),
        pytest.param(["apple"], 422, "the body is not a JSON object", id="no-object"),
    ],
)
def test_a_bad_request_gets_one_line_that_names_the_value(
    client: TestClient, body: Any, status: int, message: str
) -> None:
    response = client.post("/v1/rank", json=body)
    assert error_of(response, status).startswith(message)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"candidates": [', 400, "the body is not JSON"),
        (b"", 422, "the body is not a JSON object"),
        (b"\x80", 400, "POST /v1/rank: "),
        (b'{"candidates": ["apple"], "ts": NaN}', 422, "ts: expected"),
        (b'{"candidates": ["\\ud800"]}', 422, "candidates.0: expected"),
        (b"[" * 100_000, 400, ""),
    ],
    ids=["cut-off", "empty", "not-utf8", "nan", "lone-surrogate", "deeply-nested"],
)
def test_a_malformed_body_gets_a_4xx(
    client: TestClient, body: bytes, status: int, message: str
) -> None:
    response = client.post("/v1/rank", content=body, headers={"Content-Type": "application/json"})
    assert error_of(response, status).startswith(message)


def test_an_unknown_path_and_a_wrong_method_get_the_same_shape(client: TestClient) -> None:
    assert error_of(client.get("/v1/nothing"), 404).startswith("GET /v1/nothing: Not Found")
    assert error_of(client.get("/v1/rank"), 405).startswith("GET /v1/rank: Method Not Allowed")


def test_a_header_forces_a_resident_version_and_is_not_counted(local_root: Root) -> None:
    replica = make(local_root, on_trial())
    with replica.client() as client:
        headers = {"X-Raysys-Version": CANARY}
        body = {"user_id": STABLE_USER, "candidates": CANDIDATES}
        assert client.post("/v1/rank", json=body, headers=headers).json()["version"] == CANARY
        assert replica.service.tally is not None
        report = replica.service.tally.report(time.time())
        assert report.canary.num_requests.sum() == report.stable.num_requests.sum() == 0
        response = client.post("/v1/rank", json=body, headers={"X-Raysys-Version": "v9"})
        assert error_of(response, 404) == (
            f"X-Raysys-Version: version 'v9' is not resident; resident: {STABLE}, {CANARY}"
        )


# Readiness


def test_without_a_version_the_replica_lives_but_is_not_ready(local_root: Root) -> None:
    with make(local_root, []).client() as client:
        assert client.get("/v1/healthz").json() == {"status": "ok"}
        assert "run an update first" in error_of(client.get("/v1/readyz"), 503)
        response = client.post("/v1/rank", json={"candidates": ["apple"]})
        assert "no version is loaded yet" in error_of(response, 503)


def test_a_version_that_appears_later_makes_the_replica_ready(local_root: Root) -> None:
    replica = make(local_root, [])
    with replica.client() as client:
        for record in one_version():
            replica.append(record)
        replica.controller.views.put_nowait(RolloutView.of(replica.log.refresh()))
        eventually(lambda: client.get("/v1/readyz").status_code == 200, "never ready")
        assert rank(client)["version"] == STABLE


def test_a_stable_version_with_broken_artifacts_is_named_by_readyz(local_root: Root) -> None:
    broken = ArtifactError("versions/x/head has another sha256")
    with make(local_root, one_version(), broken).client() as client:
        assert "another sha256" in error_of(client.get("/v1/readyz"), 503)


def test_the_state_can_be_read(local_root: Root) -> None:
    with make(local_root, on_trial()).client() as client:
        versions = client.get("/v1/versions").json()
        assert [(v["version"], v["roles"]) for v in versions["versions"]] == [
            (STABLE, ["stable"]),
            (CANARY, ["canary"]),
        ]
        found = client.get("/v1/rollout").json()
        assert (found["rollout_id"], found["weight_fraction"]) == ("r0001", 0.2)
        assert found["measurement"] == {"phase": "inconclusive"}


def test_without_the_controller_the_last_state_stands(local_root: Root) -> None:
    replica = make(local_root, on_trial())
    replica.controller.is_away = True
    with replica.client() as client:
        assert rank(client, CANARY_USER)["version"] == CANARY
        assert client.get("/v1/rollout").json()["measurement"] is None


# Split and fallback


def test_users_are_split_as_the_router_says_and_counted_on_their_side(local_root: Root) -> None:
    replica = make(local_root, on_trial())
    users = [f"user-{i}" for i in range(300)]
    with replica.client() as client:
        answered = {user: rank(client, user)["version"] for user in users}
        for user, version in answered.items():
            arm = assign(user, rollout_id="r0001", weight_fraction=0.2)
            assert version == {"stable": STABLE, "canary": CANARY}[arm]
        assert replica.service.tally is not None
        report = replica.service.tally.report(time.time() + 5)
    by_version = Counter(answered.values())
    assert report.canary.num_requests.sum() == by_version[CANARY]
    assert report.stable.num_matured.sum() == by_version[STABLE]
    assert report.canary.num_bad.sum() == 0


def test_a_session_without_a_user_sticks_to_its_request_id(local_root: Root) -> None:
    with make(local_root, on_trial()).client() as client:
        versions = {rank(client, None, request_id=CANARY_USER)["version"] for _ in range(5)}
        assert versions == {CANARY}


def nan_scores(scores: np.ndarray) -> np.ndarray:
    return np.full_like(scores, np.nan)


def raising(scores: np.ndarray) -> np.ndarray:
    raise RuntimeError("a bug in the model")


def cut_off(scores: np.ndarray) -> np.ndarray:
    return scores[:-1]


def unless_checked(fault: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """Lets the check of a new version pass: that one scores all items at once."""
    return lambda scores: fault(scores) if len(scores) < len(ITEMS) else scores


@pytest.mark.parametrize("fault", [nan_scores, raising, cut_off])
def test_a_failing_canary_is_counted_as_bad_and_stable_answers(
    local_root: Root, fault: Callable[[np.ndarray], np.ndarray]
) -> None:
    canary = FakeVersion(CANARY, score=unless_checked(fault))
    replica = make(local_root, on_trial(), canary=canary)
    with replica.client() as client:
        assert rank(client, CANARY_USER)["version"] == STABLE
        assert replica.service.tally is not None
        report = replica.service.tally.report(time.time())
    assert (report.canary.num_bad.sum(), report.stable.num_requests.sum()) == (1, 0)
    assert replica.metrics.outcomes == [(STABLE, "canary_failed")]


def test_a_canary_that_lost_items_is_counted_as_bad_and_stable_answers(local_root: Root) -> None:
    replica = make(local_root, on_trial(), canary=FakeVersion(CANARY, ["wrong", "table"]))
    with replica.client() as client:
        assert rank(client, CANARY_USER)["version"] == STABLE
    assert replica.metrics.outcomes == [(STABLE, "canary_failed")]


def test_an_item_that_only_the_canary_knows_is_left_out_by_stable(local_root: Root) -> None:
    replica = make(local_root, on_trial(), canary=FakeVersion(CANARY, [*ITEMS, "eggs"]))
    with replica.client() as client:
        answer = rank(client, STABLE_USER, candidates=["eggs", "bread"])
        assert (order(answer), answer["unknown_candidates"]) == (["bread"], ["eggs"])
        assert order(rank(client, CANARY_USER, candidates=["eggs", "bread"])) == ["bread", "eggs"]
    assert {outcome for _, outcome in replica.metrics.outcomes} == {"ok"}


def test_an_item_of_the_newest_catalogue_stays_known_after_a_rollback(local_root: Root) -> None:
    """No version in memory has `eggs` any more, but the shop does: that is no caller's mistake."""
    replica = make(local_root, one_version(), item_ids=[*ITEMS, "eggs"])
    with replica.client() as client:
        answer = rank(client, STABLE_USER, candidates=["eggs", "bread"])
        assert (order(answer), answer["unknown_candidates"]) == (["bread"], ["eggs"])
        body = {"candidates": ["never-heard-of", "bread"]}
        assert "'never-heard-of'" in error_of(client.post("/v1/rank", json=body), 422)


@pytest.mark.parametrize("ts", [12.0, 1e9, 4e9], ids=["1970", "long ago", "to come"])
def test_a_time_far_from_now_is_refused_and_writes_no_partition(
    local_root: Root, ts: float
) -> None:
    replica = make(local_root, one_version(), max_ts_age_s=3600.0)
    with replica.client() as client:
        now = rank(client, ts=time.time() - 60)
        body = {"candidates": CANDIDATES, "ts": ts}
        assert "ts:" in error_of(client.post("/v1/rank", json=body), 422)
        event = {"event_type": "click", "item_id": "apple", "ts": ts}
        feedback = {"request_id": now["request_id"], "events": [event]}
        assert "ts:" in error_of(client.post("/v1/feedback", json=feedback), 422)
    assert len(local_root.list_folders("events")) <= 1


def test_a_failing_stable_version_is_a_500_in_one_line(local_root: Root) -> None:
    replica = make(local_root, one_version(), FakeVersion(STABLE, score=unless_checked(raising)))
    with replica.client() as client:
        response = client.post("/v1/rank", json={"candidates": CANDIDATES})
        assert "could not score the request" in error_of(response, 500)
    assert replica.metrics.outcomes == [(STABLE, "failed")]


def test_a_slow_answer_is_bad(local_root: Root) -> None:
    config = RolloutConfig(latency_slo_ms=1e-6)
    replica = make(local_root, on_trial(), config=config)
    with replica.client() as client:
        rank(client, CANARY_USER)
        assert replica.service.tally is not None
        assert replica.service.tally.report(time.time()).canary.num_bad.sum() == 1


@pytest.mark.parametrize(
    "canary",
    [
        FakeVersion(CANARY, golden=ArtifactError("golden request 0 is 0.5 away")),
        FakeVersion(CANARY, score=nan_scores),
        ArtifactError("versions/x/head has another sha256"),
    ],
    ids=["golden", "nan", "hash"],
)
def test_a_canary_that_fails_its_check_takes_no_request_and_is_refused(
    local_root: Root, canary: FakeVersion | Exception
) -> None:
    replica = make(local_root, on_trial(), canary=canary)
    with replica.client() as client:
        assert rank(client, CANARY_USER)["version"] == STABLE
        eventually(lambda: bool(replica.controller.reports), "no report")
    refusal = replica.controller.reports[-1].refusal
    assert refusal is not None
    assert refusal.startswith(f"version {CANARY} cannot be served: ")
    assert replica.metrics.outcomes == [(STABLE, "canary_not_loaded")]
    assert replica.controller.reports[-1].canary.num_requests.sum() == 0


def test_a_canary_that_cannot_be_fetched_now_is_tried_again_and_not_refused(
    local_root: Root,
) -> None:
    replica = make(local_root, on_trial(), canary=StorageUnavailableError("no answer in 5 s"))
    with replica.client() as client:
        assert rank(client, CANARY_USER)["version"] == STABLE
        eventually(lambda: bool(replica.controller.reports), "no report")
        assert "no answer in 5 s" in client.get("/v1/versions").json()["missing"][CANARY]
    assert replica.controller.reports[-1].refusal is None


def test_a_promotion_swaps_the_version_and_drops_what_is_no_longer_named(local_root: Root) -> None:
    replica = make(local_root, on_trial())
    with replica.client() as client:
        promoted = rollout("promoted", stable=CANARY, previous=STABLE)
        replica.append(promoted)
        replica.controller.views.put_nowait(RolloutView.of(replica.log.refresh()))
        eventually(lambda: rank(client, STABLE_USER)["version"] == CANARY, "not promoted")
        assert replica.service.tally is None
        roles = {v["version"]: v["roles"] for v in client.get("/v1/versions").json()["versions"]}
        assert roles == {CANARY: ["stable"], STABLE: ["previous"]}
        view = RolloutView.of(replica.log.refresh())
        replica.controller.views.put_nowait(
            RolloutView(
                sequence=view.sequence + 1,
                rollout_id="r0002",
                stable=CANARY,
                canary=None,
                previous=None,
                weight_fraction=0.0,
            )
        )
        eventually(lambda: replica.metrics.resident == {CANARY}, "the old version was kept")


def test_an_older_view_is_not_adopted(local_root: Root) -> None:
    replica = make(local_root, on_trial())
    with replica.client() as client:
        before = replica.service.view
        replica.service.adopt(RolloutView.of(type(replica.log.refresh())()))
        assert replica.service.view == before
        assert rank(client, CANARY_USER)["version"] == CANARY


# Feedback


def test_feedback_is_durable_when_it_is_acknowledged(client: TestClient, local_root: Root) -> None:
    answer = rank(client, surface="search", query="fruit")
    body = {
        "request_id": answer["request_id"],
        "events": [
            {"event_type": "click", "item_id": "apple", "ts": 1_500_000_000},
            {"event_type": "purchase", "item_id": "apple", "price": 2.5, "quantity": 3},
        ],
    }
    assert client.post("/v1/feedback", json=body).json() == {"accepted": 2}
    rows = events(local_root).filter(pl.col("event_type") != "impression").sort("ts")
    assert rows["event_type"].to_list() == ["click", "purchase"]
    assert rows["request_id"].unique().to_list() == [answer["request_id"]]
    assert rows["version"].unique().to_list() == [STABLE]
    assert rows["price"].to_list() == [None, 2.5]
    assert local_root.list("events/dt=2017-07-14")


def test_impressions_become_rows_of_the_contract(local_root: Root) -> None:
    replica = make(local_root, one_version())
    with replica.client() as client:
        answer = rank(client, query="fruit", surface="search", k=2, ts=1_500_000_000)
    rows = events(local_root).sort("position")
    assert rows.schema == EVENT_SCHEMA
    assert rows["item_id"].to_list() == order(answer)
    assert rows["position"].to_list() == [1, 2]
    assert rows["query"].to_list() == ["fruit", "fruit"]
    assert rows["event_id"].n_unique() == 2
    assert rows["user_id"].to_list() == [replica.pseudonymizer.pseudonym("alice")] * 2
    assert rows["user_key_id"].to_list() == [replica.pseudonymizer.key_id] * 2
    assert [Path(f.path).parent.name for f in local_root.list("events")] == ["dt=2017-07-14"]


def test_a_raw_user_id_is_written_nowhere(local_root: Root, tmp_path: Path) -> None:
    replica = make(local_root, on_trial())
    with replica.client() as client:
        answer = rank(client, "secret-user", request_id="secret-session")
        event = {"event_type": "click", "item_id": "apple"}
        body = {"request_id": answer["request_id"], "user_id": "secret-user", "events": [event]}
        assert client.post("/v1/feedback", json=body).status_code == 200
    assert "secret" not in json.dumps(answer)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert b"secret" not in path.read_bytes(), path
    assert "secret" not in events(local_root).write_csv()


def test_feedback_that_is_sent_twice_counts_and_trains_once(local_root: Root) -> None:
    replica = make(local_root, on_trial())
    with replica.client() as client:
        answer = rank(client, CANARY_USER)
        event = {"event_type": "click", "item_id": "apple"}
        body = {"request_id": answer["request_id"], "events": [event]}
        for _ in range(3):
            assert client.post("/v1/feedback", json=body).status_code == 200
        assert replica.service.tally is not None
        replica.service.tally.acknowledge(0)
        report = replica.service.tally.report(time.time() + 5)
        assert [c.arm for c in report.conversions] == ["canary"]
    clicks = events(local_root).filter(pl.col("event_type") == "click")
    assert (len(clicks), clicks["event_id"].n_unique()) == (3, 1)


@pytest.mark.parametrize("change", ["", "x", "."])
def test_a_request_id_that_was_not_signed_here_is_a_404(client: TestClient, change: str) -> None:
    request_id = rank(client)["request_id"]
    forged = request_id.replace(".user.", ".-.", 1) + change if not change else request_id + change
    body = {"request_id": forged, "events": [{"event_type": "click", "item_id": "apple"}]}
    response = client.post("/v1/feedback", json=body)
    assert "send the request_id that the items were answered with" in error_of(response, 404)


def test_feedback_of_another_user_is_refused(client: TestClient) -> None:
    event = {"event_type": "click", "item_id": "apple"}
    body = {"request_id": rank(client)["request_id"], "user_id": "bob", "events": [event]}
    assert error_of(client.post("/v1/feedback", json=body), 422).startswith("user_id: is not")


def test_a_session_may_get_a_user_before_its_feedback(client: TestClient) -> None:
    event = {"event_type": "purchase", "item_id": "apple"}
    request_id = rank(client, None, request_id="session-1")["request_id"]
    body = {"request_id": request_id, "user_id": "bob", "events": [event]}
    assert client.post("/v1/feedback", json=body).status_code == 200


@pytest.mark.parametrize(
    ("events_sent", "message"),
    [
        ([], "events: has 0 entries; send at least 1"),
        ([{"event_type": "impression", "item_id": "a"}], "events.0.event_type: expected 'click'"),
        ([{"event_type": "click"}], "events.0.item_id: is missing"),
        ([{"event_type": "click", "item_id": "a", "price": -1}], "events.0.price: expected"),
    ],
    ids=["none", "impression", "no-item", "negative-price"],
)
def test_bad_feedback_is_refused(client: TestClient, events_sent: Any, message: str) -> None:
    body = {"request_id": rank(client)["request_id"], "events": events_sent}
    assert error_of(client.post("/v1/feedback", json=body), 422).startswith(message)


def test_feedback_that_could_not_be_stored_is_a_503_and_is_not_counted(
    local_root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = make(local_root, on_trial())

    def unavailable(path: str, data: bytes) -> None:
        raise StorageUnavailableError("no answer in 5 s")

    with replica.client() as client:
        answer = rank(client, CANARY_USER)
        body = {
            "request_id": answer["request_id"],
            "events": [{"event_type": "click", "item_id": "apple"}],
        }
        with monkeypatch.context() as patch:
            patch.setattr(local_root, "put", unavailable)
            assert "send it again" in error_of(client.post("/v1/feedback", json=body), 503)
            assert rank(client, CANARY_USER)["version"] == CANARY
        assert client.post("/v1/feedback", json=body).status_code == 200
        assert replica.service.tally is not None
        replica.service.tally.acknowledge(0)
        assert len(replica.service.tally.report(time.time() + 5).conversions) == 1
    # Impressions waited for the store to come back.
    assert events(local_root).filter(pl.col("event_type") == "impression").height == 6


def test_the_openapi_schema_names_the_error_shape(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert {"/v1/rank", "/v1/feedback", "/v1/versions", "/v1/rollout"} <= set(schema["paths"])
    refusal = schema["paths"]["/v1/rank"]["post"]["responses"]["422"]
    assert refusal["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")
