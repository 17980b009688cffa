"""The trainable text side of the ranker: embeds the catalogue's texts from cached activations.

    Adapter + TokenActivations -> build_tower() -> TextTower    LoRA on the last output projection
                                                -> LayerTower   anything else in the upper layers
                                                -> FrozenTower  nothing: the head alone is trained

All give what the whole PEFT model gives, up to the cache's half precision. What lies below this
update's own modules is frozen, whatever earlier updates changed in it, and runs once.

Shape suffixes: U = users, N = distinct (user, text) pairs, M = distinct texts, T = tokens,
d = width of the encoder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeAlias

import torch

from raysys.model.adapter import Adapter
from raysys.model.encoder import TokenActivations
from raysys.model.layers import mean_pooled, run_layers
from raysys.model.text_tower import TextTower

Rows: TypeAlias = Callable[[torch.Tensor | None, int], contextlib.AbstractContextManager[object]]
"""From (N,) the user of each row and the number of users to the context that they are fed in."""


class LayerTower(torch.nn.Module):
    """Runs the adapted layers over each distinct pair of user and text of a batch."""

    def __init__(self, adapter: Adapter, activations: TokenActivations) -> None:
        super().__init__()
        self.encoder, self.cut = adapter.encoder.model, activations.cut
        self.rows: Rows = lambda users, num_users: contextlib.nullcontext()
        self.register_buffer("hidden", torch.from_numpy(activations.hidden), persistent=False)
        self.register_buffer("lengths", torch.from_numpy(activations.lengths), persistent=False)
        self.hidden: torch.Tensor
        self.lengths: torch.Tensor

    def forward(self, text_index: torch.Tensor) -> torch.Tensor:
        """Returns normalised embeddings (U, ..., d) of the texts (U, ...), user first."""
        num_users, num_texts = len(text_index), len(self.hidden)
        user = torch.arange(num_users, device=text_index.device)
        pairs = text_index.reshape(num_users, -1) + num_texts * user[:, None]
        distinct, place = torch.unique(pairs, return_inverse=True)
        with self.rows(distinct // num_texts, num_users):
            embedded = self._embed(distinct % num_texts)
        return embedded[place].reshape(*text_index.shape, -1)

    @torch.no_grad()
    def embed_all(self) -> torch.Tensor:
        """Returns the embeddings of all texts, (M, d)."""
        every = torch.arange(len(self.hidden), device=self.hidden.device)
        return torch.cat([self.forward(some[None])[0] for some in torch.split(every, 512)])

    def _embed(self, texts: torch.Tensor) -> torch.Tensor:
        lengths = self.lengths[texts]
        hidden = self.hidden[texts, : int(lengths.max())].float()
        return mean_pooled(run_layers(self.encoder, hidden, lengths, self.cut), lengths)


class FrozenTower(torch.nn.Module):
    """Looks the previous version's embeddings up."""

    def __init__(self, adapter: Adapter, activations: TokenActivations) -> None:
        super().__init__()
        text = torch.from_numpy(adapter.encoder.finish(activations))
        self.register_buffer("text", text, persistent=False)
        self.text: torch.Tensor

    def forward(self, text_index: torch.Tensor) -> torch.Tensor:
        """Returns normalised embeddings (U, ..., d) of the texts (U, ...)."""
        return self.text[text_index]

    def embed_all(self) -> torch.Tensor:
        """Returns the embeddings of all texts, (M, d)."""
        return self.text.clone()


Tower: TypeAlias = TextTower | LayerTower | FrozenTower


def build_tower(adapter: Adapter, activations: TokenActivations) -> Tower:
    """Returns the tower of an update, the fastest that computes it.

    Args:
      adapter: Fresh or trained.
      activations: Of the public encoder, at a cut below all that the line and this update changed.
    """
    config = adapter.config
    if not adapter.modules:
        return FrozenTower(adapter, activations)
    own = adapter.encoder.advance(activations, adapter.cut)
    last = adapter.encoder.layout.depth - 1
    if config.adapter == "lora" and adapter.modules == (f"encoder.layer.{last}.output.dense",):
        return TextTower(adapter.encoder.model, own)
    return LayerTower(adapter, own)
