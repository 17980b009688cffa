"""Decides what the next update reads: found x consumed -> UpdatePlan.

    discover.Discovered, ledger.State -> plan_update() -> UpdatePlan -> ledger.UpdateStarted

Pure: the same inputs give the same plan, so an update that was killed is planned again exactly. A
file is planned only while no committed update consumed it, and a commit of its plan is the one
thing that makes it consumed. That is exactly-once.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass

from raysys.config import PartitionConfig
from raysys.errors import EmptyPlanError, PartitionChangedError
from raysys.ledger.records import FileRef, PartitionRef
from raysys.ledger.state import State
from raysys.partitions.discover import Discovered
from raysys.partitions.layout import (
    EVENTS,
    QUARANTINE,
    SERVED_FILES,
    STAGING,
    STATE,
    VERSIONS,
    partition_date,
)

_DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdatePlan:
    """What one update reads, and what it starts from."""

    partitions: tuple[PartitionRef, ...]
    """By date, each with those of its files that no update consumed. Never empty."""
    item_files: tuple[FileRef, ...]
    """New ones, and those written anew: upserts may be read again."""
    base_version: str | None
    base_state: str | None
    """The update whose `state/` this one starts from."""
    watermark: str
    """The newest partition date consumed after this update, YYYY-MM-DD."""
    num_open: int
    """Partitions left out because their day had not ended for `closed_after_s`."""

    @property
    def files(self) -> tuple[FileRef, ...]:
        """All event files, by partition."""
        return tuple(file for partition in self.partitions for file in partition.files)


def plan_update(found: Discovered, state: State, config: PartitionConfig, now: float) -> UpdatePlan:
    """Plans the oldest unconsumed partitions whose day is over.

    Files of a consumed partition that are gone are no matter: shops delete old data.

    Args:
      now: UNIX seconds.

    Raises:
      PartitionChangedError: A consumed partition got late files of the shop or rewritten ones, and
        the config says `fail`. What replicas wrote is complete file by file, and never late.
      EmptyPlanError: Nothing is new.
    """
    closed = [p for p in found.partitions if _closes_at(p, config) <= now]
    if config.rewritten_files == "fail":
        _refuse_rewritten(found, state)
    new = [_unconsumed(partition, state) for partition in closed]
    if config.late_files == "fail":
        _refuse_late(new, state)
    partitions = tuple(partition for partition in new if partition.files)
    if config.max_partitions:
        partitions = partitions[: config.max_partitions]
    num_open = len(found.partitions) - len(closed)
    if not partitions:
        raise EmptyPlanError(_explain_empty(found, state, num_open))
    newest = partition_date(partitions[-1].key).isoformat()
    return UpdatePlan(
        partitions=partitions,
        item_files=tuple(
            file for file in found.item_files if state.consumed_item_files.get(file.path) != file
        ),
        base_version=state.head_version,
        base_state=state.head_state,
        watermark=max(newest, state.watermark or newest),
        num_open=num_open,
    )


def orphan_folders(state: State, folders: Iterable[str]) -> tuple[str, ...]:
    """Returns those folders that no active or committed update needs: a killed update left them.

    Args:
      folders: As `discover.work_folders` lists them, for example `staging/u0003-1a2b3c`. Folders
        below other parents are never orphans.
    """
    return tuple(folder for folder in folders if _is_orphan(state, folder))


def _is_orphan(state: State, folder: str) -> bool:
    parent, _, name = folder.strip("/").partition("/")
    active = state.active.update_id if state.active else None
    if parent == VERSIONS:
        # Only the active update's random end is known: it names its version when it commits.
        of_active = active is not None and name.endswith(active[-7:])
        return name not in state.versions and not of_active
    if parent == STAGING:
        return name != active
    return parent in (STATE, QUARANTINE) and name != active and name not in state.kept_updates


def _closes_at(partition: PartitionRef, config: PartitionConfig) -> float:
    day = partition_date(partition.key)
    midnight = datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()
    return midnight + _DAY_S + config.closed_after_s


def _unconsumed(partition: PartitionRef, state: State) -> PartitionRef:
    files = tuple(file for file in partition.files if file.path not in state.consumed_files)
    return PartitionRef(key=partition.key, files=files)


def _refuse_rewritten(found: Discovered, state: State) -> None:
    files = [file for partition in found.partitions for file in partition.files]
    changed = [file for file in files if state.consumed_files.get(file.path, file) != file]
    if changed:
        raise PartitionChangedError(
            f"{changed[0].path}{_more(len(changed))} was consumed and then written anew; put the "
            "old content back, or set partitions.rewritten_files: ignore to keep what was trained "
            "on"
        )


def _refuse_late(new: Iterable[PartitionRef], state: State) -> None:
    late = [
        (p.key, file.path)
        for p in new
        if p.key in state.consumed_partitions
        for file in p.files
        if not file.path.rpartition("/")[2].startswith(SERVED_FILES)
    ]
    if late:
        key, path = late[0]
        raise PartitionChangedError(
            f"{path}{_more(len(late))} came after update "
            f"{state.consumed_partitions[key]} consumed {key}; set "
            "partitions.late_files: consume to train on just the late files, or move them away"
        )


def _more(num_files: int) -> str:
    return f" (and {num_files - 1} more)" if num_files > 1 else ""


def _explain_empty(found: Discovered, state: State, num_open: int) -> str:
    num_known = len(found.partitions)
    if num_known == 0:
        return (
            f"nothing below {found.root_uri}/{EVENTS}; write parquet files to "
            f"{EVENTS}/dt=YYYY-MM-DD/"
        )
    consumed = f"all consumed up to {state.watermark}" if state.watermark else "none consumed"
    return (
        f"nothing new below {found.root_uri}: {num_known} partitions known, {consumed}; "
        f"{num_open} still open"
    )
