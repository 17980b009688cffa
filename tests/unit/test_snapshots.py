"""Snapshots: they say what the records say, save reading them, and are never trusted over them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.errors import LedgerCorruptError, StorageUnavailableError
from raysys.ledger import snapshots
from raysys.ledger.codec import class_reviver, fingerprint, reviver, to_json
from raysys.ledger.log import Log
from raysys.ledger.records import KeptLoss, Record, SetAside, StepsPermitted
from raysys.ledger.seal import seal
from raysys.ledger.state import State, fold
from raysys.ledger.verify import verify
from raysys.storage import Root
from tests.helpers import (
    abandoned,
    committed,
    entries,
    item_file,
    partition,
    renewed,
    rollout,
    rotated,
    started,
    write_records,
)

INTERVAL = 8
SECOND = started("u0002-bbbbbb", partitions=(partition("2017-03-02"),), base_version="v0001-aaaaaa")
KEPT = KeptLoss(num_updates=2, sha256="0" * 64)
THIRD = started(
    "u0003-cccccc",
    partitions=(partition("2017-03-03"),),
    permits_steps=True,
    kept_loss=KEPT,
)
FOURTH = started(
    "u0004-dddddd",
    private=False,
    reserved=None,
    partitions=(partition("2017-03-04"),),
    user_key_id="new",
)
ROTATION = started("u0005-eeeeee", user_key_id="new", partitions=())
FIRST = started(
    item_files=(item_file(),),
    set_aside=(SetAside(path="c", size_bytes=1, etag="e", kind="late", reason="came late"),),
)
RICH: list[Record] = [
    FIRST,
    renewed(),
    committed(
        FIRST,
        metrics={"ndcg10": [0.1, None], "by_day": {"1": 2}},
        artifacts={"a": "0" * 64},
        quarantined_files={FIRST.partitions[0].files[0].path: "torn"},
    ),
    SECOND,
    committed(SECOND),
    rollout(measurement={"phase": "inconclusive"}, rules={"steps": [], "min_requests": 5}),
    rollout("rolled_back", stable="v0001-aaaaaa", previous="v0000-000000"),
    ROTATION,
    rotated(ROTATION, committed(SECOND), to_key_id="new"),
    THIRD,
    StepsPermitted(update_id="u0003-cccccc", num_steps=3),
    abandoned("u0003-cccccc"),
    FOURTH,
    renewed("u0004-dddddd"),
]
"""Leaves no field of the state at its default; the last test of the file sees to it."""


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "INTERVAL", INTERVAL)


def path(sequence: int) -> str:
    return f"ledger/snapshots/{sequence:020d}.json"


def append(root: Root, num_records: int) -> Log:
    log = Log(root)
    for _ in range(num_records):
        log.transact(lambda state: rollout(reason=str(state.sequence)))
    return log


def names(root: Root) -> list[int]:
    return [int(name.removesuffix(".json")) for name in root.list_names("ledger/snapshots")]


class ReadingRoot(Root):
    """Remembers what is read."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.read: list[str] = []

    def read_bytes(self, path: str) -> bytes:
        self.read.append(path)
        return super().read_bytes(path)


class TestWriting:
    def test_one_is_written_after_so_many_records(self, root: Root) -> None:
        append(root, INTERVAL - 1)
        assert names(root) == []
        append(root, 1)
        assert names(root) == [INTERVAL]

    def test_the_two_newest_are_kept(self, root: Root) -> None:
        append(root, 4 * INTERVAL + 1)
        assert names(root) == [3 * INTERVAL, 4 * INTERVAL]

    def test_short_lived_writers_write_no_more_than_one_that_lives_long(self, root: Root) -> None:
        for _ in range(2 * INTERVAL + 1):
            append(root, 1)
        assert names(root) == [INTERVAL, 2 * INTERVAL]

    def test_a_writer_sees_that_another_wrote_one(self, local_root: Root) -> None:
        slow = append(local_root, 1)
        append(local_root, INTERVAL)
        slow.transact(lambda state: rollout())
        assert names(local_root) == [INTERVAL]

    def test_no_append_fails_because_a_snapshot_did(
        self, local_root: Root, caplog: pytest.LogCaptureFixture
    ) -> None:
        class NoRoom(Root):
            def put(self, path: str, data: bytes) -> None:
                raise StorageUnavailableError("no answer")

        append(NoRoom(local_root.uri), INTERVAL)
        assert Log(local_root).refresh().sequence == INTERVAL and names(local_root) == []
        assert f"no snapshot as of record {INTERVAL}: no answer" in caplog.text


class TestLoading:
    def test_says_what_all_records_say(self, root: Root) -> None:
        write_records(root, RICH)
        log = Log(root)
        log.transact(lambda state: rollout())
        assert names(root) == [len(RICH) + 1]
        log.transact(lambda state: committed(FOURTH))
        loaded = Log(root).refresh()
        assert loaded == fold(log.entries()) == log.refresh()
        assert verify(root).snapshots == (len(RICH) + 1,)

    def test_reads_one_record_before_the_tail_and_no_more(self, root: Root) -> None:
        append(root, INTERVAL + 3)
        reading = ReadingRoot(root.uri)
        assert Log(reading).refresh().sequence == INTERVAL + 3
        assert reading.read[0] == path(INTERVAL)
        read = [int(name.split("/")[1].removesuffix(".json")) for name in reading.read[1:]]
        assert sorted(read) == list(range(INTERVAL, INTERVAL + 5))  # the last one is absent

    def test_a_gap_after_it_is_an_error(self, local_root: Root) -> None:
        append(local_root, INTERVAL + 3)
        local_root.delete_prefix(f"ledger/{INTERVAL + 1:020d}.json")
        with pytest.raises(LedgerCorruptError, match=f"record {INTERVAL + 1} is missing"):
            Log(local_root).refresh()

    @pytest.mark.parametrize("damage", ["torn", "edited", "foreign", "renamed", "emptied", "v0"])
    def test_a_bad_one_is_ignored_with_a_warning(
        self, local_root: Root, tmp_path: Any, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        append(local_root, 2 * INTERVAL)
        expected = fold(Log(local_root).entries())
        data = local_root.read_bytes(path(2 * INTERVAL))
        other = Root((tmp_path / "other").as_uri())
        append(other, 2 * INTERVAL)
        local_root.put(
            path(2 * INTERVAL),
            {
                "torn": data[:-9],
                "edited": data.replace(b'"num_rollouts":1', b'"num_rollouts":7'),
                "foreign": other.read_bytes(path(2 * INTERVAL)),
                "renamed": local_root.read_bytes(path(INTERVAL)),
                "emptied": b"",
                "v0": seal({"snapshot_schema": "0-0", "state": {}}),
            }[damage],
        )
        reading = ReadingRoot(local_root.uri)
        assert Log(reading).refresh() == expected
        assert path(INTERVAL) in reading.read, "the one before it still helps"
        assert f"{path(2 * INTERVAL)} is ignored: it" in caplog.text
        assert path(2 * INTERVAL) in verify(local_root).ignored[0]

    def test_one_that_is_ahead_of_the_records_is_ignored(
        self, local_root: Root, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As after a restore of records that are older than the snapshots."""
        append(local_root, INTERVAL + 1)
        for sequence in (INTERVAL, INTERVAL + 1):
            local_root.delete_prefix(f"ledger/{sequence:020d}.json")
        assert Log(local_root).refresh().sequence == INTERVAL - 1
        assert "was made from another record" in caplog.text
        append(local_root, 1)
        assert Log(local_root).refresh().sequence == INTERVAL

    def test_a_bad_record_under_it_is_named(self, local_root: Root) -> None:
        append(local_root, INTERVAL)
        local_root.put(f"ledger/{INTERVAL:020d}.json", b"{")
        with pytest.raises(LedgerCorruptError, match=f"record {INTERVAL} cannot be read"):
            Log(local_root).refresh()

    def test_one_that_lies_is_found_by_verifying(self, local_root: Root) -> None:
        """Readers cannot see it: its hashes are right. A wrong fold would make such a one."""
        log = append(local_root, INTERVAL)
        lie = dataclasses.replace(log.refresh(), num_rollouts=7)
        body = {"snapshot_schema": snapshots.SCHEMA, "state": lie}
        local_root.put(path(INTERVAL), seal(body))
        with pytest.raises(LedgerCorruptError, match=rf"{path(INTERVAL)} says something else"):
            verify(local_root)

    def test_one_that_vanishes_while_it_is_read_is_no_error(self, local_root: Root) -> None:
        class Vanishing(Root):
            def read_bytes(self, path: str) -> bytes:
                if "snapshots" in path:
                    self.delete_prefix(path)
                return super().read_bytes(path)

        append(local_root, 2 * INTERVAL)
        assert Log(Vanishing(local_root.uri)).refresh().sequence == 2 * INTERVAL


class TestTail:
    def test_a_refresh_without_news_is_one_read(self, local_root: Root) -> None:
        append(local_root, INTERVAL + 3)
        reading = ReadingRoot(local_root.uri)
        log = Log(reading)
        log.refresh()
        reading.read.clear()
        log.refresh()
        assert reading.read == [f"ledger/{INTERVAL + 4:020d}.json"]

    def test_a_reader_that_fell_far_behind_catches_up(self, local_root: Root) -> None:
        reader = append(local_root, 1)
        writer = append(local_root, 100)
        assert reader.refresh() == writer.refresh() and reader.refresh().sequence == 101

    @pytest.mark.parametrize("num_shown", [0, 1, 5, 19])
    def test_a_listing_that_lags_hides_no_record(self, local_root: Root, num_shown: int) -> None:
        class Lagging(Root):
            def list_names(self, folder: str, after: str = "") -> list[str]:
                return super().list_names(folder, after)[:num_shown]

        append(local_root, 2 * INTERVAL + 4)
        local_root.delete_prefix("ledger/snapshots")
        assert Log(Lagging(local_root.uri)).refresh().sequence == 2 * INTERVAL + 4


class TestCodec:
    def test_a_rich_state_comes_back_equal(self) -> None:
        state = fold(entries(RICH))
        defaults = State()
        for field in dataclasses.fields(State):
            if field.name != "hash":  # records that are not stored have none
                assert getattr(state, field.name) != getattr(defaults, field.name), field.name
        assert snapshots._decode(snapshots._encode(state)) == state

    @given(st.lists(st.sampled_from(RICH), max_size=30))
    def test_so_does_any_state(self, records: list[Record]) -> None:
        state = State()
        for record in records:
            if state.problem(record) is None:
                state = state.apply(entries([record], first=state.sequence + 1)[0])
        assert snapshots._decode(snapshots._encode(state)) == state

    def test_a_field_of_a_type_that_would_come_back_different_is_refused(self) -> None:
        for hint in (dict[int, str], set[str], tuple[bytes, ...], State | Log):
            with pytest.raises(AssertionError):
                reviver(hint)

    def test_the_schema_changes_with_any_field_below_the_state(self) -> None:
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Inner:
            a: int

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Wider:
            a: int
            b: int = 0

        def around(inner: type[Any]) -> type[Any]:
            return dataclasses.make_dataclass("Outer", [("all", tuple[inner, ...])])  # type: ignore[valid-type]

        assert fingerprint(around(Inner)) == fingerprint(around(Inner))
        assert fingerprint(around(Inner)) != fingerprint(around(Wider))

    def test_equal_values_give_the_same_line(self) -> None:
        assert to_json({"b": frozenset("ab"), "a": 1}) == '{"a":1,"b":["a","b"]}'
        assert class_reviver(type(item_file()))({"path": "p", "size_bytes": 1, "etag": "e"})
