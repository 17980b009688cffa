"""`raysys doctor`: whether this machine and the config are fit for updates and serving."""

from __future__ import annotations

import dataclasses

import typer

from raysys.cli.options import ConfigOption, JsonOption
from raysys.cli.show import print_result
from raysys.doctor import run_checks


def doctor(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Check that this machine and the config are fit for updates and serving."""
    checks = run_checks(config)
    lines = [
        f"{'ok  ' if check.ok else 'fail'}  {check.name:<9} {check.detail}" for check in checks
    ]
    ok = all(check.ok for check in checks)
    print_result(
        {"ok": ok, "checks": [dataclasses.asdict(check) for check in checks]}, as_json, lines
    )
    if not ok:
        raise typer.Exit(1)
