"""Carries every pseudonym of the head state forward to the newest key, without any raw id.

    state/<base>/ -> read, checked -> translate, split by shard anew -> state/<rotation>/
    UpdateStarted of no partition -> LeaseRenewed* -> PseudonymsRotated

Below `state/`, a column `user` of a parquet file is a pseudonym, and only such files are about
users: they are translated, all others are copied. The index of the events that an update read stays
with that update: whoever reads it carries it forward. Nothing counts until the one record names the
new state. Killed before that, it leaves a folder that the next update or rotation deletes.
"""

from __future__ import annotations

import dataclasses
import io
import os
import platform
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import polars as pl

from raysys.config import Config
from raysys.ingest.pseudonym import (
    HELD_OUT_SCHEMA,
    Pseudonymizer,
    check_key,
    draw_held_out,
    replace_inside,
    user_shard,
)
from raysys.ingest.shards import shard_name
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.ledger.records import PseudonymsRotated, UpdateStarted
from raysys.ledger.state import State
from raysys.partitions.layout import HELD_OUT, SEEN, state_folder
from raysys.partitions.orphans import delete_orphans
from raysys.registry.store import hash_state, read_checked
from raysys.storage import Root
from raysys.storage.parquet import to_parquet

_SHARD_FILE = re.compile(r"(.*)/\d{4}(?:-of-\d{4})?\.parquet")


class _UpToDateError(Exception):
    """There is nothing to do."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StateFiles:
    """The files of one state, by their paths in its folder."""

    users: Mapping[str, pl.DataFrame]
    """What is about users, with a column `user`. Shards of a folder are one frame, by its name."""
    others: Mapping[str, bytes]


def rotate_key(
    config: Config, on_progress: Callable[[str], None] = lambda line: None
) -> PseudonymsRotated | None:
    """Rotates the head state and returns the record; None if it is of the newest key already.

    Raises:
      ConfigError: The keys are missing, or the head state's is not among them.
      ArtifactError: A file of the head state is not the one that was committed.
      LeaseHeldError: An update or another rotation is at work.
    """
    began = time.monotonic()
    root = Root(config.root)
    root.check_writable()
    keys = Pseudonymizer.from_config(config.pseudonyms)
    log = Log(root)
    delete_orphans(root, log)
    owner = f"{platform.node()}:{os.getpid()}"

    def start(state: State) -> UpdateStarted:
        return _start(state, keys, config, owner)

    try:
        if (state := log.refresh()).active is None:
            start(state)
        with Lease(log, owner=owner, duration_s=config.lease.duration_s) as lease:
            started = lease.start(start)
            delete_orphans(root, log)
            on_progress(f"{started.update_id} carries {started.base_state} to key {keys.key_id}")
            record = _rotate(root, log.refresh(), started, keys, config, began)
            lease.check()
            lease.commit(record)
    except _UpToDateError as done:
        on_progress(str(done))
        return None
    on_progress(f"{record.update_id} committed: {record.num_users:,} users have new pseudonyms")
    return record


def _start(state: State, keys: Pseudonymizer, config: Config, owner: str) -> UpdateStarted:
    """Decides, on the state that directly precedes the record, what is rotated."""
    used = state.user_key_id
    if used is None or state.head_state is None:
        raise _UpToDateError(f"no update is committed yet: the first takes key {keys.key_id}")
    if used == keys.key_id:
        raise _UpToDateError(f"the pseudonyms are of key {used} already: add a key first")
    if used not in keys.key_ids:
        check_key(keys, used, config.root)
    return UpdateStarted(
        update_id=state.next_update_id(),
        owner=owner,
        lease_expires_at=time.time() + config.lease.duration_s,
        partitions=(),
        item_files=(),
        base_version=None,
        base_state=state.head_state,
        config_hash=config.hash(),
        user_key_id=keys.key_id,
        seed=0,
        private=False,
        reserved=None,
    )


def _rotate(
    root: Root,
    state: State,
    started: UpdateStarted,
    keys: Pseudonymizer,
    config: Config,
    began: float,
) -> PseudonymsRotated:
    base, used = state.head_state, state.user_key_id
    assert base is not None and used is not None and base == started.base_state
    old = read_state(root, base, state.head_artifacts)
    new = translate_state(old, keys, used, holdout_fraction=config.ingest.holdout_fraction)
    for path, data in state_bytes(new, config.ingest.num_shards):
        root.put(f"{state_folder(started.update_id)}/{path}", data)
    return PseudonymsRotated(
        update_id=started.update_id,
        owner=started.owner,
        base_state=base,
        from_key_id=used,
        to_key_id=keys.key_id,
        num_users=len(new.users[HELD_OUT]),
        artifacts=hash_state(root, started.update_id),
        seconds=round(time.monotonic() - began, 3),
    )


def read_state(root: Root, update_id: str, artifacts: Mapping[str, str]) -> StateFiles:
    """Reads the files of a state.

    Args:
      artifacts: Path -> sha256, of the state's files and of any others.

    Raises:
      ArtifactError: One is missing, or is not the one that was committed.
    """
    users: defaultdict[str, list[pl.DataFrame]] = defaultdict(list)
    others: dict[str, bytes] = {}
    start = f"{state_folder(update_id)}/"
    for path in sorted(path for path in artifacts if path.startswith(start)):
        if path.startswith(f"{start}{SEEN}/"):
            continue
        data, name = read_checked(root, path, artifacts[path]), path.removeprefix(start)
        if name.endswith(".parquet") and "user" in pl.read_parquet_schema(io.BytesIO(data)):
            shard = _SHARD_FILE.fullmatch(name)
            users[shard[1] if shard else name].append(pl.read_parquet(io.BytesIO(data)))
        else:
            others[name] = data
    return StateFiles(users={name: pl.concat(users[name]) for name in users}, others=others)


def translate_state(
    files: StateFiles, keys: Pseudonymizer, key_id: str, *, holdout_fraction: float
) -> StateFiles:
    """Returns the same state with the pseudonyms of a key carried forward to the newest one.

    Who is held out stays so. Users whose draw was not kept are drawn by their old pseudonym, as
    they were whenever they were seen: the new one would draw others.
    """
    known = files.users.get(HELD_OUT, pl.DataFrame(schema=HELD_OUT_SCHEMA))
    seen = pl.concat([frame["user"] for frame in files.users.values()] or [known["user"]])
    held_out = draw_held_out(seen, known, holdout_fraction)
    users = held_out["user"]
    new = pl.Series([keys.translate(user, key_id) for user in users], dtype=pl.String())
    mapped = pl.DataFrame({"user": users, "_new": new})
    return StateFiles(
        users={
            name: _translate(frame, mapped)
            for name, frame in (*files.users.items(), (HELD_OUT, held_out))
        },
        others=files.others,
    )


def _translate(frame: pl.DataFrame, mapped: pl.DataFrame) -> pl.DataFrame:
    joined = frame.join(mapped, on="user", how="left", maintain_order="left")
    for name in (name for name in frame.columns if name != "user"):
        if frame.schema[name] == pl.String:
            joined = replace_inside(joined, name, old="user", new="_new")
    renamed = joined.with_columns(user=pl.col("_new")).select(frame.columns)
    return renamed.sort("user", maintain_order=True)


def state_bytes(files: StateFiles, num_shards: int) -> Iterator[tuple[str, bytes]]:
    """Yields path and bytes of each file of a state; shards are those of its pseudonyms."""
    yield from files.others.items()
    for name, frame in files.users.items():
        if name.endswith(".parquet"):
            yield name, to_parquet(frame)
            continue
        for shard in range(num_shards):
            yield (
                f"{name}/{shard_name(shard, num_shards)}.parquet",
                to_parquet(frame.filter(user_shard(num_shards) == shard)),
            )
