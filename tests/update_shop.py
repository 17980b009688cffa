"""A shop below a root, small enough for a whole update in seconds, and what must hold afterwards.

    write_catalogue(root); write_day(root, day) -> update -> find_problems(root), find_raw_ids(root)

Both finders look at every object below the root, and share no code with what they judge.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from raysys.ledger.log import Log
from raysys.ledger.records import PrivacySpend, StepsPermitted, UpdateAbandoned, UpdateStarted
from raysys.ledger.state import State
from raysys.partitions.layout import SERVED_FILES
from raysys.partitions.schema import EVENT_SCHEMA
from raysys.storage import Root
from tests import tiny_shop
from tests.helpers import file_uses, write_config

NUM_USERS = 160
DAYS = tuple(f"2017-03-{day:02}" for day in range(1, 8))
RAW_ID_MARK = "@customers.example"
"""In every raw user id, and in nothing else."""
PERMANENT = ("events", "items", "ledger", "cache")
PARENTS = ("staging", "state", "versions", "quarantine")
SMALL = """
model: {{encoder: {encoder}, max_tokens: 8, hidden_units: 8, lora_rank: 2}}
lease: {{duration_s: {lease_s}}}
partitions: {{vanished_files: {vanished_files}}}
ingest:
  num_shards: 2
  num_history_negatives: 6
  num_popularity_negatives: 4
  num_uniform_negatives: 8
train: {{cpus_per_worker: 0.25, num_steps: {num_steps}, bootstrap_num_steps: {num_steps}}}
privacy: {{expected_batch_users: 32, enabled: {private}, epsilon_total: {epsilon_total}}}
evaluate: {{window_days: 1, num_bootstrap: 100}}
gate: {{min_holdout_users: {min_holdout_users}, max_ndcg10_drop: 0.99}}
"""


def write_shop(folder: Path, root: Root, encoder: str, **changes: Any) -> Path:
    """Writes the config of a shop whose gate passes whatever was trained; returns its path."""
    defaults = {
        "num_steps": 6,
        "private": "true",
        "epsilon_total": 50,
        "min_holdout_users": 5,
        "vanished_files": "fail",
    }
    values = {"encoder": encoder, "lease_s": 2.0, **defaults, **changes}
    return write_config(folder, root.uri, SMALL.format(**values))


def raw_id(number: int) -> str:
    return f"user-{number}{RAW_ID_MARK}"


def write_catalogue(root: Root) -> None:
    root.put(f"items/dt={DAYS[0]}/items.parquet", parquet(tiny_shop.catalogue()))


def write_day(root: Root, day: str, *, name: str = "a.parquet", bad_rows: bool = False) -> int:
    """Writes a day's purchases and returns how many rows; `bad_rows` adds one without a user, one
    without an item and a duplicate."""
    rows = list(_purchases(day))
    if bad_rows:
        rows += [{**rows[0], "user_id": None}, {**rows[0], "item_id": ""}, rows[0]]
    frame = pl.DataFrame(rows, schema={key: EVENT_SCHEMA[key] for key in rows[0]})
    root.put(f"events/dt={day}/{name}", parquet(frame))
    return len(frame)


def _purchases(day: str) -> Iterator[dict[str, Any]]:
    """Two items of the own category by each of about 7 users in 10."""
    midnight = datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC)
    rng = np.random.default_rng(midnight.toordinal())
    for number in np.flatnonzero(rng.random(NUM_USERS) < 0.7):
        for item in 10 * (number % 4) + rng.permutation(10)[:2]:
            yield {
                "event_id": f"{day}-{number}-{item}",
                "event_type": "purchase",
                "user_id": raw_id(int(number)),
                "item_id": f"i{item:02}",
                "ts": midnight + datetime.timedelta(seconds=3600 + int(number)),
            }


def parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def find_problems(root: Root) -> list[str]:
    """What is wrong with a root on which nobody works: not once, orphaned, lost or not charged."""
    log = Log(root)
    state = log.refresh()
    active = [f"{state.active.update_id} is still active"] if state.active else []
    return [*active, *_used_twice(state), *_orphans(root, state), *_damaged(root, state),
            *_not_charged(log)]  # fmt: skip


def _used_twice(state: State) -> Iterator[str]:
    for path, updates in file_uses(state.committed).items():
        if len(updates) > 1:
            yield f"{path} is in {updates}"


def _orphans(root: Root, state: State) -> Iterator[str]:
    owned = {f"versions/{version}" for version in state.versions}
    for update in state.committed:
        owned |= {f"state/{update.update_id}", f"quarantine/{update.update_id}"}
    owned |= {f"state/{rotation.update_id}" for rotation in state.rotations}
    folders = {f"{parent}/{name}" for parent in PARENTS for name in root.list_folders(parent)}
    folders |= {"/".join(info.path.split("/")[:2]) for info in root.list("")}
    for folder in sorted(folders - owned):
        if folder.partition("/")[0] not in PERMANENT:
            yield f"{folder} belongs to no committed update"


def _damaged(root: Root, state: State) -> Iterator[str]:
    for update in (*state.committed, *state.rotations):
        if not update.artifacts:
            yield f"{update.update_id} has no artifacts"
        for path, expected in update.artifacts.items():
            if not root.exists(path):
                yield f"{path} is missing"
            elif hashlib.sha256(root.read_bytes(path)).hexdigest() != expected:
                yield f"{path} is not what was committed"


def _not_charged(log: Log) -> Iterator[str]:
    """Every reservation that was ever written is charged, whatever became of it.

    That is in full, but for steps which an abandoned update was never permitted to run.
    """
    records = [entry.record for entry in log.entries()]
    abandoned = {r.update_id for r in records if isinstance(r, UpdateAbandoned)}
    permitted = {r.update_id: r.num_steps for r in records if isinstance(r, StepsPermitted)}
    reserved = Counter[tuple[str, PrivacySpend]]()
    for record in records:
        if not isinstance(record, UpdateStarted) or record.reserved is None:
            continue
        name, spend = record.update_id, record.reserved
        if name in abandoned:
            spend = dataclasses.replace(spend, num_steps=permitted.get(name, 0))
        reserved[name, spend] += 1
    charged = Counter((name, spend) for name, spend, _ in log.refresh().spends)
    for name, _ in reserved - charged:
        yield f"{name} was not charged its reservation"


def find_raw_ids(root: Root) -> list[str]:
    """Paths of all objects that hold a raw user id, except for the shop's own files."""
    return [
        info.path
        for info in root.list("")
        if not _is_the_shops(info.path)
        and RAW_ID_MARK in info.path + _text(info.path, root.read_bytes(info.path))
    ]


def _is_the_shops(path: str) -> bool:
    is_served = path.rpartition("/")[2].startswith(SERVED_FILES)
    return path.startswith("items/") or (path.startswith("events/") and not is_served)


def _text(path: str, data: bytes) -> str:
    """An object's bytes, and its values where they are compressed: parquet alone is."""
    text = data.decode("latin-1")
    if path.endswith(".parquet"):
        text += str(pl.read_parquet(io.BytesIO(data)).to_dicts())
    return text


def contents(root: Root) -> dict[str, bytes]:
    """Every object below the root."""
    return {info.path: root.read_bytes(info.path) for info in root.list("")}


def outline(record: Any) -> dict[str, Any]:
    """A commit record without what differs from run to run: names, draws, noise and time."""
    names = {record.update_id: "UPDATE", record.version or "": "VERSION"}
    body = dataclasses.asdict(record)
    for key in ("owner", "seed", "seconds", "reason", "config_hash", "partitions", "item_files"):
        del body[key]
    body |= {
        "update_id": "UPDATE",
        "version": record.version and "VERSION",
        "base_version": record.base_version is not None,
        "partitions": [[f.path for f in p.files] for p in record.partitions],
        "item_files": [f.path for f in record.item_files],
        "set_aside": [[aside.kind, aside.path] for aside in record.set_aside],
        "example_hashes": sorted(_renamed(path, names) for path in record.example_hashes),
        "artifacts": sorted(_renamed(path, names) for path in record.artifacts),
        "metrics": _shape(body["metrics"]),
    }
    return body


def _renamed(path: str, names: dict[str, str]) -> str:
    return "/".join(names.get(part, part) for part in path.split("/"))


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shape(item) for key, item in value.items()}
    return value if isinstance(value, int) else type(value).__name__
