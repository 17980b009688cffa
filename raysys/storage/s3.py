"""A bucket's prefix as a root: `If-None-Match: *`, through s3fs."""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import os
import uuid
from collections.abc import Iterator
from typing import Any

from raysys.errors import RootError, StorageUnavailableError
from raysys.storage.store import TEMP, ObjectInfo

_CREATE_ATTEMPTS = 5


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


class S3Store:
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
            and not entry["name"].startswith(f"{self._base}/{TEMP}/")
        ]

    def list_names(self, folder: str, after: str) -> builtins.list[str]:
        bucket, prefix, _ = self._fs.split_path(f"{self._full(folder)}/")
        request = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
        if after:
            request["StartAfter"] = prefix + after
        names: builtins.list[str] = []
        with self._reported(folder):
            while True:
                page = self._fs.call_s3("list_objects_v2", **request)
                names += [item["Key"].removeprefix(prefix) for item in page.get("Contents", [])]
                if not page.get("IsTruncated"):
                    return [name for name in names if name]
                request["ContinuationToken"] = page["NextContinuationToken"]

    def list_folders(self, prefix: str) -> builtins.list[str]:
        try:
            with self._reported(prefix):
                found = self._fs.ls(self._full(prefix), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        names = [e["name"].rpartition("/")[2] for e in found if e["type"] == "directory"]
        return [name for name in names if prefix or name != TEMP]

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
