"""The root: one folder, local or on S3, below which everything durable lies.

    root = Root("s3://shop/raysys")
    root.put_if_absent("ledger/00000000000000000001.json", data)  # True for exactly one writer
    root.read_bytes("ledger/00000000000000000001.json")

The ledger's exactly-once rests on `put_if_absent` alone: of all writers of a path one wins, and a
writer that is killed leaves the whole object or none. S3 does it with `If-None-Match: *`, a local
folder with write, fsync, `link`. Endpoint and credentials of S3 come from the standard AWS
environment. Paths are relative to the root and "/"-separated.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import os
import re
import shutil
import stat
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raysys.errors import RootError, StorageUnavailableError

_TEMP = ".tmp"
_TEMP_LIFETIME_S = 3600.0
_CREATE_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """One object, as a listing saw it."""

    path: str
    size_bytes: int
    etag: str
    """Changes when the content is written anew; compare it for equality only."""


class Root:
    """A root URI, opened on first use in each process. Pickles as its URI, for Ray tasks.

    Every method raises `RootError` if the root is not usable as configured, and
    `StorageUnavailableError` if the object store does not answer after its client's retries.
    """

    def __init__(self, uri: str) -> None:
        if not re.match(r"file:///|s3://[^/]", uri):
            raise RootError(f"root {uri!r}: expected file:///folder or s3://bucket/prefix")
        self.uri = uri.rstrip("/") if uri != "file:///" else uri
        self._opened: tuple[int, _Store] | None = None

    def __reduce__(self) -> tuple[type[Root], tuple[str]]:
        return Root, (self.uri,)

    def __repr__(self) -> str:
        return f"Root({self.uri!r})"

    def read_bytes(self, path: str) -> bytes:
        """Returns the content of an object.

        Raises:
          FileNotFoundError: There is none.
        """
        return self._store.read_bytes(_checked(path))

    def list(self, prefix: str) -> list[ObjectInfo]:
        """Returns all objects below the folder `prefix`, at any depth, sorted by path."""
        found = self._store.list(_checked(prefix, may_be_root=True))
        return sorted(found, key=lambda info: info.path)

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
        probe = f"{_TEMP}/probe-{uuid.uuid4().hex}"
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
    def _store(self) -> _Store:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _open(self.uri))
        return self._opened[1]


class _Store(Protocol):
    """What differs between a local folder and S3. Paths are checked by the caller."""

    def read_bytes(self, path: str) -> bytes: ...
    def list(self, prefix: str) -> builtins.list[ObjectInfo]: ...
    def list_folders(self, prefix: str) -> builtins.list[str]: ...
    def exists(self, path: str) -> bool: ...
    def put(self, path: str, data: bytes) -> None: ...
    def put_if_absent(self, path: str, data: bytes) -> bool: ...
    def delete_prefix(self, prefix: str) -> None: ...
    def arrow(self) -> tuple[Any, str]: ...


def _open(uri: str) -> _Store:
    if uri.startswith("s3://"):
        return _S3Store(uri)
    return _LocalStore(uri, Path(urllib.parse.unquote(uri.removeprefix("file://"))))


def _checked(path: str, *, may_be_root: bool = False) -> str:
    path = path.strip("/")
    if ".." in path.split("/") or (not path and not may_be_root):
        raise ValueError(f"expected a path below the root, got {path!r}")
    return path


class _LocalStore:
    """A folder of a POSIX file system that has hard links and fsync."""

    def __init__(self, uri: str, base: Path) -> None:
        self._uri = uri
        self._base = base
        self._swept = False

    def read_bytes(self, path: str) -> bytes:
        with self._reported("read", path):
            return (self._base / path).read_bytes()

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        with self._reported("list", prefix):
            return list(self._walk(self._base / prefix))

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
        for folder, folders, names in os.walk(top, onerror=_raise_unless_gone):
            folders[:] = [name for name in folders if not self._is_temp(f"{folder}/{name}")]
            for name in names:
                file = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    yield ObjectInfo(
                        path=file.relative_to(self._base).as_posix(),
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
        return Path(folder) == self._base / _TEMP

    @contextlib.contextmanager
    def _temp(self, data: bytes) -> Iterator[Path]:
        folder = _make_folder(self._base / _TEMP)
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
        """Deletes what killed writers left, once a process; no write takes `_TEMP_LIFETIME_S`."""
        if self._swept:
            return
        self._swept = True
        for temp in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - temp.stat().st_mtime > _TEMP_LIFETIME_S:
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


@functools.lru_cache(maxsize=4)
def _s3_filesystem(pid: int, settings: frozenset[tuple[str, str]]) -> Any:
    """Returns this process's client for these AWS settings: making one takes 0.2 s.

    No listing is cached, since other processes write below the root too.
    """
    import s3fs

    # fsspec's own cache of instances does not know that the settings may change.
    return s3fs.S3FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={"connect_timeout": 10},
    )


class _S3Store:
    """A bucket's prefix, through s3fs."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._base = uri.removeprefix("s3://").rstrip("/")
        settings = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
        self._fs = _s3_filesystem(os.getpid(), frozenset(settings.items()))

    def read_bytes(self, path: str) -> bytes:
        with self._reported(path):
            data: bytes = self._fs.cat_file(self._full(path))
            return data

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        with self._reported(prefix):
            found = self._fs.find(self._full(prefix), detail=True).values()
        start = f"{self._full(prefix)}/"
        return [
            self._info(entry)
            for entry in found
            if entry["name"].startswith(start)
            and not entry["name"].endswith("/")
            and not entry["name"].startswith(f"{self._base}/{_TEMP}/")
        ]

    def list_folders(self, prefix: str) -> builtins.list[str]:
        try:
            with self._reported(prefix):
                found = self._fs.ls(self._full(prefix), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        names = [e["name"].rpartition("/")[2] for e in found if e["type"] == "directory"]
        return [name for name in names if prefix or name != _TEMP]

    def exists(self, path: str) -> bool:
        return self._head(path) is not None

    def put(self, path: str, data: bytes) -> None:
        with self._reported(path):
            self._fs.pipe_file(self._full(path), data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        token = uuid.uuid4().hex
        for attempt in range(_CREATE_ATTEMPTS):
            with self._reported(path):
                try:
                    self._fs.pipe_file(
                        self._full(path), data, mode="create", Metadata={"raysys-write": token}
                    )
                    return True
                except OSError as error:
                    code = _aws_code(error)
                    if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412"):
                        break
                    # S3 could not tell who came first: nothing was written, ask again.
                    last = attempt == _CREATE_ATTEMPTS - 1
                    if last or code not in ("ConditionalRequestConflict", "409"):
                        raise
        # The client repeats a request whose answer was lost, and then finds its own object.
        head = self._head(path)
        return head is not None and head.get("Metadata", {}).get("raysys-write") == token

    def delete_prefix(self, prefix: str) -> None:
        with self._reported(prefix):
            self._fs.rm([*self._names_below(prefix), self._full(prefix)])
            left = self._names_below(prefix)
        if left:
            raise RootError(
                f"root {self._uri}: the object store did not delete {left[0]}; check that the "
                "bucket's policy allows to delete"
            )

    def arrow(self) -> tuple[Any, str]:
        import pyarrow.fs

        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self._fs)), self._base

    def _names_below(self, prefix: str) -> builtins.list[str]:
        start = f"{self._full(prefix)}/"
        return [name for name in self._fs.find(self._full(prefix)) if name.startswith(start)]

    def _head(self, path: str) -> dict[str, Any] | None:
        bucket, key, _ = self._fs.split_path(self._full(path))
        try:
            with self._reported(path):
                head: dict[str, Any] = self._fs.call_s3("head_object", Bucket=bucket, Key=key)
                return head
        except FileNotFoundError:
            return None

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base

    def _info(self, entry: dict[str, Any]) -> ObjectInfo:
        return ObjectInfo(
            path=entry["name"].removeprefix(f"{self._base}/"),
            size_bytes=entry["size"],
            etag=entry["ETag"].strip('"'),
        )

    @contextlib.contextmanager
    def _reported(self, path: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except (OSError, BotoCoreError) as error:
            raise _s3_error(error, self._uri, path) from error


def _aws_code(error: BaseException) -> str:
    response = getattr(error.__cause__ or error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _s3_error(error: Exception, uri: str, path: str) -> Exception:
    from botocore import exceptions as aws

    code, text = _aws_code(error), " ".join(str(error).split())
    if code == "NoSuchBucket":
        return RootError(f"root {uri}: the bucket does not exist; create it or correct `root`")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{uri}/{path}")
    no_access = (PermissionError, aws.NoCredentialsError, aws.PartialCredentialsError)
    if isinstance(error, no_access):
        return RootError(
            f"root {uri}: no access to {path or 'it'} ({text}); check the AWS credentials and the "
            "bucket's policy (get, put, list and delete are needed)"
        )
    silent = (TimeoutError, ConnectionError, aws.HTTPClientError, aws.ConnectionError)
    if isinstance(error, silent) or getattr(error, "errno", None) in (errno.EBUSY, errno.EREMOTEIO):
        return StorageUnavailableError(
            f"{uri}/{path}: the object store did not answer ({text or type(error).__name__}); "
            "check AWS_ENDPOINT_URL, or try again later"
        )
    return RootError(f"root {uri}: the object store refused {path or 'it'} ({text})")
