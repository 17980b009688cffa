"""A local folder as a root: write, fsync, `link`."""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from raysys.errors import RootError
from raysys.storage.store import TEMP, ObjectInfo

TEMP_LIFETIME_S = 3600.0
"""No write takes so long: older files are what killed writers left."""


class LocalStore:
    """A folder of a POSIX file system that has hard links and fsync."""

    def __init__(self, uri: str, base: Path) -> None:
        self._uri = uri
        self._base = base
        self._swept = False

    def read_bytes(self, path: str) -> bytes:
        with self._reported("read", path):
            return (self._base / path).read_bytes()

    def open_input(self, path: str) -> BinaryIO:
        with self._reported("read", path):
            return (self._base / path).open("rb")

    def local_file(self, path: str, scratch: Path) -> Path:
        if not self.exists(path):
            raise FileNotFoundError(f"{self._uri}/{path}")
        return self._base / path

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        with self._reported("list", prefix):
            return list(self._walk(self._base / prefix))

    def list_names(self, folder: str, after: str) -> builtins.list[str]:
        with self._reported("list", folder):
            if not self._is_folder(self._base / folder):
                return []
            with os.scandir(self._base / folder) as children:
                return [c.name for c in children if c.name > after and c.is_file()]

    def list_folders(self, prefix: str) -> builtins.list[str]:
        with self._reported("list", prefix):
            if not self._is_folder(self._base / prefix):
                return []
            with os.scandir(self._base / prefix) as children:
                return [c.name for c in children if c.is_dir() and not self._is_temp(c.path)]

    def exists(self, path: str) -> bool:
        with self._reported("read", path):
            return (self._base / path).is_file()

    def put(self, path: str, data: bytes) -> None:
        with self._reported("write", path), self._temp(data) as temp:
            target = self._make_room(path)
            os.replace(temp, target)
            _sync_folder(target.parent)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        with self._reported("write", path), self._temp(data) as temp:
            target = self._make_room(path)
            try:
                os.link(temp, target)
            except FileExistsError:
                # Over NFS a link may be made and its answer lost; the repeated call then finds it.
                created = os.path.samefile(temp, target)
            else:
                created = True
            # The loser syncs too: it will read the winner's object and act on it.
            _sync_folder(target.parent)
            return created

    def delete_prefix(self, prefix: str) -> None:
        with self._reported("delete", prefix):
            target = self._base / prefix
            while target.is_dir():
                # Somebody else may delete the same folder at the same time.
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(target)
            target.unlink(missing_ok=True)

    def arrow(self) -> tuple[Any, str]:
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem(), str(self._base)

    def _walk(self, top: Path) -> Iterator[ObjectInfo]:
        if not self._is_folder(top):
            return
        # Strings: of a million files, Path objects would take most of the time.
        base = os.path.join(self._base, "")
        for folder, folders, names in os.walk(top, onerror=_raise_unless_gone):
            folders[:] = [name for name in folders if not self._is_temp(os.path.join(folder, name))]
            for name in names:
                file = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(file)
                    yield ObjectInfo(
                        path=file.removeprefix(base),
                        size_bytes=status.st_size,
                        etag=f"{status.st_mtime_ns:x}-{status.st_size:x}",
                    )

    def _is_folder(self, folder: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            # One look: the root may be created between two.
            if not stat.S_ISDIR(self._base.stat().st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return folder.is_dir()

    def _is_temp(self, folder: str) -> bool:
        return folder.endswith(TEMP) and Path(folder) == self._base / TEMP

    @contextlib.contextmanager
    def _temp(self, data: bytes) -> Iterator[Path]:
        folder = _make_folder(self._base / TEMP)
        self._sweep_once(folder)
        temp = folder / uuid.uuid4().hex
        try:
            with temp.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temp
        finally:
            temp.unlink(missing_ok=True)

    def _sweep_once(self, folder: Path) -> None:
        """Deletes what killed writers left, once a process; no write takes `TEMP_LIFETIME_S`."""
        if self._swept:
            return
        self._swept = True
        for temp in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - temp.stat().st_mtime > TEMP_LIFETIME_S:
                    temp.unlink()

    def _make_room(self, path: str) -> Path:
        target = self._base / path
        _make_folder(target.parent)
        return target

    @contextlib.contextmanager
    def _reported(self, verb: str, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if verb == "read":
                raise FileNotFoundError(f"{self._uri}/{path}") from error
            raise RootError(self._explain(verb, path, error)) from error
        except OSError as error:
            raise RootError(self._explain(verb, path, error)) from error

    def _explain(self, verb: str, path: str, error: OSError) -> str:
        remedy = {
            errno.ENOSPC: "free some space there",
            errno.EPERM: "use a file system with hard links, or S3",
            errno.EOPNOTSUPP: "use a file system with hard links, or S3",
        }.get(error.errno or 0, "`root` must be a folder that this user may read and write")
        return f"root {self._uri}: cannot {verb} {path or 'it'} ({error.strerror}); {remedy}"


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _make_folder(folder: Path) -> Path:
    """Creates the folder durably: a synced file in a folder that a crash loses is lost too."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)
    return folder


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
