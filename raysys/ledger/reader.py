"""Reads records from the store: a long way in parallel, the tail one by one.

    follow(0)      LIST the names after 0 -> GET many at a time -> GET on until there is none
    follow(41)     GET 42 -> there is none

A listing only says how far to read at once. One that lags, and shows fewer records than exist, does
no harm; one that shows a record after a missing one proves that the ledger was damaged.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from raysys.errors import LedgerCorruptError
from raysys.ledger.records import Entry, decode
from raysys.storage import Root

LEDGER = "ledger"
NAME = re.compile(r"(\d{20})\.json")
_NUM_READERS = 16
_PER_READER = 16
"""Records that a thread reads at a time: handing one over costs more than a local read."""
_READ_AHEAD = 16 * _NUM_READERS * _PER_READER
_Found = tuple[int, Entry | LedgerCorruptError | None]
_FEW = 16
"""So many records are read one by one before a listing is worth its price."""


def record_path(sequence: int) -> str:
    """Returns where a record lies below the root."""
    return f"{LEDGER}/{sequence:020d}.json"


class Reader:
    """The records below a root. Threads may share it."""

    def __init__(self, root: Root) -> None:
        self._root = root

    def read(self, sequence: int) -> Entry | None:
        """Returns one record, None if there is none.

        Raises:
          LedgerCorruptError: It cannot be read, or was changed after it was written.
        """
        try:
            data = self._root.read_bytes(record_path(sequence))
        except FileNotFoundError:
            return None
        return decode(data, sequence=sequence)

    def follow(self, sequence: int, *, is_far: bool) -> Iterator[Entry]:
        """Yields all records after `sequence`, in order.

        Args:
          is_far: Whether many are expected, so that listing them first pays.

        Raises:
          LedgerCorruptError: A record is missing or cannot be read.
        """
        num_single = _FEW if is_far else 0
        while True:
            if num_single == _FEW:
                num_single = 0
                for entry in self._listed(sequence):
                    yield entry
                    sequence = entry.sequence
            found = self.read(sequence + 1)
            if found is None:
                return
            yield found
            sequence, num_single = sequence + 1, num_single + 1

    def _listed(self, sequence: int) -> Iterator[Entry]:
        names = self._root.list_names(LEDGER, after=f"{sequence:020d}.json")
        last = max((int(m[1]) for m in map(NAME.fullmatch, names) if m), default=sequence)
        for start in range(sequence + 1, last + 1, _READ_AHEAD):
            end = min(start + _READ_AHEAD, last + 1)
            parts = [
                range(part, min(part + _PER_READER, end)) for part in range(start, end, _PER_READER)
            ]
            # No pool stays open over a yield: a generator that is given up is closed by the garbage
            # collector, in whichever thread that runs, and joining threads there can deadlock.
            with ThreadPoolExecutor(_NUM_READERS) as pool:
                found = list(pool.map(self._read_all, parts))
            yield from self._present(itertools.chain.from_iterable(found), last)

    def _read_all(self, sequences: Sequence[int]) -> list[_Found]:
        return [(sequence, self._try_to_read(sequence)) for sequence in sequences]

    def _try_to_read(self, sequence: int) -> Entry | LedgerCorruptError | None:
        try:
            return self.read(sequence)
        except LedgerCorruptError as error:
            return error  # raised in its turn: those before it are good

    def _present(self, found: Iterable[_Found], last: int) -> Iterator[Entry]:
        for sequence, entry in found:
            if isinstance(entry, LedgerCorruptError):
                raise entry
            if entry is None:
                raise LedgerCorruptError(
                    f"ledger record {sequence} is missing although record {last} exists; restore "
                    f"{self._root.uri}/{record_path(sequence)} from a backup"
                )
            yield entry
