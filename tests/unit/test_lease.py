"""The lease: one updater at a time, and the work of a dead one is taken over."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from raysys.errors import (
    DataError,
    EmptyPlanError,
    LeaseHeldError,
    LeaseLostError,
    StorageUnavailableError,
)
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.ledger.records import LeaseRenewed, UpdateAbandoned, UpdateStarted
from raysys.ledger.state import State
from raysys.storage import Root
from tests.helpers import FakeClock, committed, partition, renewed, started

FIRST = started("u0001-aaaaaa")
SECOND = started("u0002-bbbbbb")
HOUR_S = 3600.0


class Silent(Lease):
    """Renews only when the test says so: real time must not pass for a fake clock."""

    def _beat(self) -> None:
        pass


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make(root: Root, clock: FakeClock) -> Iterator[Callable[..., Lease]]:
    """Makes leases of updaters that share a clock."""
    leases: list[Lease] = []

    def build(
        owner: str = "host:1",
        duration_s: float = 4 * HOUR_S,
        sleep: Callable[[float], None] = clock.sleep,
    ) -> Lease:
        log = Log(Root(root.uri), clock)
        lease = Silent(
            log, owner=owner, duration_s=duration_s, clock=clock, monotonic=clock, sleep=sleep
        )
        leases.append(lease)
        return lease

    yield build
    for lease in leases:
        lease.__exit__(None, None, None)


def active_id(root: Root) -> str | None:
    active = Log(root).refresh().active
    return active.update_id if active else None


def reasons(root: Root) -> list[str]:
    return [update.reason for update in Log(root).refresh().abandoned]


class TestOneUpdater:
    def test_start_sets_owner_and_expiry(
        self, make: Callable[..., Lease], root: Root, clock: FakeClock
    ) -> None:
        record = make("host:9").start(lambda state: FIRST)
        assert record.owner == "host:9" and record.lease_expires_at == clock() + 4 * HOUR_S
        active = Log(root).refresh().active
        assert active is not None and active.started == record

    def test_a_renewal_moves_the_expiry(
        self, make: Callable[..., Lease], root: Root, clock: FakeClock
    ) -> None:
        lease = make()
        lease.start(lambda state: FIRST)
        clock.advance(100)
        lease.renew()
        active = Log(root).refresh().active
        assert active is not None and active.lease_expires_at == clock() + 4 * HOUR_S

    def test_a_commit_ends_the_lease(self, make: Callable[..., Lease], root: Root) -> None:
        with make() as lease:
            record = lease.start(lambda state: FIRST)
            assert lease.commit(committed(record)).sequence == 2
            lease.renew()
            lease.check()
        state = Log(root).refresh()
        assert state.active is None and len(state.committed) == 1 and state.abandoned == ()
        assert state.sequence == 2

    def test_the_next_update_may_start_after_a_commit(
        self, make: Callable[..., Lease], root: Root
    ) -> None:
        with make() as lease:
            lease.commit(committed(lease.start(lambda state: FIRST)))
        make().start(lambda state: started("u0002-bbbbbb", partitions=(partition("2017-03-02"),)))
        assert active_id(root) == "u0002-bbbbbb"

    def test_a_decision_that_raises_leaves_no_lease(
        self, make: Callable[..., Lease], root: Root
    ) -> None:
        def nothing_new(state: State) -> NoReturn:
            raise EmptyPlanError("nothing new")

        with pytest.raises(EmptyPlanError), make() as lease:
            lease.start(nothing_new)
        assert Log(root).refresh().sequence == 0


class TestFailure:
    def test_an_error_of_ours_abandons_with_its_message(
        self, make: Callable[..., Lease], root: Root
    ) -> None:
        with pytest.raises(DataError), make() as lease:
            lease.start(lambda state: FIRST)
            raise DataError("no usable\nrows")
        assert active_id(root) is None and reasons(root) == ["DataError: no usable rows"]

    def test_an_error_of_a_library_does_not_bring_its_message_into_the_ledger(
        self, make: Callable[..., Lease], root: Root
    ) -> None:
        with pytest.raises(ValueError, match="alice"), make() as lease:
            lease.start(lambda state: FIRST)
            raise ValueError("cannot parse alice@example.com")
        assert reasons(root) == ["ValueError; see the job's log"]

    def test_an_interrupt_abandons(self, make: Callable[..., Lease], root: Root) -> None:
        with pytest.raises(KeyboardInterrupt), make() as lease:
            lease.start(lambda state: FIRST)
            raise KeyboardInterrupt
        assert active_id(root) is None

    def test_leaving_without_a_commit_abandons(
        self, make: Callable[..., Lease], root: Root
    ) -> None:
        with make() as lease:
            lease.start(lambda state: FIRST)
        assert reasons(root) == ["ended without a commit"]

    def test_an_error_after_the_commit_abandons_nothing(
        self, make: Callable[..., Lease], root: Root
    ) -> None:
        with pytest.raises(DataError), make() as lease:
            lease.commit(committed(lease.start(lambda state: FIRST)))
            raise DataError("cannot clean up")
        assert reasons(root) == [] and len(Log(root).refresh().committed) == 1

    def test_abandoning_through_a_dead_store_keeps_the_first_error(
        self, local_root: Root, clock: FakeClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = Moody(local_root.uri)
        with (
            pytest.raises(DataError, match="no rows"),
            Lease(Log(root, clock), owner="a", duration_s=HOUR_S, clock=clock) as lease,
        ):
            lease.start(lambda state: FIRST)
            root.is_dead = True
            raise DataError("no rows")
        assert "u0001-aaaaaa stays active until its lease expires" in caplog.text

    def test_a_commit_whose_answer_was_lost_is_not_abandoned(
        self, local_root: Root, clock: FakeClock
    ) -> None:
        class AnswerLost(Root):
            def put_if_absent(self, path: str, data: bytes) -> bool:
                created = super().put_if_absent(path, data)
                if b"UpdateCommitted" in data:
                    raise StorageUnavailableError("no answer")
                return created

        log = Log(AnswerLost(local_root.uri), clock)
        with (
            pytest.raises(StorageUnavailableError),
            Lease(log, owner="a", duration_s=HOUR_S, clock=clock) as lease,
        ):
            lease.commit(committed(lease.start(lambda state: FIRST)))
        state = Log(local_root).refresh()
        assert len(state.committed) == 1 and state.abandoned == ()


class Moody(Root):
    """A store that answers only while it is alive."""

    is_dead = False

    def read_bytes(self, path: str) -> bytes:
        if self.is_dead:
            raise StorageUnavailableError("no answer")
        return super().read_bytes(path)


class TestSecondUpdater:
    def test_is_refused_as_soon_as_the_first_renews(
        self, make: Callable[..., Lease], root: Root, clock: FakeClock
    ) -> None:
        first = make("host:1", duration_s=20)
        first.start(lambda state: FIRST)
        begin = clock()

        def sleep(seconds: float) -> None:
            clock.advance(seconds)
            if clock() >= begin + 5:
                first.renew()

        with pytest.raises(LeaseHeldError, match=r"u0001-aaaaaa is being run by host:1 \(renewed"):
            make("host:2", duration_s=20, sleep=sleep).start(lambda state: SECOND)
        assert clock() < begin + 7 and active_id(root) == "u0001-aaaaaa"

    def test_takes_over_a_silent_one_once_its_lease_expired(
        self, make: Callable[..., Lease], root: Root, clock: FakeClock
    ) -> None:
        make("host:1", duration_s=20).start(lambda state: FIRST)
        begin = clock()
        make("host:2", duration_s=20).start(lambda state: SECOND)
        assert begin + 20 <= clock() < begin + 22
        assert active_id(root) == "u0002-bbbbbb" and reasons(root) == ["lease expired"]

    def test_watches_even_one_that_fell_silent_long_ago_for_as_long_as_that_one_declared(
        self, make: Callable[..., Lease], root: Root, clock: FakeClock
    ) -> None:
        make(duration_s=20).start(lambda state: FIRST)
        clock.advance(1000)
        before = clock()
        make("host:2").start(lambda state: SECOND)
        assert before + 20 <= clock() < before + 22 and active_id(root) == "u0002-bbbbbb"

    def test_that_renews_with_a_clock_that_stands_still_keeps_its_lease(
        self, make: Callable[..., Lease], root: Root, clock: FakeClock
    ) -> None:
        stuck = FakeClock()
        first = Silent(Log(root, stuck), owner="host:1", duration_s=20, clock=stuck)
        first.start(lambda state: FIRST)

        def sleep(seconds: float) -> None:
            clock.advance(seconds)
            first.renew()

        with pytest.raises(LeaseHeldError):
            make("host:2", sleep=sleep).start(lambda state: SECOND)
        first.abandon("the test is over")

    def test_starts_if_the_first_commits_while_it_waits(
        self, make: Callable[..., Lease], root: Root, clock: FakeClock
    ) -> None:
        first = make(duration_s=20)
        record = first.start(lambda state: FIRST)

        def sleep(seconds: float) -> None:
            clock.advance(seconds)
            if not Log(root).refresh().committed:
                first.commit(committed(record))

        next_day = started("u0002-bbbbbb", partitions=(partition("2017-03-02"),))
        make("host:2", sleep=sleep).start(lambda state: next_day)
        assert active_id(root) == "u0002-bbbbbb" and reasons(root) == []

    def test_decides_on_the_state_without_the_one_it_gave_up(
        self, make: Callable[..., Lease], clock: FakeClock
    ) -> None:
        make(duration_s=20).start(lambda state: FIRST)
        seen: list[State] = []

        def decide(state: State) -> UpdateStarted:
            seen.append(state)
            return SECOND

        make("host:2").start(decide)
        assert seen[-1].active is None and seen[-1].spends[0][2] == "abandoned"

    def test_that_renews_between_expiry_and_takeover_keeps_its_lease(
        self, root: Root, make: Callable[..., Lease], clock: FakeClock
    ) -> None:
        make("host:1", duration_s=20).start(lambda state: FIRST)
        rival = Log(Root(root.uri), clock)

        class Late(Root):
            """Lets the owner renew just before the takeover is written."""

            def put_if_absent(self, path: str, data: bytes) -> bool:
                if b"UpdateAbandoned" in data:
                    rival.transact(lambda state: renewed(lease_expires_at=clock() + 20))
                return super().put_if_absent(path, data)

        log = Log(Late(root.uri), clock)
        times: dict[str, Any] = {"clock": clock, "monotonic": clock, "sleep": clock.sleep}
        lease = Silent(log, owner="b", duration_s=20, **times)
        with pytest.raises(LeaseHeldError):
            lease.start(lambda state: SECOND)
        assert active_id(root) == "u0001-aaaaaa"

    def test_of_eight_that_wait_for_a_dead_one_exactly_one_starts(
        self, make: Callable[..., Lease], root: Root, clock: FakeClock
    ) -> None:
        make(duration_s=20).start(lambda state: FIRST)
        barrier, done, outcomes = threading.Barrier(8), threading.Barrier(8), []

        def contend(i: int) -> None:
            own = FakeClock()

            def sleep(seconds: float) -> None:
                own.advance(20)
                barrier.wait()  # all have seen the dead one, and all have waited

            times: dict[str, Any] = {"clock": own, "monotonic": own, "sleep": sleep}
            log = Log(Root(root.uri), own)
            with Lease(log, owner=f"host:{i}", duration_s=4 * HOUR_S, **times) as lease:
                try:
                    lease.start(lambda state: started(f"u0002-{i:06d}"))
                    outcomes.append("started")
                except LeaseHeldError:
                    outcomes.append("refused")
                done.wait()  # who started holds its lease until all have tried

        threads = [threading.Thread(target=contend, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["refused"] * 7 + ["started"]
        assert reasons(root) == ["lease expired", "ended without a commit"]


class ComparesClocks(Silent):
    """Broken for a negative control: the rule of before, which trusts that all clocks agree."""

    def _take_over(self) -> None:
        seen = self._log.refresh().active
        if seen is not None and seen.lease_expires_at <= self._clock():
            self._log.transact(lambda state: self._expired(state, seen))
        super()._take_over()


class TestClockSkew:
    """Two hosts whose wall clocks are an hour apart; real time passes alike for both."""

    @staticmethod
    def host(
        root: Root,
        time_: FakeClock,
        skew_s: float,
        sleep: Callable[[float], None],
        lease_class: type[Lease] = Silent,
    ) -> Lease:
        def clock() -> float:
            return time_() + skew_s

        log = Log(Root(root.uri), clock)
        return lease_class(
            log, owner=f"host:{skew_s:.0f}", duration_s=20, clock=clock, monotonic=time_,
            sleep=sleep,
        )  # fmt: skip

    @pytest.mark.parametrize("skew_s", [HOUR_S, -HOUR_S], ids=["ahead", "behind"])
    @pytest.mark.parametrize("waits_first_s", [0.0, 19.9], ids=["fresh", "almost-expired"])
    def test_a_live_updater_is_never_robbed(
        self, root: Root, clock: FakeClock, skew_s: float, waits_first_s: float
    ) -> None:
        with self.host(root, clock, 0.0, clock.sleep) as live:
            live.start(lambda state: FIRST)
            clock.advance(waits_first_s)
            renewed_at = clock()

            def sleep(seconds: float) -> None:
                clock.advance(seconds)
                if clock() >= renewed_at + 5:
                    live.renew()

            word = "behind" if skew_s > 0 else "ahead"
            with (
                self.host(root, clock, skew_s, sleep) as other,
                pytest.raises(LeaseHeldError, match=rf"its clock is 3600 s {word}\); wait"),
            ):
                other.start(lambda state: SECOND)
            live.commit(committed(FIRST))
        state = Log(root).refresh()
        assert [c.update_id for c in state.committed] == ["u0001-aaaaaa"]
        assert state.abandoned == ()

    @pytest.mark.parametrize("skew_s", [HOUR_S, -HOUR_S], ids=["ahead", "behind"])
    def test_a_dead_one_is_taken_over_after_its_duration(
        self, root: Root, clock: FakeClock, skew_s: float
    ) -> None:
        Log(root, clock).transact(lambda state: dataclasses.replace(FIRST, lease_expires_at=1020.0))
        begin = clock()
        with self.host(root, clock, skew_s, clock.sleep) as other:
            record = other.start(lambda state: SECOND)
            assert begin + 20 <= clock() < begin + 22
            other.commit(committed(record))
        state = Log(root).refresh()
        assert [c.update_id for c in state.committed] == ["u0002-bbbbbb"]
        assert [a.update_id for a in state.abandoned] == ["u0001-aaaaaa"]

    def test_comparing_clocks_would_rob_a_live_updater(self, root: Root, clock: FakeClock) -> None:
        """The negative control. Even then nothing counts twice: who was robbed cannot commit."""
        with self.host(root, clock, 0.0, clock.sleep) as live:
            live.start(lambda state: FIRST)
            with self.host(root, clock, HOUR_S, clock.sleep, ComparesClocks) as thief:
                record = thief.start(lambda state: SECOND)
                with pytest.raises(LeaseLostError):
                    live.commit(committed(FIRST))
                thief.commit(committed(record))
        assert [c.update_id for c in Log(root).refresh().committed] == ["u0002-bbbbbb"]


class TestLostLease:
    @pytest.fixture
    def lost(self, make: Callable[..., Lease], clock: FakeClock) -> Lease:
        """The lease of an updater that was given up while its host slept."""
        lease = make("host:1")
        lease.start(lambda state: FIRST)
        make("host:2", sleep=lambda _: clock.advance(5 * HOUR_S)).start(lambda state: SECOND)
        return lease

    def test_cannot_commit_and_writes_nothing(self, lost: Lease, root: Root) -> None:
        before = Log(root).refresh().sequence
        with pytest.raises(LeaseLostError, match="u0001-aaaaaa was silent for 14400 s"):
            lost.commit(committed(FIRST))
        assert Log(root).refresh().sequence == before and active_id(root) == "u0002-bbbbbb"

    def test_cannot_renew(self, lost: Lease, root: Root) -> None:
        with pytest.raises(LeaseLostError):
            lost.renew()

    def test_does_not_abandon_its_successor(self, lost: Lease, root: Root) -> None:
        lost.abandon("too late")
        assert active_id(root) == "u0002-bbbbbb" and reasons(root) == ["lease expired"]

    def test_that_comes_back_consumes_each_file_once(self, lost: Lease, root: Root) -> None:
        with pytest.raises(LeaseLostError):
            lost.commit(committed(FIRST))
        Log(root).transact(lambda state: committed(SECOND))
        with pytest.raises(LeaseLostError):
            lost.commit(committed(FIRST))
        assert [c.update_id for c in Log(root).refresh().committed] == ["u0002-bbbbbb"]


class TestHeartbeat:
    def test_renews_by_itself(self, root: Root) -> None:
        with Lease(Log(root), owner="a", duration_s=0.4) as lease:
            lease.start(lambda state: FIRST)
            wait_until(lambda: num_renewals(root) >= 2)
            lease.check()
            lease.commit(committed(FIRST))
        count = num_renewals(root)
        time.sleep(0.25)
        assert num_renewals(root) == count

    def test_tells_check_that_the_lease_is_lost(self, local_root: Root) -> None:
        with Lease(Log(local_root), owner="a", duration_s=0.2) as lease:
            lease.start(lambda state: FIRST)
            Log(local_root).transact(
                lambda state: UpdateAbandoned(update_id="u0001-aaaaaa", reason="lease expired")
            )
            with pytest.raises(LeaseLostError):
                wait_until(lambda: lease.check() is not None)

    def test_goes_on_after_the_store_was_silent(self, local_root: Root) -> None:
        root = Moody(local_root.uri)
        with Lease(Log(root), owner="a", duration_s=0.2) as lease:
            lease.start(lambda state: FIRST)
            root.is_dead = True
            time.sleep(0.3)
            root.is_dead = False
            count = num_renewals(local_root)
            wait_until(lambda: num_renewals(local_root) > count)
            lease.check()


def num_renewals(root: Root) -> int:
    return sum(isinstance(entry.record, LeaseRenewed) for entry in Log(root).entries())


def wait_until(is_so: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


RUN_UPDATE = """
import sys, time
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.storage import Root
from tests.helpers import started
with Lease(Log(Root(sys.argv[1])), owner="other:1", duration_s=2.0) as lease:
    lease.start(lambda state: started("u0001-aaaaaa"))
    print("started", flush=True)
    time.sleep(60)
"""


def test_a_second_process_holds_its_lease_while_it_lives_and_loses_it_after_kill_9(
    root: Root,
) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", RUN_UPDATE, root.uri],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "started\n"
        with Lease(Log(root), owner="me:2", duration_s=2.0) as lease:
            with pytest.raises(LeaseHeldError, match=r"by other:1 \(renewed just now\)"):
                lease.start(lambda state: SECOND)
            os.kill(other.pid, signal.SIGKILL)
            other.wait(10)
            record = lease.start(lambda state: SECOND)
            lease.commit(committed(record))
    finally:
        other.kill()
        other.communicate()
    state = Log(root).refresh()
    assert [c.update_id for c in state.committed] == ["u0002-bbbbbb"]
    assert reasons(root) == ["lease expired"]
    assert [(name, status) for name, _, status in state.spends] == [
        ("u0001-aaaaaa", "abandoned"),
        ("u0002-bbbbbb", "committed"),
    ]
