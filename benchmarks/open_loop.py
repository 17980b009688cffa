"""A client of HTTP servers that never waits for them: who is slow cannot slow its own load down.

    Load -> run() -> `python open_loop.py` in a process of its own -> [Answer]

Requests have an intended time, one each `1 / rate_per_s`, and are sent then whatever is still
unanswered, over as many connections as that takes. Latency counts from the intended time. So a
server that stalls for a second is charged with all requests of that second, and not with the one
that met it ("coordinated omission", Gil Tene 2013). A closed loop of `num_connections`, each of
which sends its next request on an answer, measures throughput instead.

It needs the standard library alone, so that it starts at once and weighs little.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

MAX_CONNECTIONS = 512
MAX_IDLE_S = 1.0
"""Servers close those that are idle for longer; one that is about to be closed is not used."""
TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is sent, and how fast."""

    host: str
    port: int
    path: str
    bodies: Sequence[str]
    """Sent in turn, again from the first after the last."""
    num_requests: int
    rate_per_s: float = 0.0
    """0: a closed loop."""
    num_connections: int = 0
    """Of a closed loop."""
    headers: Sequence[str] = ()
    """Whole lines."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of one request. Times are seconds since the start of the load."""

    intended: float
    sent: float
    ended: float
    status: int
    """0: none came."""
    version: str = ""
    """That the body says."""
    error: str = ""

    @property
    def latency_ms(self) -> float:
        """Milliseconds from when it should have been sent, so that waiting to send counts."""
        return (self.ended - self.intended) * 1e3

    @property
    def lag_ms(self) -> float:
        """Milliseconds by which the client itself was late."""
        return (self.sent - self.intended) * 1e3

    @property
    def ok(self) -> bool:
        """Whether it was answered with 200."""
        return self.status == 200


def schedule(num_requests: int, rate_per_s: float) -> list[float]:
    """Returns when each request is to be sent, in seconds from the start.

    >>> schedule(3, 50.0)
    [0.0, 0.02, 0.04]
    """
    return [i / rate_per_s for i in range(num_requests)]


def percentile(values: Sequence[float], q: float) -> float:
    """Returns the smallest value that `q` percent of the values do not exceed.

    >>> [percentile(range(1, 101), q) for q in (50, 99, 100)]
    [50, 99, 100]
    """
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * q / 100), 1) - 1]


def run(load: Load, timeout_s: float = 120.0) -> list[Answer]:
    """Puts a load on a server, from a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(dataclasses.asdict(load)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=timeout_s,
    )
    return [Answer(**answer) for answer in json.loads(done.stdout)]


async def send_all(load: Load) -> list[Answer]:
    """Sends a load and returns the answers, by intended time."""
    client = _Client(load)
    try:
        if load.rate_per_s:
            return await client.open_loop()
        return await client.closed_loop()
    finally:
        client.close()


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on its way."""

    def __init__(self) -> None:
        self.idle_since = time.monotonic()
        self.is_lost = False
        self._buffer = b""
        self._done: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        if self._done and not self._done.done():
            self._done.set_exception(error or ConnectionError("closed without an answer"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found or self._done is None or self._done.done():
            return
        length = head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
        if not length:
            self._done.set_exception(ValueError(f"an answer without a length: {head!r}"))
        elif len(body) >= int(length):
            self._buffer = b""
            self._done.set_result((int(head.split(None, 2)[1]), body))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await asyncio.wait_for(self._done, TIMEOUT_S)

    def close(self) -> None:
        self._transport.close()


class _Client:
    def __init__(self, load: Load) -> None:
        self._load = load
        self._requests = [_request(load, body) for body in load.bodies]
        self._idle: list[_Connection] = []
        self._num_busy = 0
        self._started = time.monotonic()

    async def open_loop(self) -> list[Answer]:
        tasks = []
        self._started = time.monotonic()
        for number, intended in enumerate(schedule(self._load.num_requests, self._load.rate_per_s)):
            await asyncio.sleep(max(0.0, intended - self._now()))
            tasks.append(asyncio.create_task(self._send(number, intended)))
        return list(await asyncio.gather(*tasks))

    async def closed_loop(self) -> list[Answer]:
        numbers = iter(range(self._load.num_requests))
        self._started = time.monotonic()

        async def worker() -> list[Answer]:
            return [await self._send(number, self._now()) for number in numbers]

        parts = await asyncio.gather(*(worker() for _ in range(self._load.num_connections)))
        return sorted((a for part in parts for a in part), key=lambda answer: answer.intended)

    async def _send(self, number: int, intended: float) -> Answer:
        sent, connection = self._now(), None
        self._num_busy += 1
        try:
            connection = await self._connection()
            status, body = await connection.ask(self._requests[number % len(self._requests)])
        except (OSError, ValueError, TimeoutError) as error:
            if connection is not None:
                connection.close()
            return Answer(
                intended=intended, sent=sent, ended=self._now(), status=0, error=repr(error)
            )
        finally:
            self._num_busy -= 1
        ended = self._now()
        connection.idle_since = time.monotonic()
        self._idle.append(connection)
        return Answer(
            intended=intended,
            sent=sent,
            ended=ended,
            status=status,
            version=_version(body),
            error="" if status == 200 else body[:200].decode(errors="replace"),
        )

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_lost and time.monotonic() - connection.idle_since < MAX_IDLE_S:
                return connection
            connection.close()
        if self._num_busy > MAX_CONNECTIONS:
            raise OSError(f"{self._num_busy} requests are unanswered")
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._load.host, self._load.port)
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    def _now(self) -> float:
        return time.monotonic() - self._started


def _request(load: Load, body: str) -> bytes:
    data = body.encode()
    lines = [
        f"POST {load.path} HTTP/1.1",
        f"Host: {load.host}:{load.port}",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *load.headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def _version(body: bytes) -> str:
    return body.partition(b'"version":"')[2].partition(b'"')[0].decode()


def main() -> None:
    """Reads a load as JSON and writes the answers as JSON."""
    load = Load(**json.load(sys.stdin))
    # `select` waits to the microsecond; `epoll`, which asyncio prefers, rounds up to milliseconds.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    answers = loop.run_until_complete(send_all(load))
    json.dump([dataclasses.asdict(answer) for answer in answers], sys.stdout)


if __name__ == "__main__":
    main()
