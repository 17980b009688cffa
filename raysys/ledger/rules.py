"""The rules: which record may come next.

No promise rests on the good behaviour of a writer: a record that would break one (two updates at
once, a file consumed twice, more privacy spent than was reserved) is refused before it is appended,
and again wherever it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from raysys.ledger.records import (
    FileRef,
    PartitionRef,
    PrivacySpend,
    PseudonymsRotated,
    Record,
    RolloutChanged,
    StepsPermitted,
    UpdateCommitted,
    UpdateStarted,
)


class Known(Protocol):
    """What the rules look at: a state, or one that is being folded."""

    @property
    def started(self) -> UpdateStarted | None: ...
    @property
    def permitted_steps(self) -> int: ...
    @property
    def head_state(self) -> str | None: ...
    @property
    def user_key_id(self) -> str | None: ...
    @property
    def rotations(self) -> Sequence[PseudonymsRotated]: ...
    @property
    def consumed_files(self) -> Mapping[str, FileRef]: ...
    @property
    def settled_files(self) -> Mapping[str, str]: ...
    def has_ended(self, update_id: str) -> bool: ...
    def has_version(self, version: str) -> bool: ...


def problem(known: Known, record: Record) -> str | None:
    """Returns why a record may not come next, as the end of a sentence; None if it may."""
    if isinstance(record, RolloutChanged):
        return None
    started = known.started
    if isinstance(record, UpdateStarted):
        return _start_problem(known, record, started)
    if started is None or started.update_id != record.update_id:
        return f"is about {record.update_id}, which is not the active update"
    if isinstance(record, UpdateCommitted):
        return _commit_problem(known, record, started)
    if isinstance(record, PseudonymsRotated):
        return _rotation_problem(known, record, started)
    if isinstance(record, StepsPermitted):
        return _permit_problem(known, record, started)
    return None


def _permit_problem(known: Known, record: StepsPermitted, started: UpdateStarted) -> str | None:
    if not started.permits_steps or started.reserved is None:
        return f"permits steps of {record.update_id}, which was started without permits"
    if record.num_steps < known.permitted_steps:
        return (
            f"permits {record.num_steps} steps of {record.update_id}, of which "
            f"{known.permitted_steps} were permitted before"
        )
    if record.num_steps > started.reserved.num_steps:
        return (
            f"permits {record.num_steps} steps of {record.update_id}, which reserved "
            f"{started.reserved.num_steps}"
        )
    return None


def _start_problem(known: Known, record: UpdateStarted, active: UpdateStarted | None) -> str | None:
    if active is not None:
        return f"starts {record.update_id} while {active.update_id} is active"
    if known.has_ended(record.update_id):
        return f"starts {record.update_id} a second time"
    if (record.reserved is not None) != record.private:
        return f"starts {record.update_id} with private={record.private} but the other reservation"
    if record.permits_steps and not record.private:
        return f"starts {record.update_id} with permits of private steps, but it is not private"
    return _double_use(known, record.update_id, record.partitions)


def _commit_problem(known: Known, record: UpdateCommitted, started: UpdateStarted) -> str | None:
    reserved = set(files_of(started.partitions))
    for file in files_of(record.partitions):
        if file not in reserved:
            return f"commits {file.path}, which {record.update_id} did not reserve"
    if found := _aside_problem(record, started):
        return found
    if record.version is not None and known.has_version(record.version):
        return f"commits version {record.version} a second time"
    if (record.version is None) != (record.verdict == "held"):
        return f"commits version {record.version} with verdict {record.verdict}"
    if {record.user_key_id, known.user_key_id} - {None, started.user_key_id}:
        return f"commits {record.update_id} with pseudonyms of another key than the state has"
    if not _within(record.spent, started.reserved):
        return f"commits {record.update_id} with another privacy spend than it reserved"
    if record.spent and started.permits_steps and record.spent.num_steps != known.permitted_steps:
        return (
            f"commits {record.update_id} with {record.spent.num_steps} steps, of which "
            f"{known.permitted_steps} were permitted"
        )
    return _double_use(known, record.update_id, record.partitions)


def _rotation_problem(
    known: Known, record: PseudonymsRotated, started: UpdateStarted
) -> str | None:
    if started.partitions or started.user_key_id != record.to_key_id:
        return f"rotates pseudonyms in {record.update_id}, which was started for something else"
    if (record.base_state, record.from_key_id) != (known.head_state, known.user_key_id):
        return (
            f"rotates state {record.base_state} of key {record.from_key_id}, the head state is "
            f"{known.head_state} of key {known.user_key_id}"
        )
    if record.to_key_id in (known.user_key_id, *(r.from_key_id for r in known.rotations)):
        return f"rotates pseudonyms back to key {record.to_key_id}"
    return None


def _aside_problem(record: UpdateCommitted, started: UpdateStarted) -> str | None:
    planned = set(started.set_aside)
    keys = {partition.key for partition in started.partitions}
    for aside in record.set_aside:
        # That a partition holds no rows is found only while it is read.
        if aside not in planned and not (aside.kind == "empty" and aside.path in keys):
            return f"sets {aside.path} aside, which {record.update_id} did not plan"
    return None


def _double_use(known: Known, update_id: str, partitions: tuple[PartitionRef, ...]) -> str | None:
    seen: set[str] = set()
    for file in files_of(partitions):
        # The same path with another content is a rewritten file, which may be read anew.
        if known.consumed_files.get(file.path) == file or file.content in known.settled_files:
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
        and spent.num_evaluations <= reserved.num_evaluations
        and spent.evaluation_noise_multiplier >= reserved.evaluation_noise_multiplier
        # Other users than those who were reserved, or fewer of them, are another reservation.
        and spent.group == reserved.group
        and spent.selection == reserved.selection
    )


def files_of(partitions: tuple[PartitionRef, ...]) -> list[FileRef]:
    """Returns the files of all partitions."""
    return [file for partition in partitions for file in partition.files]
