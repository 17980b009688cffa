"""What becomes of partitions that are not as they should be: refused, set aside, or read (again).

    partitions found, State -> compare() -> Changes -> settle_changes() -> [SetAside, ...] | refused

| kind      | what it is                                            | config                      |
|-----------|-------------------------------------------------------|-----------------------------|
| late      | a new file of the shop in a consumed partition        | partitions.late_files       |
| rewritten | a consumed file with another size or etag             | partitions.rewritten_files  |
| vanished  | a consumed file that is gone                          | partitions.vanished_files   |
| empty     | a closed partition without data, or with 0-byte files | partitions.empty_partitions |

No question asked: what replicas wrote is never late; a file of 0 bytes is late only once it has
content; and a file that an update could not read and that was since written anew is *repaired*:
nothing of it was trained, so it is read like a new one. All here is pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

from raysys.config import ChangeOutcome, PartitionConfig
from raysys.errors import EmptyPlanError, PartitionChangedError
from raysys.ledger.records import FileRef, PartitionRef, SetAside, SetAsideKind
from raysys.ledger.state import State
from raysys.partitions.discover import PartitionRange
from raysys.partitions.layout import SERVED_FILES, path_day

_Problem = tuple[SetAsideKind, FileRef]

_REMEDIES: dict[SetAsideKind, str] = {
    "rewritten": (
        "put the old content back, or set partitions.rewritten_files: quarantine to keep what was "
        "trained on, reprocess to read the new content"
    ),
    "late": (
        "move it away, or set partitions.late_files: reprocess to train on just the late files, "
        "quarantine to leave them out"
    ),
    "vanished": (
        "put it back, or set partitions.vanished_files: quarantine to note it and go on, or "
        "partitions.check_back_days to how many days you keep"
    ),
    "empty": (
        "write its files, delete it, or set partitions.empty_partitions: quarantine to take it "
        "for consumed, reprocess to wait for its files"
    ),
}
"""In the order in which problems are told."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What a comparison with the ledger found."""

    to_read: tuple[PartitionRef, ...]
    """By the end of their time, each with those of its files that are to be read."""
    problems: tuple[_Problem, ...]
    """What is not read; of `reprocess` only empty partitions are among them."""

    def of(self, kind: SetAsideKind) -> list[FileRef]:
        """Returns the problems of one kind, in order."""
        return [file for of_kind, file in self.problems if of_kind == kind]


def compare(
    found: Sequence[PartitionRef],
    closed: Sequence[PartitionRef],
    state: State,
    config: PartitionConfig,
    *,
    view: PartitionRange,
    since: str,
) -> Changes:
    """Sorts everything found into what is read, what is done, and what is a problem.

    Args:
      found: All partitions in `view`, those included whose time is not over.
      closed: Those whose time is over.
      since: The first day, YYYY-MM-DD, whose consumed partitions are compared.
    """
    to_read: list[PartitionRef] = []
    problems: list[_Problem] = []
    for partition in closed:
        if partition.key not in state.consumed_partitions:
            if any(file.size_bytes for file in partition.files):
                to_read.append(partition)
            else:
                folder = FileRef(path=partition.key, size_bytes=0, etag="")
                problems.append(("empty", folder))
        elif path_day(partition.key) >= since:
            files = [
                file
                for file in _not_as_consumed(partition, state.consumed_files)
                if _is_read(file, state, config, problems)
            ]
            if files:
                to_read.append(PartitionRef(key=partition.key, files=tuple(files)))
    problems += [("vanished", file) for file in _vanished(found, state, view=view, since=since)]
    return Changes(to_read=tuple(to_read), problems=tuple(problems))


def _not_as_consumed(
    partition: PartitionRef, consumed_files: Mapping[str, FileRef]
) -> list[FileRef]:
    """Returns the files that are new or changed. Of a million partitions it sees each file."""
    return [
        file
        for file in partition.files
        if (was := consumed_files.get(file.path)) is None
        or was.etag != file.etag
        or was.size_bytes != file.size_bytes
    ]


def _is_read(
    file: FileRef, state: State, config: PartitionConfig, problems: list[_Problem]
) -> bool:
    """Returns whether to read such a file. If not, it is done with, or appended as a problem."""
    if file.content in state.settled_files:
        return False
    if file.path in state.consumed_files:
        kind: SetAsideKind = "rewritten"
        is_read = config.rewritten_files == "reprocess" or file.path in state.unreadable_files
    else:
        if file.size_bytes == 0:
            return False
        kind = "late"
        is_read = config.late_files == "reprocess" or is_served(file.path)
    if not is_read:
        problems.append((kind, file))
    return is_read


def _vanished(
    found: Sequence[PartitionRef], state: State, *, view: PartitionRange, since: str
) -> list[FileRef]:
    consumed = state.consumed_files
    known = sum(file.path in consumed for partition in found for file in partition.files)
    if known == len(consumed):
        return []
    there = {file.path for partition in found for file in partition.files}
    gone = [
        file
        for path, file in consumed.items()
        if path not in there and path_day(path) >= since and view.has(path_day(path))
    ]
    # Of an unreadable file nothing was trained, so nothing is lost with it.
    lost = [
        file
        for file in gone
        if file.path not in state.unreadable_files and file.content not in state.settled_files
    ]
    return sorted(lost, key=lambda file: file.path)


def settle_changes(changes: Changes, state: State, config: PartitionConfig) -> tuple[SetAside, ...]:
    """Returns what the plan leaves out for good.

    Raises:
      PartitionChangedError: The config says `fail` of a kind that was found.
    """
    for kind in _REMEDIES:
        if _outcome(kind, config) == "fail" and (files := changes.of(kind)):
            raise PartitionChangedError(_refusal(kind, [file.path for file in files], state))
    return tuple(
        set_aside(kind, file, state)
        for kind, file in changes.problems
        if _outcome(kind, config) == "quarantine"
    )


def settle_without_rows(
    partitions: Iterable[PartitionRef],
    without_rows: Collection[str],
    state: State,
    config: PartitionConfig,
) -> tuple[tuple[PartitionRef, ...], tuple[SetAside, ...]]:
    """Decides about planned partitions whose files hold no rows.

    Args:
      partitions: Those that are planned.
      without_rows: Keys of those whose files have no rows at all.

    Returns:
      The partitions that the update takes, and what it sets aside besides.

    Raises:
      PartitionChangedError: The config says `fail` of empty partitions.
      EmptyPlanError: None of them holds rows.
    """
    planned = tuple(partitions)
    empty = [partition.key for partition in planned if partition.key in without_rows]
    if not empty:
        return planned, ()
    if config.empty_partitions == "fail":
        raise PartitionChangedError(_refusal("empty", empty, state))
    kept = tuple(partition for partition in planned if partition.key not in without_rows)
    if not kept:
        raise EmptyPlanError(
            f"{empty[0]}{_more(empty)} holds no rows, and nothing else is new; the next update "
            "looks at it again"
        )
    if config.empty_partitions == "quarantine":
        folders = (FileRef(path=key, size_bytes=0, etag="") for key in empty)
        return planned, tuple(set_aside("empty", folder, state) for folder in folders)
    return kept, ()


def set_aside(kind: SetAsideKind, file: FileRef, state: State) -> SetAside:
    """Returns the record of what is left out."""
    return SetAside(
        path=file.path,
        size_bytes=file.size_bytes,
        etag=file.etag,
        kind=kind,
        reason=_what_happened(kind, file.path, state),
    )


def is_served(path: str) -> bool:
    """Returns whether a replica wrote the file."""
    return path.rpartition("/")[2].startswith(SERVED_FILES)


def _outcome(kind: SetAsideKind, config: PartitionConfig) -> ChangeOutcome:
    return {
        "late": config.late_files,
        "rewritten": config.rewritten_files,
        "vanished": config.vanished_files,
        "empty": config.empty_partitions,
    }[kind]


def _refusal(kind: SetAsideKind, paths: Sequence[str], state: State) -> str:
    what = _what_happened(kind, paths[0], state)
    return f"{paths[0]}{_more(paths)} {what}; {_REMEDIES[kind]}"


def _what_happened(kind: SetAsideKind, path: str, state: State) -> str:
    key = path.rpartition("/")[0]
    update_id = state.consumed_partitions.get(key, "an earlier one")
    return {
        "late": f"came after update {update_id} consumed {key}",
        "rewritten": f"was written anew after update {update_id} consumed it",
        "vanished": f"is gone after update {update_id} consumed it",
        "empty": "holds no data",
    }[kind]


def _more(paths: Sequence[str]) -> str:
    return f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
