"""A replica through a rotation: which key it writes, looks up and signs with, and what it reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from raysys.config import PseudonymConfig
from raysys.errors import MissingKeyError
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ledger.log import Log
from raysys.ledger.records import Record
from raysys.rollout.view import RolloutView
from raysys.serve.app import named
from raysys.serve.keys import Keys
from raysys.serve.request_id import RequestIds, RequestTag
from raysys.storage import Root
from tests.fakes import ITEMS, FakeReplica, FakeVersion, load_fake
from tests.helpers import FakeClock, committed, rollout, rotated, started

FIRST, SECOND = b"0123456789abcdef", b"fedcba9876543210"
OLD, NEW = Pseudonymizer(FIRST), Pseudonymizer(FIRST, SECOND)
STABLE, CANARY = "v0001-aaaaaa", "v0002-cccccc"
CLICK = {"event_type": "click", "item_id": "apple"}

START = started("u0001-aaaaaa", user_key_id=OLD.key_id)
BASE = committed(START, version=STABLE)
BEFORE: list[Record] = [START, BASE]
_ROTATION = started("u0002-bbbbbb", user_key_id=NEW.key_id, partitions=())
ROTATION: list[Record] = [_ROTATION, rotated(_ROTATION, BASE)]
_NEXT = started("u0003-cccccc", user_key_id=NEW.key_id, partitions=())
AFTER: list[Record] = [_NEXT, committed(_NEXT, version=CANARY)]
TRIAL = rollout("canary", stable=STABLE, canary=CANARY, weight_fraction=0.5)


class Shop:
    """A replica that has both keys, while the ledger names the first."""

    def __init__(self, root: Root, records: Sequence[Record] = BEFORE) -> None:
        self.versions = {
            STABLE: FakeVersion(STABLE, user_key_id=OLD.key_id),
            CANARY: FakeVersion(CANARY, user_key_id=NEW.key_id),
        }
        self.root = root
        self.replica = FakeReplica(root, self.versions, records, keys=(FIRST, SECOND))

    def follow(self, *records: Record) -> None:
        for record in records:
            self.replica.append(record)
        self.replica.service.adopt(RolloutView.of(self.replica.log.refresh()))

    def rank(self, client: Any, **changes: Any) -> dict[str, Any]:
        body = {"user_id": "alice", "candidates": list(ITEMS), **changes}
        response = client.post("/v1/rank", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def send(self, client: Any, request_id: str, **changes: Any) -> Any:
        body = {"request_id": request_id, "events": [CLICK], **changes}
        return client.post("/v1/feedback", json=body)

    def rows(self, kind: str) -> pl.DataFrame:
        files = [f.path for f in self.root.list("events") if f"/{kind}-" in f.path]
        frames = [pl.read_parquet(io.BytesIO(self.root.read_bytes(path))) for path in files]
        return pl.concat(frames).sort("ts", "event_id")


@pytest.fixture
def shop(local_root: Root) -> Shop:
    return Shop(local_root)


def signed_by(request_id: str) -> list[bytes]:
    return [key for key in (FIRST, SECOND) if RequestIds(key).read(request_id)]


def test_a_new_key_is_not_used_before_the_ledger_names_it(shop: Shop) -> None:
    """So that replicas without it, and the update, can read what this one writes and signs."""
    with shop.replica.client() as client:
        assert signed_by(shop.rank(client)["request_id"]) == [FIRST]
    rows = shop.rows("impressions")
    assert set(rows["user_id"]) == {OLD.pseudonym("alice")}
    assert set(rows["user_key_id"]) == {OLD.key_id}


def test_it_is_used_from_the_rotation_on(shop: Shop) -> None:
    with shop.replica.client() as client:
        shop.follow(*ROTATION)
        assert signed_by(shop.rank(client)["request_id"]) == [SECOND]
    rows = shop.rows("impressions")
    assert set(rows["user_id"]) == {NEW.pseudonym("alice")}
    assert set(rows["user_key_id"]) == {NEW.key_id}


def test_a_root_without_an_update_gets_the_newest_key(local_root: Root) -> None:
    assert Keys(lambda: NEW).current.key_id == NEW.key_id


def test_each_version_is_asked_for_the_user_of_its_own_key(shop: Shop) -> None:
    shop.follow(*ROTATION, *AFTER, TRIAL)
    with shop.replica.client() as client:
        for name in (STABLE, CANARY):
            headers = {"X-Raysys-Version": name}
            body = {"user_id": "alice", "candidates": list(ITEMS)}
            assert client.post("/v1/rank", json=body, headers=headers).json()["version"] == name
    assert shop.versions[STABLE].users == [OLD.pseudonym("alice")]
    assert shop.versions[CANARY].users == [NEW.pseudonym("alice")]


def test_a_fallback_is_asked_by_its_own_key_too(shop: Shop) -> None:
    def fails(scores: np.ndarray) -> np.ndarray:
        raise RuntimeError("broken")

    shop.follow(*ROTATION, *AFTER, rollout("canary", stable=STABLE, canary=CANARY,
                                           weight_fraction=0.999))  # fmt: skip
    with shop.replica.client() as client:
        shop.versions[CANARY]._score = fails
        assert shop.rank(client)["version"] == STABLE
    assert shop.versions[CANARY].users == [NEW.pseudonym("alice")]
    assert shop.versions[STABLE].users == [OLD.pseudonym("alice")]


def test_a_rotation_in_the_middle_of_a_request_leaves_it_with_its_key(shop: Shop) -> None:
    def rotate(scores: np.ndarray) -> np.ndarray:
        shop.versions[STABLE]._score = None
        shop.follow(*ROTATION)
        return scores

    with shop.replica.client() as client:
        shop.versions[STABLE]._score = rotate
        assert signed_by(shop.rank(client)["request_id"]) == [FIRST]
        assert signed_by(shop.rank(client)["request_id"]) == [SECOND]
    pairs = shop.rows("impressions").select("user_key_id", "user_id").unique()
    assert set(pairs.iter_rows()) == {(c.key_id, c.pseudonym("alice")) for c in (OLD, NEW)}


class TestFeedback:
    def test_an_answer_from_before_the_rotation_still_gets_its_feedback(self, shop: Shop) -> None:
        with shop.replica.client() as client:
            request_id = shop.rank(client)["request_id"]
            shop.follow(*ROTATION)
            assert shop.send(client, request_id).json() == {"accepted": 1}
            assert shop.send(client, request_id, user_id="alice").status_code == 200
            assert shop.send(client, request_id, user_id="bob").status_code == 422
        rows = shop.rows("feedback")
        assert set(rows["user_id"]) == {OLD.pseudonym("alice")}
        assert set(rows["user_key_id"]) == {OLD.key_id}

    def test_so_does_one_that_a_replica_further_on_has_signed(self, shop: Shop) -> None:
        with shop.replica.client() as client:
            request_id = shop.rank(client)["request_id"]
            tag = RequestIds(FIRST).read(request_id)
            assert tag is not None
            assert shop.send(client, RequestIds(SECOND).sign(tag)).status_code == 200
        assert set(shop.rows("feedback")["user_key_id"]) == {NEW.key_id}

    def test_a_key_that_was_given_up_stores_feedback_but_does_not_vote(self, shop: Shop) -> None:
        shop.follow(*ROTATION, *AFTER, TRIAL)
        with shop.replica.client() as client:
            request_id = shop.rank(client)["request_id"]
            tag = RequestIds(SECOND).read(request_id)
            assert tag is not None and shop.replica.service.tally is not None
            forged = RequestIds(FIRST).sign(tag)
            assert shop.send(client, forged).json() == {"accepted": 1}
            assert shop.replica.service.tally.report(1e12).conversions == ()
            assert shop.send(client, request_id).json() == {"accepted": 1}
            assert len(shop.replica.service.tally.report(1e12).conversions) == 1

    def test_a_foreign_key_signs_nothing_that_is_read(self, shop: Shop) -> None:
        with shop.replica.client() as client:
            tag = RequestIds(FIRST).read(shop.rank(client)["request_id"])
            assert tag is not None
            response = shop.send(client, RequestIds(b"somebody else's!").sign(tag))
        assert response.status_code == 404


class TestMissingKey:
    """A replica that was started before the key was given."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        (tmp_path / "key").write_bytes(FIRST)
        return tmp_path / "key"

    @pytest.fixture
    def clock(self) -> FakeClock:
        return FakeClock()

    @pytest.fixture
    def keys(self, file: Path, clock: FakeClock) -> Keys:
        config = PseudonymConfig(key_file=str(file))
        return Keys(lambda: Pseudonymizer.from_config(config), clock=clock)

    def load(self, root: Root, keys: Keys, name: str = CANARY) -> Any:
        log = Log(root)
        if not list(log.entries()):
            for record in (*BEFORE, *ROTATION, *AFTER):
                log.transact(lambda state, record=record: record)  # type: ignore[misc]
        return load_fake(root, named(name, log, keys))

    def test_a_version_of_a_later_key_is_not_served_without_histories(
        self, local_root: Root, keys: Keys
    ) -> None:
        assert self.load(local_root, keys, STABLE).name == STABLE
        with pytest.raises(MissingKeyError, match=f"user key {NEW.key_id} is not among those"):
            self.load(local_root, keys)

    def test_it_is_as_soon_as_the_file_has_the_key(
        self, local_root: Root, keys: Keys, file: Path, clock: FakeClock
    ) -> None:
        keys.follow(NEW.key_id)
        assert keys.current.key_id == OLD.key_id
        file.write_bytes(FIRST + b"\n" + SECOND + b"\n")
        clock.advance(1.0)
        assert self.load(local_root, keys).name == CANARY

    def test_a_replica_that_got_the_key_late_goes_over_by_itself(
        self, keys: Keys, file: Path, clock: FakeClock
    ) -> None:
        keys.follow(NEW.key_id)
        file.write_bytes(FIRST + b"\n" + SECOND + b"\n")
        clock.advance(1.0)
        assert keys.current.key_id == NEW.key_id

    def test_what_others_signed_already_is_read(
        self, keys: Keys, file: Path, clock: FakeClock
    ) -> None:
        tag = RequestTag(
            nonce="00ff00ff00ff00ff", answered_at=1.5, version=STABLE, surface="search",
            pseudonym=NEW.pseudonym("alice"), has_user=True, rollout_id=None, arm="stable",
            bucket=7,
        )  # fmt: skip
        request_id = RequestIds(SECOND).sign(tag)
        clock.advance(1.0)
        assert keys.read_request_id(request_id) is None
        file.write_bytes(FIRST + b"\n" + SECOND + b"\n")
        assert keys.read_request_id(request_id) is None  # bad ids do not make it read and read
        clock.advance(1.0)
        signed = keys.read_request_id(request_id)
        assert signed is not None and signed.tag == tag and not signed.is_outdated

    @pytest.mark.parametrize("content", [b"", SECOND, SECOND + b"\n" + FIRST])
    def test_a_file_that_lost_a_key_is_not_taken(
        self, keys: Keys, file: Path, clock: FakeClock, content: bytes
    ) -> None:
        file.write_bytes(content)
        for key_id in (NEW.key_id, Pseudonymizer(SECOND).key_id):
            clock.advance(1.0)
            with pytest.raises(MissingKeyError):
                keys.of(key_id)
        assert keys.of(OLD.key_id).chain == OLD

    def test_no_key_is_in_what_is_logged(
        self, keys: Keys, caplog: pytest.LogCaptureFixture
    ) -> None:
        keys.follow(NEW.key_id)
        assert NEW.key_id in caplog.text and f"it uses {OLD.key_id}" in caplog.text
        assert FIRST.decode() not in caplog.text
