"""Joins an update's delta with the version before it.

    previous + alpha * (trained - previous) -> the new version

Each update trains a fresh adapter on the frozen previous model, so the formula is exact, the rank
may change from update to update, and a rollback drops the last delta.
"""

from __future__ import annotations

import numpy as np
import torch

from raysys.ingest.features import FloatArray
from raysys.model.scorer import Head


def interpolate(previous: Head, trained: Head, alpha: float) -> Head:
    """Returns `previous + alpha * (trained - previous)`, weight by weight."""
    return Head(
        weights={
            name: (old + alpha * (trained.weights[name] - old)).astype(np.float32)
            for name, old in previous.weights.items()
        }
    )


def merge_lora(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float
) -> FloatArray:
    """Returns `weight + scale * (lora_b @ lora_a)`, (d_out, d_in), with alpha inside `scale`."""
    merged: FloatArray = (weight + scale * (lora_b @ lora_a)).detach().numpy().astype(np.float32)
    return merged
