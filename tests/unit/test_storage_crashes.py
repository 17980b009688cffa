"""Single operations of a local root that are killed, or find the disk full, at any change.

The first test is why elsewhere an exception may stand for SIGKILL: both leave the same files.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysys.errors import RootError
from raysys.ledger.log import Log
from raysys.storage import Root
from tests.crashes import fill_disk_before, kill_before, run_watched
from tests.helpers import rollout

OLD, NEW = b"old" * 1000, b"new" * 2000
BEFORE = {
    "cache/a": OLD,
    "staging/u1/a": OLD,
    "staging/u1/deep/b": OLD,
    "staging/u10/a": OLD,
}


def append(root: Root) -> None:
    Log(root, clock=lambda: 0.0).transact(lambda state: rollout(reason=str(state.sequence)))


ACTIONS: dict[str, Callable[[Root], object]] = {
    "append": append,
    "put_if_absent": lambda root: root.put_if_absent("versions/v1/a", NEW),
    "put_new": lambda root: root.put("versions/v1/a", NEW),
    "put_over": lambda root: root.put("cache/a", NEW),
    "delete_folder": lambda root: root.delete_prefix("staging/u1"),
    "delete_object": lambda root: root.delete_prefix("cache/a"),
}


def prepare(folder: Path, name: str, change: int | None) -> Root:
    """A root of its own for each death, with some objects and two records."""
    root = root_of(folder / name / str(change))
    for path, data in BEFORE.items():
        root.put(path, data)
    append(root)
    append(root)
    return root


def root_of(folder: Path) -> Root:
    return Root(folder.as_uri())


def left_by(root: Root) -> tuple[list[tuple[str, bytes]], list[bytes]]:
    """Every file and folder below a root; and the temporary files, whose names are drawn."""
    base = Path(urllib.parse.unquote(root.uri.removeprefix("file://")))
    found = [
        (path.relative_to(base).as_posix(), b"" if path.is_dir() else path.read_bytes())
        for path in sorted(base.rglob("*"))
    ]
    is_temp = [name.startswith(".tmp/") for name, _ in found]
    return (
        [entry for entry, temp in zip(found, is_temp, strict=True) if not temp],
        sorted(data for (_, data), temp in zip(found, is_temp, strict=True) if temp),
    )


def contents(root: Root) -> dict[str, bytes]:
    return {info.path: root.read_bytes(info.path) for info in root.list("")}


def kill_really(folder: Path) -> None:
    """Runs every action in processes of their own, and kills each before one of its changes."""
    for name, action in ACTIONS.items():
        for change in itertools.count():
            root = prepare(folder, name, change)
            pid = os.fork()
            if pid == 0:
                run_watched(change, _kill_self, lambda: action(root))  # noqa: B023
                os._exit(0)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSIGNALED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            assert os.WTERMSIG(status) == signal.SIGKILL


def _kill_self(event: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it, `<action>/<change>` is a root as SIGKILL left it."""
    folder = tmp_path_factory.mktemp("killed")
    program = "import sys, pathlib; from tests.unit import test_storage_crashes as tests\n"
    subprocess.run(
        [sys.executable, "-c", f"{program}tests.kill_really(pathlib.Path(sys.argv[1]))", folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=True,
        timeout=120,
    )
    return folder


@pytest.mark.parametrize("name", ACTIONS)
class TestKilled:
    def test_an_exception_leaves_what_sigkill_leaves(
        self, name: str, killed: Path, tmp_path: Path
    ) -> None:
        # The last folder is of the run that came through.
        num_changes = len(list((killed / name).iterdir())) - 1
        assert num_changes >= 1
        for change in range(num_changes + 1):
            root = prepare(tmp_path, name, change)
            assert kill_before(change, lambda: ACTIONS[name](root)) == change  # noqa: B023
            assert left_by(root) == left_by(root_of(killed / name / str(change)))

    def test_the_root_is_whole_and_the_next_writer_goes_on(
        self, name: str, killed: Path, tmp_path: Path
    ) -> None:
        before, after = before_and_after(tmp_path, name)
        for folder in (killed / name).iterdir():
            root = root_of(folder)
            found = contents(root)
            assert all(data in (before.get(path), after.get(path)) for path, data in found.items())
            assert before.items() & after.items() <= found.items()
            ACTIONS[name](root)
            assert after.items() <= contents(root).items()
            # Whoever was killed after its append has appended, and the next record comes after it.
            assert contents(root) == after or (name == "append" and found == after)
            append(root)


@pytest.mark.parametrize("name", ["append", "put_if_absent", "put_new", "put_over"])
class TestFullDisk:
    def full(self, root: Root) -> Any:
        remedy = r"cannot write (ledger|versions|cache)/\S+ \(No space left on device\); free some"
        return pytest.raises(RootError, match=f"root {root.uri}: {remedy}")

    def test_changes_nothing_and_says_what_to_do(self, name: str, tmp_path: Path) -> None:
        before, after = before_and_after(tmp_path, name)
        counted = prepare(tmp_path, name, None)
        num_changes = kill_before(None, lambda: ACTIONS[name](counted))
        # The last change deletes the temporary file, for which no space is needed.
        for change in range(num_changes - 1):
            root = prepare(tmp_path, name, change)
            with self.full(root):
                fill_disk_before(change, lambda: ACTIONS[name](root))  # noqa: B023
            assert contents(root) == before
            assert left_by(root)[1] == []
            ACTIONS[name](root)
            assert contents(root) == after

    def test_so_does_one_that_fills_up_within_a_file(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, after = before_and_after(tmp_path, name)
        root = prepare(tmp_path, name, 0)
        opened = Path.open

        def open_full(path: Path, mode: str = "r", *args: Any) -> Any:
            if mode != "xb":
                return opened(path, mode, *args)
            opened(path, mode).close()
            return Path("/dev/full").open("wb")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", open_full)
            with self.full(root):
                ACTIONS[name](root)
        assert contents(root) == before
        assert left_by(root)[1] == []
        ACTIONS[name](root)
        assert contents(root) == after

    def test_one_that_is_full_when_it_syncs_left_all_or_nothing(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, after = before_and_after(tmp_path, name)
        for failing in itertools.count():
            root = prepare(tmp_path, name, failing)
            syncs = itertools.count()
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", lambda fd: full_from(failing, next(syncs)))  # noqa: B023
                try:
                    ACTIONS[name](root)
                except RootError as error:
                    assert "free some space" in str(error)
                else:
                    break
            assert contents(root) in (before, after)
            assert left_by(root)[1] == []
        assert failing >= 2


def full_from(failing: int, sync: int) -> None:
    if sync >= failing:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def before_and_after(folder: Path, name: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    root = prepare(folder / "undisturbed", name, None)
    before = contents(root)
    ACTIONS[name](root)
    return before, contents(root)
