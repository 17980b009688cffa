"""What stands before the endpoints: bodies that are refused, and how many requests may wait."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import HttpConfig
from raysys.errors import ConfigError
from raysys.ledger.records import Record
from raysys.rollout.view import RolloutView
from raysys.serve import limits
from raysys.serve.api import create_api
from raysys.serve.limits import MAX_DEPTH, Gate, gates, parse_json
from raysys.serve.schema import ApiError
from raysys.storage import Root
from tests.fakes import ITEMS, FakeReplica, FakeVersion, serving
from tests.helpers import committed, started

STABLE = "v0001-aaaaaa"
BODY = {"user_id": "alice", "candidates": ["dates", "apple"]}
JSON = {"Content-Type": "application/json"}


def one_version() -> list[Record]:
    start = started("u0001-aaaaaa")
    return [start, committed(start, version=STABLE)]


@pytest.fixture
def replica(local_root: Root) -> FakeReplica:
    return FakeReplica(local_root, {STABLE: FakeVersion(STABLE)}, one_version())


@pytest.fixture
def client(replica: FakeReplica) -> Iterator[TestClient]:
    with replica.client(HttpConfig(max_body_bytes=1000)) as client:
        yield client


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    message: str = response.json()["error"]
    assert "\n" not in message
    return message


# Bodies


@pytest.mark.parametrize("path", ["/v1/rank", "/v1/feedback"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "with-length"])
def test_a_body_over_the_limit_is_a_413(client: TestClient, path: str, chunked: bool) -> None:
    body = json.dumps({**BODY, "user_id": "u" * 1000}).encode()
    content: Any = iter([body[:600], body[600:]]) if chunked else body
    response = client.post(path, content=content, headers=JSON)
    assert "longer than 1000 bytes (http.max_body_bytes)" in error_of(response, 413)
    assert response.headers["Connection"] == "close"


def test_a_body_at_the_limit_is_taken(client: TestClient) -> None:
    body = json.dumps(BODY).encode()
    assert client.post("/v1/rank", content=body.ljust(1000), headers=JSON).status_code == 200
    assert client.post("/v1/rank", content=body.ljust(1001), headers=JSON).status_code == 413


@pytest.mark.parametrize(
    ("length", "num_read"), [(None, 3), ("500", 3), ("5000000", 0), ("9" * 5000, 0)]
)
def test_no_more_of_a_body_is_read_than_shows_that_it_is_too_long(
    length: str | None, num_read: int
) -> None:
    """Whatever its Content-Length says: a server may let it lie."""
    num_received = 0

    async def receive() -> dict[str, Any]:
        nonlocal num_received
        num_received += 1
        return {"type": "http.request", "body": b"x" * 400, "more_body": True}

    headers = [(b"content-type", b"application/json")]
    headers += [(b"transfer-encoding", b"chunked")] if length is None else []
    headers += [(b"content-length", length.encode())] if length is not None else []
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    with pytest.raises(ApiError, match="longer than 1000 bytes"):
        asyncio.run(limits.read_body(request, HttpConfig(max_body_bytes=1000)))
    assert num_received == num_read


def exchange(port: int, *parts: bytes) -> bytes:
    """Sends bytes, and returns all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
        received = b""
        while data := connection.recv(65536):
            received += data
        return received


HEAD = b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        (b"Content-Length: 100000000\r\n\r\n{", 413),
        (b"Transfer-Encoding: chunked\r\n\r\n7d0\r\n" + b"x" * 2000 + b"\r\n", 413),
        (b"Content-Length: 500\r\n\r\n{", 408),
        (b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", 408),
    ],
    ids=["long", "long-chunked", "cut-off", "cut-off-chunked"],
)
def test_a_real_server_refuses_a_body_before_it_is_there_and_closes(
    replica: FakeReplica, rest: bytes, status: int
) -> None:
    with serving(
        create_api(replica.replica, HttpConfig(max_body_bytes=1000, body_timeout_s=0.2))
    ) as port:
        answer = exchange(port, HEAD, rest)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
        assert b"connection: close" in answer.lower()
        assert httpx.post(f"http://127.0.0.1:{port}/v1/rank", json=BODY).status_code == 200


def test_a_caller_who_goes_away_costs_no_error(
    replica: FakeReplica, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(create_api(replica.replica, HttpConfig())) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(HEAD + b"Content-Length: 500\r\n\r\n{")
        assert httpx.get(f"http://127.0.0.1:{port}/v1/healthz").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Content-Type": "text/plain"}, "Content-Type: expected application/json, got 'text/"),
        ({"Content-Type": ""}, "Content-Type: expected application/json, got ''"),
        ({"Content-Type": "application/jsonp"}, "Content-Type: expected application/json"),
        ({**JSON, "Content-Encoding": "gzip"}, "Content-Encoding: 'gzip' is not taken"),
    ],
)
def test_what_is_no_json_by_its_headers_is_a_415(
    client: TestClient, headers: dict[str, str], message: str
) -> None:
    response = client.post("/v1/rank", content=json.dumps(BODY), headers=headers)
    assert error_of(response, 415).startswith(message)


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.shop+json"]
)
def test_json_goes_by_several_names(client: TestClient, kind: str) -> None:
    headers = {"Content-Type": kind, "Content-Encoding": "identity"}
    assert client.post("/v1/rank", content=json.dumps(BODY), headers=headers).status_code == 200


def nested(depth: int, inner: str = "1") -> bytes:
    return ("[" * depth + inner + "]" * depth).encode()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (nested(100_000), 400, "more than 16 lists and objects within each other"),
        (b'{"a":' * 100_000, 400, "more than 16 lists and objects within each other"),
        (nested(900), 400, "more than 16 lists and objects within each other"),
        (nested(MAX_DEPTH + 1), 400, "more than 16 lists and objects within each other"),
        (nested(MAX_DEPTH), 422, "the body is not a JSON object"),
        (b'{"k": 1, "k": 2}', 422, "'k' stands twice in one object"),
        (b'{"k": 1, "\\u006b": 2}', 422, "'k' stands twice in one object"),
        (b'{"events": [{"a": 1, "a": 1}]}', 422, "'a' stands twice in one object"),
        (b'{"ts": NaN}', 422, "NaN is no number in JSON"),
        (b'{"ts": -Infinity}', 422, "-Infinity is no number in JSON"),
        (b'{"candidates": ["apple"], "ts": 1e999}', 422, "ts: expected a finite number"),
        (b'{"candidates": ["apple"], "k": 1e999}', 422, "k: expected"),
        (b'{"k": ' + b"9" * 5000 + b"}", 400, "a number of too many digits"),
        (b'{"candidates": ["apple"], "k": ' + b"9" * 4000 + b"}", 422, "k: expected"),
        (b'{"candidates": ["apple"], "ts": ' + b"9" * 4000 + b"}", 422, "ts: expected"),
        (b'{"user_id": "\xff"}', 400, "the body is not UTF-8 (byte 13)"),
        (json.dumps(BODY).encode("utf-16"), 400, "the body is not UTF-8 (byte 0)"),
        (b"\xef\xbb\xbf{}", 400, "the body is not JSON"),
        (b'{"candidates": ["\\ud800"]}', 422, "the body has half a character"),
        (b'{"\\uDFFF": 1}', 422, "the body has half a character"),
        (b'{"candidates": ["apple"]} {}', 400, "the body is not JSON (Extra data, character 26)"),
        (b"", 422, "the body is not a JSON object"),
        (b"null", 422, "the body is not a JSON object"),
        (b'"text"', 422, "the body is not a JSON object"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else None,
)
def test_a_body_that_two_parsers_could_read_in_two_ways_is_refused(
    replica: FakeReplica, body: bytes, status: int, message: str
) -> None:
    with replica.client() as client:
        response = client.post("/v1/rank", content=body, headers=JSON)
        assert message in error_of(response, status)


def test_a_whole_character_may_be_spelt_in_halves() -> None:
    assert parse_json(b'["\\ud83d\\ude00", "\\\\ud800"]') == ["\N{GRINNING FACE}", "\\ud800"]


def test_python_alone_would_take_what_is_refused() -> None:
    """Negative control: the refusals are ours."""
    for body in (b'{"k": 1, "k": 2}', b"[NaN]", nested(900), json.dumps(BODY).encode("utf-16")):
        json.loads(body)
        with pytest.raises(ApiError):
            parse_json(body)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(JSON_VALUES, st.booleans())
def test_what_is_json_is_read_as_python_reads_it(value: Any, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    try:
        assert parse_json(body) == value
    except ApiError as error:
        assert "within each other" in error.message
        assert body.count(b"[") + body.count(b"{") > MAX_DEPTH


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=60) | st.text('{}[]":,\\u0123dDeE+-. Na', max_size=60).map(str.encode))
def test_whatever_is_sent_is_parsed_or_refused(body: bytes) -> None:
    try:
        json.dumps(parse_json(body), allow_nan=True).encode()
    except ApiError as error:
        assert error.status in (400, 422)


# Methods and paths


def test_head_is_answered_where_get_is_and_options_is_not(client: TestClient) -> None:
    for path in ("/v1/healthz", "/v1/readyz", "/v1/versions", "/v1/rollout", "/docs"):
        assert client.head(path).status_code == client.get(path).status_code == 200, path
        assert client.options(path).headers["Allow"] == "GET, HEAD"
    for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"):
        response = client.request(method, "/v1/rank")
        assert response.status_code == 405, method
        assert response.headers["Allow"] == "POST"


def test_a_real_server_answers_head_without_a_body(replica: FakeReplica) -> None:
    with serving(create_api(replica.replica, HttpConfig())) as port:
        answer = exchange(port, b"HEAD /v1/healthz HTTP/1.0\r\nHost: x\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and b"content-length: 15" in head
    assert body == b""


# Overload


@contextlib.asynccontextmanager
async def caller(replica: FakeReplica, config: HttpConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A client in the replica's own event loop, so that the order of events is known."""
    api = create_api(replica.replica, config)
    await replica.replica.start()
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        yield client
    await replica.replica.stop()


class Clocked:
    """A version of which each score takes one tick, and nothing else takes any."""

    def __init__(self) -> None:
        self.now = 0
        self.version = FakeVersion(STABLE, score=self._score)

    def _score(self, scores: np.ndarray) -> np.ndarray:
        self.now += len(scores) < len(ITEMS)  # not the check of the new version
        return scores


async def storm(
    replica: FakeReplica, clock: Clocked, config: HttpConfig, num: int
) -> list[tuple[int, int]]:
    """Sends requests all at once; returns the status of each and the tick of its answer."""

    async def ask(client: httpx.AsyncClient, number: int) -> tuple[int, int]:
        response = await client.post("/v1/rank", json={**BODY, "user_id": f"user-{number}"})
        if response.status_code == 503:
            assert int(response.headers["Retry-After"]) == config.retry_after_s
            assert "retry after" in response.json()["error"]
        return response.status_code, clock.now

    async with caller(replica, config) as client:
        return await asyncio.gather(*(ask(client, number) for number in range(num)))


@pytest.fixture
def clock() -> Clocked:
    return Clocked()


@pytest.fixture
def slow(local_root: Root, clock: Clocked) -> FakeReplica:
    return FakeReplica(local_root, {STABLE: clock.version}, one_version())


def test_exactly_the_surplus_is_refused_at_once_and_nobody_waits_longer_than_the_bound(
    slow: FakeReplica, clock: Clocked
) -> None:
    config = HttpConfig(max_concurrent_requests=4, max_waiting_requests=16, retry_after_s=3)
    answers = asyncio.run(storm(slow, clock, config, 200))
    accepted = [tick for status, tick in answers if status == 200]
    refused = [tick for status, tick in answers if status == 503]
    assert (len(accepted), len(refused)) == (20, 180)
    assert slow.metrics.rejections == ["ranking"] * 180
    assert max(accepted) <= 20
    assert max(refused) <= 4, "refusals wait for nobody's scores but those already at work"


def test_without_the_bound_the_wait_grows_with_the_queue(slow: FakeReplica, clock: Clocked) -> None:
    """Negative control: the ticks do show a queue."""
    config = HttpConfig(max_concurrent_requests=4, max_waiting_requests=10_000)
    answers = asyncio.run(storm(slow, clock, config, 200))
    assert {status for status, _ in answers} == {200}
    assert np.quantile([tick for _, tick in answers], 0.99) > 190


def test_a_gate_that_does_not_yield_hides_the_queue_from_the_bound(
    slow: FakeReplica, clock: Clocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the first test: scoring does not yield, so each would find it empty."""

    async def nothing(delay: float) -> None:
        return None

    config = HttpConfig(max_concurrent_requests=4, max_waiting_requests=16)
    hasty = SimpleNamespace(Semaphore=asyncio.Semaphore, timeout=asyncio.timeout, sleep=nothing)
    monkeypatch.setattr("raysys.serve.limits.asyncio", hasty)
    answers = asyncio.run(storm(slow, clock, config, 200))
    assert sum(status == 200 for status, _ in answers) > 20


def test_everything_else_is_answered_while_rankings_are_refused(
    local_root: Root,
) -> None:
    release = threading.Event()

    def wait(scores: np.ndarray) -> np.ndarray:
        assert release.wait(30)
        return scores

    async def scenario() -> None:
        version = FakeVersion(STABLE)
        replica = FakeReplica(local_root, {STABLE: version}, one_version())
        config = HttpConfig(max_concurrent_requests=1, max_waiting_requests=1)
        async with caller(replica, config) as client:
            answer = (await client.post("/v1/rank", json=BODY)).json()
            version._score = wait
            # With a query, scores are computed in a thread.
            asked = [
                asyncio.create_task(client.post("/v1/rank", json={**BODY, "query": f"query {i}"}))
                for i in range(10)
            ]
            while sum(task.done() for task in asked) < 8:
                await asyncio.sleep(0)
            for path in ("healthz", "readyz", "versions", "rollout"):
                assert (await client.get(f"/v1/{path}")).status_code == 200, path
            event = {"event_type": "click", "item_id": "apple"}
            body = {"request_id": answer["request_id"], "events": [event]}
            assert (await client.post("/v1/feedback", json=body)).status_code == 200
            assert not release.is_set()
            release.set()
            statuses = [(await task).status_code for task in asked]
            assert sorted(statuses) == [200] * 2 + [503] * 8

    asyncio.run(scenario())


def test_feedback_that_waits_for_the_store_is_bounded_and_starves_no_ranking(
    local_root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    put = local_root.put

    def stuck(path: str, data: bytes) -> None:
        assert release.wait(30)
        put(path, data)

    async def scenario() -> None:
        replica = FakeReplica(local_root, {STABLE: FakeVersion(STABLE)}, one_version())
        async with caller(replica, HttpConfig(max_waiting_feedback=5)) as client:
            answer = (await client.post("/v1/rank", json=BODY)).json()
            monkeypatch.setattr(local_root, "put", stuck)
            event = {"event_type": "click", "item_id": "apple"}
            body = {"request_id": answer["request_id"], "events": [event]}
            sent = [asyncio.create_task(client.post("/v1/feedback", json=body)) for _ in range(12)]
            while sum(task.done() for task in sent) < 7:
                await asyncio.sleep(0)
            assert (await client.post("/v1/rank", json=BODY)).status_code == 200
            release.set()
            statuses = [(await task).status_code for task in sent]
            assert sorted(statuses) == [200] * 5 + [503] * 7

    asyncio.run(scenario())


def test_a_caller_who_gives_up_leaves_its_place() -> None:
    async def scenario() -> None:
        gate = Gate("ranking", max_concurrent=1, max_waiting=1)

        async def hold(forever: asyncio.Event) -> None:
            async with gate.place():
                await forever.wait()

        for _ in range(3):
            tasks = [asyncio.create_task(hold(asyncio.Event())) for _ in range(2)]
            await asyncio.sleep(0.01)
            with pytest.raises(ApiError):
                async with gate.place():
                    pass
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        async with gate.place():
            pass

    asyncio.run(scenario())


def test_every_endpoint_that_takes_a_body_has_a_gate(replica: FakeReplica) -> None:
    api = create_api(replica.replica, HttpConfig())
    paths = api.openapi()["paths"]
    posts = {path: methods["post"] for path, methods in paths.items() if "post" in methods}
    assert len(posts) >= 5
    for path, endpoint in posts.items():
        assert endpoint["tags"][0] in gates(HttpConfig()), path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_body_bytes": 0}, "http.max_body_bytes: expected >= 1, got 0"),
        ({"body_timeout_s": 0}, "http.body_timeout_s: expected > 0, got 0"),
        ({"max_concurrent_requests": 0}, "http.max_concurrent_requests: expected >= 1, got 0"),
        ({"max_waiting_requests": -1}, "http.max_waiting_requests: expected >= 0, got -1"),
        ({"max_waiting_feedback": 0}, "http.max_waiting_feedback: expected >= 1, got 0"),
        ({"retry_after_s": 0}, "http.retry_after_s: expected >= 1, got 0"),
    ],
)
def test_limits_out_of_bounds_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        HttpConfig(**values)
    assert str(refused.value) == message


# Alive and ready


def test_a_replica_is_alive_but_not_ready_while_its_first_version_loads(local_root: Root) -> None:
    may_load = threading.Event()

    class Slow(FakeVersion):
        def check_golden(self) -> None:
            assert may_load.wait(30)

    replica = FakeReplica(local_root, {STABLE: Slow(STABLE)})
    with replica.client() as client:
        assert "run an update first" in error_of(client.get("/v1/readyz"), 503)
        for record in one_version():
            replica.append(record)
        replica.controller.views.put_nowait(RolloutView.of(replica.log.refresh()))
        until(lambda: client.get("/v1/versions").json()["missing"] != {})
        response = client.get("/v1/readyz")
        assert error_of(response, 503) == f"not ready: {STABLE}: is being loaded"
        assert response.headers["Retry-After"] == "1"
        assert client.get("/v1/healthz").json() == {"status": "ok"}
        assert "no version is loaded yet" in error_of(client.post("/v1/rank", json=BODY), 503)
        may_load.set()
        until(lambda: client.get("/v1/readyz").status_code == 200)


def until(check: Callable[[], bool]) -> None:
    for _ in range(1000):
        if check():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")
