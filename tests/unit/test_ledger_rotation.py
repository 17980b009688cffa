"""The record of a rotation: what it changes in the state, what not, and where it may not come."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raysys.errors import LedgerCorruptError
from raysys.ledger.records import Entry, decode, encode
from raysys.partitions.plan import orphan_folders
from raysys.rollout.view import RolloutView
from tests.helpers import abandoned, committed, folded, partition, rotated, started

FIRST = started("u0001-aaaaaa", user_key_id="old")
BASE = committed(FIRST, artifacts={"state/u0001-aaaaaa/items.json": "0" * 64})
START = started("u0002-bbbbbb", user_key_id="new", partitions=(), private=False, reserved=None)
ROTATED = rotated(START, BASE, artifacts={"state/u0002-bbbbbb/items.json": "1" * 64})
NEXT = started("u0003-cccccc", user_key_id="new", partitions=(partition("2017-03-02"),))


def test_it_reads_back_as_it_was_written() -> None:
    entry = Entry(sequence=7, at=1.5, record=ROTATED)
    assert decode(encode(entry), sequence=7) == entry


def test_it_makes_its_state_and_key_the_head_and_changes_nothing_else() -> None:
    before, after = folded(FIRST, BASE), folded(FIRST, BASE, START, ROTATED)
    assert (before.head_state, before.user_key_id) == ("u0001-aaaaaa", "old")
    assert (after.head_state, after.user_key_id) == ("u0002-bbbbbb", "new")
    assert after.rotations == (ROTATED,) and after.active is None
    for name in ("committed", "consumed_files", "consumed_partitions", "spends", "versions",
                 "head_version", "stable", "watermark", "abandoned"):  # fmt: skip
        assert getattr(after, name) == getattr(before, name), name


def test_the_head_states_files_are_those_of_its_own_record() -> None:
    assert folded(FIRST).head_artifacts == {}
    assert folded(FIRST, BASE).head_artifacts == BASE.artifacts
    assert folded(FIRST, BASE, START, ROTATED).head_artifacts == ROTATED.artifacts
    later = committed(NEXT, artifacts={"state/u0003-cccccc/items.json": "2" * 64})
    assert folded(FIRST, BASE, START, ROTATED, NEXT, later).head_artifacts == later.artifacts


def test_each_commit_keeps_the_key_of_its_own_histories() -> None:
    state = folded(FIRST, BASE, START, ROTATED, NEXT, committed(NEXT))
    assert [update.user_key_id for update in state.committed] == ["old", "new"]
    assert state.head_state == "u0003-cccccc"


def test_a_commit_of_before_there_was_a_field_for_it_gets_the_key_of_its_start() -> None:
    body = json.loads(encode(Entry(sequence=2, at=0.0, record=BASE)))
    for name in ("user_key_id", "hash", "prev"):
        del body[name]
    old = decode(json.dumps({**body, "schema_version": 1}).encode(), sequence=2).record
    assert getattr(old, "user_key_id", "missing") is None
    assert folded(FIRST, old).committed == (BASE,)


def test_an_abandoned_rotation_changes_neither_state_nor_key() -> None:
    state = folded(FIRST, BASE, START, abandoned("u0002-bbbbbb"))
    assert (state.head_state, state.user_key_id) == ("u0001-aaaaaa", "old")
    assert state.spends == folded(FIRST, BASE).spends


def test_replicas_are_told_the_key() -> None:
    assert RolloutView.of(folded()).user_key_id is None
    assert RolloutView.of(folded(FIRST, BASE)).user_key_id == "old"
    assert RolloutView.of(folded(FIRST, BASE, START, ROTATED)).user_key_id == "new"


@pytest.mark.parametrize(
    ("records", "orphans"),
    [
        pytest.param((START, ROTATED), [], id="committed"),
        pytest.param((START,), [], id="active"),
        pytest.param((START, abandoned("u0002-bbbbbb")), ["state/u0002-bbbbbb"], id="abandoned"),
    ],
)
def test_its_folder_stays_while_it_is_at_work_and_once_it_is_committed(
    records: tuple[Any, ...], orphans: list[str]
) -> None:
    state = folded(FIRST, BASE, *records)
    folders = ["state/u0001-aaaaaa", "state/u0002-bbbbbb"]
    assert list(orphan_folders(state, folders)) == orphans


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        pytest.param((ROTATED,), "is not the active update", id="not-started"),
        pytest.param(
            (started("u0002-bbbbbb", user_key_id="new", partitions=NEXT.partitions), ROTATED),
            "was started for something else",
            id="update",
        ),
        pytest.param(
            (started("u0002-bbbbbb", user_key_id="other", partitions=()), ROTATED),
            "was started for something else",
            id="other-key",
        ),
        pytest.param(
            (START, rotated(START, BASE, base_state="u0000-000000")),
            "the head state is u0001-aaaaaa of key old",
            id="other-state",
        ),
        pytest.param(
            (START, rotated(START, BASE, from_key_id="other")),
            "the head state is u0001-aaaaaa of key old",
            id="from-other-key",
        ),
        pytest.param(
            (START, ROTATED, START), "starts u0002-bbbbbb a second time", id="second-time"
        ),
        pytest.param(
            (NEXT, committed(NEXT)), "pseudonyms of another key than the state has", id="mixed-keys"
        ),
        pytest.param(
            (
                START,
                ROTATED,
                started("u0003-cccccc", user_key_id="old", partitions=()),
                rotated(
                    started("u0003-cccccc", user_key_id="old", partitions=()),
                    BASE, base_state="u0002-bbbbbb", from_key_id="new",
                ),
            ),
            "rotates pseudonyms back to key old",
            id="back",
        ),
    ],
)  # fmt: skip
def test_a_ledger_that_would_mix_keys_is_refused(records: tuple[Any, ...], problem: str) -> None:
    with pytest.raises(LedgerCorruptError, match=problem):
        folded(FIRST, BASE, *records)
