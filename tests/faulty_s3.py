"""A proxy between a client and an S3 server that loses, delays, cuts and falsifies on order.

    client -> FaultyS3(endpoint).endpoint -> the real server
    proxy.next("lost_answer", method="PUT", path="ledger/1")    the next such request, once
    proxy.always("slow_down")                                   until proxy.heal()

Faults, by what the client meets and whether the server acted:

    slow_down       503 SlowDown                       no
    internal_error  500 InternalError                  no
    reset           the connection is reset            no
    silence         nothing until the client hangs up  no
    lost_answer     the connection is reset            yes
    late_answer     nothing until the client hangs up  yes
    cut_body        half of the answer, then the end   yes
    lag             a listing without the keys for which `hides` is true
"""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal[
    "slow_down", "internal_error", "reset", "silence", "lost_answer", "late_answer", "cut_body",
    "lag",
]  # fmt: skip
MAX_SILENCE_S = 10.0
"""However long a client waits, the proxy's threads end."""
_REFUSALS: dict[str, tuple[int, str, str]] = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error."),
}
_HOP_BY_HOP = frozenset({"connection", "transfer-encoding", "content-length", "expect", "host"})
_ENTRY = re.compile(r"<(Contents|CommonPrefixes)>.*?<(?:Key|Prefix)>(.*?)</.*?</\1>", re.DOTALL)


@dataclass(kw_only=True, slots=True)
class Rule:
    """What is done to the requests that match."""

    fault: Fault
    method: str
    path: str
    """Is found in the request's path and query."""
    left: float
    hides: Callable[[str], bool]

    def takes(self, method: str, path: str) -> bool:
        return self.left > 0 and bool(re.fullmatch(self.method, method)) and self.path in path


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class FaultyS3:
    """A running proxy on loopback; `with` ends it."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urllib.parse.urlsplit(upstream).netloc
        self.requests: list[tuple[str, str]] = []
        """Method and path with query of every request that arrived, in order."""
        self.num_body_bytes = 0
        """Sent to clients in bodies of answers."""
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> FaultyS3:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.ends.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def next(
        self,
        fault: Fault,
        *,
        method: str = ".*",
        path: str = "",
        times: float = 1,
        hides: Callable[[str], bool] = lambda key: False,
    ) -> None:
        """Does this to the next `times` requests of a method (a pattern) and path (a part)."""
        rule = Rule(fault=fault, method=method, path=path, left=times, hides=hides)
        with self._lock:
            self._rules.append(rule)

    def always(
        self, fault: Fault, *, path: str = "", hides: Callable[[str], bool] = lambda key: False
    ) -> None:
        self.next(fault, path=path, times=float("inf"), hides=hides)

    def heal(self) -> None:
        with self._lock:
            self._rules.clear()

    def forget(self) -> None:
        """Starts counting anew."""
        with self._lock:
            self.requests.clear()
            self.num_body_bytes = 0

    def arrived(self, method: str, path: str) -> Rule | None:
        with self._lock:
            self.requests.append((method, path))
            for rule in self._rules:
                if rule.takes(method, path):
                    rule.left -= 1
                    return rule
        return None

    def sent(self, num_bytes: int) -> None:
        with self._lock:
            self.num_body_bytes += num_bytes


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Ending the proxy hangs up on its clients and waits for nobody.
    block_on_close = False

    def __init__(self, proxy: FaultyS3) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.proxy = proxy
        self.ends = threading.Event()

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        # Without a shutdown before it, so that a reset is nothing but a reset.
        self.close_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is what some faults are for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are written apart, and Nagle would hold the second back for 40 ms.
    disable_nagle_algorithm = True
    server: _Server

    def handle_any(self) -> None:
        path = urllib.parse.unquote(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        rule = self.server.proxy.arrived(self.command, path)
        fault = rule.fault if rule else None
        if fault in _REFUSALS:
            self.answer(_refusal(*_REFUSALS[fault]))
        elif fault == "reset":
            self.reset()
        elif fault == "silence":
            self.be_silent()
        else:
            self.pass_on(body, rule)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def pass_on(self, body: bytes, rule: Rule | None) -> None:
        answer = self.forward(body)
        fault = rule.fault if rule else None
        if fault == "lost_answer":
            self.reset()
        elif fault == "late_answer":
            self.be_silent()
        elif fault == "lag":
            assert rule is not None
            self.answer(_without(answer, rule.hides))
        else:
            self.answer(answer, cut=fault == "cut_body")

    def forward(self, body: bytes) -> Answer:
        upstream = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
        try:
            upstream.request(self.command, self.path, body=body, headers=headers)
            response = upstream.getresponse()
            kept = [(k, v) for k, v in response.getheaders() if k.lower() not in _HOP_BY_HOP]
            length = response.getheader("Content-Length", "0")
            data = response.read()
            if self.command == "HEAD":
                kept.append(("Content-Length", length))
            return Answer(status=response.status, headers=kept, body=data)
        finally:
            upstream.close()

    def answer(self, answer: Answer, *, cut: bool = False) -> None:
        if cut and not answer.body:
            # Its head alone would be the whole answer.
            self.reset()
            return
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        data = answer.body[: len(answer.body) // 2] if cut else answer.body
        self.wfile.write(data)
        self.server.proxy.sent(len(data))
        self.close_connection = self.close_connection or cut

    def reset(self) -> None:
        """Ends the connection with RST, as a router does that lost it."""
        linger_at_once = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_at_once)
        self.close_connection = True

    def be_silent(self) -> None:
        """Returns when the client hangs up."""
        self.close_connection = True
        self.connection.settimeout(0.05)
        for _ in range(int(MAX_SILENCE_S / 0.05)):
            try:
                if self.server.ends.is_set() or not self.connection.recv(1):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _refusal(status: int, code: str, message: str) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return Answer(status=status, headers=[("Content-Type", "application/xml")], body=body)


def _without(answer: Answer, hides: Callable[[str], bool]) -> Answer:
    def keep(entry: re.Match[str]) -> str:
        return "" if hides(urllib.parse.unquote(entry[2])) else entry[0]

    body = _ENTRY.sub(keep, answer.body.decode()).encode()
    return Answer(status=answer.status, headers=answer.headers, body=body)
