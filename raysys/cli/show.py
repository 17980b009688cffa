"""What several commands print, as lines for people and as JSON for scripts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from raysys.config import Config
from raysys.ledger.state import State
from raysys.rollout.progress import progress


def print_result(body: Mapping[str, Any], as_json: bool, lines: Sequence[str]) -> None:
    """Prints the one object, or the lines. An infinite epsilon is null: JSON has no such number."""
    typer.echo(json.dumps(_finite(body), allow_nan=False) if as_json else "\n".join(lines))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Returns the lines of a table whose columns are padded."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def active_json(state: State) -> dict[str, Any] | None:
    """Returns the update that holds the lease."""
    if state.active is None:
        return None
    return {
        "update_id": state.active.update_id,
        "owner": state.active.owner,
        "num_partitions": len(state.active.started.partitions),
        "renewed_at": state.active.renewed_at,
        "lease_expires_at": state.active.lease_expires_at,
    }


def active_lines(state: State) -> list[str]:
    """Returns the same as a line, none if no update is active."""
    if state.active is None:
        return []
    left_s = state.active.lease_expires_at - time.time()
    lease = f"expires in {left_s:.0f} s" if left_s > 0 else f"expired {-left_s:.0f} s ago"
    return [f"running    {state.active.update_id} by {state.active.owner}, lease {lease}"]


def rollout_json(state: State, shop: Config) -> dict[str, Any]:
    """Returns where the rollout stands."""
    last = state.rollout
    at = progress(state, shop.rollout, time.time())
    return {
        "phase": last.phase if last else None,
        "rollout_id": last.rollout_id if last else None,
        "stable": state.stable,
        "canary": state.canary,
        "previous": state.previous,
        "weight_fraction": state.weight_fraction,
        "step": at.step if at else None,
        "num_steps": at.num_steps if at else None,
        "doing": at.doing if at else None,
        "waits_for": at.waits_for if at else None,
        "actor": last.actor if last else None,
        "reason": last.reason if last else None,
        "measurement": last.measurement if last else None,
    }


def rollout_lines(state: State, shop: Config) -> list[str]:
    """Returns the same as lines."""
    lines = [f"stable     {state.stable or 'none'}"]
    if state.canary:
        lines.append(f"canary     {state.canary} with {state.weight_fraction:.2%} of users")
    if state.previous:
        lines.append(f"previous   {state.previous}")
    if state.rollout:
        last = state.rollout
        lines.append(f"rollout    {last.rollout_id} {last.phase} by {last.actor}: {last.reason}")
    if at := progress(state, shop.rollout, time.time()):
        lines.append(f"at         {at.describe()}")
    return lines


def is_private(state: State, shop: Config) -> bool:
    """Returns whether all that was trained and will be is private."""
    return shop.privacy.enabled and not state.not_private


def privacy_lines(state: State, shop: Config) -> list[str]:
    """Returns the warning of a root that is not."""
    if is_private(state, shop):
        return []
    from raysys.privacy.statement import NOT_PRIVATE

    return [f"{NOT_PRIVATE} Updates: {', '.join(state.not_private) or 'none yet'}"]
