"""The log: of racing writers one gets each place, and none of their records is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from raysys.errors import LedgerCorruptError, StorageUnavailableError
from raysys.ledger.log import Log
from raysys.ledger.records import Entry, Record, RolloutChanged, encode
from raysys.ledger.state import State, fold
from raysys.storage import Root
from tests.helpers import (
    OverwritingRoot,
    committed,
    entries,
    renewed,
    rollout,
    started,
    write_records,
)

NUM_WRITERS = 8


def path(sequence: int) -> str:
    return f"ledger/{sequence:020d}.json"


def append(log: Log, record: Record) -> Entry:
    entry = log.transact(lambda state: record)
    assert entry is not None
    return entry


def reasons(log: Log) -> list[str]:
    records = [entry.record for entry in log.entries()]
    return [record.reason for record in records if isinstance(record, RolloutChanged)]


class TestTransact:
    def test_appends_from_sequence_one_with_the_time(self, root: Root) -> None:
        log = Log(root, clock=lambda: 12.5)
        assert append(log, started()) == Entry(sequence=1, at=12.5, record=started())
        assert append(log, renewed()).sequence == 2
        assert [o.path for o in root.list("ledger")] == [path(1), path(2)]

    def test_another_process_folds_the_same_state(self, root: Root) -> None:
        log = Log(root)
        for record in (started(), renewed(), committed(), rollout()):
            append(log, record)
        assert Log(Root(root.uri)).refresh() == log.refresh() == fold(log.entries())

    def test_a_reader_sees_what_was_appended_since(self, root: Root) -> None:
        writer, reader = Log(root), Log(Root(root.uri))
        assert reader.refresh().sequence == 0
        append(writer, started())
        append(writer, renewed())
        assert reader.refresh().sequence == 2

    def test_deciding_for_nothing_writes_nothing(self, root: Root) -> None:
        assert Log(root).transact(lambda state: None) is None
        assert root.list("") == []

    def test_a_decision_that_raises_writes_nothing(self, root: Root) -> None:
        def refuse(state: State) -> Record:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            Log(root).transact(refuse)
        assert root.list("") == []

    def test_a_record_that_the_state_refuses_is_our_bug_and_is_not_written(
        self, root: Root
    ) -> None:
        with pytest.raises(AssertionError, match="which is not the active update"):
            append(Log(root), committed())
        assert root.list("") == []

    def test_a_record_that_json_cannot_hold_is_not_written(self, root: Root) -> None:
        log = Log(root)
        append(log, started())
        with pytest.raises(ValueError, match="not JSON compliant"):
            append(log, committed(metrics={"ndcg10": float("inf")}))
        assert Log(root).refresh().active is not None

    def test_the_loser_of_a_race_decides_anew_on_the_newer_state(self, root: Root) -> None:
        rival, seen = Log(Root(root.uri)), []

        def decide(state: State) -> Record:
            seen.append(state.sequence)
            if len(seen) == 1:
                append(rival, rollout(reason="rival"))
            return rollout(reason=f"saw {state.num_rollouts} rollouts")

        entry = Log(root).transact(decide)
        assert entry is not None and entry.sequence == 2 and seen == [0, 1]
        assert reasons(rival) == ["rival", "saw 1 rollouts"]

    def test_a_place_that_is_taken_but_unreadable_ends_in_an_error_not_in_a_loop(
        self, local_root: Root
    ) -> None:
        class Deaf(Root):
            def put_if_absent(self, path: str, data: bytes) -> bool:
                return False

        with pytest.raises(StorageUnavailableError, match="exists and cannot be read"):
            append(Log(Deaf(local_root.uri)), started())


def race(root: Root, num_records: int) -> list[str]:
    """Lets eight writers append at once; returns the reasons of all appends that succeeded."""

    def write(writer: int) -> list[str]:
        log, mine = Log(type(root)(root.uri)), [f"{writer}-{i}" for i in range(num_records)]
        return [reason for reason in mine if append(log, rollout(reason=reason))]

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        return [reason for mine in pool.map(write, range(NUM_WRITERS)) for reason in mine]


APPEND = """
import sys
from raysys.ledger.log import Log
from raysys.storage import Root
from tests.helpers import rollout
log = Log(Root(sys.argv[1]))
sys.stdin.read()
for i in range(5):
    record = rollout(reason=f"{sys.argv[2]}-{i}")
    log.transact(lambda state: record)
"""


class TestRace:
    def test_eight_threads_lose_no_record_and_share_no_place(self, root: Root) -> None:
        num_records = 20 if root.uri.startswith("file:") else 2
        appended = race(root, num_records)
        assert sorted(reasons(Log(root))) == sorted(appended)
        assert len(root.list("ledger")) == NUM_WRITERS * num_records

    def test_each_writer_finds_its_records_in_its_own_order(self, local_root: Root) -> None:
        race(local_root, 10)
        for writer in range(NUM_WRITERS):
            mine = [r for r in reasons(Log(local_root)) if r.startswith(f"{writer}-")]
            assert mine == [f"{writer}-{i}" for i in range(10)]

    def test_threads_that_share_a_log_lose_no_record(self, local_root: Root) -> None:
        log = Log(local_root)
        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            list(pool.map(lambda i: append(log, rollout(reason=str(i))), range(80)))
        assert sorted(map(int, reasons(log))) == list(range(80))
        assert log.refresh().sequence == 80

    def test_eight_processes_lose_no_record(self, local_root: Root) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", APPEND, local_root.uri, str(i)],
                stdin=subprocess.PIPE,
                env=env,
            )
            for i in range(NUM_WRITERS)
        ]
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.close()
        assert [writer.wait(60) for writer in writers] == [0] * NUM_WRITERS
        expected = [f"{writer}-{i}" for writer in range(NUM_WRITERS) for i in range(5)]
        assert sorted(reasons(Log(local_root))) == sorted(expected)

    def test_a_store_without_conditional_writes_loses_records(self, root: Root) -> None:
        """The negative control: both writers believe that they appended, one record is left."""
        broken = OverwritingRoot(root.uri)
        rival, called = Log(OverwritingRoot(root.uri)), []

        def decide(state: State) -> Record:
            if not called:
                called.append(append(rival, rollout(reason="rival")))
            return rollout(reason="mine")

        mine = Log(broken).transact(decide)
        assert mine is not None and mine.sequence == called[0].sequence == 1
        assert reasons(Log(root)) == ["mine"]


class CountingRoot(Root):
    """Counts what is read."""

    num_reads = 0

    def read_bytes(self, path: str) -> bytes:
        self.num_reads += 1
        return super().read_bytes(path)


class TestReading:
    def test_a_slow_reader_does_not_set_a_shared_log_back(self, local_root: Root) -> None:
        class Slow(Root):
            """While the first look for a new record fails, another thread appends two."""

            def read_bytes(self, path: str) -> bytes:
                try:
                    return super().read_bytes(path)
                except FileNotFoundError:
                    if not appended:
                        appended.append(True)
                        with ThreadPoolExecutor(1) as pool:
                            list(pool.map(lambda _: append(log, rollout()), range(2)))
                    raise

        appended: list[bool] = []
        log = Log(Slow(local_root.uri))
        assert log.refresh().sequence == 2

    def test_refresh_reads_the_tail_only(self, local_root: Root) -> None:
        write_records(local_root, [rollout()] * 30)
        counting = CountingRoot(local_root.uri)
        log = Log(counting)
        log.refresh()
        counting.num_reads = 0
        append(Log(local_root), rollout())
        assert log.refresh().sequence == 31
        assert counting.num_reads == 2  # the new one, and the absent one after it

    def test_a_long_log_reads_in_order(self, local_root: Root) -> None:
        write_records(local_root, [rollout(reason=str(i)) for i in range(300)])
        assert reasons(Log(local_root)) == [str(i) for i in range(300)]
        assert Log(local_root).refresh().sequence == 300

    @pytest.mark.parametrize("gone", [1, 2, 3], ids=lambda n: f"record-{n}")
    def test_a_gap_is_corrupt_and_names_the_missing_record(self, root: Root, gone: int) -> None:
        write_records(root, [rollout()] * 4)
        root.delete_prefix(path(gone))
        with pytest.raises(LedgerCorruptError, match=rf"record {gone} is missing.*{path(gone)}"):
            Log(root).refresh()

    def test_nothing_is_appended_into_a_gap(self, local_root: Root) -> None:
        write_records(local_root, [rollout()] * 3)
        local_root.delete_prefix(path(2))
        with pytest.raises(LedgerCorruptError):
            append(Log(local_root), rollout())
        assert not local_root.exists(path(2))

    def test_a_torn_record_is_corrupt_and_named(self, root: Root) -> None:
        (entry,) = entries([started()])
        root.put(path(1), encode(entry)[:-10])
        with pytest.raises(LedgerCorruptError, match="ledger record 1 cannot be read"):
            Log(root).refresh()

    def test_an_illegal_record_is_corrupt_and_named(self, root: Root) -> None:
        (entry,) = entries([committed()])
        root.put(path(1), encode(entry))
        with pytest.raises(LedgerCorruptError, match="ledger record 1 is about u0001-aaaaaa"):
            Log(root).refresh()

    def test_a_reading_that_is_given_up_leaves_no_thread(self, local_root: Root) -> None:
        """The garbage collector would have to join it, which can deadlock."""
        write_records(local_root, [rollout()] * 40)
        before = set(threading.enumerate())
        entries = Log(local_root).entries()
        assert next(entries).sequence == 1
        assert set(threading.enumerate()) <= before

    def test_other_objects_in_the_folder_are_no_records(self, root: Root) -> None:
        append(Log(root), started())
        for name in ("ledger/README", "ledger/7.json", f"ledger/sub/{9:020d}.json"):
            root.put(name, b"x")
        assert Log(root).refresh().sequence == 1
