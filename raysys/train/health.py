"""After training: what should have moved moved, nothing else did, and what was written is that.

    frozen_digests() -> steps -> require_moved(), require_frozen() -> write -> require_same_scores()

Some stacks report a loss and an epsilon while nothing is trained (opacus #820), or do not restore a
trained head on reload (sentence-transformers #3936). Here both fail the update, before anything of
it can become a version. The probe is made of item texts alone: no user's data enters it.

Shape suffixes: P = texts of the probe, d = width of the encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from raysys.errors import HealthError
from raysys.ingest.features import NUM_FEATURES, FloatArray
from raysys.model.encoder import TokenActivations
from raysys.model.scorer import Head, head_inputs

SCORE_TOLERANCE = 1e-6
"""Of scores after a reload, relative to the largest one: both sides compute the same."""
TRAINED_TOLERANCE = 1e-3
"""Of embeddings by the trained tower and by the written weights, which compute in another order,
and the first of them perhaps on a GPU."""
NUM_PROBE_TEXTS = 64


def frozen_digests(modules: Iterable[torch.nn.Module]) -> dict[str, str]:
    """Returns parameter -> sha256 of all that are not trained."""
    return {
        name: hashlib.sha256(parameter.detach().cpu().contiguous().numpy().data).hexdigest()
        for module in modules
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
    }


def require_frozen(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Checks that training changed no frozen weight.

    Raises:
      HealthError: It did.
    """
    changed = sorted(name for name in before.keys() | after.keys()
                     if before.get(name) != after.get(name))  # fmt: skip
    if changed:
        raise HealthError(
            f"training changed {changed[0]}, which is frozen ({len(changed)} frozen weights "
            "changed): what changed it is no part of the private engine; freeze or train it there"
        )


def require_moved(
    trainable: Iterable[tuple[str, torch.nn.Parameter]],
    before: Iterable[torch.Tensor],
    adam: torch.optim.Optimizer,
    emptied: Iterable[torch.Tensor] = (),
) -> None:
    """Checks that training moved the weights that it should have moved.

    What nothing ever pulled at may stay as it was. Noise pulls at everything; without it LoRA has
    no gradient where no user has a history yet. What AdaLoRA has taken all rank from is back where
    it began: `emptied`.

    Raises:
      HealthError: A weight that was pulled at did not move or is not finite, or none moved.
    """
    moved, zeroed = {}, {id(parameter) for parameter in emptied}
    for (name, parameter), old in zip(trainable, before, strict=True):
        pulled = adam.state[parameter]["exp_avg_sq"].any() if parameter in adam.state else True
        pulled = pulled and id(parameter) not in zeroed
        moved[name] = not torch.equal(parameter, old)
        if not torch.isfinite(parameter).all() or (pulled and not moved[name]):
            raise HealthError(
                f"training left {name} unchanged, or not finite: the optimizer does not hold the "
                "weights that the model computes with, or the learning rate is out of bounds"
            )
    if not any(moved.values()):
        raise HealthError("training changed nothing: no sampled user had a loss")


def require_same_scores(name: str, expected: FloatArray, found: FloatArray) -> None:
    """Checks that scores (P,) are the same but for rounding.

    Raises:
      HealthError: They are not.
    """
    worst = float(np.abs(found - expected).max(initial=0.0))
    # Written so that NaN is refused too.
    if not worst <= SCORE_TOLERANCE * max(1.0, float(np.abs(expected).max(initial=0.0))):
        raise HealthError(
            f"{name} scores up to {worst:.3g} away from the model that was trained: what was "
            "written is not what was trained; look at how it is saved and loaded"
        )


def require_same_texts(trained: FloatArray, written: FloatArray) -> None:
    """Checks that the trained tower and the written weights embed texts (P, d) alike.

    Raises:
      HealthError: They do not.
    """
    if not np.isfinite(trained).all():
        raise HealthError(
            "what was trained embeds texts as numbers that are not finite: lower "
            "train.learning_rate or train.bootstrap_learning_rate"
        )
    worst = float(np.abs(trained - written).max(initial=0.0))
    if not worst <= TRAINED_TOLERANCE:
        raise HealthError(
            f"the written encoder embeds texts up to {worst:.3g} away from the one that was "
            "trained: it is not the trained one that is merged"
        )


def probe_scores(head: Head, text: FloatArray) -> FloatArray:
    """Returns scores (P,) of the texts (P, d) for a made-up user and query.

    The first text is the user's history, the last one the query. Each feature takes each value from
    0 to 1 somewhere, so that all of the head's weights matter.
    """
    places = (np.arange(len(text))[:, None] * 7 + np.arange(NUM_FEATURES) * 3) % 11 / 10
    inputs = head_inputs(places.astype(np.float32), text @ text[0], text @ text[-1])
    return head.score(inputs)


def probe(activations: TokenActivations) -> TokenActivations:
    """Returns the activations of the probe's texts, perhaps fewer than `NUM_PROBE_TEXTS`."""
    return activations.select(activations.texts[:NUM_PROBE_TEXTS])
