"""Lists the partitions and item files that lie below the root.

    Root, PartitionRange -> Discovered -> plan.plan_update

No file is opened. Names that start with "_" or "." are hidden, as Spark and Ray Data have it, so a
writer may stage files there; a folder that holds nothing else is an empty partition.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from raysys.errors import DataError, PartitionChangedError
from raysys.ledger.records import FileRef, PartitionRef
from raysys.partitions.layout import (
    EVENTS,
    EXPECTED,
    ITEMS,
    QUARANTINE,
    STAGING,
    STATE,
    VERSIONS,
    is_partition,
    label_order,
    partition_label,
)
from raysys.storage import ObjectInfo, Root

_NUM_THREADS = 16
_DAY = re.compile(r"dt=\d{4}-\d{2}-\d{2}")
_DAY_AT = len("dt=")
_HOURS_OF_DAY = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionRange:
    """Which partitions an update may look at."""

    first: datetime.date | None = None
    """The first day; None leaves it to `partitions.check_back_days`."""
    last: datetime.date | None = None
    """The last day; None for no end."""
    max_partitions: int = 0
    """At most so many of the oldest new ones; 0 leaves it to `partitions.max_partitions`."""

    def has(self, day: str) -> bool:
        """Returns whether a day, YYYY-MM-DD, lies in the range."""
        after = self.first is None or self.first.isoformat() <= day
        return after and (self.last is None or day <= self.last.isoformat())


EVERYTHING = PartitionRange()


@dataclass(frozen=True, kw_only=True, slots=True)
class Discovered:
    """What a root holds, consumed or not."""

    root_uri: str
    partitions: tuple[PartitionRef, ...]
    """By the end of their time (`layout.label_order`), each with all its files, perhaps none."""
    item_files: tuple[FileRef, ...]


def discover(root: Root, within: PartitionRange = EVERYTHING) -> Discovered:
    """Lists the root, of `events/` only the days of the range.

    Raises:
      DataError: A parquet file lies below `events/` but not in a partition's folder.
    """
    top = [name for name in root.list_folders(EVENTS) if not _is_hidden(name)]
    wanted = [name for name in top if not _DAY.fullmatch(name) or within.has(name[_DAY_AT:])]
    if len(wanted) == len(top):
        infos: Iterable[ObjectInfo] = root.list(EVENTS)
    else:
        _refuse_strays(f"{EVENTS}/{name}" for name in root.list_names(EVENTS) if _is_data(name))
        infos = itertools.chain(*_in_threads(root.list, [f"{EVENTS}/{name}" for name in wanted]))
    files = _by_folder(infos)
    for name in wanted:
        files.setdefault(f"{EVENTS}/{name}", [])
    labels = _labels(files)
    for key in _empty_hours(root, files, labels):
        files[key], labels[key] = [], partition_label(key)
    return Discovered(
        root_uri=root.uri,
        partitions=_partitions(files, labels),
        item_files=tuple(_ref(info) for info in root.list(ITEMS) if _is_data(info.path)),
    )


def require_as_planned(root: Root, partition: PartitionRef) -> None:
    """Checks that a partition's files are still those that were planned.

    Called once they have been read: whatever was read is then what was planned.

    Raises:
      PartitionChangedError: A file changed or vanished meanwhile.
    """
    there = {info.path: info for info in root.list(partition.key)}
    for file in partition.files:
        if problem := changed(file, there.get(file.path)):
            raise PartitionChangedError(
                f"{file.path} {problem}; nothing of it counts: submit again once its writer is done"
            )


def changed(planned: FileRef, found: ObjectInfo | None) -> str | None:
    """Returns why what is found now is not what was planned, as the end of a sentence.

    >>> file = FileRef(path="events/dt=2017-03-01/a.parquet", size_bytes=7, etag="x")
    >>> changed(file, None)
    'vanished after it was planned'
    """
    if found is None:
        return "vanished after it was planned"
    if found.size_bytes != planned.size_bytes:
        return f"has {found.size_bytes} bytes, {planned.size_bytes} were planned"
    return "was written anew after it was planned" if found.etag != planned.etag else None


def work_folders(root: Root) -> list[str]:
    """Returns the folders that updates made below the root, for `plan.orphan_folders`."""
    parents = (STAGING, STATE, VERSIONS, QUARANTINE)
    return [f"{parent}/{name}" for parent in parents for name in root.list_folders(parent)]


def _by_folder(infos: Iterable[ObjectInfo]) -> dict[str, list[FileRef]]:
    """Returns the data files of each folder that holds any object."""
    files: dict[str, list[FileRef]] = {}
    for info in infos:
        folder, _, name = info.path.rpartition("/")
        in_folder = files.setdefault(folder, [])
        if name.endswith(".parquet") and not name.startswith(("_", ".")):
            in_folder.append(_ref(info))
    return {folder: files[folder] for folder in files if not _is_hidden(folder)}


def _labels(files: dict[str, list[FileRef]]) -> dict[str, str]:
    """Returns the label of each folder that is a partition; any other may hold no data."""
    _refuse_strays(file.path for file in files.get(EVENTS, ()))
    # Of a misnamed folder `partition_label` says what is wrong.
    return {key: partition_label(key) for key in files if files[key] or is_partition(key)}


def _refuse_strays(paths: Iterable[str]) -> None:
    for path in paths:
        raise DataError(f"{path}: expected files in {EXPECTED}; move it there")


def _empty_hours(root: Root, files: dict[str, list[FileRef]], labels: dict[str, str]) -> list[str]:
    """Returns the folders of hours in which no object lies: a listing of objects has none."""
    hours = Counter(_day_of_hour(key) for key in labels)
    del hours[""]
    days = {key for key in labels if not _day_of_hour(key) and not files[key]} | hours.keys()
    partial = sorted(day for day in days if hours[day] < _HOURS_OF_DAY)
    found = zip(partial, _in_threads(root.list_folders, partial), strict=True)
    keys = (f"{day}/{name}" for day, names in found for name in names)
    return [key for key in keys if key not in files and is_partition(key)]


def _partitions(
    files: dict[str, list[FileRef]], labels: dict[str, str]
) -> tuple[PartitionRef, ...]:
    # A day that has hours is a partition of its own only if it has files of its own.
    days_of_hours = {_day_of_hour(key) for key in labels}
    keys = [key for key in labels if files[key] or key not in days_of_hours]
    keys.sort(key=lambda key: label_order(labels[key]))
    return tuple(PartitionRef(key=key, files=tuple(files[key])) for key in keys)


def _day_of_hour(key: str) -> str:
    """Returns the folder of the day in which an hour's partition lies, "" for a day's."""
    return key.rpartition("/hour=")[0]


_Listing = TypeVar("_Listing")


def _in_threads(listing: Callable[[str], _Listing], folders: Sequence[str]) -> Iterable[_Listing]:
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(listing, folders))


def _is_data(path: str) -> bool:
    return path.endswith(".parquet") and not _is_hidden(path)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) for part in path.split("/"))


def _ref(info: ObjectInfo) -> FileRef:
    return FileRef(path=info.path, size_bytes=info.size_bytes, etag=info.etag)
