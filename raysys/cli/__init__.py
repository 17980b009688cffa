"""The command line: looks at a shop's ledger, and lets an operator steer its rollout.

    raysys plan | status | budget | versions | doctor --config shop.yaml [--json]
    raysys ledger [list] | show N | verify --config shop.yaml [--json]
    raysys rollout status | start VERSION | pause | resume | promote | abort --config shop.yaml

Nothing here needs a Ray cluster: the ledger below the root says it all, and a rollout is steered by
appending to it. `--json` prints one object. An error is one line, `raysys: MESSAGE`, and exit code
1 if it will fail again or 75 if a retry may help. One file a command or group, named as it is:

options.py  what `--config`, `--json` and `--reason` are
show.py     what several commands print
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from raysys.cli import budget, doctor, ledger, plan, rollout, status, versions
from raysys.errors import RaysysError


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
app.command()(plan.plan)
app.command()(status.status)
app.command()(budget.budget)
app.command()(versions.versions)
app.command()(doctor.doctor)

ledger_app = typer.Typer(
    cls=ledger.ListsByDefault,
    help="List and explain the records, show one, or verify all.",
)
ledger_app.command("list")(ledger.list_records)
ledger_app.command()(ledger.show)
ledger_app.command()(ledger.verify)
app.add_typer(ledger_app, name="ledger")

rollout_app = typer.Typer(
    help="Put a version on trial with a share of the users, promote it or take it back.",
    no_args_is_help=True,
)
rollout_app.command()(rollout.status)
rollout_app.command()(rollout.start)
rollout_app.command()(rollout.pause)
rollout_app.command()(rollout.resume)
rollout_app.command()(rollout.promote)
rollout_app.command()(rollout.abort)
app.add_typer(rollout_app, name="rollout")


def main() -> None:
    """Runs the command line and exits."""
    app()
