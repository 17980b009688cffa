"""The state: a pure fold over the ledger's records.

    fold(entries) == State().apply(entry 1).apply(entry 2)...

A state never changes, so threads may share it. `fold.py` has how a record changes it, `rules.py`
which record may come next: the log asks before it appends, and again when it reads.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from raysys.ledger import rules
from raysys.ledger.fold import ActiveUpdate, Draft, SpendStatus
from raysys.ledger.records import (
    Entry,
    FileRef,
    KeptLoss,
    PrivacySpend,
    PseudonymsRotated,
    Record,
    RolloutChanged,
    UpdateAbandoned,
    UpdateCommitted,
    UpdateStarted,
)

_EMPTY: Mapping[str, FileRef] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What the records up to `sequence` say."""

    sequence: int = 0
    hash: str = ""
    """Of the record `sequence`; the next one carries it as its `prev`."""
    is_chained: bool = False
    """Whether that record has a hash of its own. Those of schema version 1 have not."""
    active: ActiveUpdate | None = None
    committed: tuple[UpdateCommitted, ...] = ()
    """In order, held ones included."""
    abandoned: tuple[UpdateAbandoned, ...] = ()
    not_private: tuple[str, ...] = ()
    """Updates that read data without privacy, whatever became of them: also one that was abandoned
    may have written weights that anybody saw."""
    num_started: int = 0
    num_rollouts: int = 0
    consumed_files: Mapping[str, FileRef] = dataclasses.field(default_factory=lambda: _EMPTY)
    """Event files of committed updates, as they were when they were last read."""
    consumed_partitions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Partition key -> the last update that consumed files of it, or set it aside as empty."""
    settled_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other contents (`FileRef.content`) that are neither read nor asked about again -> why: the
    kind of what was set aside, or `replaced` by a later content of the same path."""
    unreadable_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Path in `consumed_files` -> the update that could not read it: nothing of it was trained."""
    consumed_item_files: Mapping[str, FileRef] = dataclasses.field(default_factory=lambda: _EMPTY)
    spends: tuple[tuple[str, PrivacySpend, SpendStatus], ...] = ()
    """What each private update is charged: its reservation until it ends; then what it committed,
    or, if it is abandoned, the reservation with no more steps than were permitted."""
    kept_loss: KeptLoss | None = None
    """Where the composed privacy loss of the first of them is kept, if it is."""
    head_state: str | None = None
    """The update whose `state/` the next update starts from: the last commit, held or not, or a
    rotation of its pseudonyms."""
    user_key_id: str | None = None
    """The key of the pseudonyms in the head state."""
    rotations: tuple[PseudonymsRotated, ...] = ()
    """In order."""
    rollout: RolloutChanged | None = None
    """The last transition."""
    rollout_started_at: float | None = None
    """UNIX time of the first transition of that rollout."""
    rollout_changed_at: float | None = None
    """UNIX time of the last one."""
    rollout_sequence: int = 0
    """Ledger record of the last one."""
    rollout_step_s: float = 0.0
    """Seconds that its step had run at the last one, without the pauses that people made."""
    rollout_rules: Mapping[str, Any] | None = None
    """What judges that rollout, None before schema version 4."""
    rolled_back: frozenset[str] = frozenset()
    """Versions that were taken out of traffic: rolled back on trial, or undone by the promotion of
    one that they descend from. A version that is promoted later is sound again, and its line."""

    @property
    def started(self) -> UpdateStarted | None:
        """The record that started the active update."""
        return self.active.started if self.active else None

    @property
    def permitted_steps(self) -> int:
        """Private steps of the active update that may have run."""
        return self.active.permitted_steps if self.active else 0

    @property
    def versions(self) -> dict[str, UpdateCommitted]:
        """Version -> its commit, in order."""
        return {c.version: c for c in self.committed if c.version is not None}

    @property
    def head_version(self) -> str | None:
        """The newest version that neither was rolled back nor descends from one that was.

        The next update trains on top of it, so what was wrong with a version dies with it.
        """
        versions, sound = self.versions, set[str | None]({None})
        for version, record in versions.items():
            if record.base_version in sound and version not in self.rolled_back:
                sound.add(version)
        return next((version for version in reversed(versions) if version in sound), None)

    @property
    def head_artifacts(self) -> Mapping[str, str]:
        """Path -> sha256 of the head state's files; of an update, also of its version's."""
        if self.rotations and self.rotations[-1].update_id == self.head_state:
            return self.rotations[-1].artifacts
        return self.committed[-1].artifacts if self.committed else {}

    @property
    def kept_updates(self) -> frozenset[str]:
        """The updates and rotations that were committed: their folders are kept."""
        return frozenset(
            [u.update_id for u in self.committed] + [r.update_id for r in self.rotations]
        )

    @property
    def watermark(self) -> str | None:
        """The newest partition consumed so far, YYYY-MM-DD or YYYY-MM-DDTHH."""
        return self.committed[-1].watermark if self.committed else None

    @property
    def stable(self) -> str | None:
        """The version that answers all who are not in the canary's share."""
        return self.rollout.stable if self.rollout else next(iter(self.versions), None)

    @property
    def canary(self) -> str | None:
        """The version on trial, if one is."""
        return self.rollout.canary if self.rollout else None

    @property
    def previous(self) -> str | None:
        """The version that was stable before `stable` was."""
        return self.rollout.previous if self.rollout else None

    @property
    def weight_fraction(self) -> float:
        """Share of users that the canary answers."""
        return self.rollout.weight_fraction if self.rollout else 0.0

    def next_update_id(self) -> str:
        """Returns a new id, `u0003-1a2b3c`. Its random end keeps killed attempts' folders apart."""
        return f"u{self.num_started + 1:04d}-{secrets.token_hex(3)}"

    def next_version(self, update_id: str) -> str:
        """Returns the name of the version that `update_id` may commit.

        >>> State().next_version("u0003-1a2b3c")
        'v0001-1a2b3c'
        """
        return f"v{len(self.versions) + 1:04d}-{update_id[-6:]}"

    def has_ended(self, update_id: str) -> bool:
        """Returns whether the update or rotation was committed or abandoned."""
        return update_id in self.kept_updates or any(
            record.update_id == update_id for record in self.abandoned
        )

    def has_version(self, version: str) -> bool:
        """Returns whether an update committed the version."""
        return any(record.version == version for record in self.committed)

    def apply(self, entry: Entry) -> State:
        """Returns the state after the next entry; `fold` takes many at once, which is faster.

        Raises:
          LedgerCorruptError: The entry is not the next one, does not follow the record before it,
            or its record may not come here.
        """
        return fold([entry], self)

    def problem(self, record: Record) -> str | None:
        """Returns why a record may not come next, as the end of a sentence; None if it may."""
        return rules.problem(self, record)


def fold(entries: Iterable[Entry], state: State | None = None) -> State:
    """Returns the state after all entries, from the empty one or from `state` on.

    Raises:
      LedgerCorruptError: As `State.apply`.
    """
    draft = Draft(state or State())
    for entry in entries:
        draft.apply(entry)
    return draft.freeze()
