"""Tells somebody what the ledger says, again and again: the metrics of the controller's process.

Log -> watch() -> Report (serve.metrics.ControllerMetrics)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from raysys.config import Config
from raysys.errors import RaysysError
from raysys.ledger.log import Log
from raysys.ledger.state import State
from raysys.storage import Root

INTERVAL_S = 5.0

Report = Callable[[State], None]
"""Takes the newest state. Blocking."""
BuildReport = Callable[[Config, Root], Report]

_logger = logging.getLogger(__name__)


async def watch(
    log: Log, report: Report, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Reports the ledger's state every `INTERVAL_S` until it is cancelled."""
    while True:
        try:
            await asyncio.to_thread(lambda: report(log.refresh()))
        except RaysysError as error:
            _logger.warning("metrics keep their last values: %s", error)
        except Exception:
            _logger.exception("metrics keep their last values after a bug")
        await sleep(INTERVAL_S)
