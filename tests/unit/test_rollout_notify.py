"""The webhook: told of each transition after it is recorded, by a server that fails at first."""

from __future__ import annotations

import asyncio
import http.server
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from raysys.config import RolloutConfig
from raysys.ledger.log import Log
from raysys.rollout.controller import TELL_AGAIN_S, Control
from raysys.rollout.notify import MAX_WAITING, Notifier, post
from raysys.rollout.state import abort, pause, promote, resume, start
from raysys.storage import Root
from tests.helpers import FakeClock, committed, started

NOW = (0.0, 0.0, 0.0)


class Webhook:
    """A real HTTP server that answers with these statuses, then with 204."""

    def __init__(self, *statuses: int) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.statuses = list(statuses)
        webhook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = webhook.statuses.pop(0) if webhook.statuses else 204
                if status == 204:
                    webhook.bodies.append(json.loads(body))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            def do_GET(self) -> None:
                raise AssertionError("a redirect was followed")

            def log_message(self, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/T0K3N"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    found = Webhook()
    yield found
    found.close()


class Shop:
    """A ledger of two versions, and controllers that tell a webhook."""

    def __init__(self, root: Root, url: str) -> None:
        self.root, self.url, self.clock = root, url, FakeClock()
        self.log = Log(root, clock=self.clock)
        for number in (1, 2):
            begun = started(f"u000{number}-aaaaa{number}", partitions=())
            done = committed(begun, version=f"v{number}")
            self.log.transact(lambda state, record=begun: record)
            self.log.transact(lambda state, record=done: record)

    def live(self, *changes: Any) -> None:
        """One controller's life: a look, these changes with a look after each, and all is told."""

        async def life() -> None:
            notifier = Notifier(self.url, timeout_s=5.0, backoff_s=NOW)
            control = Control(
                Log(self.root, clock=self.clock),
                RolloutConfig(),
                clock=self.clock,
                notifier=notifier,
            )
            telling = asyncio.create_task(notifier.run())
            await control.step()
            for change in changes:
                self.log.transact(change)
                await control.step()
            while notifier.num_untold:
                await asyncio.sleep(0.005)
            telling.cancel()

        asyncio.run(life())


def begin(state: Any) -> Any:
    return start(state, "v2", weight_fraction=0.2, actor="operator")


def stop(state: Any) -> Any:
    return abort(state, actor="operator", reason="worse")


def test_each_transition_is_told_once_and_in_order(local_root: Root, webhook: Webhook) -> None:
    shop = Shop(local_root, webhook.url)
    shop.live(
        begin,
        lambda s: pause(s, actor="operator", reason="lunch"),
        lambda s: resume(s, actor="operator", reason="back"),
        lambda s: promote(s, actor="operator", reason="better", measurement={"n": 1}),
    )
    assert [body["phase"] for body in webhook.bodies] == ["canary", "paused", "canary", "promoted"]
    assert [body["sequence"] for body in webhook.bodies] == [5, 6, 7, 8]
    last = webhook.bodies[-1]
    assert (last["rollout_id"], last["stable"], last["previous"]) == ("r0001", "v2", "v1")
    assert (last["reason"], last["measurement"]) == ("better", {"n": 1})
    assert last["text"] == "r0001: operator made v2 stable: better"


def test_two_transitions_between_two_looks_are_both_told(
    local_root: Root, webhook: Webhook
) -> None:
    shop = Shop(local_root, webhook.url)

    def paused_and_back(state: Any) -> Any:
        other = Log(local_root, clock=shop.clock)
        if state.rollout.phase == "canary":
            other.transact(lambda s: pause(s, actor="operator", reason="lunch"))
            state = other.refresh()
        return resume(state, actor="operator", reason="back")

    shop.live(begin, paused_and_back)
    assert [body["phase"] for body in webhook.bodies] == ["canary", "paused", "canary"]


def test_a_webhook_that_fails_at_first_is_told_in_the_end(
    local_root: Root, webhook: Webhook, caplog: pytest.LogCaptureFixture
) -> None:
    webhook.statuses = [500, 302, 429]
    Shop(local_root, webhook.url).live(begin)
    assert [body["phase"] for body in webhook.bodies] == ["canary"]
    assert "webhook 127.0.0.1 was not told of record 5 (HTTP Error 500" in caplog.text
    assert "T0K3N" not in caplog.text


def test_a_webhook_that_is_down_costs_only_the_news(
    local_root: Root, webhook: Webhook, caplog: pytest.LogCaptureFixture
) -> None:
    webhook.close()
    shop = Shop(local_root, webhook.url)
    with caplog.at_level(logging.WARNING):
        shop.live(begin, stop)
    assert shop.log.refresh().rollout is not None
    assert "given up" in caplog.text


def test_a_webhook_that_hangs_holds_up_no_decision(local_root: Root) -> None:
    shop, is_open = Shop(local_root, "http://chat.example/"), threading.Event()

    def hang(url: str, body: bytes, timeout_s: float) -> None:
        is_open.wait(30)

    async def life() -> None:
        notifier = Notifier(shop.url, timeout_s=5.0, send=hang)
        control = Control(
            Log(local_root, clock=shop.clock), RolloutConfig(), clock=shop.clock, notifier=notifier
        )
        telling = asyncio.create_task(notifier.run())
        await control.step()
        for change in (begin, stop):
            shop.log.transact(change)
            await control.step()
            view = await control.wait_for_change(0, 1.0)
            assert view is not None
            assert view.sequence == shop.log.refresh().sequence
        is_open.set()
        telling.cancel()

    asyncio.run(life())


def test_a_new_controller_tells_the_newest_transition_again_while_it_is_news(
    local_root: Root, webhook: Webhook
) -> None:
    shop = Shop(local_root, webhook.url)
    shop.live(begin)
    shop.log.transact(stop)  # while no controller was there
    shop.live()
    shop.live()
    assert [body["sequence"] for body in webhook.bodies] == [5, 6, 6]
    shop.clock.advance(TELL_AGAIN_S + 1)
    shop.live()
    assert len(webhook.bodies) == 3


def test_a_slow_webhook_bounds_memory_by_losing_the_oldest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sent: list[int] = []

    def send(url: str, body: bytes, timeout_s: float) -> None:
        sent.append(json.loads(body)["sequence"])

    async def life() -> None:
        notifier = Notifier("https://chat.example/T0K3N", timeout_s=1.0, send=send)
        for sequence in range(MAX_WAITING + 2):
            notifier.tell({"sequence": sequence})
        telling = asyncio.create_task(notifier.run())
        while notifier.num_untold:
            await asyncio.sleep(0.005)
        telling.cancel()

    asyncio.run(life())
    assert sent == list(range(2, MAX_WAITING + 2))
    assert "webhook chat.example is too slow" in caplog.text
    assert "T0K3N" not in caplog.text


def test_a_redirect_is_an_error(webhook: Webhook) -> None:
    webhook.statuses = [302]
    with pytest.raises(OSError, match="302"):
        post(webhook.url, b"{}", 5.0)
