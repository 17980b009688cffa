"""`raysys rollout`: looks at the rollout, and steers it by appending to the ledger."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Annotated

import typer

from raysys.cli.options import ConfigOption, JsonOption, ReasonOption, open_shop
from raysys.cli.show import print_result, rollout_json, rollout_lines
from raysys.ledger.log import Log
from raysys.ledger.records import RolloutChanged
from raysys.ledger.state import State
from raysys.rollout import state as rollout

_OPERATOR = "operator"


def status(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Show stable, canary and the last transition."""
    _, log = open_shop(config)
    _show_rollout(log.refresh(), as_json)


def start(
    version: Annotated[str, typer.Argument(help="A committed version.")],
    config: ConfigOption,
    weight: Annotated[
        float | None,
        typer.Option(help="Share of users in (0, 1); the config's weight_fraction by default."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put VERSION on trial beside stable."""
    shop, log = open_shop(config)
    share = shop.rollout.weight_fraction if weight is None else weight
    _change(
        log,
        lambda state: rollout.start(state, version, weight_fraction=share, actor=_OPERATOR),
        as_json,
    )


def promote(
    config: ConfigOption,
    reason: ReasonOption = "promoted by the operator",
    as_json: JsonOption = False,
) -> None:
    """Make the canary stable."""
    _, log = open_shop(config)
    _change(log, lambda state: rollout.promote(state, actor=_OPERATOR, reason=reason), as_json)


def abort(
    config: ConfigOption,
    reason: ReasonOption = "aborted by the operator",
    as_json: JsonOption = False,
) -> None:
    """Take the canary off trial; stable answers everyone again."""
    _, log = open_shop(config)
    _change(log, lambda state: rollout.abort(state, actor=_OPERATOR, reason=reason), as_json)


def _change(log: Log, decide: Callable[[State], RolloutChanged], as_json: bool) -> None:
    log.transact(decide)
    _show_rollout(log.refresh(), as_json)


def _show_rollout(state: State, as_json: bool) -> None:
    at = state.rollout_changed_at
    when = None if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC)
    body = {**rollout_json(state), "at": when and when.isoformat(timespec="seconds")}
    since = [f"since      {body['at']}"] if when else []
    print_result(body, as_json, [*rollout_lines(state), *since])
