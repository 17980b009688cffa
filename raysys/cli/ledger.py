"""`raysys ledger`: lists and explains the records, shows one, verifies all."""

from __future__ import annotations

import dataclasses
import datetime
import json
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from raysys.cli.options import ConfigOption, JsonOption, open_shop
from raysys.cli.show import print_result, table
from raysys.errors import LedgerCorruptError, UnknownRecordError
from raysys.ledger.explain import explain
from raysys.ledger.log import Log
from raysys.ledger.reader import record_path
from raysys.ledger.records import RECORD_TYPES, Entry, LeaseRenewed, decode
from raysys.ledger.verify import verify as verify_ledger
from raysys.storage import Root


class ListsByDefault(TyperGroup):
    """`raysys ledger --config FILE` is `raysys ledger list --config FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the command in where only options were given."""
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


def list_records(
    config: ConfigOption,
    last: Annotated[int | None, typer.Option(min=1, help="Only the newest so many.")] = None,
    update: Annotated[str | None, typer.Option(help="Only those of this update.")] = None,
    type_: Annotated[
        str | None, typer.Option("--type", help=f"Only one of {', '.join(RECORD_TYPES)}.")
    ] = None,
    heartbeats: Annotated[
        bool, typer.Option(help="Also the LeaseRenewed records, of which each update has many.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the records, each with a sentence that explains it."""
    if type_ is not None and type_ not in RECORD_TYPES:
        raise typer.BadParameter(f"expected one of {', '.join(RECORD_TYPES)}", param_hint="--type")
    shop, log = open_shop(config)
    found, damage = _matching(log, last, update, type_, heartbeats=heartbeats)
    if damage is None or not as_json:
        records = [_record_json(entry) for entry in found]
        header = ["record", "time", "type", "meaning"]
        rows = [[r["sequence"], r["at"], r["type"], r["meaning"]] for r in records]
        print_result({"root": shop.root, "records": records}, as_json, table(header, rows))
    if damage is not None:
        raise damage


def show(
    sequence: Annotated[int, typer.Argument(help="The record's number.", min=1)],
    config: ConfigOption,
    as_json: JsonOption = False,
) -> None:
    """Print record SEQUENCE whole, also where it was changed."""
    shop, log = open_shop(config)
    try:
        data = Root(shop.root).read_bytes(record_path(sequence))
    except FileNotFoundError as error:
        raise UnknownRecordError(
            f"there is no ledger record {sequence} below {shop.root}; the newest is "
            f"{log.refresh().sequence}"
        ) from error
    try:
        body = json.loads(data)
    except ValueError:
        body = None
    if isinstance(body, dict):
        print_result(body, as_json, json.dumps(body, indent=2).splitlines())
    elif not as_json:
        typer.echo(data.decode(errors="backslashreplace"))
    decode(data, sequence=sequence)


def verify(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Read every record and check hashes, order, rules and snapshots."""
    shop, _ = open_shop(config)
    verified = verify_ledger(Root(shop.root))
    print_result(
        {"root": shop.root, "ok": True, **dataclasses.asdict(verified)},
        as_json,
        [
            f"{verified.num_records} records are as they were written, and "
            f"{len(verified.snapshots)} snapshots say the same",
            *([f"last hash  {verified.last_hash}"] if verified.num_records else []),
            *(f"ignored    {snapshot}" for snapshot in verified.ignored),
        ],
    )


def _matching(
    log: Log, last: int | None, update: str | None, type_: str | None, *, heartbeats: bool
) -> tuple[list[Entry], LedgerCorruptError | None]:
    """Returns the entries asked for, and what ended the reading early."""
    beat = LeaseRenewed.__name__
    hidden = None if heartbeats or type_ == beat else beat
    is_filtered = update is not None or type_ is not None or hidden is not None
    after = 0 if last is None or is_filtered else max(0, log.refresh().sequence - last)
    found: list[Entry] = []
    try:
        for entry in log.entries(after):
            name = type(entry.record).__name__
            is_type = type_ in (None, name) and name != hidden
            if is_type and update in (None, _update_id(entry)):
                found.append(entry)
    except LedgerCorruptError as error:
        return found, error
    return found[-last:] if last else found, None


def _update_id(entry: Entry) -> str | None:
    return getattr(entry.record, "update_id", None)


def _record_json(entry: Entry) -> dict[str, Any]:
    at = datetime.datetime.fromtimestamp(entry.at, datetime.UTC)
    return {
        "sequence": entry.sequence,
        "at": at.isoformat(timespec="seconds"),
        "type": type(entry.record).__name__,
        "update_id": _update_id(entry),
        "meaning": explain(entry.record),
    }
