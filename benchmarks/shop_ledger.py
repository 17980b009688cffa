"""The records of a shop with one update after the other, as many as wanted.

An update is its start, 18 heartbeats, and a commit of two partitions of two files with metrics and
artifacts. Every tenth version goes through a rollout. The ids are made up, the sizes are not.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raysys.ledger.reader import record_path
from raysys.ledger.records import (
    Entry,
    FileRef,
    LeaseRenewed,
    PartitionRef,
    PrivacySpend,
    Record,
    RolloutChanged,
    UpdateCommitted,
    UpdateStarted,
    decode,
    encode,
)

NUM_HEARTBEATS = 18
_FIRST_DAY = datetime.date(1000, 1, 1)
_OWNER = "raysys-head-7c9f:4021"
_SPEND = PrivacySpend(
    num_steps=60,
    sampling_prob=0.05,
    noise_multiplier=2.0,
    num_count_releases=1,
    count_noise_multiplier=8.0,
)
_INTERVAL = {"mean": 0.3127451, "low": 0.3014112, "high": 0.3240981}
_METRICS = {
    arm: {name: _INTERVAL for name in ("ndcg10", "ndcg5", "hit10", "mrr")}
    for arm in ("before", "after", "difference", "prequential")
}


def day_partition(number: int) -> PartitionRef:
    """Returns the partition of the day of that number, with two files."""
    key = f"events/dt={_FIRST_DAY + datetime.timedelta(days=number)}"
    files = tuple(
        FileRef(path=f"{key}/part-{i:05d}.parquet", size_bytes=48_211_907, etag=f"{number:032x}")
        for i in range(2)
    )
    return PartitionRef(key=key, files=files)


def records() -> Iterator[Record]:
    """Yields records without end."""
    stable = None
    for number in itertools.count(1):
        begun = start(number, stable)
        yield begun
        for _ in range(NUM_HEARTBEATS):
            yield LeaseRenewed(update_id=begun.update_id, owner=_OWNER, lease_expires_at=1e9)
        yield commit(begun, number)
        version = version_of(begun)
        if stable is not None and number % 10 == 0:
            yield _rollout(number, "canary", stable, version)
            yield _rollout(number, "promoted", version, None)
        if stable is None or number % 10 == 0:
            stable = version


def write(root: Path, first: int, num: int, source: Iterator[Record], prev: str) -> str:
    """Writes records `first` and up as the log would, but without a sync each.

    Returns:
      The hash of the last.
    """
    for sequence in range(first, first + num):
        entry = Entry(sequence=sequence, at=1e9 + sequence, record=next(source), prev=prev)
        data = encode(entry)
        (root / record_path(sequence)).write_bytes(data)
        prev = decode(data, sequence=sequence).hash
    return prev


def start(number: int, base: str | None) -> UpdateStarted:
    """Returns the start of update `number`, which reads two days."""
    return UpdateStarted(
        update_id=f"u{number:04d}-{number * 2654435761 % 2**24:06x}",
        owner=_OWNER,
        lease_expires_at=1e9,
        partitions=(day_partition(2 * number), day_partition(2 * number + 1)),
        item_files=(),
        base_version=base,
        base_state=None,
        config_hash="0" * 64,
        user_key_id="0" * 16,
        seed=number,
        private=True,
        reserved=_SPEND,
    )


def version_of(begun: UpdateStarted) -> str:
    """Returns the name of the version that an update makes."""
    return f"v{begun.update_id[1:]}"


def commit(begun: UpdateStarted, number: int) -> UpdateCommitted:
    """Returns the commit of all that `begun` reserved."""
    version = version_of(begun)
    names = ("head.safetensors", "adapter.safetensors", "items.parquet", "manifest.json")
    return UpdateCommitted(
        update_id=begun.update_id,
        owner=_OWNER,
        version=version,
        verdict="passed",
        reason="ndcg10 0.3127 against 0.3101",
        base_version=begun.base_version,
        partitions=begun.partitions,
        item_files=(),
        watermark=begun.partitions[-1].key.rpartition("=")[2],
        num_rows=1_204_311,
        num_users=80_112,
        row_counts={"impression": 1_100_000, "click": 90_000, "duplicate": 14_311},
        quarantined_files={},
        artifacts={f"versions/{version}/{name}": "0" * 64 for name in names},
        metrics=_METRICS,
        config_hash=begun.config_hash,
        seed=number,
        private=True,
        spent=_SPEND,
        seconds=312.4,
    )


def _rollout(number: int, phase: Any, stable: str, canary: str | None) -> RolloutChanged:
    return RolloutChanged(
        rollout_id=f"r{number:04d}",
        phase=phase,
        stable=stable,
        canary=canary,
        previous=None,
        weight_fraction=0.1 if canary else 0.0,
        actor="controller",
        reason="fewer bad requests",
        measurement=None,
    )
