"""`raysys budget`: the privacy spent by each update and what is left."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raysys.cli.options import ConfigOption, JsonOption, open_shop
from raysys.cli.show import is_private, print_result, privacy_lines, table
from raysys.ledger.state import State
from raysys.storage import Root

if TYPE_CHECKING:
    from raysys.privacy.budget import BudgetReport, UpdateSpend

_HEADER = [
    "update", "status", "users", "steps", "noise", "releases", "selection", "epsilon alone",
    "epsilon so far",
]  # fmt: skip

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
    statement = report.statement
    print_result(
        {**dataclasses.asdict(report), "private": private, "statement": statement},
        as_json,
        [
            *table(_HEADER, [_row(spend, state) for spend in report.updates]),
            f"epsilon {report.epsilon_spent:.3f} of {report.epsilon_total:g} spent, "
            f"{report.epsilon_left:.3f} left{_more_updates(report)}",
            statement,
            *privacy_lines(state, shop),
        ],
    )


def _row(spend: UpdateSpend, state: State) -> list[str]:
    status, steps = spend.status, f"{spend.num_steps}"
    if spend.selection and not spend.num_steps:
        steps = "of trials"
    elif status == "reserved":
        steps += f" reserved, {state.permitted_steps} may have run"
    elif status == "abandoned":
        steps += " may have run"
    counts = f"{spend.num_count_releases}"
    if spend.num_evaluations:
        counts += f" + {spend.num_evaluations} evaluations"
    return [
        spend.update_id,
        status,
        spend.group or "all",
        steps,
        f"{spend.noise_multiplier:g}",
        counts,
        spend.selection or "",
        f"{spend.epsilon_alone:.3f}",
        f"{spend.epsilon_cumulative:.3f}",
    ]


def _explain(config: Path, *, as_json: bool) -> None:
    from raysys.privacy.statement import build_statement

    shop, log = open_shop(config)
    statement = build_statement(log.refresh(), shop, Root(shop.root))
    body = {**dataclasses.asdict(statement), "summary": statement.summary}
    print_result(body, as_json, statement.lines())


def _more_updates(report: BudgetReport) -> str:
    from raysys.privacy.calibrate import at_least

    if report.updates_left is None:
        return ""
    return f": {at_least(report.updates_left)} more updates like {report.updates_like}"
