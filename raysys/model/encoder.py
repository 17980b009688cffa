"""The pretrained text encoder, and the token activations that are computed once for each text.

    texts -> activations() -> TokenActivations -> cache/<encoder>/… -> Tower (train), catalogue

Below the lowest module that any update of a version's line has adapted, the encoder is the public
one: the activations at that cut depend on (encoder, text) alone and are kept below the root for all
steps, updates and versions. By default the cut is the last feed-forward block, and recomputing that
from its input takes about 1/20 of the whole encoder.

Shape suffixes: M = distinct texts, T = tokens, d = width of the encoder (384 for MiniLM).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from raysys.model.encoder_files import resolve_encoder, weights_sha256
from raysys.model.layers import mean_pooled, run_layers, token_mask
from raysys.model.targets import DEFAULT_CUT, Cut, Layout, cut_of, layout
from raysys.storage import Root
from raysys.storage.parquet import to_parquet


def load_encoder(folder: Path) -> PreTrainedModel:
    """Loads a frozen encoder.

    Raises:
      ConfigError: Its layers have not the shape of BERT's.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder: PreTrainedModel = AutoModel.from_pretrained(folder, local_files_only=True)
    encoder.requires_grad_(False).eval()  # type: ignore[no-untyped-call]
    layout(encoder)
    return encoder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenActivations:
    """The hidden states at a cut, for each token of each text."""

    texts: list[str]
    hidden: NDArray[np.floating[Any]]
    """(M, T, d), zero beyond a text's length; half precision as cached."""
    lengths: NDArray[np.int32]
    """(M,) in tokens."""
    cut: Cut = DEFAULT_CUT

    def select(self, texts: Sequence[str]) -> TokenActivations:
        """Returns the activations of `texts`, in their order, trimmed to their longest."""
        place = {text: i for i, text in enumerate(self.texts)}
        rows = np.array([place[text] for text in texts], np.int64)
        lengths = self.lengths[rows]
        longest = int(lengths.max(initial=1))
        return dataclasses.replace(
            self, texts=list(texts), hidden=self.hidden[rows, :longest], lengths=lengths
        )

    def to_bytes(self) -> bytes:
        """Returns a compressed npz file."""
        buffer = io.BytesIO()
        texts = np.array(self.texts, dtype=np.str_)
        cut = np.array(dataclasses.astuple(self.cut), np.int32)
        np.savez(buffer, texts=texts, hidden=self.hidden, lengths=self.lengths, cut=cut)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> TokenActivations:
        """Reads what `to_bytes` wrote; what names no cut was written before there were several."""
        with np.load(io.BytesIO(data)) as arrays:
            num_layers, keeps_attention = arrays.get("cut", (1, 1))
            return cls(
                texts=arrays["texts"].tolist(),
                hidden=arrays["hidden"],
                lengths=arrays["lengths"],
                cut=Cut(num_layers=int(num_layers), keeps_attention=bool(keeps_attention)),
            )

    @classmethod
    def concat(cls, parts: Iterable[TokenActivations]) -> TokenActivations:
        """Joins one or more parts of one encoder and cut."""
        parts = list(parts)
        (cut,) = {part.cut for part in parts}
        longest = max(part.hidden.shape[1] for part in parts)
        hidden = [
            np.pad(part.hidden, ((0, 0), (0, longest - part.hidden.shape[1]), (0, 0)))
            for part in parts
        ]
        return cls(
            texts=[text for part in parts for text in part.texts],
            hidden=np.concatenate(hidden),
            lengths=np.concatenate([part.lengths for part in parts]),
            cut=cut,
        )


class TextEncoder:
    """An encoder with its tokenizer, in one process. Threads may share it."""

    def __init__(self, name: str, max_tokens: int) -> None:
        folder = resolve_encoder(name)
        self.model = load_encoder(folder)
        self.max_tokens = max_tokens
        self.cut = DEFAULT_CUT
        """Below it the encoder is the public one."""
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @property
    def width(self) -> int:
        """Width d of the encoder."""
        return int(self.model.config.hidden_size)

    @property
    def layout(self) -> Layout:
        """Names of its modules."""
        return layout(self.model)

    def with_weights(self, adapted_weights: Mapping[str, NDArray[np.float32]]) -> TextEncoder:
        """Returns an encoder that has a version's matrices, and shares all else with this one.

        Args:
          adapted_weights: Module name -> weight, (d_out, d_in).
        """
        other = copy.copy(self)
        other.model = _with_weights(self.model, adapted_weights)
        other.cut = cut_of(adapted_weights, self.layout.depth)
        return other

    def tokenize(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns `input_ids` and `attention_mask`, (M, T)."""
        batch: dict[str, torch.Tensor] = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens,
            return_tensors="pt",
        )  # fmt: skip
        return batch

    @torch.inference_mode()
    def activations(
        self, texts: Sequence[str], cut: Cut | None = None, batch_size: int = 128
    ) -> TokenActivations:
        """Runs the part below a cut, by default its own, once over each text, shortest first."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = []
        for start in range(0, len(order), batch_size):
            some = [texts[i] for i in order[start : start + batch_size]]
            parts.append(self._batch_activations(some, cut or self.cut))
        return TokenActivations.concat(parts)

    def _batch_activations(self, texts: list[str], cut: Cut) -> TokenActivations:
        batch = self.tokenize(texts)
        lengths = batch["attention_mask"].sum(1)
        model: Any = self.model
        embedded = model.embeddings(batch["input_ids"], batch.get("token_type_ids"))
        bottom = Cut(num_layers=self.layout.depth, keeps_attention=False)
        hidden = run_layers(self.model, embedded, lengths, bottom, cut)
        hidden = hidden * batch["attention_mask"][..., None]
        return TokenActivations(
            texts=texts,
            hidden=hidden.to(torch.float16).numpy(),
            lengths=lengths.numpy().astype(np.int32),
            cut=cut,
        )

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Returns normalised embeddings, (M, d)."""
        return self.finish(self.activations(texts).select(texts))

    @torch.inference_mode()
    def finish(self, activations: TokenActivations) -> NDArray[np.float32]:
        """Returns the embeddings that belong to cached activations, (M, d)."""
        hidden = torch.from_numpy(activations.hidden).float()
        lengths = torch.from_numpy(activations.lengths)
        last = run_layers(self.model, hidden, lengths, activations.cut)
        out: NDArray[np.float32] = mean_pooled(last, lengths).numpy()
        return out

    @torch.inference_mode()
    def advance(
        self, activations: TokenActivations, cut: Cut, batch_size: int = 512
    ) -> TokenActivations:
        """Returns the activations at a higher cut: unrounded, or the same ones at the same cut."""
        if activations.cut == cut:
            return activations
        hidden = np.zeros(activations.hidden.shape, np.float32)
        for start in range(0, len(hidden), batch_size):
            rows = slice(start, start + batch_size)
            lengths = torch.from_numpy(activations.lengths[rows])
            lower = torch.from_numpy(activations.hidden[rows]).float()
            upper = run_layers(self.model, lower, lengths, activations.cut, cut)
            hidden[rows] = (upper * token_mask(lengths, lower.shape[1])[..., None]).numpy()
        return dataclasses.replace(activations, hidden=hidden, cut=cut)


def _with_weights(
    model: PreTrainedModel, weights: Mapping[str, NDArray[np.float32]]
) -> PreTrainedModel:
    tensors = itertools.chain(model.parameters(), model.buffers())
    # What the memo of `deepcopy` holds is not copied: only the modules are.
    other = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name, weight in weights.items():
        module = other.get_submodule(name)
        tensor = torch.from_numpy(np.array(weight, np.float32))
        module.weight = torch.nn.Parameter(tensor, requires_grad=False)
    return other


def cache_folder(name: str, max_tokens: int, cut: Cut) -> str:
    """Returns where an encoder's activations at a cut are kept, relative to the root."""
    digest = weights_sha256(resolve_encoder(name))[:16]
    return f"cache/activations/{digest}-{max_tokens}{cut.suffix}"


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
