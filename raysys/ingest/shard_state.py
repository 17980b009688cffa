"""Where a shard's state lies below `state/<update_id>/`, and how it is read and written.

    histories/  impressions/  recent/  closed/  held_out/   one file a shard each: `ShardState`
    seen/                                        which events were read: `ingest.seen`
    histories.json                               how many items a history keeps

An update reads of its base only the files that can hold users of the shard at hand.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

import polars as pl

from raysys.ingest.examples import ShardState
from raysys.ingest.history import HISTORY_SCHEMA, merge_histories
from raysys.ingest.labels import CLOSED_SCHEMA, IMPRESSION_SCHEMA, OUTCOME_SCHEMA, Waiting
from raysys.ingest.pseudonym import HELD_OUT_SCHEMA, user_shard
from raysys.ingest.shards import overlapping, shard_name
from raysys.ingest.stats import load_item_scalars
from raysys.partitions.layout import HELD_OUT, SEEN, state_folder
from raysys.storage import Root
from raysys.storage.parquet import to_parquet

SHARD_FILES: Mapping[str, Mapping[str, pl.DataType]] = {
    "histories": HISTORY_SCHEMA,
    "impressions": IMPRESSION_SCHEMA,
    "recent": OUTCOME_SCHEMA,
    "closed": CLOSED_SCHEMA,
    HELD_OUT: HELD_OUT_SCHEMA,
}
"""Folder -> columns; `user` is the pseudonym in all of them."""


def shard_path(update_id: str, kind: str, shard: int, num_shards: int) -> str:
    """Returns the path of one of a shard's files."""
    return f"{state_folder(update_id)}/{kind}/{shard_name(shard, num_shards)}.parquet"


def save_shard_state(
    root: Root, update_id: str, shard: int, num_shards: int, state: ShardState
) -> None:
    """Writes a shard's state."""
    frames = {
        # Half the bytes of what no other column can compress, at 7 digits.
        "histories": state.histories.with_columns(pl.col("decayed").cast(pl.Float32)),
        "impressions": state.waiting.impressions,
        "recent": state.waiting.recent,
        "closed": state.waiting.closed,
        HELD_OUT: state.held_out,
    }
    for kind, frame in frames.items():
        root.put(shard_path(update_id, kind, shard, num_shards), to_parquet(frame))


def load_shard_state(root: Root, update_id: str, shard: int, num_shards: int) -> ShardState:
    """Reads the state of a shard's users, whatever the number of shards was when it was written."""
    held = {
        kind: _read(root, update_id, kind, shard, num_shards).filter(
            user_shard(num_shards) == shard
        )
        for kind in SHARD_FILES
    }
    return ShardState(
        histories=held.pop("histories").sort("user", "item"),
        held_out=held.pop(HELD_OUT),
        waiting=Waiting(**held),
        as_of=load_item_scalars(root, update_id)["as_of"],
    )


def save_history_settings(root: Root, update_id: str, *, max_items: int) -> None:
    """Writes what `load_histories` needs to know."""
    root.put(_settings_path(update_id), json.dumps({"max_items": max_items}).encode())


def seen_paths(root: Root, update_id: str, shard: int, num_shards: int) -> list[str]:
    """Returns the indexes of an update that can hold events of a shard's users."""
    listed = root.list(f"{state_folder(update_id)}/{SEEN}")
    return overlapping(shard, num_shards, (info.path for info in listed))


def load_held_out(root: Root, update_id: str) -> pl.DataFrame:
    """Reads who is held out, HELD_OUT_SCHEMA; of a state that kept no draws yet, nobody."""
    return _read(root, update_id, HELD_OUT, 0, 1)


def load_histories(root: Root, update_id: str) -> pl.DataFrame:
    """Reads the histories of all users, up to the last event: HISTORY_SCHEMA, sorted."""
    settled, recent = (_read(root, update_id, kind, 0, 1) for kind in ("histories", "recent"))
    if recent.is_empty():
        return settled.sort("user", "item")
    scalars = load_item_scalars(root, update_id)
    settings = json.loads(root.read_bytes(_settings_path(update_id)))
    return merge_histories(
        settled,
        recent,
        histories_as_of=scalars["as_of"],
        as_of=scalars["as_of"],
        half_life_s=scalars["half_life_s"],
        max_items=settings["max_items"],
    )


def _settings_path(update_id: str) -> str:
    return f"{state_folder(update_id)}/histories.json"


def _read(root: Root, update_id: str, kind: str, shard: int, num_shards: int) -> pl.DataFrame:
    schema = SHARD_FILES[kind]
    listed = root.list(f"{state_folder(update_id)}/{kind}")
    paths = overlapping(shard, num_shards, (info.path for info in listed))
    frames = [pl.read_parquet(io.BytesIO(root.read_bytes(path))) for path in paths]
    return pl.concat([pl.DataFrame(schema=schema), *(_typed(f, schema) for f in frames)])


def _typed(frame: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    return frame.select(pl.col(name).cast(dtype) for name, dtype in schema.items())
