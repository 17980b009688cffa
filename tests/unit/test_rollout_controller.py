"""The controller without Ray: it follows, judges, decides once, and survives."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from raysys.config import RolloutConfig
from raysys.errors import StorageUnavailableError
from raysys.ledger.log import Log
from raysys.ledger.records import Record, RolloutChanged
from raysys.ledger.state import State
from raysys.rollout.controller import Control
from raysys.rollout.counters import VersionCounters
from raysys.rollout.reports import Conversion, ReplicaReport
from raysys.rollout.state import abort, promote, start
from raysys.storage import Root
from tests.helpers import FakeClock, committed, started

CONFIG = RolloutConfig(min_requests=200, interval_s=2.0, deadline_s=600.0)


class Shop:
    """A ledger with two versions, of which the second is on trial, and a controller."""

    def __init__(self, root: Root, config: RolloutConfig = CONFIG) -> None:
        self.clock = FakeClock()
        self.log = Log(root, clock=self.clock)
        for number in (1, 2):
            begun = started(f"u000{number}-aaaaa{number}", partitions=())
            self.append(begun)
            self.append(committed(begun, version=f"v{number}"))
        self.control = Control(Log(root, clock=self.clock), config, clock=self.clock)
        self.root, self.config = root, config

    def append(self, record: Record) -> None:
        self.log.transact(lambda state: record)

    def start(self) -> None:
        self.log.transact(lambda s: start(s, "v2", weight_fraction=0.2, actor="operator"))

    @property
    def rollout(self) -> RolloutChanged:
        rollout = self.log.refresh().rollout
        assert rollout is not None
        return rollout


@pytest.fixture
def shop(local_root: Root) -> Shop:
    return Shop(local_root)


def report(
    requests: int = 4000,
    *,
    bad: int = 0,
    converted: int = 800,
    rollout_id: str = "r0001",
    refusal: str | None = None,
) -> ReplicaReport:
    """Canary and stable alike, but for `bad` and `converted` of the canary."""

    def spread(total: int) -> Any:
        counts = VersionCounters.zeros().num_requests
        counts[1] += total // 100
        return counts

    canary = VersionCounters.of(
        num_requests=spread(requests), num_bad=spread(bad), num_matured=spread(requests)
    )
    stable = VersionCounters.of(num_requests=spread(requests), num_matured=spread(requests))
    conversions = [Conversion(f"c{i}", "canary", i % 100) for i in range(converted)]
    conversions += [Conversion(f"s{i}", "stable", i % 100) for i in range(800)]
    return ReplicaReport(
        replica_id="replica-1",
        rollout_id=rollout_id,
        canary=canary,
        stable=stable,
        conversions=tuple(conversions),
        first_conversion=0,
        refusal=refusal,
    )


async def observe(shop: Shop, *reports: ReplicaReport) -> None:
    """One second of the controller's life, in which these reports arrive."""
    await shop.control.step()
    for each in reports:
        await shop.control.report(each)
    shop.clock.advance(shop.config.interval_s)
    await shop.control.step()


def test_an_equal_canary_with_enough_traffic_is_promoted_with_its_measurement(shop: Shop) -> None:
    shop.start()
    asyncio.run(observe(shop, report()))
    found = shop.rollout
    assert (found.phase, found.stable, found.previous) == ("promoted", "v2", "v1")
    assert found.actor == "controller"
    assert found.measurement is not None
    assert found.measurement["canary"]["num_requests"] == 4000


def test_a_canary_that_fails_too_often_is_rolled_back(shop: Shop) -> None:
    shop.start()
    asyncio.run(observe(shop, report(bad=400)))
    assert (shop.rollout.phase, shop.rollout.stable) == ("rolled_back", "v1")
    assert "400 of 4000 canary answers" in shop.rollout.reason


def test_a_canary_that_converts_less_is_rolled_back(shop: Shop) -> None:
    shop.start()
    asyncio.run(observe(shop, report(converted=400)))
    assert shop.rollout.phase == "rolled_back"
    assert "400 of 4000 canary answers" in shop.rollout.reason


def test_too_little_traffic_waits_until_the_deadline(shop: Shop) -> None:
    shop.start()
    asyncio.run(observe(shop, report(100)))
    assert shop.rollout.phase == "canary"
    measurement = shop.control.measurement()
    assert measurement is not None
    assert measurement["phase"] == "inconclusive"
    shop.clock.advance(600)
    asyncio.run(observe(shop))
    assert shop.rollout.phase == "rolled_back"
    assert "still inconclusive after" in shop.rollout.reason


def test_the_age_of_a_rollout_survives_the_controller(shop: Shop) -> None:
    shop.start()
    shop.clock.advance(601)
    shop.control = Control(Log(shop.root), CONFIG, clock=shop.clock)
    asyncio.run(observe(shop))
    assert shop.rollout.phase == "rolled_back"


def test_a_canary_that_a_replica_refuses_is_rolled_back_at_once(shop: Shop) -> None:
    shop.start()

    async def refuse() -> None:
        await shop.control.step()
        for _ in range(3):  # replicas go on until they see the record
            await shop.control.report(report(0, refusal="version v2 cannot be served: NaN"))

    asyncio.run(refuse())
    assert (shop.rollout.phase, shop.rollout.reason) == (
        "rolled_back",
        "version v2 cannot be served: NaN",
    )
    assert len([e for e in shop.log.entries() if isinstance(e.record, RolloutChanged)]) == 2


def test_counts_of_another_rollout_are_not_taken(shop: Shop) -> None:
    shop.start()
    asyncio.run(observe(shop, report(bad=400, rollout_id="r0000")))
    assert shop.rollout.phase == "canary"


def test_an_operator_who_was_faster_prevails(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.start()

    async def race() -> None:
        await shop.control.step()
        await shop.control.report(report())
        shop.clock.advance(2)
        refresh = shop.control._log.refresh

        def late_refresh() -> State:
            state = refresh()
            monkeypatch.undo()
            shop.log.transact(lambda s: abort(s, actor="operator", reason="I said so"))
            return state

        monkeypatch.setattr(shop.control._log, "refresh", late_refresh)
        await shop.control.step()

    asyncio.run(race())
    assert (shop.rollout.phase, shop.rollout.actor) == ("rolled_back", "operator")


def test_an_unreadable_ledger_keeps_the_last_state(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("raysys.rollout.controller.REFRESH_INTERVAL_S", 0.01)
    shop.start()

    def unavailable() -> State:
        raise StorageUnavailableError("no answer in 5 s")

    async def outage() -> None:
        await shop.control.step()
        with monkeypatch.context() as patch:
            patch.setattr(shop.control._log, "refresh", unavailable)
            task = asyncio.create_task(shop.control.run())
            await asyncio.sleep(0.05)
            view = await shop.control.wait_for_change(0, 0.01)
            assert view is not None
            assert view.canary == "v2"
            assert not task.done()
        shop.log.transact(lambda s: promote(s, actor="operator", reason="better"))
        found = await shop.control.wait_for_change(view.sequence, 5.0)
        assert found is not None
        assert found.stable == "v2"
        task.cancel()

    asyncio.run(outage())
    assert "no answer in 5 s" in caplog.text


def test_a_long_poll_returns_with_the_change_and_not_before(shop: Shop) -> None:
    async def poll() -> None:
        await shop.control.step()
        view = await shop.control.wait_for_change(0, 1.0)
        assert view is not None
        assert (view.stable, view.canary, view.weight_fraction) == ("v1", None, 0.0)
        begun = time.monotonic()
        assert await shop.control.wait_for_change(view.sequence, 0.05) is None
        assert time.monotonic() - begun >= 0.05
        waiting = asyncio.create_task(shop.control.wait_for_change(view.sequence, 10.0))
        await asyncio.sleep(0.01)
        shop.start()
        await shop.control.step()
        found = await waiting
        assert found is not None
        assert (found.canary, found.weight_fraction, found.rollout_id) == ("v2", 0.2, "r0001")

    asyncio.run(poll())


def test_lease_records_wake_no_replica(shop: Shop) -> None:
    async def poll() -> None:
        await shop.control.step()
        view = await shop.control.wait_for_change(0, 1.0)
        assert view is not None
        shop.append(started("u0003-aaaaa3", partitions=()))
        await shop.control.step()
        assert await shop.control.wait_for_change(view.sequence, 0.05) is None

    asyncio.run(poll())


def test_before_the_ledger_was_read_a_poll_waits(tmp_path: Path) -> None:
    control = Control(Log(Root(tmp_path.as_uri())), CONFIG)
    assert asyncio.run(control.wait_for_change(0, 0.02)) is None
