"""Builders of records, and what several tests measure by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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
    decode,
    encode,
)
from raysys.ledger.state import State
from raysys.partitions.discover import Discovered
from raysys.partitions.plan import watermark_after
from raysys.storage import Root

SPEND = PrivacySpend(
    num_steps=15,
    sampling_prob=0.25,
    noise_multiplier=4.0,
    num_count_releases=1,
    count_noise_multiplier=10.0,
)


def partition(label: str, *names: str, etag: str = "e") -> PartitionRef:
    """A partition of a day, `2017-03-01`, or hour, `2017-03-01T05`, with files of these names."""
    key = f"events/dt={label.replace('T', '/hour=')}"
    files = tuple(
        FileRef(path=f"{key}/{name}", size_bytes=1, etag=etag) for name in names or ("a.parquet",)
    )
    return PartitionRef(key=key, files=files)


def item_file(name: str = "items.parquet", etag: str = "e") -> FileRef:
    return FileRef(path=f"items/{name}", size_bytes=1, etag=etag)


def found(*partitions: PartitionRef, items: tuple[FileRef, ...] = ()) -> Discovered:
    """What a listing of a root finds."""
    return Discovered(root_uri="file:///shop", partitions=partitions, item_files=items)


def consumed(*partitions: PartitionRef, items: tuple[FileRef, ...] = (), **changes: Any) -> State:
    """The state after one update that read these; `changes` are of its commit."""
    first = started(partitions=partitions, item_files=items)
    return folded(first, committed(first, **changes))


def started(update_id: str = "u0001-aaaaaa", **changes: Any) -> UpdateStarted:
    """A private update of one partition."""
    record = UpdateStarted(
        update_id=update_id,
        owner="host:1",
        lease_expires_at=20.0,
        partitions=(partition("2017-03-01"),),
        item_files=(),
        base_version=None,
        base_state=None,
        config_hash="0" * 64,
        user_key_id="key",
        seed=0,
        private=True,
        reserved=SPEND,
    )
    return dataclasses.replace(record, **changes)


def renewed(update_id: str = "u0001-aaaaaa", **changes: Any) -> LeaseRenewed:
    record = LeaseRenewed(update_id=update_id, owner="host:1", lease_expires_at=40.0)
    return dataclasses.replace(record, **changes)


def abandoned(update_id: str = "u0001-aaaaaa", reason: str = "lease expired") -> UpdateAbandoned:
    return UpdateAbandoned(update_id=update_id, reason=reason)


def committed(start: UpdateStarted | None = None, **changes: Any) -> UpdateCommitted:
    """The commit of all that `start` reserved; `version=None` makes a held one."""
    start = start or started()
    if "version" in changes and changes["version"] is None:
        changes = {"verdict": "held", "reason": "the gate held it back", **changes}
    record = UpdateCommitted(
        update_id=start.update_id,
        owner=start.owner,
        version=f"v{start.update_id[1:]}",
        verdict="passed",
        reason="better",
        base_version=start.base_version,
        partitions=start.partitions,
        item_files=start.item_files,
        watermark=watermark_after(start.partitions, start.set_aside, "2017-03-01"),
        num_rows=1,
        num_users=1,
        row_counts={"used": 1},
        quarantined_files={},
        artifacts={},
        metrics={},
        config_hash=start.config_hash,
        seed=start.seed,
        private=start.private,
        spent=start.reserved,
        seconds=1.0,
        user_key_id=start.user_key_id,
        set_aside=start.set_aside,
    )
    return dataclasses.replace(record, **changes)


def rotated(start: UpdateStarted, base: UpdateCommitted, **changes: Any) -> PseudonymsRotated:
    """The rotation that `start` began, from the state and key of `base` to the key of `start`."""
    assert base.user_key_id is not None
    record = PseudonymsRotated(
        update_id=start.update_id,
        owner=start.owner,
        base_state=base.update_id,
        from_key_id=base.user_key_id,
        to_key_id=start.user_key_id,
        num_users=1,
        artifacts={},
        seconds=1.0,
    )
    return dataclasses.replace(record, **changes)


def rollout(phase: str = "canary", **changes: Any) -> RolloutChanged:
    on_trial = phase == "canary"
    values: dict[str, Any] = {
        "rollout_id": "r0001",
        "phase": phase,
        "stable": "v0001-aaaaaa",
        "canary": "v0002-bbbbbb" if on_trial else None,
        "previous": None,
        "weight_fraction": 0.2 if on_trial else 0.0,
        "actor": "operator",
        "reason": "try it",
        "measurement": None,
    }
    return RolloutChanged(**{**values, **changes})


def entries(records: Iterable[Record], *, first: int = 1, at: float = 0.0) -> list[Entry]:
    """The records in their places, one second apart."""
    return [Entry(sequence=first + i, at=at + i, record=record) for i, record in enumerate(records)]


def stored(
    records: Iterable[Record], *, first: int = 1, prev: str = "", at: float = 0.0
) -> dict[str, bytes]:
    """Path -> bytes of the records in their places, each with the hash of the one before it."""
    found: dict[str, bytes] = {}
    for entry in entries(records, first=first, at=at):
        data = encode(dataclasses.replace(entry, prev=prev))
        found[f"ledger/{entry.sequence:020d}.json"] = data
        prev = decode(data, sequence=entry.sequence).hash
    return found


def write_records(root: Root, records: Iterable[Record]) -> None:
    """Writes a ledger of these records, faster than by appending them."""
    for path, data in stored(records).items():
        root.put(path, data)


def folded(*records: Record) -> State:
    """The state after these records."""
    state = State()
    for entry in entries(records):
        state = state.apply(entry)
    return state


def file_uses(commits: Sequence[UpdateCommitted]) -> dict[str, list[str]]:
    """Each consumed content -> the updates that consumed it. Exactly-once means one each.

    It is named by the path, and a later content of the same path by size and etag as well.
    """
    first: dict[str, str] = {}
    uses: dict[str, list[str]] = {}
    for commit in commits:
        for part in commit.partitions:
            for file in part.files:
                is_first = first.setdefault(file.path, file.content) == file.content
                uses.setdefault(file.path if is_first else file.content, []).append(
                    commit.update_id
                )
    return uses


class OverwritingRoot(Root):
    """A broken store for negative controls: it has no conditional write, so every writer wins."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        self.put(path, data)
        return True


class FakeClock:
    """Time that passes only by `sleep` and `advance`."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    advance = sleep


def write_config(folder: Path, root_uri: str, extra: str = "") -> Path:
    """A config file with a key file beside it."""
    (folder / "key").write_bytes(b"0123456789abcdef")
    path = folder / "shop.yaml"
    path.write_text(f"root: {root_uri}\npseudonyms:\n  key_file: key\n{extra}")
    return path
