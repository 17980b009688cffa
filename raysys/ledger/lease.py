"""The lease: one updater at a time, and a dead one's work is taken over.

    with Lease(log, owner="host:123", duration_s=20) as lease:
        started = lease.start(decide)
        ...                            # the heartbeat renews every quarter of the duration
        lease.commit(record)

Clocks of two hosts are never compared. A second updater takes over when the first one has written
nothing for as long as it declared that it might be silent, by the second one's own monotonic clock;
so it always waits that long. An updater that was given up all the same (its host slept) finds at
its next record that its update is not the active one, and cannot commit.

Source: the same rule as in Kubernetes' leader election and Amazon's DynamoDB lock client.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from raysys.errors import LeaseHeldError, LeaseLostError, RaysysError, StorageUnavailableError
from raysys.ledger.fold import ActiveUpdate
from raysys.ledger.log import Log
from raysys.ledger.records import (
    Entry,
    LeaseRenewed,
    PseudonymsRotated,
    UpdateAbandoned,
    UpdateCommitted,
    UpdateStarted,
)
from raysys.ledger.state import State

_logger = logging.getLogger(__name__)


class Lease:
    """Context manager around one update. Whatever ends the block without a commit abandons it."""

    def __init__(
        self,
        log: Log,
        *,
        owner: str,
        duration_s: float,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._log = log
        self._owner = owner
        self._duration_s = duration_s
        self._clock = clock
        self._monotonic = monotonic
        self._sleep = sleep
        self._started: UpdateStarted | None = None
        self._failure: Exception | None = None
        self._done = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abandon("ended without a commit" if exc is None else _reason(exc))
        self._stop()

    def start(self, decide: Callable[[State], UpdateStarted]) -> UpdateStarted:
        """Waits out a silent updater, then appends what `decide` makes of the state.

        `decide` may run more than once. Its record's `owner` and `lease_expires_at` are set here.

        Raises:
          LeaseHeldError: Another update is alive.
        """
        self._take_over()
        entry = self._log.transact(lambda state: self._leased(state, decide))
        assert entry is not None and isinstance(entry.record, UpdateStarted)
        self._started = entry.record
        self._heartbeat = threading.Thread(target=self._beat, name="raysys-lease", daemon=True)
        self._heartbeat.start()
        return entry.record

    def renew(self) -> None:
        """Appends one LeaseRenewed. The heartbeat calls it.

        Raises:
          LeaseLostError: Another updater took over.
        """
        self._log.transact(self._renewed)

    def check(self) -> None:
        """Raises what the heartbeat met, so that a lost update stops early.

        Raises:
          LeaseLostError: Another updater took over.
        """
        if self._failure is not None:
            raise self._failure

    def commit(self, record: UpdateCommitted | PseudonymsRotated) -> Entry:
        """Appends the commit, and with it ends the lease.

        Raises:
          LeaseLostError: This is not the active update any more; nothing was written.
          StorageUnavailableError: It is unknown whether the record was written. Running the same
            update again is safe in both cases.
        """

        def decide(state: State) -> UpdateCommitted | PseudonymsRotated:
            self._require_active(state)
            return record

        entry = self._log.transact(decide)
        assert entry is not None
        self._done.set()
        return entry

    def abandon(self, reason: str) -> None:
        """Frees the update's partitions if it is still active. Best effort: a lease expires."""
        if self._started is None or self._done.is_set():
            return
        update_id = self._started.update_id

        def decide(state: State) -> UpdateAbandoned | None:
            if state.active is None or state.active.update_id != update_id:
                return None
            return UpdateAbandoned(update_id=update_id, reason=reason)

        self._done.set()
        try:
            self._log.transact(decide)
        except RaysysError as error:
            _logger.warning("%s stays active until its lease expires: %s", update_id, error)

    def _take_over(self) -> None:
        seen = self._log.refresh().active
        seen_at = self._monotonic()
        active = seen
        while active is not None and _is_unrenewed(active, seen):
            # Only now that the newest records were read does the time count as silence.
            left_s = active.silence_s - (self._monotonic() - seen_at)
            if left_s <= 0:
                self._log.transact(lambda state: self._expired(state, seen))
                return
            self._sleep(min(left_s, self._duration_s / 8, 1.0))
            active = self._log.refresh().active
        if active is not None:
            raise self._held(active)

    def _expired(self, state: State, seen: ActiveUpdate | None) -> UpdateAbandoned | None:
        if state.active is None:
            return None
        if not _is_unrenewed(state.active, seen):
            raise self._held(state.active)
        return UpdateAbandoned(update_id=state.active.update_id, reason="lease expired")

    def _leased(self, state: State, decide: Callable[[State], UpdateStarted]) -> UpdateStarted:
        if state.active is not None:
            raise self._held(state.active)
        record = decide(state)
        # The clock is read after the decision, which may have taken long.
        expires_at = self._clock() + self._duration_s
        return dataclasses.replace(record, owner=self._owner, lease_expires_at=expires_at)

    def _renewed(self, state: State) -> LeaseRenewed | None:
        if self._done.is_set():
            return None
        return LeaseRenewed(
            update_id=self._require_active(state).update_id,
            owner=self._owner,
            lease_expires_at=self._clock() + self._duration_s,
        )

    def _require_active(self, state: State) -> ActiveUpdate:
        assert self._started is not None, "start() comes first"
        update_id = self._started.update_id
        if state.active is None or state.active.update_id != update_id:
            raise LeaseLostError(
                f"update {update_id} was silent for {self._duration_s:g} s and was given up; "
                "submit again (a longer lease.duration_s helps if this host pauses)"
            )
        return state.active

    def _held(self, active: ActiveUpdate) -> LeaseHeldError:
        # It wrote while this one looked on: its times say how the clocks differ, not how old it is.
        ahead_s = active.renewed_at - self._clock()
        skew = f"; its clock is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}"
        return LeaseHeldError(
            f"update {active.update_id} is being run by {active.owner} (renewed just now"
            f"{skew if abs(ahead_s) > self._duration_s else ''}); wait for it to end, then submit "
            "again"
        )

    def _beat(self) -> None:
        while not self._done.wait(self._duration_s / 4):
            try:
                self.renew()
            except StorageUnavailableError as error:
                # Nobody can take over through a store that does not answer, so it is not lost yet.
                _logger.warning("lease not renewed, will try again: %s", error)
            except Exception as error:
                if not self._done.is_set():
                    self._failure = error
                return

    def _stop(self) -> None:
        self._done.set()
        if self._heartbeat is not None:
            self._heartbeat.join()


def _reason(error: BaseException) -> str:
    # Messages of other libraries may quote rows, and a raw user id must not get below the root.
    detail = f": {error}" if isinstance(error, RaysysError) else "; see the job's log"
    return " ".join(f"{type(error).__name__}{detail}".split())[:500]


def _is_unrenewed(active: ActiveUpdate, seen: ActiveUpdate | None) -> bool:
    """Returns whether its updater has not renewed since it was `seen`.

    Permits of steps do not count: workers ask for them, for a while also those of a dead updater.
    """
    return seen is not None and active.renewed_in == seen.renewed_in
