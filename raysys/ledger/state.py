"""The state: a pure fold over the ledger's records.

    fold(entries) == State().apply(entry 1).apply(entry 2)...

A state never changes, so threads may share it. It refuses any record that would break what raysys
promises: two updates at once, a file consumed twice, more privacy spent than was reserved. The log
asks it before it appends, and again when it reads.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal

from raysys.errors import LedgerCorruptError
from raysys.ledger.records import (
    Entry,
    FileRef,
    LeaseRenewed,
    PartitionRef,
    PrivacySpend,
    PseudonymsRotated,
    Record,
    RolloutChanged,
    UpdateAbandoned,
    UpdateCommitted,
    UpdateStarted,
)

SpendStatus = Literal["reserved", "committed", "abandoned"]
_EMPTY: Mapping[str, FileRef] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ActiveUpdate:
    """The update that holds the lease."""

    started: UpdateStarted
    owner: str
    renewed_at: float
    """When the owner last wrote, by its own clock."""
    lease_expires_at: float

    @property
    def update_id(self) -> str:
        """The id under which it was started."""
        return self.started.update_id


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What the records up to `sequence` say."""

    sequence: int = 0
    active: ActiveUpdate | None = None
    committed: tuple[UpdateCommitted, ...] = ()
    """In order, held ones included."""
    abandoned: tuple[UpdateAbandoned, ...] = ()
    num_started: int = 0
    num_rollouts: int = 0
    consumed_files: Mapping[str, FileRef] = dataclasses.field(default_factory=lambda: _EMPTY)
    """Event files of committed updates, as they were when they were read."""
    consumed_partitions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Partition key -> the last update that consumed files of it."""
    consumed_item_files: Mapping[str, FileRef] = dataclasses.field(default_factory=lambda: _EMPTY)
    spends: tuple[tuple[str, PrivacySpend, SpendStatus], ...] = ()
    """What each private update is charged: its reservation until it commits, and for good if it is
    abandoned, since nobody knows how far it came."""
    head_state: str | None = None
    """The update whose `state/` the next update starts from: the last commit, held or not, or a
    rotation of its pseudonyms."""
    user_key_id: str | None = None
    """The key of the pseudonyms in the head state."""
    rotations: tuple[PseudonymsRotated, ...] = ()
    """In order."""
    rollout: RolloutChanged | None = None
    """The last transition."""
    rolled_back: frozenset[str] = frozenset()
    """Versions that were taken out of traffic: rolled back on trial, or undone by the promotion of
    one that they descend from. A version that is promoted later is sound again, and its line."""

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
        """The newest partition date consumed so far, YYYY-MM-DD."""
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

    def apply(self, entry: Entry) -> State:
        """Returns the state after the next entry.

        Raises:
          LedgerCorruptError: The entry is not the next one, or its record may not come here.
        """
        if entry.sequence != self.sequence + 1:
            raise LedgerCorruptError(
                f"ledger record {entry.sequence} follows record {self.sequence}; restore the "
                "records between them from a backup"
            )
        if problem := self.problem(entry.record):
            raise LedgerCorruptError(
                f"ledger record {entry.sequence} {problem}; restore the ledger from a backup"
            )
        return dataclasses.replace(_after(self, entry), sequence=entry.sequence)

    def problem(self, record: Record) -> str | None:
        """Returns why a record may not come next, as the end of a sentence; None if it may."""
        if isinstance(record, RolloutChanged):
            return None
        if isinstance(record, UpdateStarted):
            return _start_problem(self, record)
        if self.active is None or self.active.update_id != record.update_id:
            return f"is about {record.update_id}, which is not the active update"
        if isinstance(record, UpdateCommitted):
            return _commit_problem(self, record, self.active.started)
        if isinstance(record, PseudonymsRotated):
            return _rotation_problem(self, record, self.active.started)
        return None


def fold(entries: Iterable[Entry]) -> State:
    """Returns the state after all entries.

    Raises:
      LedgerCorruptError: As `State.apply`.
    """
    state = State()
    for entry in entries:
        state = state.apply(entry)
    return state


def _after(state: State, entry: Entry) -> State:
    record = entry.record
    match record:
        case UpdateStarted():
            return _after_start(state, record, entry.at)
        case LeaseRenewed():
            assert state.active is not None
            renewed = dataclasses.replace(
                state.active,
                owner=record.owner,
                renewed_at=entry.at,
                lease_expires_at=record.lease_expires_at,
            )
            return dataclasses.replace(state, active=renewed)
        case UpdateAbandoned():
            spends = _charge(state, record.update_id, None, "abandoned")
            return dataclasses.replace(
                state, active=None, abandoned=(*state.abandoned, record), spends=spends
            )
        case UpdateCommitted():
            return _after_commit(state, record)
        case PseudonymsRotated():
            return dataclasses.replace(
                state,
                active=None,
                head_state=record.update_id,
                user_key_id=record.to_key_id,
                rotations=(*state.rotations, record),
            )
        case RolloutChanged():
            return _after_rollout(state, record)


def _after_start(state: State, record: UpdateStarted, at: float) -> State:
    active = ActiveUpdate(
        started=record,
        owner=record.owner,
        renewed_at=at,
        lease_expires_at=record.lease_expires_at,
    )
    spends = state.spends
    if record.reserved is not None:
        spends = (*spends, (record.update_id, record.reserved, "reserved"))
    return dataclasses.replace(
        state, active=active, num_started=state.num_started + 1, spends=spends
    )


def _after_rollout(state: State, record: RolloutChanged) -> State:
    is_new = state.rollout is None or state.rollout.rollout_id != record.rollout_id
    return dataclasses.replace(
        state,
        rollout=record,
        num_rollouts=state.num_rollouts + is_new,
        rolled_back=_rolled_back(state, record),
    )


def _rolled_back(state: State, record: RolloutChanged) -> frozenset[str]:
    if record.phase == "rolled_back" and state.canary:
        return state.rolled_back | {state.canary}
    if record.phase == "promoted":
        kept = _line(state, record.stable)
        before = _line(state, state.stable)
        undone = before - kept if record.stable in before else set[str]()
        return (state.rolled_back | undone) - kept
    return state.rolled_back


def _line(state: State, version: str | None) -> set[str]:
    """Returns a version and those that it was trained on top of."""
    versions, found = state.versions, set[str]()
    while version is not None:
        found.add(version)
        version = versions[version].base_version if version in versions else None
    return found


def _after_commit(state: State, record: UpdateCommitted) -> State:
    assert state.active is not None
    files = {file.path: file for file in _files(record.partitions)}
    keys = {partition.key: record.update_id for partition in record.partitions}
    item_files = {file.path: file for file in record.item_files}
    key_id = state.active.started.user_key_id
    return dataclasses.replace(
        state,
        active=None,
        committed=(*state.committed, dataclasses.replace(record, user_key_id=key_id)),
        head_state=record.update_id,
        consumed_files={**state.consumed_files, **files},
        consumed_partitions={**state.consumed_partitions, **keys},
        consumed_item_files={**state.consumed_item_files, **item_files},
        spends=_charge(state, record.update_id, record.spent, "committed"),
        user_key_id=key_id,
    )


def _charge(
    state: State, update_id: str, spent: PrivacySpend | None, status: SpendStatus
) -> tuple[tuple[str, PrivacySpend, SpendStatus], ...]:
    return tuple(
        (update_id, spent or reserved, status) if update_id == name else (name, reserved, old)
        for name, reserved, old in state.spends
    )


def _start_problem(state: State, record: UpdateStarted) -> str | None:
    if state.active is not None:
        return f"starts {record.update_id} while {state.active.update_id} is active"
    if record.update_id in {*state.kept_updates, *(u.update_id for u in state.abandoned)}:
        return f"starts {record.update_id} a second time"
    if (record.reserved is not None) != record.private:
        return f"starts {record.update_id} with private={record.private} but the other reservation"
    return _double_use(state, record.update_id, record.partitions)


def _commit_problem(state: State, record: UpdateCommitted, started: UpdateStarted) -> str | None:
    reserved_paths = {file.path for file in _files(started.partitions)}
    for file in _files(record.partitions):
        if file.path not in reserved_paths:
            return f"commits {file.path}, which {record.update_id} did not reserve"
    if record.version is not None and record.version in state.versions:
        return f"commits version {record.version} a second time"
    if (record.version is None) != (record.verdict == "held"):
        return f"commits version {record.version} with verdict {record.verdict}"
    if {record.user_key_id, state.user_key_id} - {None, started.user_key_id}:
        return f"commits {record.update_id} with pseudonyms of another key than the state has"
    if not _within(record.spent, started.reserved):
        return f"commits {record.update_id} with another privacy spend than it reserved"
    return _double_use(state, record.update_id, record.partitions)


def _rotation_problem(
    state: State, record: PseudonymsRotated, started: UpdateStarted
) -> str | None:
    if started.partitions or started.user_key_id != record.to_key_id:
        return f"rotates pseudonyms in {record.update_id}, which was started for something else"
    if (record.base_state, record.from_key_id) != (state.head_state, state.user_key_id):
        return (
            f"rotates state {record.base_state} of key {record.from_key_id}, the head state is "
            f"{state.head_state} of key {state.user_key_id}"
        )
    if record.to_key_id in (state.user_key_id, *(r.from_key_id for r in state.rotations)):
        return f"rotates pseudonyms back to key {record.to_key_id}"
    return None


def _double_use(state: State, update_id: str, partitions: tuple[PartitionRef, ...]) -> str | None:
    seen: set[str] = set()
    for file in _files(partitions):
        if file.path in state.consumed_files:
            return f"gives {file.path} to {update_id}, but an earlier update consumed it"
        if file.path in seen:
            return f"gives {file.path} to {update_id} twice"
        seen.add(file.path)
    return None


def _within(spent: PrivacySpend | None, reserved: PrivacySpend | None) -> bool:
    if spent is None or reserved is None:
        return spent is reserved
    return (
        spent.num_steps <= reserved.num_steps
        and spent.sampling_prob <= reserved.sampling_prob
        and spent.noise_multiplier >= reserved.noise_multiplier
        and spent.num_count_releases <= reserved.num_count_releases
        and spent.count_noise_multiplier >= reserved.count_noise_multiplier
    )


def _files(partitions: tuple[PartitionRef, ...]) -> list[FileRef]:
    return [file for partition in partitions for file in partition.files]
