"""What stands before an endpoint: the size, kind and syntax of a body, and how many may wait.

    request -> LimitedRoute: guard -> read_body -> Gate -> parse_json -> FastAPI's endpoint
                             401, 403  408, 413, 415  503   400, 422

A body is refused as early as it can be told to be wrong. The gate comes before the parsing, since
that is what overload is made of: a refusal costs a hundredth of an answer, and is answered between
any two of them. Source: RFC 8259 (JSON), RFC 9110 (413, 415, Retry-After).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from raysys.config import HttpConfig
from raysys.serve.schema import ApiError, name_some

MAX_DEPTH = 16
"""Lists and objects within each other; no request needs more than four."""
RANKING, FEEDBACK, STATUS, STEERING = "ranking", "feedback", "status", "steering"
"""Tags of the endpoints. Each endpoint has one, and by it its gate and its guard."""

Guard = Callable[[Request], Awaitable[None]]
"""Raises an `ApiError` for a request that may not go on."""


class Gate:
    """Bounds how many requests are worked on, and how many wait. For one event loop.

    With `max_concurrent` places of a service time each, nobody who is let in waits longer than
    `max_waiting / max_concurrent` service times for a place.
    """

    def __init__(
        self,
        kind: str,
        *,
        max_concurrent: int,
        max_waiting: int,
        on_full: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self._kind = kind
        self._on_full = on_full
        self._max_inside = max_concurrent + max_waiting
        self._places = asyncio.Semaphore(max_concurrent)
        self._num_inside = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Waits for a place and keeps it.

        Raises:
          ApiError: 503 at once, if as many wait as may.
        """
        if self._num_inside >= self._max_inside:
            self._on_full(self._kind)
            raise ApiError(
                503,
                f"{self._num_inside} {self._kind} requests wait for this replica already; retry "
                "after the seconds in Retry-After",
            )
        self._num_inside += 1
        try:
            async with self._places:
                # Whoever arrived at the same time is counted before anyone's scores are computed:
                # scoring does not yield, so it would hide the queue from the bound.
                await asyncio.sleep(0)
                yield
        finally:
            self._num_inside -= 1


def gates(
    config: HttpConfig, on_full: Callable[[str], None] = lambda kind: None
) -> dict[str, Gate]:
    """Returns tag -> gate, of the endpoints that take a body. None waits at another's gate, and
    status at none: whatever is overloaded, the rest is there. `on_full` is told the tag of each
    request that found no room."""
    rooms = {
        RANKING: (config.max_concurrent_requests, config.max_waiting_requests),
        # They do not wait for each other, but together for the object store.
        FEEDBACK: (config.max_waiting_feedback, 0),
        # While the store is away, operators hold one of the replica's threads, however many try.
        STEERING: (1, 8),
    }
    return {
        tag: Gate(tag, max_concurrent=concurrent, max_waiting=waiting, on_full=on_full)
        for tag, (concurrent, waiting) in rooms.items()
    }


def limited_route(
    config: HttpConfig, gates: Mapping[str, Gate], guards: Mapping[str, Guard]
) -> type[APIRoute]:
    """Returns the class of an app's routes, which keeps to the limits by tag."""

    class LimitedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            endpoint = super().get_route_handler()
            has_body = self.body_field is not None
            tag = str(self.tags[0])
            gate, guard = gates[tag] if has_body else None, guards.get(tag)

            async def limited(request: Request) -> Response:
                if guard is not None:
                    await guard(request)
                if gate is None:
                    return await endpoint(request)
                body = await read_body(request, config)
                async with gate.place():
                    return await endpoint(_parsed(request, body))

            return limited

    return LimitedRoute


class _ParsedRequest(Request):
    """A request whose body was read and parsed, for FastAPI to find it so."""

    raw: bytes
    value: Any

    async def body(self) -> bytes:
        return self.raw

    async def json(self) -> Any:
        return self.value


def _parsed(request: Request, body: bytes) -> Request:
    parsed = _ParsedRequest(request.scope)
    parsed.raw, parsed.value = body, parse_json(body) if body else None
    return parsed


class HeadAsGet:
    """Has GET's endpoints answer HEAD; the server leaves the body out, as it knows the method."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if is_head else scope, receive, send)


async def read_body(request: Request, config: HttpConfig) -> bytes:
    """Returns the body of a request.

    Raises:
      ApiError: 400 it is cut off, 408 it does not arrive, 413 it is too long, whatever its
        Content-Length says or leaves out, 415 it is no JSON by its headers.
    """
    _check_headers(request.headers, config.max_body_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for part in request.stream():
                num_bytes += len(part)
                if num_bytes > config.max_body_bytes:
                    raise _too_long(config.max_body_bytes)
                parts.append(part)
    except ClientDisconnect as error:
        raise ApiError(400, "the body was cut off; send it whole") from error
    except TimeoutError as error:
        raise ApiError(
            408, f"the body did not arrive within {config.body_timeout_s:g} s; send it again"
        ) from error
    return b"".join(parts)


def _check_headers(headers: Mapping[str, str], max_body_bytes: int) -> None:
    length = headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_body_bytes):
        raise _too_long(max_body_bytes)
    if not length and "transfer-encoding" not in headers:
        return  # there is no body, and the endpoint says whether it needs one
    kind = headers.get("content-type", "")
    essence = kind.partition(";")[0].strip().lower()
    if length != "0" and not (
        essence == "application/json"
        or (essence.startswith("application/") and essence.endswith("+json"))
    ):
        raise ApiError(415, f"Content-Type: expected application/json, got {name_some([kind])}")
    coding = headers.get("content-encoding", "identity")
    if coding.strip().lower() != "identity":
        raise ApiError(
            415, f"Content-Encoding: {name_some([coding])} is not taken; send the body as it is"
        )


def _too_long(max_body_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is longer than {max_body_bytes} bytes (http.max_body_bytes); send fewer or "
        "shorter entries",
    )


def parse_json(body: bytes) -> Any:
    """Parses a body, stricter than Python does: what two parsers may read in two ways is refused.

    >>> parse_json(b'{"k": 1, "k": 2}')
    Traceback (most recent call last):
    raysys.serve.schema.ApiError: 'k' stands twice in one object; send each key once

    Raises:
      ApiError: 400 it is no JSON, or nested too deeply; 422 a key stands twice, a number is not
        finite, or text has half a character.
    """
    try:
        text = body.decode()
        value = json.loads(text, object_pairs_hook=_each_key_once, parse_constant=_refuse_constant)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(value)
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8 (byte {error.start}); send JSON in UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise ApiError(
            400, f"the body is not JSON ({error.msg}, character {error.pos}); send one JSON object"
        ) from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # Python refuses to convert numbers of thousands of digits
        raise ApiError(400, "the body has a number of too many digits; send fewer") from error
    if "\\ud" in text or "\\uD" in text:
        _check_characters(value)
    return value


def _each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise ApiError(422, f"{name_some([twice])} stands twice in one object; send each key once")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(422, f"{name} is no number in JSON; send a finite one, or leave its key out")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [
        child
        for parent in level
        if isinstance(parent, list | dict)
        for child in (parent.values() if isinstance(parent, dict) else parent)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()


def _too_deep() -> ApiError:
    return ApiError(
        400, f"the body has more than {MAX_DEPTH} lists and objects within each other; send fewer"
    )


def _check_characters(value: Any) -> None:
    """Escapes can spell halves of characters, which no text that is stored or logged may have."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            422, r"the body has half a character (a lone \ud800 to \udfff); send whole ones"
        ) from error
