"""The log: record N is the object `ledger/%020d.json`, created only if absent.

    decide(State) -> Record -> put_if_absent(next sequence) -> Entry
                       ^------- lost the race: reread, decide anew

Whoever creates the object of a sequence number has appended that record; all others see it before
they decide again. So a decision is always about the state that directly precedes its record, and
neither a lock nor a database is needed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from raysys.errors import StorageUnavailableError
from raysys.ledger.reader import Reader, record_path
from raysys.ledger.records import Entry, Record, decode, encode
from raysys.ledger.snapshots import Snapshots
from raysys.ledger.state import State, fold
from raysys.storage import Root


class Log:
    """One process's view of the ledger below a root. Threads may share it."""

    def __init__(self, root: Root, clock: Callable[[], float] = time.time) -> None:
        self._root = root
        self._clock = clock
        self._lock = threading.Lock()
        self._reader = Reader(root)
        self._snapshots = Snapshots(root, self._reader)
        self._state = State()

    def refresh(self) -> State:
        """Reads the records that are new since the last call, and returns the state after them.

        Raises:
          LedgerCorruptError: A record is missing, cannot be read, was changed after it was written,
            or may not come where it stands.
        """
        state = self._state
        is_far = state.sequence == 0
        if is_far:
            state = self._snapshots.load()
        return self._keep(fold(self._reader.follow(state.sequence, is_far=is_far), state))

    def transact(self, decide: Callable[[State], Record | None]) -> Entry | None:
        """Appends what `decide` makes of the newest state.

        `decide` runs again on the newer state whenever another writer was faster, so it must not
        have effects. It returns None to append nothing, or raises, and nothing is written either.

        Returns:
          The entry that was appended, None if `decide` returned None.
        """
        lost = 0
        while True:
            state = self.refresh()
            if state.sequence < lost:
                raise StorageUnavailableError(
                    f"{self._root.uri}/{record_path(lost)} exists and cannot be read; try again "
                    "later"
                )
            record = decide(state)
            if record is None:
                return None
            if problem := state.problem(record):
                raise AssertionError(f"refused to append a record that {problem}")
            lost = state.sequence + 1
            data = encode(Entry(sequence=lost, at=self._clock(), record=record, prev=state.hash))
            if self._root.put_if_absent(record_path(lost), data):
                # Read back what was written, so that this state is the one that others fold.
                entry = decode(data, sequence=lost)
                self._snapshots.write_if_due(self._keep(state.apply(entry)))
                return entry

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """Yields all entries after a sequence number, from the first by default.

        Raises:
          LedgerCorruptError: A record is missing, cannot be read, or was changed after it was
            written.
        """
        return self._reader.follow(after, is_far=True)

    def _keep(self, state: State) -> State:
        with self._lock:
            if state.sequence > self._state.sequence:
                self._state = state
            return self._state
