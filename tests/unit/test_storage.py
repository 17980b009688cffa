"""The root: local and S3 behave alike, and of racing writers one wins."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from raysys.errors import RootError
from raysys.storage import Root
from tests.helpers import OverwritingRoot

NUM_WRITERS = 8


def folder_of(root: Root) -> Path:
    return Path(urllib.parse.unquote(root.uri.removeprefix("file://")))


class TestEveryRoot:
    def test_returns_what_was_put(self, root: Root) -> None:
        root.put("versions/v1/head.bin", b"one")
        assert root.read_bytes("versions/v1/head.bin") == b"one"

    def test_put_replaces(self, root: Root) -> None:
        root.put("a", b"one")
        root.put("a", b"two")
        assert root.read_bytes("a") == b"two"

    def test_keeps_an_empty_object(self, root: Root) -> None:
        root.put("a", b"")
        assert root.read_bytes("a") == b""

    def test_reading_what_is_absent_is_file_not_found(self, root: Root) -> None:
        with pytest.raises(FileNotFoundError, match="ledger/1"):
            root.read_bytes("ledger/1")

    def test_only_the_first_put_if_absent_creates(self, root: Root) -> None:
        assert root.put_if_absent("ledger/1", b"first")
        assert not root.put_if_absent("ledger/1", b"second")
        assert root.read_bytes("ledger/1") == b"first"

    def test_identical_content_does_not_make_a_second_winner(self, root: Root) -> None:
        assert root.put_if_absent("ledger/1", b"same")
        assert not root.put_if_absent("ledger/1", b"same")

    def test_lists_objects_at_any_depth_sorted_with_size(self, root: Root) -> None:
        for path in ("events/dt=2/b", "events/dt=1/sub/c", "events/dt=1/a"):
            root.put(path, path.encode())
        found = root.list("events")
        assert [o.path for o in found] == ["events/dt=1/a", "events/dt=1/sub/c", "events/dt=2/b"]
        assert [o.size_bytes for o in found] == [len(o.path) for o in found]

    def test_a_listing_leaves_out_folders_of_a_longer_name(self, root: Root) -> None:
        root.put("ledger/1", b"")
        root.put("ledger-copy/1", b"")
        assert [o.path for o in root.list("ledger")] == ["ledger/1"]

    def test_lists_nothing_below_an_absent_folder(self, root: Root) -> None:
        assert root.list("events") == []
        assert root.list_folders("events") == []

    def test_lists_the_whole_root(self, root: Root) -> None:
        root.put("a/b", b"")
        assert [o.path for o in root.list("")] == ["a/b"]
        assert root.list_folders("") == ["a"]

    def test_lists_immediate_folders_only(self, root: Root) -> None:
        for path in ("staging/u2/deep/x", "staging/u1/x", "staging/file"):
            root.put(path, b"")
        assert root.list_folders("staging") == ["u1", "u2"]

    def test_sees_at_once_what_another_process_wrote(self, root: Root) -> None:
        other = Root(root.uri)
        assert root.list("ledger") == [] and not root.exists("ledger/1")
        other.put("ledger/1", b"")
        assert [o.path for o in root.list("ledger")] == ["ledger/1"] and root.exists("ledger/1")
        other.put("ledger/2", b"")
        assert len(root.list("ledger")) == 2
        assert root.list_folders("") == ["ledger"]

    def test_an_etag_changes_with_content_of_the_same_size(self, root: Root) -> None:
        root.put("events/a", b"one")
        before = root.list("events")
        assert root.list("events") == before
        root.put("events/a", b"two")
        assert root.list("events")[0].etag != before[0].etag

    def test_a_folder_does_not_exist_as_an_object(self, root: Root) -> None:
        root.put("a/b", b"")
        assert root.exists("a/b") and not root.exists("a")

    def test_deletes_a_folder_and_nothing_else(self, root: Root) -> None:
        for path in ("staging/u1/a", "staging/u1/deep/b", "staging/u10/a", "versions/u1"):
            root.put(path, b"")
        root.delete_prefix("staging/u1")
        assert [o.path for o in root.list("")] == ["staging/u10/a", "versions/u1"]

    def test_deletes_a_single_object(self, root: Root) -> None:
        root.put("a", b"")
        root.delete_prefix("a")
        assert not root.exists("a")

    def test_deleting_what_is_absent_is_no_error(self, root: Root) -> None:
        root.put("a", b"")
        root.delete_prefix("staging/u1")
        assert [info.path for info in root.list("")] == ["a"]

    @pytest.mark.parametrize("path", ["", "/", "../x", "a/../../x"], ids=repr)
    def test_refuses_a_path_that_leaves_the_root(self, root: Root, path: str) -> None:
        for call in (root.read_bytes, root.exists, root.delete_prefix):
            with pytest.raises(ValueError, match="below the root"):
                call(path)

    def test_a_used_root_pickles(self, root: Root) -> None:
        root.put("a", b"1")
        copy = pickle.loads(pickle.dumps(root))
        assert copy.uri == root.uri and copy.read_bytes("a") == b"1"

    def test_arrow_reads_and_writes_the_same_objects(self, root: Root) -> None:
        table = pa.table({"x": [1, 2]})
        root.put("events/keep", b"")
        filesystem, base = pickle.loads(pickle.dumps(root.arrow()))
        pq.write_table(table, f"{base}/events/x.parquet", filesystem=filesystem)
        assert [o.path for o in root.list("events")] == ["events/keep", "events/x.parquet"]
        assert pq.read_table(f"{base}/events/x.parquet", filesystem=filesystem).equals(table)

    def test_arrow_sees_at_once_what_another_process_wrote(self, root: Root) -> None:
        filesystem, base = root.arrow()
        everything = pa.fs.FileSelector(f"{base}/events", allow_not_found=True)
        other = Root(root.uri)
        for count in (1, 2):
            other.put(f"events/{count}", b"")
            assert len(filesystem.get_file_info(everything)) == count
            other = pickle.loads(pickle.dumps(other))

    def test_the_check_leaves_nothing_behind(self, root: Root) -> None:
        root.check_writable()
        assert root.list("") == [] and root.list_folders("") == []

    def test_the_check_finds_a_store_without_conditional_writes(self, root: Root) -> None:
        with pytest.raises(RootError, match="If-None-Match"):
            OverwritingRoot(root.uri).check_writable()


@pytest.mark.parametrize("uri", ["/tmp/x", "file://x", "s3://", "gs://b"], ids=repr)
def test_refuses_a_uri_of_another_kind(uri: str) -> None:
    with pytest.raises(RootError, match="expected file:///folder or s3://bucket/prefix"):
        Root(uri)


def num_winners(root: Root, num_paths: int) -> list[int]:
    """For each path, how many of the writers that start together believe that they created it."""
    barrier = Barrier(NUM_WRITERS)

    def write(writer: int) -> list[bool]:
        mine, wins = type(root)(root.uri), []
        for i in range(num_paths):
            barrier.wait()
            wins.append(mine.put_if_absent(f"ledger/{i}", bytes([writer])))
        return wins

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        return [sum(wins) for wins in zip(*pool.map(write, range(NUM_WRITERS)), strict=True)]


class TestRace:
    def test_one_of_eight_threads_wins_each_path(self, root: Root) -> None:
        assert num_winners(root, num_paths=8) == [1] * 8

    def test_a_store_without_conditional_writes_has_many_winners(self, root: Root) -> None:
        assert max(num_winners(OverwritingRoot(root.uri), num_paths=2)) > 1

    def test_one_of_four_processes_wins_each_path(self, root: Root) -> None:
        program = (
            "import os, sys; from raysys.storage import Root; root = Root(sys.argv[1])\n"
            "sys.stdin.read()\n"
            "print(*[i for i in range(30) if root.put_if_absent(f'ledger/{i}', b'x' * 1000)])"
        )
        writers = [run_python(program, root.uri) for _ in range(4)]
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.close()
            writer.stdin = None
        won = [int(i) for writer in writers for i in writer.communicate(timeout=60)[0].split()]
        assert sorted(won) == list(range(30))


def run_python(program: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


RECORD = bytes(range(256)) * 400
DIE_AT = """
import os, signal, sys
from pathlib import Path
from raysys.storage import Root

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def half_then_die(file, data):
    file.raw.write(data[: len(data) // 2])
    die()

def after(function):
    def wrapped(*args, **kwargs):
        function(*args, **kwargs)
        die()
    return wrapped

def create_naively(path, data):
    target = Path(sys.argv[3], path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        half_then_die(file, data)

root, moment = Root(sys.argv[1]), sys.argv[2]
root.put_if_absent("ledger/0", b"")  # makes the folders, so that the next sync is of the record
if moment == "half_written":
    opened = Path.open
    class Half:
        def __init__(self, file): self.file = file
        def __enter__(self): return self
        def __exit__(self, *args): self.file.close()
        def write(self, data): half_then_die(self.file, data)
    Path.open = lambda self, mode: Half(opened(self, mode))
elif moment == "before_fsync": os.fsync = die
elif moment == "after_fsync": os.fsync = after(os.fsync)
elif moment == "before_link": os.link = die
elif moment == "after_link": os.link = after(os.link)
elif moment == "naive": root.put_if_absent = create_naively
root.put_if_absent("ledger/1", bytes(range(256)) * 400)
"""


def die_while_creating(root: Root, moment: str) -> None:
    writer = run_python(DIE_AT, root.uri, moment, str(folder_of(root)))
    writer.communicate(timeout=30)
    assert writer.returncode == -signal.SIGKILL


class TestKill9:
    @pytest.mark.parametrize(
        "moment", ["half_written", "before_fsync", "after_fsync", "before_link", "after_link"]
    )
    def test_leaves_the_whole_record_or_none(self, local_root: Root, moment: str) -> None:
        die_while_creating(local_root, moment)
        created = moment == "after_link"
        there = ["ledger/0", "ledger/1"] if created else ["ledger/0"]
        assert [o.path for o in local_root.list("")] == there
        (temp,) = (folder_of(local_root) / ".tmp").iterdir()
        assert temp.stat().st_size == len(RECORD) // (2 if moment == "half_written" else 1)
        assert local_root.put_if_absent("ledger/1", RECORD) == (not created)
        assert local_root.read_bytes("ledger/1") == RECORD

    def test_an_exclusive_create_without_link_would_leave_a_torn_record(
        self, local_root: Root
    ) -> None:
        die_while_creating(local_root, "naive")
        assert len(local_root.read_bytes("ledger/1")) == len(RECORD) // 2

    @pytest.mark.parametrize("delay_s", [0.002, 0.01, 0.03], ids=lambda d: f"{d * 1000:g}ms")
    def test_at_any_moment_of_a_stream_of_records_none_is_torn(
        self, local_root: Root, delay_s: float
    ) -> None:
        program = (
            "import sys; from raysys.storage import Root; root = Root(sys.argv[1])\n"
            "print('ready', flush=True)\n"
            "for i in range(10**6): root.put_if_absent(f'ledger/{i}', bytes(range(256)) * 400)"
        )
        writer = run_python(program, local_root.uri)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(delay_s)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate(timeout=30)
        assert all(local_root.read_bytes(o.path) == RECORD for o in local_root.list("ledger"))


class TestLocalRoot:
    def test_a_file_in_the_way_is_one_clear_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        root = Root((tmp_path / "file").as_uri())
        calls: list[Callable[[], Any]] = [
            root.check_writable,
            lambda: root.put("a", b""),
            lambda: root.put_if_absent("a", b""),
            lambda: root.list("events"),
            lambda: root.read_bytes("a"),
        ]
        for call in calls:
            with pytest.raises(RootError, match="must be a folder") as caught:
                call()
            assert root.uri in str(caught.value) and "\n" not in str(caught.value)

    def test_a_full_disk_is_told(self, local_root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(fd: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RootError, match=r"No space left on device.*free some space"):
            local_root.put("a", b"")

    def test_a_file_system_without_hard_links_is_told(
        self, local_root: Root, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
        with pytest.raises(RootError, match="use a file system with hard links, or S3"):
            local_root.check_writable()

    def test_a_link_whose_answer_was_lost_still_counts_as_ours(
        self, local_root: Root, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        link = os.link

        def link_twice(source: Path, target: Path) -> None:
            link(source, target)
            link(source, target)

        monkeypatch.setattr(os, "link", link_twice)
        assert local_root.put_if_absent("a", b"")

    def test_temporary_files_of_killed_writers_are_hidden_and_swept_when_old(
        self, local_root: Root
    ) -> None:
        temp = folder_of(local_root) / ".tmp"
        temp.mkdir(parents=True)
        for name in ("old", "young"):
            (temp / name).write_bytes(b"torn")
        os.utime(temp / "old", (0, 0))
        assert local_root.list("") == []
        local_root.put("a", b"")
        assert [file.name for file in temp.iterdir()] == ["young"]

    def test_a_folder_with_odd_characters_works(self, tmp_path: Path) -> None:
        root = Root((tmp_path / "a b[c]%20ü").as_uri())
        root.put("x", b"1")
        assert (tmp_path / "a b[c]%20ü" / "x").read_bytes() == b"1"
