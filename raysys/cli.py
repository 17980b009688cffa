"""The command line: looks at a shop's ledger, and lets an operator steer its rollout.

    raysys plan | status | budget | versions | doctor --config shop.yaml [--json]
    raysys rollout status | start VERSION | promote | abort --config shop.yaml [--json]

Nothing here needs a Ray cluster: the ledger below the root says it all, and a rollout is steered by
appending to it. `--json` prints one object. An error is one line, `raysys: MESSAGE`, and exit code
1 if it will fail again or 75 if a retry may help.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from raysys.config import Config, load_config
from raysys.doctor import run_checks
from raysys.errors import RaysysError
from raysys.evaluate.report import NOT_PRIVATE
from raysys.ledger.log import Log
from raysys.ledger.records import PartitionRef, RolloutChanged, UpdateCommitted
from raysys.ledger.state import State, fold
from raysys.partitions.discover import discover
from raysys.partitions.plan import plan_update
from raysys.rollout import state as rollout
from raysys.storage import Root

_OPERATOR = "operator"


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RaysysError as error:
            typer.echo(f"raysys: {error}", err=True)
            raise typer.Exit(error.exit_code) from error


app = typer.Typer(
    cls=_Commands,
    help="Keeps a shop's ranker fresh, privately and safely, on one Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
rollout_app = typer.Typer(
    help="Put a version on trial with a share of the users, promote it or take it back.",
    no_args_is_help=True,
)
app.add_typer(rollout_app, name="rollout")

ConfigOption = Annotated[Path, typer.Option("--config", help="The shop's YAML file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Recorded in the ledger.")]


def main() -> None:
    """Runs the command line and exits."""
    app()


@app.command()
def plan(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Show what the next update would read. Changes nothing."""
    shop, log = _open(config)
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
        "active": _active_json(state),
    }
    rows = [[p["key"], p["num_files"], f"{p['size_bytes']:,}"] for p in partitions]
    _print(
        body,
        as_json,
        [
            *_table(["partition", "files", "bytes"], rows),
            f"{len(rows)} partitions and {len(planned.item_files)} item files are new, "
            f"{planned.num_open} partitions still open; starts from "
            f"{planned.base_version or 'a head set by hand'}",
            *_active_lines(state),
        ],
    )


@app.command()
def status(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Show where updates and rollout stand."""
    shop, log = _open(config)
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
        "active": _active_json(state),
        "private": _is_private(state, shop),
        "rollout": _rollout_json(state),
    }
    _print(
        body,
        as_json,
        [
            f"root       {shop.root}",
            f"updates    {len(state.committed)} committed, {len(state.abandoned)} abandoned, "
            f"{len(state.consumed_partitions)} partitions up to {state.watermark or 'none'}",
            f"versions   {len(state.versions)}, newest {state.head_version or 'none'}",
            *_rollout_lines(state),
            *_active_lines(state),
            *_privacy_lines(state, shop),
        ],
    )


@app.command()
def budget(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Show the privacy spent by each update and what is left."""
    from raysys.privacy.budget import report_budget

    shop, log = _open(config)
    state = log.refresh()
    report = report_budget(state, shop.privacy)
    private = _is_private(state, shop)
    statement = (
        f"unit: a {report.unit}; neighbours: {report.relation}; delta {report.delta:g}; "
        f"accountant: {report.accountant}"
    )
    rows = [
        [u.update_id, u.status, f"{u.epsilon_alone:.3f}", f"{u.epsilon_cumulative:.3f}"]
        for u in report.updates
    ]
    _print(
        {**dataclasses.asdict(report), "private": private, "statement": statement},
        as_json,
        [
            *_table(["update", "status", "epsilon alone", "epsilon so far"], rows),
            f"epsilon {report.epsilon_spent:.3f} of {report.epsilon_total:g} spent, "
            f"{report.epsilon_left:.3f} left{_more_updates(report.updates_left)}",
            statement,
            *_privacy_lines(state, shop),
        ],
    )


def _more_updates(updates_left: int | None) -> str:
    return "" if updates_left is None else f": {updates_left} more updates like the last"


@app.command()
def versions(config: ConfigOption, as_json: JsonOption = False) -> None:
    """List all committed updates, with their versions or why they were held back."""
    shop, log = _open(config)
    state = log.refresh()
    listed = [_version_json(update, state) for update in state.committed]
    header = ["version", "role", "update", "partitions", "rows", "users", "ndcg@10", "before"]
    rows = [_version_row(v) for v in listed]
    held = [f"{v['update_id']} held: {v['reason']}" for v in listed if v["version"] is None]
    _print(
        {"root": shop.root, "versions": listed},
        as_json,
        [*_table(header, rows), *held, *_privacy_lines(state, shop)],
    )


@app.command()
def doctor(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Check that this machine and the config are fit for updates and serving."""
    checks = run_checks(config)
    lines = [
        f"{'ok  ' if check.ok else 'fail'}  {check.name:<9} {check.detail}" for check in checks
    ]
    ok = all(check.ok for check in checks)
    _print({"ok": ok, "checks": [dataclasses.asdict(check) for check in checks]}, as_json, lines)
    if not ok:
        raise typer.Exit(1)


@rollout_app.command("status")
def rollout_status(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Show stable, canary and the last transition."""
    _, log = _open(config)
    entries = list(log.entries())
    times = [entry.at for entry in entries if isinstance(entry.record, RolloutChanged)]
    _show_rollout(fold(entries), times[-1] if times else None, as_json)


@rollout_app.command("start")
def rollout_start(
    version: Annotated[str, typer.Argument(help="A committed version.")],
    config: ConfigOption,
    weight: Annotated[
        float | None,
        typer.Option(help="Share of users in (0, 1); the config's weight_fraction by default."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put VERSION on trial beside stable."""
    shop, log = _open(config)
    share = shop.rollout.weight_fraction if weight is None else weight
    _change(
        log,
        lambda state: rollout.start(state, version, weight_fraction=share, actor=_OPERATOR),
        as_json,
    )


@rollout_app.command("promote")
def rollout_promote(
    config: ConfigOption,
    reason: ReasonOption = "promoted by the operator",
    as_json: JsonOption = False,
) -> None:
    """Make the canary stable."""
    _, log = _open(config)
    _change(log, lambda state: rollout.promote(state, actor=_OPERATOR, reason=reason), as_json)


@rollout_app.command("abort")
def rollout_abort(
    config: ConfigOption,
    reason: ReasonOption = "aborted by the operator",
    as_json: JsonOption = False,
) -> None:
    """Take the canary off trial; stable answers everyone again."""
    _, log = _open(config)
    _change(log, lambda state: rollout.abort(state, actor=_OPERATOR, reason=reason), as_json)


def _open(config: Path) -> tuple[Config, Log]:
    shop = load_config(config)
    return shop, Log(Root(shop.root))


def _change(log: Log, decide: Callable[[State], RolloutChanged], as_json: bool) -> None:
    entry = log.transact(decide)
    assert entry is not None
    _show_rollout(log.refresh(), entry.at, as_json)


def _show_rollout(state: State, at: float | None, as_json: bool) -> None:
    when = None if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC)
    body = {**_rollout_json(state), "at": when and when.isoformat(timespec="seconds")}
    since = [f"since      {body['at']}"] if when else []
    _print(body, as_json, [*_rollout_lines(state), *since])


def _print(body: Mapping[str, Any], as_json: bool, lines: Sequence[str]) -> None:
    typer.echo(json.dumps(body, allow_nan=False) if as_json else "\n".join(lines))


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def _partition_json(partition: PartitionRef) -> dict[str, Any]:
    size_bytes = sum(file.size_bytes for file in partition.files)
    return {"key": partition.key, "num_files": len(partition.files), "size_bytes": size_bytes}


def _active_json(state: State) -> dict[str, Any] | None:
    if state.active is None:
        return None
    return {
        "update_id": state.active.update_id,
        "owner": state.active.owner,
        "num_partitions": len(state.active.started.partitions),
        "renewed_at": state.active.renewed_at,
        "lease_expires_at": state.active.lease_expires_at,
    }


def _active_lines(state: State) -> list[str]:
    if state.active is None:
        return []
    left_s = state.active.lease_expires_at - time.time()
    lease = f"expires in {left_s:.0f} s" if left_s > 0 else f"expired {-left_s:.0f} s ago"
    return [f"running    {state.active.update_id} by {state.active.owner}, lease {lease}"]


def _rollout_json(state: State) -> dict[str, Any]:
    last = state.rollout
    return {
        "phase": last.phase if last else None,
        "rollout_id": last.rollout_id if last else None,
        "stable": state.stable,
        "canary": state.canary,
        "previous": state.previous,
        "weight_fraction": state.weight_fraction,
        "actor": last.actor if last else None,
        "reason": last.reason if last else None,
        "measurement": last.measurement if last else None,
    }


def _rollout_lines(state: State) -> list[str]:
    lines = [f"stable     {state.stable or 'none'}"]
    if state.canary:
        lines.append(f"canary     {state.canary} with {state.weight_fraction:.2%} of users")
    if state.previous:
        lines.append(f"previous   {state.previous}")
    if state.rollout:
        last = state.rollout
        lines.append(f"rollout    {last.rollout_id} {last.phase} by {last.actor}: {last.reason}")
    return lines


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
    days = sorted(key.rpartition("=")[2] for key in keys)
    return f"{days[0]}..{days[-1]} ({len(days)})" if days else "none"


def _is_private(state: State, shop: Config) -> bool:
    return shop.privacy.enabled and all(update.private for update in state.committed)


def _privacy_lines(state: State, shop: Config) -> list[str]:
    if _is_private(state, shop):
        return []
    public = [update.update_id for update in state.committed if not update.private]
    return [f"{NOT_PRIVATE} Updates: {', '.join(public) or 'none yet'}"]
