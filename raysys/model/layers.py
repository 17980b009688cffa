"""Runs an encoder's layers from one cut to another, on activations instead of texts.

    activations at a cut -> run_layers() -> the same at a higher cut, or what the encoder gives out

Serving, training and the cache use this one function, so they agree on what a cut is.

Shape suffixes: N = texts, T = tokens, d = width of the encoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize
from transformers.masking_utils import create_bidirectional_mask

from raysys.model.targets import Cut


def run_layers(
    encoder: Any, hidden: torch.Tensor, lengths: torch.Tensor, start: Cut, stop: Cut | None = None
) -> torch.Tensor:
    """Returns hidden states (N, T, d) at `stop`, or those that the last layer gives out.

    Args:
      encoder: A BERT-like model, with or without PEFT's modules in it.
      hidden: (N, T, d) hidden states at `start`.
      lengths: (N,) in tokens; what lies beyond is neither attended to nor meant to be read.
    """
    layers = encoder.encoder.layer
    place, end = _place(start, len(layers)), _place(stop, len(layers))
    assert place <= end, f"{stop} lies below {start}"
    mask = token_mask(lengths, hidden.shape[1])
    attended = create_bidirectional_mask(
        config=encoder.config, inputs_embeds=hidden, attention_mask=mask.long()
    )
    while place < end:
        index, in_feed_forward = place
        layer = layers[index]
        if in_feed_forward:
            hidden, place = layer.output(layer.intermediate(hidden), hidden), (index + 1, False)
        elif end == (index, True):
            hidden, place = layer.attention(hidden, attended)[0], end
        else:
            hidden, place = layer(hidden, attended), (index + 1, False)
    return hidden


def token_mask(lengths: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Returns which tokens of texts of these lengths (N,) are no padding, (N, T)."""
    return torch.arange(num_tokens, device=lengths.device) < lengths[:, None]


def mean_pooled(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Returns normalised embeddings (N, d) of hidden states (N, T, d)."""
    mask = token_mask(lengths, hidden.shape[1])[..., None].to(hidden.dtype)
    return normalize((hidden * mask).sum(1), dim=1)


def _place(cut: Cut | None, depth: int) -> tuple[int, bool]:
    """Orders cuts: the layer, and whether its attention is done."""
    return (depth, False) if cut is None else (cut.first_layer(depth), cut.keeps_attention)
