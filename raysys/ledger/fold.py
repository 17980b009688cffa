"""The fold: how a record changes the state.

    State -> Draft -> apply(entry), apply(entry), ... -> State

A state never changes, so each new one would have to copy all that was consumed before. A draft is
the mutable twin of a state: it copies once, then takes any number of entries.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from raysys.errors import LedgerCorruptError
from raysys.ledger import rules
from raysys.ledger.records import (
    CONTROLLER,
    Entry,
    FileRef,
    KeptLoss,
    LeaseRenewed,
    PrivacySpend,
    PseudonymsRotated,
    RolloutChanged,
    StepsPermitted,
    UpdateAbandoned,
    UpdateCommitted,
    UpdateStarted,
)

if TYPE_CHECKING:
    from raysys.ledger.state import State

SpendStatus = Literal["reserved", "committed", "abandoned"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ActiveUpdate:
    """The update that holds the lease."""

    started: UpdateStarted
    owner: str
    renewed_at: float
    """When the owner last wrote, by its own clock."""
    lease_expires_at: float
    renewed_in: int
    """The record that the owner wrote last: two renewals differ, even if its clock stands still."""
    permitted_steps: int = 0
    """Private steps that may have run by now."""

    @property
    def update_id(self) -> str:
        """The id under which it was started."""
        return self.started.update_id

    @property
    def silence_s(self) -> float:
        """How long the owner may be silent. Both times are of its clock, so no other matters."""
        return self.lease_expires_at - self.renewed_at


class Draft:
    """A state while it is folded. Its attributes are the state's fields, tuples and sets mutable.

    Mappings are the state's own until the first commit: a heartbeat copies none of them.
    """

    sequence: int
    hash: str
    is_chained: bool
    active: ActiveUpdate | None
    committed: list[UpdateCommitted]
    abandoned: list[UpdateAbandoned]
    not_private: list[str]
    num_started: int
    num_rollouts: int
    consumed_files: dict[str, FileRef]
    consumed_partitions: dict[str, str]
    settled_files: dict[str, str]
    unreadable_files: dict[str, str]
    consumed_item_files: dict[str, FileRef]
    spends: list[tuple[str, PrivacySpend, SpendStatus]]
    kept_loss: KeptLoss | None
    head_state: str | None
    user_key_id: str | None
    rotations: list[PseudonymsRotated]
    rollout: RolloutChanged | None
    rollout_started_at: float | None
    rollout_changed_at: float | None
    rollout_sequence: int
    rollout_step_s: float
    rollout_rules: Mapping[str, Any] | None
    rolled_back: set[str]

    def __init__(self, state: State) -> None:
        self._state = state
        self._owns_mappings = False
        for field in dataclasses.fields(state):
            setattr(self, field.name, _thawed(getattr(state, field.name)))

    def freeze(self) -> State:
        """Returns the state. The draft must not be used after it."""
        names = [field.name for field in dataclasses.fields(self._state)]
        return dataclasses.replace(
            self._state, **{name: _frozen(getattr(self, name)) for name in names}
        )

    def apply(self, entry: Entry) -> None:
        """Takes the next entry.

        Raises:
          LedgerCorruptError: The entry is not the next one, does not follow the record before it,
            or its record may not come here.
        """
        if found := self._problem(entry):
            raise LedgerCorruptError(found)
        _change(self, entry)
        self.sequence, self.hash = entry.sequence, entry.hash
        self.is_chained = entry.prev is not None

    @property
    def started(self) -> UpdateStarted | None:
        """The record that started the active update."""
        return self.active.started if self.active else None

    @property
    def permitted_steps(self) -> int:
        """As the state's."""
        return self.active.permitted_steps if self.active else 0

    @functools.cached_property
    def versions(self) -> dict[str, UpdateCommitted]:
        """Version -> its commit, in order."""
        return {c.version: c for c in self.committed if c.version is not None}

    @functools.cached_property
    def ended(self) -> set[str]:
        """Updates and rotations that were committed or abandoned."""
        committed = {record.update_id for record in self.committed}
        rotated = {record.update_id for record in self.rotations}
        return committed | rotated | {record.update_id for record in self.abandoned}

    @functools.cached_property
    def place_in_spends(self) -> dict[str, int]:
        """Update -> where in `spends` it is."""
        return {update_id: place for place, (update_id, *_) in enumerate(self.spends)}

    @property
    def stable(self) -> str | None:
        """As the state's."""
        return self.rollout.stable if self.rollout else next(iter(self.versions), None)

    def has_ended(self, update_id: str) -> bool:
        """Whether the update committed or was abandoned."""
        return update_id in self.ended

    def has_version(self, version: str) -> bool:
        """Whether an update committed the version."""
        return version in self.versions

    def own_mappings(self) -> None:
        """Copies the state's mappings, so that they may be changed; once."""
        if self._owns_mappings:
            return
        for field in dataclasses.fields(self._state):
            value = getattr(self, field.name)
            if isinstance(value, Mapping):
                setattr(self, field.name, dict(value))
        self._owns_mappings = True

    def _problem(self, entry: Entry) -> str | None:
        if entry.sequence != self.sequence + 1:
            return (
                f"ledger record {entry.sequence} follows record {self.sequence}; restore the "
                "records between them from a backup"
            )
        if found := broken_link(entry, self.hash, self.is_chained):
            return found
        if found := rules.problem(self, entry.record):
            return f"ledger record {entry.sequence} {found}; restore the ledger from a backup"
        return None


def broken_link(entry: Entry, before: str, is_chained: bool) -> str | None:
    """Returns what is wrong if an entry does not follow a record with hash `before`, or None.

    `is_chained` is whether that record has a hash of its own, which those of version 1 have not.
    """
    if entry.prev is None and is_chained:
        return (
            f"ledger record {entry.sequence} was changed after it was written: it has no hash, the "
            "record before it has; restore it from a backup of the root"
        )
    if entry.prev is not None and entry.prev != before:
        return (
            f"ledger record {entry.sequence - 1} was changed after it was written: record "
            f"{entry.sequence} follows one with hash {entry.prev[:12] or 'none'}, it has "
            f"{before[:12] or 'none'}; restore it, or else record {entry.sequence}, from a backup"
        )
    return None


def _change(draft: Draft, entry: Entry) -> None:
    match entry.record:
        case UpdateStarted() as record:
            _start(draft, record, entry)
        case LeaseRenewed() as record:
            assert draft.active is not None
            draft.active = dataclasses.replace(
                draft.active,
                owner=record.owner,
                renewed_at=entry.at,
                lease_expires_at=record.lease_expires_at,
                renewed_in=entry.sequence,
            )
        case StepsPermitted() as record:
            assert draft.active is not None
            draft.active = dataclasses.replace(draft.active, permitted_steps=record.num_steps)
        case UpdateAbandoned() as record:
            assert draft.active is not None
            _charge(draft, record.update_id, charge_if_abandoned(draft.active), "abandoned")
            draft.active = None
            draft.abandoned.append(record)
            draft.ended.add(record.update_id)
        case PseudonymsRotated() as record:
            draft.ended.add(record.update_id)
            draft.rotations.append(record)
            draft.active = None
            draft.head_state, draft.user_key_id = record.update_id, record.to_key_id
        case UpdateCommitted() as record:
            _commit(draft, record)
        case RolloutChanged() as record:
            _roll(draft, record, entry)


def charge_if_abandoned(active: ActiveUpdate) -> PrivacySpend | None:
    """Returns what the active update is charged if it ends without a commit; None if not private.

    Its releases and its selection may all be out, so they are charged in full. Of its steps, none
    ran that was not permitted before, if it asked for permits at all.
    """
    reserved = active.started.reserved
    if reserved is None or not active.started.permits_steps:
        return reserved
    return dataclasses.replace(reserved, num_steps=active.permitted_steps)


def _start(draft: Draft, record: UpdateStarted, entry: Entry) -> None:
    draft.active = ActiveUpdate(
        started=record,
        owner=record.owner,
        renewed_at=entry.at,
        lease_expires_at=record.lease_expires_at,
        renewed_in=entry.sequence,
    )
    draft.num_started += 1
    # A rotation is started without partitions: it trains nothing.
    if record.partitions and not record.private:
        draft.not_private.append(record.update_id)
    draft.kept_loss = record.kept_loss or draft.kept_loss
    if record.reserved is not None:
        draft.place_in_spends[record.update_id] = len(draft.spends)
        draft.spends.append((record.update_id, record.reserved, "reserved"))


def _commit(draft: Draft, record: UpdateCommitted) -> None:
    started = draft.started
    assert started is not None
    record = dataclasses.replace(record, user_key_id=started.user_key_id)
    draft.own_mappings()
    for partition in record.partitions:
        draft.consumed_partitions[partition.key] = record.update_id
        for file in partition.files:
            _consume(draft, file, record)
    for aside in record.set_aside:
        draft.settled_files[aside.file.content] = aside.kind
        if aside.kind == "empty":
            draft.consumed_partitions[aside.path] = record.update_id
    for file in record.item_files:
        draft.consumed_item_files[file.path] = file
    if record.version is not None:
        draft.versions[record.version] = record
    draft.ended.add(record.update_id)
    draft.committed.append(record)
    draft.active = None
    draft.head_state, draft.user_key_id = record.update_id, started.user_key_id
    _charge(draft, record.update_id, record.spent, "committed")


def _consume(draft: Draft, file: FileRef, record: UpdateCommitted) -> None:
    if (was := draft.consumed_files.get(file.path)) is not None:
        draft.settled_files[was.content] = "replaced"
    draft.consumed_files[file.path] = file
    draft.unreadable_files.pop(file.path, None)
    if file.path in record.quarantined_files:
        draft.unreadable_files[file.path] = record.update_id


def _charge(draft: Draft, update_id: str, spent: PrivacySpend | None, status: SpendStatus) -> None:
    place = draft.place_in_spends.get(update_id)
    if place is not None:
        _, reserved, _ = draft.spends[place]
        draft.spends[place] = (update_id, spent or reserved, status)


def _roll(draft: Draft, record: RolloutChanged, entry: Entry) -> None:
    if record.phase == "rolled_back" and draft.rollout and draft.rollout.canary:
        draft.rolled_back.add(draft.rollout.canary)
    if record.phase == "promoted":
        kept, before = _line(draft, record.stable), _line(draft, draft.stable)
        if record.stable in before:
            draft.rolled_back |= before
        draft.rolled_back -= kept
    if draft.rollout is None or draft.rollout.rollout_id != record.rollout_id:
        draft.num_rollouts += 1
        draft.rollout_started_at = entry.at
        draft.rollout_rules = record.rules
    draft.rollout_step_s = _step_s(draft, record, entry.at)
    draft.rollout_changed_at, draft.rollout_sequence = entry.at, entry.sequence
    draft.rollout = record


def _step_s(draft: Draft, record: RolloutChanged, at: float) -> float:
    """Returns how long the step of a record had run, 0 if the record enters it."""
    before, since = draft.rollout, draft.rollout_changed_at
    if before is None or since is None or before.rollout_id != record.rollout_id:
        return 0.0
    if before.step_index != record.step_index:
        return 0.0
    if before.phase == "paused":
        # Who resumes what the controller paused gives it the whole time again.
        return 0.0 if before.actor == CONTROLLER else draft.rollout_step_s
    return draft.rollout_step_s + max(0.0, at - since)


def _line(draft: Draft, version: str | None) -> set[str]:
    """Returns a version and those that it was trained on top of."""
    found = set[str]()
    while version is not None:
        found.add(version)
        commit = draft.versions.get(version)
        version = commit.base_version if commit else None
    return found


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return set(value) if isinstance(value, frozenset) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return frozenset(value) if isinstance(value, set) else value
