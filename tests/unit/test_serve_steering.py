"""Steering a rollout over HTTP: who may, what the ledger then says, and what a refusal tells."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from raysys.config import HttpConfig
from raysys.errors import ConfigError, StorageUnavailableError
from raysys.ledger.records import Record
from raysys.serve.app import build
from raysys.serve.auth import Tokens
from raysys.storage import Root
from tests.fakes import FakeReplica, FakeVersion
from tests.helpers import committed, rollout, started, write_config

STABLE, CANARY = "v0001-aaaaaa", "v0002-bbbbbb"
TOKEN, NEXT_TOKEN = "a" * 32, "b" * 40
ACTIONS = ["start", "pause", "resume", "promote", "abort"]


def two_versions() -> list[Record]:
    first, second = started("u0001-aaaaaa"), started("u0002-bbbbbb", partitions=())
    return [first, committed(first, version=STABLE), second, committed(second, version=CANARY)]


class Shop:
    """A replica with a token file, and an operator's client of it."""

    def __init__(self, root: Root, folder: Path, records: list[Record]) -> None:
        self.file = folder / "tokens"
        self.give(TOKEN)
        versions = {name: FakeVersion(name) for name in (STABLE, CANARY)}
        self.replica = FakeReplica(root, versions, records)
        self.config = HttpConfig(token_file=str(self.file))

    def give(self, *tokens: str) -> None:
        self.file.write_text("\n".join(tokens))
        self.file.chmod(0o600)


@pytest.fixture
def shop(local_root: Root, tmp_path: Path) -> Shop:
    return Shop(local_root, tmp_path, two_versions())


@pytest.fixture
def client(shop: Shop) -> Iterator[TestClient]:
    with shop.replica.client(shop.config) as client:
        yield client


def steer(
    client: TestClient, action: str, body: Any = None, token: str | None = TOKEN
) -> httpx.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return client.post(f"/v1/rollout/{action}", json=body, headers=headers)


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    message: str = response.json()["error"]
    return message


def test_a_rollout_is_started_aborted_and_promoted(client: TestClient, shop: Shop) -> None:
    begun = steer(client, "start", {"version": CANARY, "weight": 0.3}).json()
    assert (begun["rollout_id"], begun["canary"], begun["weight_fraction"]) == (
        "r0001", CANARY, 0.3,
    )  # fmt: skip
    ended = steer(client, "abort", {"reason": "too slow"}).json()
    assert (ended["canary"], ended["stable"]) == (None, STABLE)
    record = shop.replica.log.refresh().rollout
    assert record is not None
    assert (record.phase, record.actor, record.reason) == ("rolled_back", "operator", "too slow")
    assert steer(client, "start", {"version": CANARY}).json()["weight_fraction"] == 0.2
    promoted = steer(client, "promote").json()
    assert (promoted["stable"], promoted["previous"]) == (CANARY, STABLE)
    assert client.get("/v1/rollout").json() == promoted


def test_a_trial_is_paused_and_goes_on(client: TestClient) -> None:
    assert steer(client, "start", {"version": CANARY}).json()["phase"] == "canary"
    paused = steer(client, "pause", {"reason": "a sale"}).json()
    assert (paused["phase"], paused["canary"], paused["weight_fraction"]) == ("paused", CANARY, 0.2)
    assert "paused" in error_of(steer(client, "pause"), 409)
    assert steer(client, "resume").json()["phase"] == "canary"
    assert steer(client, "pause").json()["phase"] == "paused"
    assert steer(client, "abort").json()["phase"] == "rolled_back"


def test_the_replica_follows_its_own_change_without_the_controller(
    client: TestClient, shop: Shop
) -> None:
    shop.replica.controller.is_away = True
    steer(client, "start", {"version": CANARY, "weight": 0.9999})
    steer(client, "abort")
    answers = [
        client.post("/v1/rank", json={"user_id": f"u{i}", "candidates": ["apple"]}).json()
        for i in range(20)
    ]
    assert {answer["version"] for answer in answers} == {STABLE}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}a", f"Basic {TOKEN}", TOKEN, "ü"],
)
def test_without_a_known_token_nothing_changes(
    client: TestClient, shop: Shop, action: str, header: str | None
) -> None:
    before = shop.replica.log.refresh().sequence
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for body in (b"{}", b"not json", b"[" * 5000):
        response = client.post(f"/v1/rollout/{action}", content=body, headers=headers)
        assert "expected `Bearer TOKEN`" in error_of(response, 401)
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert shop.replica.log.refresh().sequence == before


def test_the_scheme_is_known_in_any_case(client: TestClient) -> None:
    headers = {"Authorization": f"bearer {TOKEN}"}
    assert client.post("/v1/rollout/promote", headers=headers).status_code == 409


@pytest.mark.parametrize("action", ACTIONS)
def test_without_a_token_file_the_endpoints_are_off(shop: Shop, action: str) -> None:
    with shop.replica.client(HttpConfig()) as client:
        response = steer(client, action, {"version": CANARY})
    assert "set http.token_file" in error_of(response, 403)
    assert shop.replica.log.refresh().rollout is None


def test_a_token_is_replaced_without_a_restart(client: TestClient, shop: Shop) -> None:
    assert steer(client, "abort", token=NEXT_TOKEN).status_code == 401
    shop.give(TOKEN, NEXT_TOKEN)
    assert {steer(client, "abort", token=t).status_code for t in (TOKEN, NEXT_TOKEN)} == {409}
    shop.give(NEXT_TOKEN)
    assert steer(client, "abort", token=NEXT_TOKEN).status_code == 409
    assert steer(client, "abort", token=TOKEN).status_code == 401


def test_every_token_is_compared_in_constant_time(
    client: TestClient, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.give(TOKEN, NEXT_TOKEN, "c" * 32)
    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr("raysys.serve.auth.hmac.compare_digest", compare)
    for token in (TOKEN, "x", "ü" * 3):
        client.post("/v1/rollout/abort", headers={"Authorization": f"Bearer {token}".encode()})
    assert compared == [(32, 32)] * 9


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.chmod(0o604), r"may be read or written by everyone \(mode 0604\)"),
        (lambda f: f.unlink(), r"cannot be read \(No such file"),
        (lambda f: f.write_text("\n \n"), "has no token"),
        (lambda f: f.write_text(f"{TOKEN}\nshort"), "token 2 has 5 characters, at least 32"),
    ],
    ids=["readable", "missing", "empty", "short"],
)
def test_a_token_file_that_cannot_be_used_refuses_everyone_and_an_application(
    client: TestClient, shop: Shop, tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(shop.file)
    with pytest.raises(ConfigError, match=f"http.token_file: .*tokens.*{message}"):
        Tokens(str(shop.file)).digests()
    assert "the replica's log says why" in error_of(steer(client, "abort"), 503)
    extra = "http:\n  token_file: tokens\n"
    path = write_config(tmp_path, shop.replica.root.uri, extra)
    with pytest.raises(ConfigError, match=r"http\.token_file"):
        build({"config": str(path)})


def test_a_token_is_never_said_again(
    shop: Shop, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "secret-that-was-mistyped-by-someone"
    said = [repr(Tokens(str(shop.file)))]
    with shop.replica.client(shop.config) as client:
        for token in (TOKEN, wrong):
            for action in ACTIONS:
                response = steer(client, action, {"version": CANARY}, token)
                said.append(f"{response.text} {response.headers}")
        shop.give("short-secret")
        said.append(steer(client, "abort").text)
    with pytest.raises(ConfigError) as refused:
        Tokens(str(shop.file)).digests()
    said += [str(refused.value), caplog.text]
    records = [
        path.read_text(errors="replace")
        for path in (tmp_path / "root").rglob("*")
        if path.is_file()
    ]
    for text in said + records:
        assert TOKEN not in text and wrong not in text and "short-secret" not in text


@pytest.mark.parametrize("action", [a for a in ACTIONS if a != "start"])
def test_an_illegal_transition_is_a_409_that_says_what_to_do(
    client: TestClient, action: str
) -> None:
    message = error_of(steer(client, action), 409)
    assert message == f"cannot {action}: there is no rollout yet; start one first"


def test_a_second_trial_is_a_409_and_an_unknown_version_a_404(
    client: TestClient, shop: Shop
) -> None:
    message = error_of(steer(client, "start", {"version": "v9"}), 404)
    assert message == f"no version 'v9' was committed; known: {STABLE}, {CANARY}"
    shop.replica.append(rollout("canary"))
    message = error_of(steer(client, "start", {"version": CANARY}), 409)
    assert "is on trial; promote, pause or abort it first" in message


@pytest.mark.parametrize(
    ("action", "body", "message"),
    [
        ("start", {}, "version: is missing"),
        ("start", {"version": CANARY, "weight": 0}, "weight: expected greater than 0"),
        ("start", {"version": CANARY, "weight": 1}, "weight: expected less than 1"),
        ("start", {"version": CANARY, "weight": True}, "weight: expected"),
        ("start", {"version": CANARY, "share": 0.1}, "share: is an unknown key"),
        ("abort", {"reason": " "}, "reason: expected text that is not blank"),
        ("abort", {"reason": "x" * 501}, "reason: expected"),
        ("promote", [], "the body is not a JSON object"),
    ],
)
def test_a_bad_body_is_a_422_that_names_the_value(
    client: TestClient, shop: Shop, action: str, body: Any, message: str
) -> None:
    assert error_of(steer(client, action, body), 422).startswith(message)
    assert shop.replica.log.refresh().rollout is None


def test_a_ledger_that_cannot_be_written_is_a_503_and_nothing_changes(
    client: TestClient, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*args: Any) -> bool:
        raise StorageUnavailableError("no answer in 5 s")

    with monkeypatch.context() as patch:
        patch.setattr(shop.replica.root, "put_if_absent", unavailable)
        response = steer(client, "start", {"version": CANARY})
    assert "the ledger cannot be written now" in error_of(response, 503)
    assert response.headers["Retry-After"] == "1"
    assert client.get("/v1/rollout").json()["canary"] is None
    assert steer(client, "start", {"version": CANARY}).status_code == 200
