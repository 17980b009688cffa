"""What a record means, in one sentence for an operator."""

from __future__ import annotations

from collections.abc import Sequence

from raysys.ledger.records import (
    LeaseRenewed,
    PartitionRef,
    PseudonymsRotated,
    Record,
    RolloutChanged,
    StepsPermitted,
    UpdateAbandoned,
    UpdateCommitted,
    UpdateStarted,
)


def explain(record: Record) -> str:
    """Returns one line.

    >>> from raysys.ledger.records import UpdateAbandoned
    >>> explain(UpdateAbandoned(update_id="u0001-1a2b3c", reason="lease expired"))
    'u0001-1a2b3c ended without a commit: lease expired; its partitions are free again'
    """
    match record:
        case UpdateStarted():
            return _started(record)
        case LeaseRenewed():
            return f"{record.update_id} is still at work on {record.owner}"
        case StepsPermitted():
            return f"{record.update_id} may run private steps up to its {record.num_steps}."
        case UpdateAbandoned():
            return (
                f"{record.update_id} ended without a commit: {record.reason}; its partitions are "
                "free again"
            )
        case UpdateCommitted():
            return _committed(record)
        case PseudonymsRotated():
            return (
                f"{record.update_id} carried {record.num_users:,} users of {record.base_state} "
                f"from key {record.from_key_id} to {record.to_key_id}, in {record.seconds:.0f} s"
            )
        case RolloutChanged():
            return f"{record.rollout_id}: {_changed(record)}: {record.reason}"


def _started(record: UpdateStarted) -> str:
    reserved = record.reserved
    privacy = (
        f"privacy of {reserved.num_steps} steps at noise {reserved.noise_multiplier:g} reserved"
        if reserved
        else "not private"
    )
    return (
        f"{record.update_id} on {record.owner} takes {_span(record.partitions)} and "
        f"{len(record.item_files)} item files, on top of {record.base_version or 'no version'}; "
        f"{privacy}"
    )


def _committed(record: UpdateCommitted) -> str:
    made = f"made {record.version}" if record.version else "was held back"
    return (
        f"{record.update_id} {made}: {record.reason}; consumed {_span(record.partitions)}, "
        f"{record.num_rows:,} rows of {record.num_users:,} users, in {record.seconds:.0f} s"
    )


def _changed(record: RolloutChanged) -> str:
    if record.phase == "canary":
        return (
            f"{record.actor} put {record.canary} on trial with {record.weight_fraction:.2%} of "
            f"users, beside {record.stable}"
        )
    if record.phase == "paused":
        return (
            f"{record.actor} paused {record.canary} at {record.weight_fraction:.2%} of users, "
            f"beside {record.stable}"
        )
    if record.phase == "promoted":
        return f"{record.actor} made {record.stable} stable"
    return f"{record.actor} ended the trial, {record.stable} answers everyone"


def _span(partitions: Sequence[PartitionRef]) -> str:
    keys = sorted(partition.key for partition in partitions)
    if len(keys) < 2:
        return "".join(keys) or "no partition"
    return f"{len(keys)} partitions {keys[0]}..{keys[-1].rpartition('/')[2]}"
