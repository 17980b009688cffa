"""`raysys plan`: what the next update would read."""

from __future__ import annotations

import time
from typing import Any

from raysys.cli.options import ConfigOption, JsonOption, open_shop
from raysys.cli.show import active_json, active_lines, print_result, table
from raysys.ledger.records import PartitionRef
from raysys.partitions.discover import discover
from raysys.partitions.plan import plan_update
from raysys.storage import Root


def plan(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Show what the next update would read. Changes nothing."""
    shop, log = open_shop(config)
    state = log.refresh()
    planned = plan_update(discover(Root(shop.root)), state, shop.partitions, time.time())
    partitions = [_partition_json(partition) for partition in planned.partitions]
    body = {
        "root": shop.root,
        "partitions": partitions,
        "num_files": len(planned.files),
        "size_bytes": sum(file.size_bytes for file in planned.files),
        "num_item_files": len(planned.item_files),
        "base_version": planned.base_version,
        "base_state": planned.base_state,
        "watermark": planned.watermark,
        "num_open": planned.num_open,
        "active": active_json(state),
    }
    rows = [[p["key"], p["num_files"], f"{p['size_bytes']:,}"] for p in partitions]
    print_result(
        body,
        as_json,
        [
            *table(["partition", "files", "bytes"], rows),
            f"{len(rows)} partitions and {len(planned.item_files)} item files are new, "
            f"{planned.num_open} partitions still open; starts from "
            f"{planned.base_version or 'a head set by hand'}",
            *active_lines(state),
        ],
    )


def _partition_json(partition: PartitionRef) -> dict[str, Any]:
    size_bytes = sum(file.size_bytes for file in partition.files)
    return {"key": partition.key, "num_files": len(partition.files), "size_bytes": size_bytes}
