"""`raysys ledger`: what an operator reads of the records, and how a bad one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysys.ledger import snapshots
from raysys.ledger.explain import explain
from raysys.ledger.log import Log
from raysys.ledger.records import RECORD_TYPES, Record
from raysys.storage import Root
from tests.helpers import (
    abandoned,
    committed,
    item_file,
    partition,
    renewed,
    rollout,
    rotated,
    started,
    write_config,
    write_records,
)
from tests.unit.test_cli import body, refusal, run, text

FIRST = started(
    partitions=(partition("2017-03-01"), partition("2017-03-02")), item_files=(item_file(),)
)
SECOND = started(
    "u0002-bbbbbb", partitions=(partition("2017-03-03"),), base_version="v0001-aaaaaa",
    private=False, reserved=None,
)  # fmt: skip
DONE = rollout("promoted", stable="v0002-bbbbbb", actor="controller", reason="fewer bad requests")
MEANINGS: dict[str, tuple[Record, str]] = {
    "started": (
        FIRST,
        "u0001-aaaaaa on host:1 takes 2 partitions events/dt=2017-03-01..dt=2017-03-02 and 1 item "
        "files, on top of no version; privacy of 15 steps at noise 4 reserved",
    ),
    "renewed": (renewed(), "u0001-aaaaaa is still at work on host:1"),
    "committed": (
        committed(FIRST, num_rows=1234, seconds=7.6),
        "u0001-aaaaaa made v0001-aaaaaa: better; consumed 2 partitions events/dt=2017-03-01.."
        "dt=2017-03-02, 1,234 rows of 1 users, in 8 s",
    ),
    "public": (
        SECOND,
        "u0002-bbbbbb on host:1 takes events/dt=2017-03-03 and 0 item files, on top of "
        "v0001-aaaaaa; not private",
    ),
    "held": (
        committed(SECOND, version=None),
        "u0002-bbbbbb was held back: the gate held it back; consumed events/dt=2017-03-03, 1 rows "
        "of 1 users, in 1 s",
    ),
    "canary": (
        rollout(),
        "r0001: operator put v0002-bbbbbb on trial with 20.00% of users, beside v0001-aaaaaa: "
        "try it",
    ),
    "promoted": (DONE, "r0001: controller made v0002-bbbbbb stable: fewer bad requests"),
    "rolled-back": (
        rollout("rolled_back", reason="worse"),
        "r0001: operator ended the trial, v0001-aaaaaa answers everyone: worse",
    ),
    "abandoned": (
        abandoned("u0003-cccccc"),
        "u0003-cccccc ended without a commit: lease expired; its partitions are free again",
    ),
}


@pytest.mark.parametrize(("record", "meaning"), MEANINGS.values(), ids=MEANINGS)
def test_a_record_is_explained_in_one_sentence(record: Record, meaning: str) -> None:
    assert explain(record) == meaning


def test_a_rotation_is_explained_in_one_sentence() -> None:
    start = started("u0003-cccccc", user_key_id="new", partitions=())
    meaning = "u0003-cccccc carried 1 users of u0001-aaaaaa from key key to new, in 1 s"
    assert explain(rotated(start, committed())) == meaning


def test_every_type_of_record_is_explained() -> None:
    explained = {type(record).__name__ for record, _ in MEANINGS.values()}
    # Of the other two there are tests here and in test_permits.
    assert explained | {"PseudonymsRotated", "StepsPermitted"} == set(RECORD_TYPES)


@pytest.fixture
def config(tmp_path: Path, local_root: Root) -> Path:
    """A shop with the records above, an abandoned update among them."""
    records = [record for record, _ in MEANINGS.values()]
    records[-1:] = [started("u0003-cccccc", partitions=()), records[-1]]
    write_records(local_root, records)
    return write_config(tmp_path, local_root.uri)


def listed(config: Path, *args: str) -> list[int]:
    return [record["sequence"] for record in body(config, "ledger", *args)["records"]]


class TestList:
    def test_shows_number_time_type_and_meaning(self, config: Path) -> None:
        lines = text(config, "ledger", "--heartbeats").splitlines()
        assert lines[0].split() == ["record", "time", "type", "meaning"] and len(lines) == 11
        assert lines[2].split(maxsplit=3) == [
            "2", "1970-01-01T00:00:01+00:00", "LeaseRenewed", MEANINGS["renewed"][1],
        ]  # fmt: skip
        assert text(config, "ledger", "list", "--heartbeats").splitlines() == lines

    def test_leaves_heartbeats_out_unless_they_are_asked_for(self, config: Path) -> None:
        assert listed(config) == [1, *range(3, 11)]
        assert listed(config, "--heartbeats") == list(range(1, 11))
        assert listed(config, "--type", "LeaseRenewed") == [2]

    def test_prints_one_object_with_json(self, config: Path) -> None:
        assert body(config, "ledger")["records"][4] == {
            "sequence": 6,
            "at": "1970-01-01T00:00:05+00:00",
            "type": "RolloutChanged",
            "update_id": None,
            "meaning": MEANINGS["canary"][1],
        }

    def test_filters(self, config: Path) -> None:
        assert listed(config, "--last", "3") == [8, 9, 10]
        assert listed(config, "--update", "u0002-bbbbbb") == [4, 5]
        assert listed(config, "--type", "UpdateCommitted") == [3, 5]
        assert listed(config, "--type", "UpdateCommitted", "--last", "1") == [5]
        assert listed(config, "--update", "u0009-eeeeee") == []

    def test_refuses_a_type_that_there_is_not(self, config: Path) -> None:
        result = run(config, "ledger", "--type", "Nonsense")
        assert result.exit_code == 2 and "expected one of UpdateStarted" in result.stderr

    def test_of_an_empty_root_is_empty(self, tmp_path: Path) -> None:
        empty = write_config(tmp_path, (tmp_path / "empty").as_uri())
        assert listed(empty) == listed(empty, "--last", "3") == []

    def test_shows_what_comes_before_a_bad_record_and_names_it(
        self, config: Path, local_root: Root
    ) -> None:
        local_root.put(f"ledger/{4:020d}.json", b"{")
        result = run(config, "ledger", "--heartbeats")
        assert result.exit_code == 1 and len(result.stdout.splitlines()) == 4
        assert result.stderr.startswith("raysys: ledger record 4 cannot be read")
        assert "ledger record 4" in refusal(config, "ledger", "--json")


class TestShow:
    def test_prints_the_record_as_it_is_stored(self, config: Path, local_root: Root) -> None:
        stored = json.loads(local_root.read_bytes(f"ledger/{3:020d}.json"))
        assert body(config, "ledger", "show", "3") == stored
        assert json.loads(text(config, "ledger", "show", "3")) == stored

    def test_of_a_number_that_there_is_not_tells_the_newest(self, config: Path) -> None:
        assert "no ledger record 11 below" in refusal(config, "ledger", "show", "11")
        assert "the newest is 10" in refusal(config, "ledger", "show", "11")

    def test_of_a_changed_record_prints_it_and_says_so(
        self, config: Path, local_root: Root
    ) -> None:
        path = f"ledger/{3:020d}.json"
        local_root.put(path, local_root.read_bytes(path).replace(b'"better"', b'"worse!"'))
        result = run(config, "ledger", "show", "3")
        assert result.exit_code == 1 and json.loads(result.stdout)["reason"] == "worse!"
        assert result.stderr.startswith("raysys: ledger record 3 was changed after it was written")

    def test_of_a_torn_record_prints_what_there_is(self, config: Path, local_root: Root) -> None:
        local_root.put(f"ledger/{3:020d}.json", b'{"type": "UpdateComm')
        result = run(config, "ledger", "show", "3")
        assert result.exit_code == 1 and result.stdout == '{"type": "UpdateComm\n'


class TestVerify:
    def test_says_how_many_records_are_as_they_were(self, config: Path, local_root: Root) -> None:
        shown = text(config, "ledger", "verify").splitlines()
        assert shown[0].startswith("10 records are as they were written, and 0 snapshots")
        assert shown[1] == f"last hash  {Log(local_root).refresh().hash}"
        found = body(config, "ledger", "verify")
        assert found["ok"] and found["num_records"] == 10 and found["ignored"] == []

    def test_names_the_first_bad_record(self, config: Path, local_root: Root) -> None:
        for sequence in (4, 6):
            path = f"ledger/{sequence:020d}.json"
            local_root.put(path, local_root.read_bytes(path).replace(b"host:1", b"host:2"))
        assert "ledger record 4 was changed" in refusal(config, "ledger", "verify")

    def test_finds_a_bad_record_that_readers_skip_thanks_to_a_snapshot(
        self, config: Path, local_root: Root, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(snapshots, "INTERVAL", 4)
        Log(local_root).transact(lambda state: rollout())
        assert body(config, "ledger", "verify")["snapshots"] == [11]
        local_root.put(f"ledger/{2:020d}.json", b"{")
        assert Log(local_root).refresh().sequence == 11
        assert "ledger record 2 cannot be read" in refusal(config, "ledger", "verify")

    def test_tells_of_snapshots_that_are_ignored(self, config: Path, local_root: Root) -> None:
        local_root.put(f"ledger/snapshots/{4:020d}.json", b"torn")
        shown = text(config, "ledger", "verify")
        assert "ignored    ledger/snapshots/00000000000000000004.json does not end with" in shown

    def test_of_an_empty_root_is_fine(self, tmp_path: Path) -> None:
        empty = write_config(tmp_path, (tmp_path / "empty").as_uri())
        assert text(empty, "ledger", "verify").startswith("0 records are as they were written")
