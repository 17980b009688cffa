"""A version of the tiny shop below a root, whole or spoilt."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from raysys.ingest.shard_state import shard_path
from raysys.ingest.stats import save_item_state
from raysys.ledger.records import UpdateCommitted
from raysys.model.encoder import TextEncoder
from raysys.model.encoder_files import weights_sha256
from raysys.registry.loaded import VersionWeights
from raysys.registry.store import publish, text_indexes
from raysys.registry.version import Manifest, version_path
from raysys.storage import Root
from tests import tiny_shop
from tests.helpers import committed

VERSION, UPDATE = "v0002-bbbbbb", "u0002-bbbbbb"
ADAPTED = "encoder.layer.1.output.dense"


def publish_version(root: Root, encoder: str) -> UpdateCommitted:
    """Writes state and version below the root; returns the commit record that names them."""
    state = tiny_shop.item_states()[-1]
    texts, _ = text_indexes(state.table())
    matrix = np.random.default_rng(1).normal(size=(16, 32)).astype(np.float32)
    weights = VersionWeights(
        head=tiny_shop.random_head(),
        adapted_weights={ADAPTED: matrix},
        texts=texts,
        text=TextEncoder(encoder, 8).with_weights({ADAPTED: matrix}).embed(texts),
    )
    manifest = Manifest(
        version=VERSION, update_id=UPDATE, base_version=None, encoder=encoder,
        encoder_sha256=weights_sha256(Path(encoder)), max_tokens=8, lora_rank=4, adapter="lora",
        adapted_modules=(ADAPTED,), alpha=1.0, state=UPDATE,
    )  # fmt: skip
    save_item_state(root, UPDATE, state)
    buffer = io.BytesIO()
    tiny_shop.shard(tiny_shop.outcomes(20)).state.histories.write_parquet(buffer)
    root.put(shard_path(UPDATE, "histories", 0, 1), buffer.getvalue())
    artifacts = publish(root, manifest, weights, adapter={}, report="# Version\n")
    return committed(version=VERSION, artifacts=artifacts)


def with_file(
    root: Root,
    record: UpdateCommitted,
    name: str,
    change: Callable[[bytes], bytes],
    *,
    is_committed: bool = True,
) -> UpdateCommitted:
    """Changes one of the version's files; `is_committed` has the ledger name what it is now."""
    path = version_path(VERSION, name)
    data = change(root.read_bytes(path))
    root.put(path, data)
    if not is_committed:
        return record
    digest = hashlib.sha256(data).hexdigest()
    return dataclasses.replace(record, artifacts={**record.artifacts, path: digest})


def with_skip_weight(
    root: Root, record: UpdateCommitted, change: Callable[[np.ndarray], np.ndarray]
) -> UpdateCommitted:
    """A version whose head was published with other weights."""

    def changed(data: bytes) -> bytes:
        tensors = load(data)
        return save({**tensors, "skip.weight": change(tensors["skip.weight"]).astype(np.float32)})

    return with_file(root, record, "head.safetensors", changed)
