"""What the commands share: their options, and the shop that `--config` names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raysys.config import Config, load_config
from raysys.ledger.log import Log
from raysys.storage import Root

ConfigOption = Annotated[Path, typer.Option("--config", help="The shop's YAML file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TuneOption = Annotated[
    bool, typer.Option("--tune", help="Of an update by selection, as jobs/tune.py runs it.")
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Recorded in the ledger.")]


def open_shop(config: Path) -> tuple[Config, Log]:
    """Returns the config of a file and the ledger of its root.

    Raises:
      ConfigError: The file cannot be used; the message names the key.
    """
    shop = load_config(config)
    return shop, Log(Root(shop.root))
