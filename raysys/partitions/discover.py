"""Lists the partitions and item files that lie below the root.

    Root -> Discovered -> plan.plan_update

One listing of `events/` and one of `items/`; no file is opened. Names that start with "_" or "."
are hidden, as Spark and Ray Data have it, so a writer may stage files there.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from raysys.errors import DataError
from raysys.ledger.records import FileRef, PartitionRef
from raysys.partitions.layout import (
    EVENTS,
    ITEMS,
    QUARANTINE,
    STAGING,
    STATE,
    VERSIONS,
    partition_date,
)
from raysys.storage import ObjectInfo, Root


@dataclass(frozen=True, kw_only=True, slots=True)
class Discovered:
    """What a root holds, consumed or not."""

    root_uri: str
    partitions: tuple[PartitionRef, ...]
    """By date, each with all its files."""
    item_files: tuple[FileRef, ...]


def discover(root: Root) -> Discovered:
    """Lists the root.

    Raises:
      DataError: A parquet file lies below `events/` but not in a `dt=YYYY-MM-DD` folder.
    """
    files: defaultdict[str, list[FileRef]] = defaultdict(list)
    for info in root.list(EVENTS):
        if _is_data(info):
            files[_partition_of(info.path)].append(_ref(info))
    partitions = [PartitionRef(key=key, files=tuple(files[key])) for key in files]
    return Discovered(
        root_uri=root.uri,
        partitions=tuple(sorted(partitions, key=lambda partition: partition_date(partition.key))),
        item_files=tuple(_ref(info) for info in root.list(ITEMS) if _is_data(info)),
    )


def work_folders(root: Root) -> list[str]:
    """Returns the folders that updates made below the root, for `plan.orphan_folders`."""
    parents = (STAGING, STATE, VERSIONS, QUARANTINE)
    return [f"{parent}/{name}" for parent in parents for name in root.list_folders(parent)]


def _is_data(info: ObjectInfo) -> bool:
    hidden = any(part.startswith(("_", ".")) for part in info.path.split("/"))
    return info.path.endswith(".parquet") and not hidden


def _partition_of(path: str) -> str:
    key = path.rpartition("/")[0]
    if key == EVENTS:
        raise DataError(f"{path}: expected files in {EVENTS}/dt=YYYY-MM-DD/; move it there")
    partition_date(key)
    return key


def _ref(info: ObjectInfo) -> FileRef:
    return FileRef(path=info.path, size_bytes=info.size_bytes, etag=info.etag)
