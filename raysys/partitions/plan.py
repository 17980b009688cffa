"""Decides what the next update reads: found x consumed -> UpdatePlan.

    discover.Discovered, ledger.State -> plan_update() -> UpdatePlan -> ledger.UpdateStarted

Pure: the same inputs give the same plan, so an update that was killed is planned again exactly. A
content (path, size and etag) is planned only while no committed update consumed it, and a commit of
its plan is the one thing that makes it consumed. That is exactly-once.

changes.py says what becomes of files that are late, rewritten or vanished, and of empty partitions.
"""

from __future__ import annotations

import bisect
import dataclasses
import datetime
from collections.abc import Collection, Iterable, Sequence

from raysys.config import PartitionConfig
from raysys.errors import EmptyPlanError
from raysys.ledger.records import FileRef, PartitionRef, SetAside
from raysys.ledger.state import State
from raysys.partitions.changes import compare, settle_changes, settle_without_rows
from raysys.partitions.discover import EVERYTHING, Discovered, PartitionRange
from raysys.partitions.layout import (
    EVENTS,
    EXPECTED,
    QUARANTINE,
    STAGING,
    STATE,
    VERSIONS,
    label_date,
    label_order,
    partition_label,
    partition_span,
    path_day,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UpdatePlan:
    """What one update reads, and what it starts from."""

    partitions: tuple[PartitionRef, ...]
    """By the end of their time, each with those of its files that are read. Never empty."""
    item_files: tuple[FileRef, ...]
    """New ones, and those written anew: upserts may be read again."""
    set_aside: tuple[SetAside, ...] = ()
    """What is left out for good."""
    base_version: str | None
    base_state: str | None
    """The update whose `state/` this one starts from."""
    watermark: str
    """The newest partition consumed after this update, YYYY-MM-DD or YYYY-MM-DDTHH."""
    num_open: int
    """Partitions left out because their time had not ended for `closed_after_s`."""
    num_left: int = 0
    """New partitions left for later updates by `max_partitions`."""

    @property
    def files(self) -> tuple[FileRef, ...]:
        """All event files, by partition."""
        return tuple(file for partition in self.partitions for file in partition.files)

    @property
    def size_bytes(self) -> int:
        """Of all event files."""
        return sum(file.size_bytes for file in self.files)


def range_to_list(
    state: State, config: PartitionConfig, within: PartitionRange = EVERYTHING
) -> PartitionRange:
    """Returns the days that have to be listed for a plan: all, or those since the horizon."""
    if within.first is not None:
        return within
    return dataclasses.replace(within, first=_horizon(state, config))


def plan_update(
    found: Discovered,
    state: State,
    config: PartitionConfig,
    now: float,
    within: PartitionRange = EVERYTHING,
) -> UpdatePlan:
    """Plans the oldest unconsumed partitions whose time is over.

    Args:
      found: All that lies in `range_to_list`; what lies outside is not looked at.
      now: UNIX seconds.
      within: Restricts what is read, set aside and compared.

    Raises:
      PartitionChangedError: A partition is late, rewritten, vanished or empty, and the config says
        `fail` of that.
      EmptyPlanError: There is nothing to read.
    """
    view = range_to_list(state, config, within)
    seen = _in_range(found.partitions, view)
    closed = _closed(seen, config, now)
    since = _horizon(state, config)
    changes = compare(
        seen, closed, state, config, view=view, since=since.isoformat() if since else ""
    )
    set_aside = settle_changes(changes, state, config)
    limit = within.max_partitions or config.max_partitions or len(changes.to_read)
    partitions = tuple(changes.to_read[:limit])
    num_open = len(seen) - len(closed)
    if not partitions:
        raise EmptyPlanError(_explain_empty(found, seen, state, num_open, len(set_aside)))
    if limit < len(changes.to_read):
        # The watermark must not pass what is left for a later update.
        set_aside = _without_empty_after(partitions[-1].key, set_aside)
    return UpdatePlan(
        partitions=partitions,
        item_files=tuple(
            file for file in found.item_files if state.consumed_item_files.get(file.path) != file
        ),
        set_aside=set_aside,
        base_version=state.head_version,
        base_state=state.head_state,
        watermark=watermark_after(partitions, set_aside, state.watermark),
        num_open=num_open,
        num_left=len(changes.to_read) - len(partitions),
    )


def watermark_after(
    partitions: Iterable[PartitionRef], set_aside: Iterable[SetAside], before: str | None
) -> str:
    """Returns the label of the newest partition that is consumed after an update.

    Args:
      before: The watermark before it.
    """
    empty = (aside.path for aside in set_aside if aside.kind == "empty")
    labels = [partition_label(key) for key in (*(p.key for p in partitions), *empty)]
    return max([*labels, *([before] if before else [])], key=label_order)


def _horizon(state: State, config: PartitionConfig) -> datetime.date | None:
    """Returns the first day that is still listed and compared; None for all."""
    if not config.check_back_days or state.watermark is None:
        return None
    newest = label_date(state.watermark).toordinal()
    return datetime.date.fromordinal(max(newest - config.check_back_days, 1))


def _in_range(partitions: Sequence[PartitionRef], view: PartitionRange) -> Sequence[PartitionRef]:
    if view.first is None and view.last is None:
        return partitions
    return [partition for partition in partitions if view.has(path_day(partition.key))]


def _closed(
    partitions: Sequence[PartitionRef], config: PartitionConfig, now: float
) -> Sequence[PartitionRef]:
    end = bisect.bisect_right(
        partitions, now - config.closed_after_s, key=lambda p: partition_span(p.key)[1]
    )
    return partitions[:end]


def _without_empty_after(key: str, set_aside: tuple[SetAside, ...]) -> tuple[SetAside, ...]:
    last = label_order(partition_label(key))
    return tuple(
        aside
        for aside in set_aside
        if aside.kind != "empty" or label_order(partition_label(aside.path)) <= last
    )


def without_empty(
    plan: UpdatePlan, empty: Collection[str], state: State, config: PartitionConfig
) -> UpdatePlan:
    """Returns the plan once it is known which of its partitions hold no rows.

    Raises:
      PartitionChangedError: The config says `fail` of empty partitions.
      EmptyPlanError: None of them holds rows.
    """
    kept, aside = settle_without_rows(plan.partitions, empty, state, config)
    set_aside = (*plan.set_aside, *aside)
    watermark = watermark_after(kept, set_aside, state.watermark)
    return dataclasses.replace(plan, partitions=kept, set_aside=set_aside, watermark=watermark)


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


def _explain_empty(
    found: Discovered, seen: Sequence[PartitionRef], state: State, num_open: int, num_aside: int
) -> str:
    if not seen and not state.consumed_partitions:
        return f"nothing below {found.root_uri}/{EVENTS}; write parquet files to {EXPECTED}"
    consumed = f"all consumed up to {state.watermark}" if state.watermark else "none consumed"
    aside = f"; {num_aside} to set aside, with the next update that reads something"
    return (
        f"nothing new below {found.root_uri}: {len(seen)} partitions known, {consumed}; "
        f"{num_open} still open{aside if num_aside else ''}"
    )
