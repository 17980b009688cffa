"""Which version answers: split, forced version, fallback, checks, promotion."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from raysys.config import RolloutConfig
from raysys.errors import ArtifactError, StorageUnavailableError
from raysys.rollout.view import RolloutView
from raysys.serve.router import assign
from raysys.storage import Root
from tests.fakes import ITEMS, FakeVersion
from tests.helpers import rollout
from tests.serving import (
    CANARY,
    CANARY_USER,
    CANDIDATES,
    STABLE,
    STABLE_USER,
    cut_off,
    error_of,
    eventually,
    make,
    nan_scores,
    on_trial,
    one_version,
    order,
    raising,
    rank,
    unless_checked,
)


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
    is_invalid = fault is not raising
    assert report.canary.num_invalid.sum() == is_invalid
    outcome = "canary_invalid" if is_invalid else "canary_failed"
    assert replica.metrics.outcomes == [(STABLE, outcome)]


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
