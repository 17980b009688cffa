"""What a kind of storage has to do, for `root.Root`."""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

TEMP = ".tmp"
"""The folder of writes under way; never listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """One object, as a listing saw it."""

    path: str
    size_bytes: int
    etag: str
    """Changes when the content is written anew; compare it for equality only."""


class Store(Protocol):
    """What differs between a local folder and S3. Paths are checked by the caller."""

    def read_bytes(self, path: str) -> bytes: ...
    def open_input(self, path: str) -> BinaryIO: ...
    def local_file(self, path: str, scratch: Path) -> Path: ...
    def list(self, prefix: str) -> builtins.list[ObjectInfo]: ...
    def list_names(self, folder: str, after: str) -> builtins.list[str]: ...
    def list_folders(self, prefix: str) -> builtins.list[str]: ...
    def exists(self, path: str) -> bool: ...
    def put(self, path: str, data: bytes) -> None: ...
    def put_if_absent(self, path: str, data: bytes) -> bool: ...
    def delete_prefix(self, prefix: str) -> None: ...
    def arrow(self) -> tuple[Any, str]: ...
