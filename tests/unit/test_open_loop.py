"""The load client never waits for a server, and charges it for what it would have made wait."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
NUM = 20


@pytest.fixture
def open_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("open_loop")


class Server:
    """Answers nobody before `num_needed` requests have come; then all of them."""

    def __init__(self, num_needed: int, answer: bytes) -> None:
        self._num_missing = num_needed
        self._are_there = asyncio.Event()
        self._answer = answer
        self.bodies: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                self.bodies.append(await reader.readexactly(length))
                self._num_missing -= 1
                if self._num_missing <= 0:
                    self._are_there.set()
                await self._are_there.wait()
                writer.write(self._answer)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def listening(self) -> Any:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]


def http_answer(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def send(open_loop: ModuleType, server: Server, **how: Any) -> list[Any]:
    async def scenario() -> list[Any]:
        async with server.listening() as port, asyncio.timeout(20):
            load = open_loop.Load(
                host="127.0.0.1", port=port, path="/", bodies=["a", "bb"], num_requests=NUM, **how
            )
            answers: list[Any] = await open_loop.send_all(load)
            return answers

    return asyncio.run(scenario())


def test_a_server_that_stalls_does_not_stop_the_load(open_loop: ModuleType) -> None:
    server = Server(NUM, http_answer(b'{"version":"v1"}'))
    answers = send(open_loop, server, rate_per_s=500.0)
    assert [answer.status for answer in answers] == [200] * NUM
    assert {answer.version for answer in answers} == {"v1"}
    assert sorted(server.bodies) == [b"a"] * (NUM // 2) + [b"bb"] * (NUM // 2)


def test_a_closed_loop_waits_for_such_a_server_forever(open_loop: ModuleType) -> None:
    """The negative control: this is what an open loop is for."""
    server = Server(NUM, http_answer(b""))

    async def scenario() -> None:
        async with server.listening() as port:
            load = open_loop.Load(
                host="127.0.0.1", port=port, path="/", bodies=["a"], num_requests=NUM,
                num_connections=2,
            )  # fmt: skip
            task = asyncio.create_task(open_loop.send_all(load))
            while len(server.bodies) < 2:
                await asyncio.sleep(0.001)
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert len(server.bodies) == 2 and not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())


def test_latency_counts_from_when_a_request_should_have_been_sent(open_loop: ModuleType) -> None:
    answer = open_loop.Answer(intended=1.0, sent=1.5, ended=1.6, status=200)
    assert (round(answer.latency_ms), round(answer.lag_ms), answer.ok) == (600, 500, True)


def test_a_stalled_second_is_charged_with_all_its_requests(open_loop: ModuleType) -> None:
    intended = open_loop.schedule(NUM, 500.0)
    answers = send(open_loop, Server(NUM, http_answer(b"")), rate_per_s=500.0)
    assert [answer.intended for answer in answers] == intended
    # Nobody was answered before the last request was there.
    assert all(answer.ended >= intended[-1] for answer in answers)


def test_what_is_not_answered_with_200_is_a_failure(open_loop: ModuleType) -> None:
    server = Server(1, http_answer(b"no room", b"503 Service Unavailable"))
    answers = send(open_loop, server, rate_per_s=500.0)
    assert {(answer.status, answer.error, answer.ok) for answer in answers} == {
        (503, "no room", False)
    }


def test_a_server_that_is_not_there_is_a_failure_of_each_request(open_loop: ModuleType) -> None:
    load = open_loop.Load(
        host="127.0.0.1", port=9, path="/", bodies=["a"], num_requests=3, rate_per_s=500.0
    )
    answers = asyncio.run(open_loop.send_all(load))
    assert [(answer.status, answer.ok) for answer in answers] == [(0, False)] * 3


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([3.0], 50, 3.0), ([1.0, 2.0], 50, 1.0), ([1.0, 2.0], 51, 2.0), (range(1, 1001), 99, 990)],
)
def test_percentiles_are_values_that_were_seen(
    open_loop: ModuleType, values: list[float], q: float, expected: float
) -> None:
    assert open_loop.percentile(values, q) == expected
