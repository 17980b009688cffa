"""Snapshots: the state as of a record, so that a reader need not start from the first.

    ledger/snapshots/00000000000000000512.json    the state that records 1 to 512 fold to

A snapshot is a cache and never the truth. It is used only if it is whole, of this schema, and made
from the very record that stands in its place now; else the fold starts earlier. Whoever appends
writes one now and then, and no append fails because that failed.
"""

from __future__ import annotations

import json
import logging
import threading

from raysys.errors import RaysysError
from raysys.ledger.codec import class_reviver, fingerprint
from raysys.ledger.reader import LEDGER, NAME, Reader
from raysys.ledger.seal import broken_seal, seal
from raysys.ledger.state import State
from raysys.storage import Root

SNAPSHOTS = f"{LEDGER}/snapshots"
INTERVAL = 256
"""Records between two. So many are read in 0.01 s from a disk and in about 1 s from an S3 server on
two busy cores, and with a heartbeat every 5 s a snapshot is written every 20 minutes."""
NUM_KEPT = 2
"""The newest, and the one before for who is just reading it."""
SCHEMA = f"1-{fingerprint(State)}"
"""Raise the number when the same records fold to another state than before. The rest follows the
state's fields by itself. A snapshot of another schema is ignored."""

_logger = logging.getLogger(__name__)


def snapshot_path(sequence: int) -> str:
    """Returns where the snapshot as of a record lies below the root."""
    return f"{SNAPSHOTS}/{sequence:020d}.json"


class Snapshots:
    """The snapshots below a root. Threads may share it."""

    def __init__(self, root: Root, reader: Reader) -> None:
        self._root = root
        self._reader = reader
        self._newest = 0
        self._writing = threading.Lock()

    def load(self) -> State:
        """Returns the newest state that can be trusted, the empty one if there is none.

        Raises:
          LedgerCorruptError: The record that a snapshot was made from cannot be read.
        """
        for sequence in reversed(self.sequences()):
            state, problem = self.open(sequence)
            if state is not None:
                self._newest = sequence
                return state
            _logger.warning("%s is ignored: it %s", self._uri(sequence), problem)
        return State()

    def sequences(self) -> list[int]:
        """Returns the records of which there are snapshots, in order."""
        matches = map(NAME.fullmatch, self._root.list_names(SNAPSHOTS))
        return [int(match[1]) for match in matches if match]

    def open(self, sequence: int) -> tuple[State | None, str]:
        """Returns a snapshot's state, or None and why it must not be used.

        Raises:
          LedgerCorruptError: The record that it was made from cannot be read.
        """
        try:
            state = _decode(self._root.read_bytes(snapshot_path(sequence)))
        except FileNotFoundError:
            return None, "was removed meanwhile"
        except _UnusableError as error:
            return None, str(error)
        if state.sequence != sequence:
            return None, f"is that of record {state.sequence}"
        entry = self._reader.read(sequence)
        if entry is None or entry.hash != state.hash:
            return None, f"was made from another record {sequence} than there is"
        return state, ""

    def write_if_due(self, state: State) -> None:
        """Writes the snapshot of a state if enough records lie after the newest. Best effort."""
        if state.sequence - self._newest < INTERVAL or not self._writing.acquire(blocking=False):
            return
        try:
            self._newest = max(s for s in (0, *self.sequences()) if s <= state.sequence)
            if state.sequence - self._newest >= INTERVAL:
                self._root.put(snapshot_path(state.sequence), _encode(state))
                self._newest = state.sequence
                for old in self.sequences()[:-NUM_KEPT]:
                    self._root.delete_prefix(snapshot_path(old))
        except RaysysError as error:
            _logger.warning("no snapshot as of record %d: %s", state.sequence, error)
        finally:
            self._writing.release()

    def _uri(self, sequence: int) -> str:
        return f"{self._root.uri}/{snapshot_path(sequence)}"


class _UnusableError(Exception):
    pass


def _encode(state: State) -> bytes:
    return seal({"snapshot_schema": SCHEMA, "state": state})


def _decode(data: bytes) -> State:
    if problem := broken_seal(data):
        raise _UnusableError(problem)
    try:
        body = json.loads(data)
        if (schema := body.get("snapshot_schema")) != SCHEMA:
            raise _UnusableError(f"has schema {schema}, not {SCHEMA}")
        state: State = class_reviver(State)(body["state"])
        return state
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _UnusableError(f"cannot be read ({type(error).__name__}: {error})") from error
