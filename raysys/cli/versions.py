"""`raysys versions`: all committed updates, with what became of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raysys.cli.options import ConfigOption, JsonOption, open_shop
from raysys.cli.show import print_result, privacy_lines, table
from raysys.ledger.records import UpdateCommitted
from raysys.ledger.state import State
from raysys.partitions.layout import label_order, partition_label


def versions(config: ConfigOption, as_json: JsonOption = False) -> None:
    """List all committed updates, with their versions or why they were held back."""
    shop, log = open_shop(config)
    state = log.refresh()
    listed = [_version_json(update, state) for update in state.committed]
    header = ["version", "role", "update", "partitions", "rows", "users", "ndcg@10", "before"]
    rows = [_version_row(v) for v in listed]
    held = [f"{v['update_id']} held: {v['reason']}" for v in listed if v["version"] is None]
    print_result(
        {"root": shop.root, "versions": listed},
        as_json,
        [*table(header, rows), *held, *privacy_lines(state, shop)],
    )


def _version_json(update: UpdateCommitted, state: State) -> dict[str, Any]:
    roles = {state.stable: "stable", state.canary: "canary", state.previous: "previous"}
    return {
        "version": update.version,
        "role": roles.get(update.version) if update.version else None,
        "update_id": update.update_id,
        "base_version": update.base_version,
        "verdict": update.verdict,
        "reason": update.reason,
        "partitions": [partition.key for partition in update.partitions],
        "num_rows": update.num_rows,
        "num_users": update.num_users,
        "ndcg10_before": _mean(update.metrics, "before"),
        "ndcg10_after": _mean(update.metrics, "after"),
        "private": update.private,
        "seconds": update.seconds,
    }


def _version_row(listed: Mapping[str, Any]) -> list[str]:
    return [
        listed["version"] or "held",
        listed["role"] or "",
        listed["update_id"],
        _span(listed["partitions"]),
        f"{listed['num_rows']:,}",
        f"{listed['num_users']:,}",
        _number(listed["ndcg10_after"]),
        _number(listed["ndcg10_before"]),
    ]


def _mean(metrics: Mapping[str, Any], arm: str) -> float | None:
    value: float | None = metrics.get(arm, {}).get("ndcg10", {}).get("mean")
    return value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _span(keys: Sequence[str]) -> str:
    labels = sorted(map(partition_label, keys), key=label_order)
    return f"{labels[0]}..{labels[-1]} ({len(labels)})" if labels else "none"
