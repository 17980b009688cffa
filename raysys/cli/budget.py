"""`raysys budget`: the privacy spent by each update and what is left."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from raysys.cli.options import ConfigOption, JsonOption, open_shop
from raysys.cli.show import is_private, print_result, privacy_lines, table

ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Say what the guarantee covers, and what it does not.")
]


def budget(
    config: ConfigOption, as_json: JsonOption = False, explain: ExplainOption = False
) -> None:
    """Show the privacy spent by each update and what is left."""
    if explain:
        return _explain(config, as_json=as_json)
    from raysys.privacy.budget import report_budget

    shop, log = open_shop(config)
    state = log.refresh()
    report = report_budget(state, shop.privacy)
    private = is_private(state, shop)
    statement = (
        f"unit: a {report.unit}; neighbours: {report.relation}; delta {report.delta:g}; "
        f"accountant: {report.accountant}"
    )
    rows = [
        [u.update_id, u.status, f"{u.epsilon_alone:.3f}", f"{u.epsilon_cumulative:.3f}"]
        for u in report.updates
    ]
    print_result(
        {**dataclasses.asdict(report), "private": private, "statement": statement},
        as_json,
        [
            *table(["update", "status", "epsilon alone", "epsilon so far"], rows),
            f"epsilon {report.epsilon_spent:.3f} of {report.epsilon_total:g} spent, "
            f"{report.epsilon_left:.3f} left{_more_updates(report.updates_left)}",
            statement,
            *privacy_lines(state, shop),
        ],
    )


def _explain(config: Path, *, as_json: bool) -> None:
    from raysys.privacy.statement import build_statement

    shop, log = open_shop(config)
    statement = build_statement(log.refresh(), shop)
    body = {**dataclasses.asdict(statement), "summary": statement.summary}
    print_result(body, as_json, statement.lines())


def _more_updates(updates_left: int | None) -> str:
    return "" if updates_left is None else f": {updates_left} more updates like the last"
