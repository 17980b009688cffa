"""Users who keep a ranking application busy, and whether its answers were allowed."""

from __future__ import annotations

import dataclasses
import http.client
import itertools
import json
import random
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from raysys.ledger.records import Entry, RolloutChanged
from tests.faulty_versions import ITEMS

GRACE_S = 2.0
"""A version may answer for so long after the record that took its weight."""
NUM_CANDIDATES = 50


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One request that was answered with 200."""

    sent_at: float
    """UNIX seconds."""
    user: str
    version: str


class OneWrite(http.client.HTTPConnection):
    """Sends head and body in one piece, as a request must come that HAProxy is to send again.

    It passes a head on before the body is there, and from then on it cannot.
    """

    def _send_output(self, message_body: bytes | None = None, encode_chunked: bool = False) -> None:
        lines = [*self._buffer, b"", b""]  # type: ignore[attr-defined]
        self._buffer.clear()  # type: ignore[attr-defined]
        self.send(b"\r\n".join(lines) + (message_body or b""))


class Users:
    """Requests in the background, bounded in number and time; all that came of them is kept.

    Each asks for a ranking of the one item that all users want and some others, and clicks on what
    stands first if it is that item, which is how a version that ranks badly shows.
    """

    def __init__(
        self, url: str, *, clicks: bool = False, num_threads: int = 4, pause_s: float = 0.03
    ) -> None:
        self.answers: list[Answered] = []
        self.failures: list[str] = []
        self._address = url.removeprefix("http://")
        self._clicks, self._pause_s = clicks, pause_s
        self._ended = threading.Event()
        self._names = itertools.count()
        self._deadline = time.monotonic() + 90.0
        self._threads = [threading.Thread(target=self._run) for _ in range(num_threads)]

    def __enter__(self) -> Users:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)

    def newest(self, num: int = 40, timeout_s: float = 30.0) -> set[str]:
        """Waits for further answers and returns their versions."""
        mark, deadline = len(self.answers), time.monotonic() + timeout_s
        while len(self.answers) < mark + num:
            assert time.monotonic() < deadline, f"no answers; {self.failures[-3:]}"
            time.sleep(0.02)
        return {answer.version for answer in self.answers[mark:]}

    def _run(self) -> None:
        connection = OneWrite(self._address, timeout=15)
        while not self._ended.is_set() and time.monotonic() < self._deadline:
            try:
                self._ask(connection, f"user-{next(self._names)}")
            except (AssertionError, OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
                connection.close()
            time.sleep(self._pause_s)
        connection.close()

    def _ask(self, connection: OneWrite, user: str) -> None:
        others = random.Random(user).sample(ITEMS[1:], NUM_CANDIDATES - 1)
        body = {"user_id": user, "candidates": [*others, ITEMS[0]], "ts": 1_500_000_000}
        sent_at = time.time()
        answer = _post(connection, "/v1/rank", body)
        self.answers.append(Answered(sent_at=sent_at, user=user, version=answer["version"]))
        first = answer["ranking"][0]["item_id"]
        if self._clicks and first == ITEMS[0]:
            event = {"event_type": "click", "item_id": first, "ts": 1_500_000_000}
            feedback = {"request_id": answer["request_id"], "events": [event]}
            _post(connection, "/v1/feedback", feedback)


def _post(connection: OneWrite, path: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    connection.request("POST", path, json.dumps(body).encode(), headers)
    response = connection.getresponse()
    text = response.read().decode()
    assert response.status == 200, f"{path}: {response.status} {text}"
    answer: dict[str, Any] = json.loads(text)
    return answer


def without_weight(
    answers: Iterable[Answered], entries: Sequence[Entry], first_stable: str
) -> list[Answered]:
    """Returns the answers of versions that had no weight when the request was sent.

    A version has weight from its record on, and for `GRACE_S` after the record that takes it.
    """
    changes = [(e.at, e.record) for e in entries if isinstance(e.record, RolloutChanged)]
    spans = [(0.0, {first_stable}), *((at, _weighted(record)) for at, record in changes)]
    ends = [at for at, _ in spans[1:]] + [float("inf")]
    return [
        answer
        for answer in answers
        if not any(
            answer.version in names and answer.sent_at <= end + GRACE_S
            for (_, names), end in zip(spans, ends, strict=True)
        )
    ]


def _weighted(record: RolloutChanged) -> set[str]:
    return {name for name in (record.stable, record.canary) if name is not None}
