"""The log: record N is the object `ledger/%020d.json`, created only if absent.

    decide(State) -> Record -> put_if_absent(next sequence) -> Entry
                       ^------- lost the race: reread, decide anew

Whoever creates the object of a sequence number has appended that record; all others see it before
they decide again. So a decision is always about the state that directly precedes its record, and
neither a lock nor a database is needed.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from raysys.errors import LedgerCorruptError, StorageUnavailableError
from raysys.ledger.records import Entry, Record, decode, encode
from raysys.ledger.state import State
from raysys.storage import Root

LEDGER = "ledger"
_NUM_READERS = 16
_READ_AHEAD = 256


class Log:
    """One process's view of the ledger below a root. Threads may share it."""

    def __init__(self, root: Root, clock: Callable[[], float] = time.time) -> None:
        self._root = root
        self._clock = clock
        self._lock = threading.Lock()
        self._state = State()

    def refresh(self) -> State:
        """Reads the records that are new since the last call, and returns the state after them.

        Raises:
          LedgerCorruptError: A record is missing, cannot be read, or may not come where it stands.
        """
        state = self._state
        if state.sequence == 0:
            for entry in self.entries():
                state = state.apply(entry)
        while (new := self._read(state.sequence + 1)) is not None:
            state = state.apply(new)
        return self._keep(state)

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
                    f"{self._root.uri}/{_path(lost)} exists and cannot be read; try again later"
                )
            record = decide(state)
            if record is None:
                return None
            if problem := state.problem(record):
                raise AssertionError(f"refused to append a record that {problem}")
            lost = state.sequence + 1
            data = encode(Entry(sequence=lost, at=self._clock(), record=record))
            if self._root.put_if_absent(_path(lost), data):
                # Read back what was written, so that this state is the one that others fold.
                entry = decode(data, sequence=lost)
                self._keep(state.apply(entry))
                return entry

    def entries(self) -> Iterator[Entry]:
        """Yields all entries that exist when it is called, from the first.

        Raises:
          LedgerCorruptError: A record is missing or cannot be read.
        """
        last = self._last_sequence()
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            for start in range(1, last + 1, _READ_AHEAD):
                sequences = range(start, min(start + _READ_AHEAD, last + 1))
                for sequence, entry in zip(sequences, pool.map(self._read, sequences), strict=True):
                    if entry is None:
                        raise LedgerCorruptError(
                            f"ledger record {sequence} is missing although record {last} exists; "
                            f"restore {self._root.uri}/{_path(sequence)} from a backup"
                        )
                    yield entry

    def _last_sequence(self) -> int:
        pattern = re.compile(rf"{LEDGER}/(\d{{20}})\.json")
        matches = (pattern.fullmatch(info.path) for info in self._root.list(LEDGER))
        return max((int(match[1]) for match in matches if match), default=0)

    def _read(self, sequence: int) -> Entry | None:
        try:
            data = self._root.read_bytes(_path(sequence))
        except FileNotFoundError:
            return None
        return decode(data, sequence=sequence)

    def _keep(self, state: State) -> State:
        with self._lock:
            if state.sequence > self._state.sequence:
                self._state = state
            return self._state


def _path(sequence: int) -> str:
    return f"{LEDGER}/{sequence:020d}.json"
