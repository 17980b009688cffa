"""A bucket's prefix as a root: `If-None-Match: *`, through botocore.

    Root -> S3Store._ask -> botocore, which asks once -> s3_errors.may_pass -> ask again

There is one layer of retries, here: botocore's own is off, since layers multiply. An operation
whose retries are used up raises `StorageUnavailableError` with the object's name.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import logging
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from raysys.errors import RootError
from raysys.storage.patience import Patience
from raysys.storage.ranges import RangeReader
from raysys.storage.s3_errors import ERRORS, LOST_RACE, code_of, explain, may_pass
from raysys.storage.store import TEMP, ObjectInfo

_logger = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

_MAX_CONNECTIONS = 32
"""At once from one process: the ledger reads with 16 threads."""
_COPY_BYTES = 16_000_000
"""Of one ranged GET of a copy, which is all of it that is ever in memory."""
_MAX_KEYS_PER_DELETE = 1000
"""S3's own limit."""
_TELL_FROM_S = 1.0
"""Shorter delays are not logged: any busy store makes some."""
_TOKEN = "raysys-write"
"""Metadata by which a writer knows its own object again."""


@functools.lru_cache(maxsize=8)
def _client(pid: int, settings: frozenset[tuple[str, str]], patience: Patience) -> Any:
    """Returns this process's client for these AWS settings: making one takes 0.1 s."""
    config = Config(
        connect_timeout=patience.connect_timeout_s,
        read_timeout=patience.read_timeout_s,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=_MAX_CONNECTIONS,
    )
    return botocore.session.get_session().create_client("s3", config=config)


def _aws_settings() -> frozenset[tuple[str, str]]:
    return frozenset(item for item in os.environ.items() if item[0].startswith("AWS_"))


class S3Store:
    """A bucket's prefix. Paths are relative to it, keys are not."""

    def __init__(self, uri: str, patience: Patience) -> None:
        self._uri = uri
        self._bucket, _, self._prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        self._patience = patience
        try:
            self._s3 = _client(os.getpid(), _aws_settings(), patience)
        except (BotoCoreError, ValueError) as error:
            text = " ".join(str(error).split())
            raise RootError(f"root {uri}: {text}; check the AWS settings") from error

    def read_bytes(self, path: str) -> bytes:
        return self._get(path)

    def open_input(self, path: str) -> BinaryIO:
        head = self._head(path)
        if head is None:
            raise FileNotFoundError(f"{self._uri}/{path}")
        # All ranges must be of the object that was opened.
        same = {"IfMatch": head["ETag"]}
        return cast(
            BinaryIO,
            RangeReader(
                head["ContentLength"],
                lambda start, stop: self._get(path, Range=f"bytes={start}-{stop - 1}", **same),
            ),
        )

    def local_file(self, path: str, scratch: Path) -> Path:
        copy = scratch / uuid.uuid4().hex
        try:
            with self.open_input(path) as source, copy.open("xb") as target:
                shutil.copyfileobj(source, target, _COPY_BYTES)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise RootError(
                f"root {self._uri}: no room in {scratch} for {path}; free some space there, or "
                "name a larger disk by TMPDIR"
            ) from error
        return copy

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        return [
            ObjectInfo(path=path, size_bytes=entry["Size"], etag=entry["ETag"].strip('"'))
            for page in self._pages(prefix)
            for entry in page.get("Contents", [])
            if not (path := self._path(entry["Key"])).endswith("/")
            and not path.startswith(f"{TEMP}/")
        ]

    def list_names(self, folder: str, after: str) -> builtins.list[str]:
        start = self._folder(folder)
        settings = {"StartAfter": start + after} if after else {}
        names = (
            entry["Key"].removeprefix(start)
            for page in self._pages(folder, Delimiter="/", **settings)
            for entry in page.get("Contents", [])
        )
        return [name for name in names if name]

    def list_folders(self, prefix: str) -> builtins.list[str]:
        start = len(self._folder(prefix))
        names = [
            entry["Prefix"][start:].rstrip("/")
            for page in self._pages(prefix, Delimiter="/")
            for entry in page.get("CommonPrefixes", [])
        ]
        return [name for name in names if prefix or name != TEMP]

    def exists(self, path: str) -> bool:
        return self._head(path) is not None

    def put(self, path: str, data: bytes) -> None:
        self._ask(path, lambda: self._s3.put_object(**self._object(path), Body=data))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        token = uuid.uuid4().hex
        request = {**self._object(path), "Body": data, "Metadata": {_TOKEN: token}}
        if self._ask(path, lambda: self._create(request)):
            return True
        # An attempt whose answer was lost may have made the object that the next one found.
        head = self._head(path)
        return head is not None and head.get("Metadata", {}).get(_TOKEN) == token

    def delete_prefix(self, prefix: str) -> None:
        keys = [e["Key"] for page in self._pages(prefix) for e in page.get("Contents", [])]
        keys.append(self._key(prefix))
        for start in range(0, len(keys), _MAX_KEYS_PER_DELETE):
            batch = keys[start : start + _MAX_KEYS_PER_DELETE]
            self._ask(prefix, functools.partial(self._delete, batch))

    def arrow(self) -> tuple[Any, str]:
        from raysys.storage.s3_arrow import arrow_filesystem

        base = f"{self._bucket}/{self._prefix}".rstrip("/")
        return arrow_filesystem(os.getpid(), _aws_settings(), self._patience), base

    def _get(self, path: str, **conditions: str) -> bytes:
        def get() -> bytes:
            answer = self._s3.get_object(**self._object(path), **conditions)
            # botocore compares the bytes that came with Content-Length.
            with contextlib.closing(answer["Body"]) as body:
                data: bytes = body.read()
                return data

        return self._ask(path, get)

    def _create(self, request: dict[str, Any]) -> bool:
        try:
            self._s3.put_object(**request, IfNoneMatch="*")
        except ClientError as error:
            if code_of(error) in LOST_RACE:
                return False
            raise
        return True

    def _delete(self, keys: builtins.list[str]) -> None:
        wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        answer = self._s3.delete_objects(Bucket=self._bucket, Delete=wanted)
        for problem in answer.get("Errors", []):
            # S3 answers 200 and names what it did not delete.
            raise ClientError({"Error": problem}, f"DeleteObjects of {problem['Key']}")

    def _head(self, path: str) -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = self._ask(
                path, lambda: self._s3.head_object(**self._object(path))
            )
        except FileNotFoundError:
            return None
        return head

    def _pages(self, prefix: str, **settings: str) -> Iterator[dict[str, Any]]:
        request = {"Bucket": self._bucket, "Prefix": self._folder(prefix), **settings}
        while True:
            page = self._ask(prefix, functools.partial(self._s3.list_objects_v2, **request))
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _ask(self, path: str, request: Callable[[], _Answer]) -> _Answer:
        """Sends a request until it is answered, refused, or patience is at its end."""
        began = time.monotonic()
        num_attempts = 0
        while True:
            num_attempts += 1
            try:
                return request()
            except ERRORS as error:
                delay_s = self._patience.delay_s(num_attempts, random.random())
                waited_s = time.monotonic() - began + delay_s
                if not may_pass(error) or waited_s > self._patience.give_up_after_s:
                    raise explain(error, self._uri, path, num_attempts) from error
                if delay_s >= _TELL_FROM_S:
                    text = " ".join(str(error).split())
                    _logger.warning("%s/%s: %s; will ask again", self._uri, path, text)
            time.sleep(delay_s)

    def _object(self, path: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key(path)}

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _folder(self, prefix: str) -> str:
        return f"{key}/" if (key := self._key(prefix).rstrip("/")) else ""

    def _path(self, key: str) -> str:
        return key.removeprefix(self._folder(""))
