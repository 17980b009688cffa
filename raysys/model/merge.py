"""Joins what an update trained in the head with the version before it.

    previous + alpha * (trained - previous) -> the new version

Each update trains a fresh adapter on the frozen previous model, so the formula is exact for the
encoder too (`Adapter.scale`), rank and target modules may change from update to update, and a
rollback drops the last delta.
"""

from __future__ import annotations

import numpy as np

from raysys.model.scorer import Head


def interpolate(previous: Head, trained: Head, alpha: float) -> Head:
    """Returns `previous + alpha * (trained - previous)`, weight by weight."""
    return Head(
        weights={
            name: (old + alpha * (trained.weights[name] - old)).astype(np.float32)
            for name, old in previous.weights.items()
        }
    )
