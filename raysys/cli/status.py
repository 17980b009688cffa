"""`raysys status`: where updates and rollout stand."""

from __future__ import annotations

from raysys.cli.options import ConfigOption, JsonOption, open_shop
from raysys.cli.show import (
    active_json,
    active_lines,
    is_private,
    print_result,
    privacy_lines,
    rollout_json,
    rollout_lines,
)


def status(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Show where updates and rollout stand."""
    shop, log = open_shop(config)
    state = log.refresh()
    body = {
        "root": shop.root,
        "num_records": state.sequence,
        "num_committed": len(state.committed),
        "num_abandoned": len(state.abandoned),
        "num_versions": len(state.versions),
        "num_partitions": len(state.consumed_partitions),
        "watermark": state.watermark,
        "head_version": state.head_version,
        "active": active_json(state),
        "private": is_private(state, shop),
        "rollout": rollout_json(state, shop),
    }
    print_result(
        body,
        as_json,
        [
            f"root       {shop.root}",
            f"updates    {len(state.committed)} committed, {len(state.abandoned)} abandoned, "
            f"{len(state.consumed_partitions)} partitions up to {state.watermark or 'none'}",
            f"versions   {len(state.versions)}, newest {state.head_version or 'none'}",
            *rollout_lines(state, shop),
            *active_lines(state),
            *privacy_lines(state, shop),
        ],
    )
