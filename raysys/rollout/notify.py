"""Tells a webhook of each transition of a rollout, after it is in the ledger.

    RolloutChanged in the ledger -> message() -> Notifier.tell() -> POST rollout.webhook_url

Telling never holds up deciding: messages wait in a queue of their own. Each is tried a few times,
then given up with a warning, so a webhook that is down costs nothing but the news.
"""

from __future__ import annotations

import asyncio
import collections
import http.client
import json
import logging
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raysys.ledger.explain import explain
from raysys.ledger.records import RolloutChanged

BACKOFF_S = (1.0, 4.0, 15.0, 60.0)
"""Seconds before each further try."""
MAX_WAITING = 100
"""Messages kept while the webhook is slow; older ones are given up first."""

Message = Mapping[str, Any]
Send = Callable[[str, bytes, float], None]
"""Posts a body to a URL within a time; raises `OSError` or `HTTPException` if that failed."""

_logger = logging.getLogger(__name__)


def message(record: RolloutChanged, *, sequence: int, at: float) -> Message:
    """Returns what is told of a transition.

    Args:
      record: The transition.
      sequence: Its place in the ledger, by which a receiver knows what it was told before.
      at: When it was recorded, UNIX time.
    """
    return {
        "text": explain(record),
        "sequence": sequence,
        "at": at,
        "rollout_id": record.rollout_id,
        "phase": record.phase,
        "stable": record.stable,
        "canary": record.canary,
        "previous": record.previous,
        "weight_fraction": record.weight_fraction,
        "step_index": record.step_index,
        "actor": record.actor,
        "reason": record.reason,
        "measurement": record.measurement,
    }


class Notifier:
    """Posts messages in order. For one event loop; the webhook is spoken to in threads."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        backoff_s: Sequence[float] = BACKOFF_S,
        send: Send | None = None,
    ) -> None:
        self._url = url
        # All that a log may show: the path of such a URL often is a secret.
        self._host = urllib.parse.urlsplit(url).hostname
        self._timeout_s = timeout_s
        self._backoff_s = backoff_s
        self._send = send or post
        self._waiting: collections.deque[Message] = collections.deque()
        self._is_sending = False
        self._has_news = asyncio.Event()

    @property
    def num_untold(self) -> int:
        """Messages that are neither told nor given up."""
        return len(self._waiting) + self._is_sending

    def tell(self, body: Message) -> None:
        """Has a message sent in the background."""
        self._waiting.append(body)
        if len(self._waiting) > MAX_WAITING:
            _logger.warning("webhook %s is too slow: a message was dropped", self._host)
            self._waiting.popleft()
        self._has_news.set()

    async def run(self) -> None:
        """Sends what there is to tell, until it is cancelled."""
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            while self._waiting:
                body, self._is_sending = self._waiting.popleft(), True
                await self._try(body)
                self._is_sending = False

    async def _try(self, body: Message) -> None:
        data = json.dumps(body, allow_nan=False).encode()
        for wait_s in (*self._backoff_s, None):
            try:
                await asyncio.to_thread(self._send, self._url, data, self._timeout_s)
                return
            except (OSError, http.client.HTTPException) as error:
                outcome = "given up" if wait_s is None else f"next try in {wait_s:g} s"
                _logger.warning(
                    "webhook %s was not told of record %s (%s): %s",
                    self._host,
                    body["sequence"],
                    error,
                    outcome,
                )
            if wait_s is not None:
                await asyncio.sleep(wait_s)


def post(url: str, body: bytes, timeout_s: float) -> None:
    """Posts JSON; any answer but 2xx is an error, a redirect too.

    Raises:
      OSError: No answer in time, or not 2xx.
      HTTPException: The answer is no HTTP.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "raysys"}
    request = urllib.request.Request(url, body, headers, method="POST")
    with _OPENER.open(request, timeout=timeout_s):
        pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follows none: a redirected POST would arrive as a GET, without its body."""


_OPENER = urllib.request.build_opener(_NoRedirect)
