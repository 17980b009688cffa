"""Deletes what killed updates left below the root.

discover.work_folders, Log -> plan.orphan_folders -> Root.delete_prefix
"""

from __future__ import annotations

from raysys.ledger.log import Log
from raysys.partitions.discover import work_folders
from raysys.partitions.plan import orphan_folders
from raysys.storage import Root


def delete_orphans(root: Root, log: Log) -> None:
    """Deletes every folder that no active or committed update needs.

    The folders are listed before the ledger is read: whoever made one of them has started by then,
    so a folder without an active or committed update has no living owner.
    """
    folders = work_folders(root)
    for folder in orphan_folders(log.refresh(), folders):
        root.delete_prefix(folder)
