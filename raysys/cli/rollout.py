"""`raysys rollout`: looks at the rollout, and steers it by appending to the ledger."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Annotated

import typer

from raysys.cli.options import ConfigOption, JsonOption, ReasonOption, open_shop
from raysys.cli.show import print_result, rollout_json, rollout_lines
from raysys.config import Config
from raysys.ledger.log import Log
from raysys.ledger.records import RolloutChanged
from raysys.ledger.state import State
from raysys.rollout import state as rollout

_OPERATOR = "operator"


def status(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Show stable, canary, the step and what it waits for, and the last transition."""
    shop, log = open_shop(config)
    _show_rollout(log.refresh(), shop, as_json)


def start(
    version: Annotated[str, typer.Argument(help="A committed version.")],
    config: ConfigOption,
    weight: Annotated[
        float | None,
        typer.Option(help="First share of users, in (0, 1); the config's by default."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put VERSION on trial beside stable, by the steps and thresholds of the config."""
    shop, log = open_shop(config)
    _change(
        shop,
        log,
        lambda state: rollout.start(
            state, version, rules=shop.rollout, weight_fraction=weight, actor=_OPERATOR
        ),
        as_json,
    )


def pause(
    config: ConfigOption,
    reason: ReasonOption = "paused by the operator",
    as_json: JsonOption = False,
) -> None:
    """Keep the canary at its share until somebody resumes; a proven fault still rolls it back."""
    shop, log = open_shop(config)
    _change(shop, log, lambda state: rollout.pause(state, actor=_OPERATOR, reason=reason), as_json)


def resume(
    config: ConfigOption,
    reason: ReasonOption = "resumed by the operator",
    as_json: JsonOption = False,
) -> None:
    """Go on after a pause; approve the promotion where that is what is waited for."""
    shop, log = open_shop(config)
    _change(shop, log, lambda state: rollout.resume(state, actor=_OPERATOR, reason=reason), as_json)


def promote(
    config: ConfigOption,
    reason: ReasonOption = "promoted by the operator",
    as_json: JsonOption = False,
) -> None:
    """Make the canary stable."""
    shop, log = open_shop(config)
    _change(
        shop, log, lambda state: rollout.promote(state, actor=_OPERATOR, reason=reason), as_json
    )


def abort(
    config: ConfigOption,
    reason: ReasonOption = "aborted by the operator",
    as_json: JsonOption = False,
) -> None:
    """Take the canary off trial; stable answers everyone again."""
    shop, log = open_shop(config)
    _change(shop, log, lambda state: rollout.abort(state, actor=_OPERATOR, reason=reason), as_json)


def _change(
    shop: Config, log: Log, decide: Callable[[State], RolloutChanged], as_json: bool
) -> None:
    log.transact(decide)
    _show_rollout(log.refresh(), shop, as_json)


def _show_rollout(state: State, shop: Config, as_json: bool) -> None:
    at = state.rollout_changed_at
    when = None if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC)
    body = {**rollout_json(state, shop), "at": when and when.isoformat(timespec="seconds")}
    since = [f"since      {body['at']}"] if when else []
    print_result(body, as_json, [*rollout_lines(state, shop), *since])
