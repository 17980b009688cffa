"""Verifies a ledger from its first record on, without trusting any snapshot.

records 1, 2, ... -> fold (hashes, order, rules) -> compare with each snapshot -> Verified
"""

from __future__ import annotations

import dataclasses
import hashlib
from itertools import islice

from raysys.errors import LedgerCorruptError
from raysys.ledger.reader import Reader
from raysys.ledger.records import KeptLoss
from raysys.ledger.snapshots import Snapshots, snapshot_path
from raysys.ledger.state import State, fold
from raysys.storage import Root


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """A ledger in which nothing is wrong."""

    num_records: int
    last_hash: str
    """Of the newest record. Kept elsewhere, it shows later whether any record up to it changed."""
    snapshots: tuple[int, ...]
    """Records of which there is a snapshot that says the same."""
    ignored: tuple[str, ...]
    """Snapshots, and the kept privacy loss, that no reader uses, each with the reason. They do no
    harm."""


def verify(root: Root) -> Verified:
    """Reads every record, every snapshot and the kept privacy loss.

    Raises:
      LedgerCorruptError: Names the first bad record, or a snapshot that would deceive a reader.
    """
    reader = Reader(root)
    snapshots = Snapshots(root, reader)
    entries = reader.follow(0, is_far=True)
    state, good, ignored = State(), list[int](), list[str]()
    for sequence in snapshots.sequences():
        state = fold(islice(entries, max(0, sequence - state.sequence)), state)
        found, why = snapshots.open(sequence)
        if found is None:
            ignored.append(f"{snapshot_path(sequence)} {why}")
        elif found != state:
            raise LedgerCorruptError(
                f"{root.uri}/{snapshot_path(sequence)} says something else than the records up to "
                f"{sequence}; delete it"
            )
        else:
            good.append(sequence)
    state = fold(entries, state)
    if state.kept_loss and (problem := _kept_loss_problem(root, state.kept_loss)):
        ignored.append(f"{state.kept_loss.path} {problem}: the budget is composed from the records")
    return Verified(
        num_records=state.sequence,
        last_hash=state.hash,
        snapshots=tuple(good),
        ignored=tuple(ignored),
    )


def _kept_loss_problem(root: Root, kept: KeptLoss) -> str | None:
    try:
        data = root.read_bytes(kept.path)
    except FileNotFoundError:
        return "is gone"
    return None if hashlib.sha256(data).hexdigest() == kept.sha256 else "was changed"
