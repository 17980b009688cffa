"""Writes versions and loads them again, with every hash checked.

    TrainOutput's weights -> publish() -> versions/<version>/… + {path: sha256}
    UpdateCommitted -> load_version() -> LoadedVersion

Loading a version needs no torch, except where ONNX Runtime cannot run its encoder.

Shape suffix: M = distinct texts, d = width of the encoder.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from raysys.errors import ArtifactError
from raysys.ingest.features import FloatArray, ItemTable
from raysys.ingest.history import history_slices
from raysys.ingest.shard_state import load_histories
from raysys.ingest.stats import load_item_state
from raysys.ledger.records import UpdateCommitted
from raysys.model.encoder_files import resolve_encoder, weights_sha256
from raysys.model.scorer import Head
from raysys.partitions.layout import state_folder
from raysys.registry.encoders import Encoders, VersionEncoder
from raysys.registry.loaded import LoadedVersion, VersionWeights
from raysys.registry.version import Manifest, version_path
from raysys.storage import Root
from raysys.storage.parquet import to_parquet


def publish(
    root: Root,
    manifest: Manifest,
    weights: VersionWeights,
    *,
    adapter: Mapping[str, bytes],
    report: str,
) -> dict[str, str]:
    """Writes a version's folder and returns {path: sha256} of it and of its state.

    The folder counts as a version only once a commit record names it.
    """
    texts = pl.DataFrame({"text": weights.texts, "embedding": weights.text.tolist()}).with_columns(
        pl.col("embedding").cast(pl.List(pl.Float32))
    )
    files = {
        "manifest.json": manifest.to_bytes(),
        "head.safetensors": save_tensors(
            {name: np.ascontiguousarray(value) for name, value in weights.head.weights.items()}
        ),
        "encoder.safetensors": save_tensors(
            {name: np.ascontiguousarray(w) for name, w in weights.adapted_weights.items()}
        ),
        "texts.parquet": to_parquet(texts),
        "report.md": report.encode(),
        **{f"adapter/{name}": data for name, data in adapter.items()},
    }
    for name, data in files.items():
        root.put(version_path(manifest.version, name), data)
    loaded = _assemble(root, manifest, weights)
    golden = json.dumps(loaded.record_golden(), sort_keys=True).encode()
    root.put(version_path(manifest.version, "golden.json"), golden)
    paths = [version_path(manifest.version, name) for name in (*files, "golden.json")]
    return hash_files(root, paths) | hash_state(root, manifest.state)


def hash_state(root: Root, update_id: str) -> dict[str, str]:
    """Returns {path: sha256} of everything below `state/<update_id>/`."""
    return hash_files(root, (file.path for file in root.list(state_folder(update_id))))


def hash_files(root: Root, paths: Iterable[str]) -> dict[str, str]:
    """Returns {path: sha256} of what is stored, not of what was meant to be."""
    return {path: hashlib.sha256(root.read_bytes(path)).hexdigest() for path in sorted(paths)}


def load_weights(root: Root, record: UpdateCommitted) -> tuple[Manifest, VersionWeights]:
    """Reads a committed version's manifest and weights.

    Raises:
      ArtifactError: A file is missing or is not the one that was committed, or this process has
        another encoder than the version was trained on.
    """
    version = record.version
    assert version is not None, "a held update has no version"

    def read(name: str) -> bytes:
        path = version_path(version, name)
        return read_checked(root, path, record.artifacts.get(path, "none"))

    manifest = Manifest.from_bytes(read("manifest.json"))
    found = weights_sha256(resolve_encoder(manifest.encoder))
    if found != manifest.encoder_sha256:
        raise ArtifactError(
            f"version {version} was trained on encoder {manifest.encoder_sha256[:12]}, "
            f"{manifest.encoder} here is {found[:12]}; install the same encoder"
        )
    texts = pl.read_parquet(io.BytesIO(read("texts.parquet")))
    width = len(texts["embedding"][0])
    return manifest, VersionWeights(
        head=Head(weights=load_tensors(read("head.safetensors"))),
        adapted_weights=_by_module(load_tensors(read("encoder.safetensors")), manifest),
        texts=texts["text"].to_list(),
        text=texts["embedding"].list.to_array(width).to_numpy(),
    )


def _by_module(tensors: dict[str, FloatArray], manifest: Manifest) -> dict[str, FloatArray]:
    if tensors.keys() == {"weight"}:  # of a version whose manifest had schema 1
        return dict(zip(manifest.adapted_modules, tensors.values(), strict=True))
    return tensors


def load_version(
    root: Root, record: UpdateCommitted, encoders: Encoders | None = None
) -> LoadedVersion:
    """Loads a committed version for serving, after checking every file against the ledger.

    Args:
      encoders: Of this process, which its versions share.

    Raises:
      ArtifactError: As `load_weights`.
    """
    for path, expected in record.artifacts.items():
        read_checked(root, path, expected)
    manifest, weights = load_weights(root, record)
    golden = json.loads(root.read_bytes(version_path(manifest.version, "golden.json")))
    encoder = (encoders or Encoders()).of(
        manifest, weights.adapted_weights, *_recorded(golden, weights)
    )
    return _assemble(root, manifest, weights, golden, record.user_key_id, encoder)


def _recorded(
    golden: Sequence[Mapping[str, Any]], weights: VersionWeights
) -> tuple[list[str], FloatArray]:
    """Returns texts and the embeddings (M, d) that training recorded of them."""
    requests = [request for request in golden if "embedding" in request]
    if not requests:  # of a version of an earlier raysys
        return weights.texts, weights.text
    embeddings = np.array([request["embedding"] for request in requests], np.float32)
    return [request["query"] for request in requests], embeddings


def read_checked(root: Root, path: str, expected: str) -> bytes:
    """Reads a file whose sha256 the ledger has.

    Raises:
      ArtifactError: It is missing, or another file than the one that was committed.
    """
    try:
        data = root.read_bytes(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing; restore it from a backup") from error
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise ArtifactError(
            f"{path} has sha256 {found[:12]}…, the ledger says {expected[:12]}…; restore it from a "
            "backup"
        )
    return data


def _assemble(
    root: Root,
    manifest: Manifest,
    weights: VersionWeights,
    golden: Sequence[Mapping[str, object]] = (),
    user_key_id: str | None = None,
    encoder: VersionEncoder | None = None,
) -> LoadedVersion:
    state = load_item_state(root, manifest.state)
    histories = history_slices(load_histories(root, manifest.state), state.as_of)
    return LoadedVersion(manifest, weights, state.table(), histories, golden, user_key_id, encoder)


def text_indexes(items: ItemTable) -> tuple[list[str], NDArray[np.int32]]:
    """Returns the catalogue's distinct texts, and (N,) the index of each item's text."""
    texts = list(dict.fromkeys(items.texts))
    place = {text: i for i, text in enumerate(texts)}
    return texts, np.array([place[text] for text in items.texts], np.int32)
