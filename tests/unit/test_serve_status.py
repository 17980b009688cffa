"""Readiness, and the state that a replica tells."""

from __future__ import annotations

from raysys.errors import ArtifactError
from raysys.rollout.view import RolloutView
from raysys.storage import Root
from tests.serving import (
    CANARY,
    CANARY_USER,
    STABLE,
    error_of,
    eventually,
    make,
    on_trial,
    one_version,
    rank,
)


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
