"""One root, of whatever kind its URI says.

URI -> Root -> local.LocalStore | s3.S3Store
"""

from __future__ import annotations

import builtins
import contextlib
import os
import re
import urllib.parse
import uuid
from pathlib import Path
from typing import Any, BinaryIO

from raysys.errors import RootError, StorageUnavailableError
from raysys.storage.local import LocalStore
from raysys.storage.patience import Patience
from raysys.storage.store import TEMP, ObjectInfo, Store

_PATIENCE = Patience()


class Root:
    """A root URI, opened on first use in each process. Pickles as its URI, for Ray tasks.

    Every method raises `RootError` if the root is not usable as configured, and
    `StorageUnavailableError`, which names the object, if the object store did not answer for as
    long as `patience` says.
    """

    def __init__(self, uri: str, patience: Patience = _PATIENCE) -> None:
        if not re.match(r"file:///|s3://[^/]", uri):
            raise RootError(f"root {uri!r}: expected file:///folder or s3://bucket/prefix")
        self.uri = uri.rstrip("/") if uri != "file:///" else uri
        self._patience = patience
        self._opened: tuple[int, Store] | None = None

    def __reduce__(self) -> tuple[type[Root], tuple[str, Patience]]:
        return Root, (self.uri, self._patience)

    def __repr__(self) -> str:
        return f"Root({self.uri!r})"

    def read_bytes(self, path: str) -> bytes:
        """Returns the content of an object.

        Raises:
          FileNotFoundError: There is none.
        """
        return self._store.read_bytes(_checked(path))

    def open_input(self, path: str) -> BinaryIO:
        """Returns an object as a seekable file, for `pyarrow.parquet.ParquetFile`. Close it.

        Nothing is read ahead, so a parquet file costs its footer and the columns that are read.

        Raises:
          FileNotFoundError: There is none.
        """
        return self._store.open_input(_checked(path))

    def local_file(self, path: str, scratch: Path) -> Path:
        """Returns a file of this machine with an object's content, to be mapped into memory.

        It is the object itself on a local root, so do not write to it, else a copy in `scratch`.

        Raises:
          FileNotFoundError: There is none.
        """
        return self._store.local_file(_checked(path), scratch)

    def list(self, prefix: str) -> list[ObjectInfo]:
        """Returns all objects below the folder `prefix`, at any depth, sorted by path."""
        found = self._store.list(_checked(prefix, may_be_root=True))
        return sorted(found, key=lambda info: info.path)

    def list_names(self, folder: str, after: str = "") -> builtins.list[str]:
        """Returns the sorted names, greater than `after`, of the objects right in a folder.

        Of a folder of 100,000 objects it asks the store only for those that come after.
        """
        return sorted(self._store.list_names(_checked(folder), after))

    def list_folders(self, prefix: str) -> builtins.list[str]:
        """Returns the sorted names of the immediate child folders of the folder `prefix`."""
        return sorted(self._store.list_folders(_checked(prefix, may_be_root=True)))

    def exists(self, path: str) -> bool:
        """Returns whether there is an object (not a folder) of this path."""
        return self._store.exists(_checked(path))

    def put(self, path: str, data: bytes) -> None:
        """Writes an object or replaces it. Readers see the old content or the new, never a mix."""
        self._store.put(_checked(path), data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Creates an object and returns True, or returns False because it exists already.

        Of any number of concurrent writers exactly one gets True. True means that the object
        survives a crash. A writer killed on the way leaves the whole object or nothing.
        """
        return self._store.put_if_absent(_checked(path), data)

    def delete_prefix(self, prefix: str) -> None:
        """Deletes the object `prefix` and all objects below the folder `prefix`, if any."""
        self._store.delete_prefix(_checked(prefix))

    def arrow(self) -> tuple[Any, str]:
        """Returns a `pyarrow.fs.FileSystem` and the root's path in it, for Ray Data and Train."""
        return self._store.arrow()

    def check_writable(self) -> None:
        """Creates and deletes a probe, twice over, as the ledger would.

        Raises:
          RootError: It cannot be written, or the store lets two writers create the same object.
        """
        probe = f"{TEMP}/probe-{uuid.uuid4().hex}"
        try:
            wins = [self.put_if_absent(probe, b"raysys") for _ in range(2)]
        finally:
            with contextlib.suppress(RootError, StorageUnavailableError):
                self.delete_prefix(probe)
        if wins != [True, False]:
            raise RootError(
                f"root {self.uri}: the store ignores If-None-Match, so two updates could both "
                "win; use a store with conditional writes (AWS S3, a current MinIO or Ceph)"
            )

    @property
    def _store(self) -> Store:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _open(self.uri, self._patience))
        return self._opened[1]


def _open(uri: str, patience: Patience) -> Store:
    if uri.startswith("s3://"):
        # A local root does not pay for loading botocore.
        from raysys.storage.s3 import S3Store

        return S3Store(uri, patience)
    return LocalStore(uri, Path(urllib.parse.unquote(uri.removeprefix("file://"))))


def _checked(path: str, *, may_be_root: bool = False) -> str:
    path = path.strip("/")
    if ".." in path.split("/") or (not path and not may_be_root):
        raise ValueError(f"expected a path below the root, got {path!r}")
    return path
