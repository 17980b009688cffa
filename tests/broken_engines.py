"""Private engines with one fault each, for tests that must notice it.

with_fault(NoClip) -> what `PrivacyPlan.optimizer` is to be replaced with
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.privacy.plan import PrivacyPlan
from raysys.privacy.sampling import PoissonSampler

Optimizer = Callable[..., Any]


class NoClip:
    """Gradients keep their norm; noise is as large as it was."""

    def clip_and_accumulate(self) -> None:
        with _changed(self, max_grad_norm=float(torch.finfo(torch.float32).max)):
            super().clip_and_accumulate()  # type: ignore[misc]


class NoNoise:
    """Noise is charged and not added."""

    def add_noise(self) -> None:
        with _changed(self, noise_multiplier=0.0):
            super().add_noise()  # type: ignore[misc]


class NotTimesClip:
    """Noise does not grow with the clip norm."""

    def add_noise(self) -> None:
        with _changed(self, max_grad_norm=1.0):
            super().add_noise()  # type: ignore[misc]


class HalfAPercentLess:
    """Noise is a little less than is charged."""

    def add_noise(self) -> None:
        with _changed(self, noise_multiplier=0.995 * self.noise_multiplier):  # type: ignore[attr-defined]
            super().add_noise()  # type: ignore[misc]


class NoiseOnEachRank:
    """The noise of a step grows with the number of workers."""

    def add_noise(self) -> None:
        with _changed(self, rank=0):
            super().add_noise()  # type: ignore[misc]


class DropsEmptySteps(PoissonSampler):
    """As Opacus' distributed sampler does: ranks lose step."""

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (users for users in super().__iter__() if len(users))


class EveryStep(PoissonSampler):
    """Everybody takes part in each step, as if none were sampled."""

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return iter([np.arange(self.num_users)] * self.num_steps)


class FixedSize(PoissonSampler):
    """Batches of the expected size, drawn without replacement."""

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        size = round(self.num_users * self.sampling_prob)
        for _ in range(self.num_steps):
            yield np.sort(self.rng.choice(self.num_users, size, replace=False))


def with_fault(fault: type[Any]) -> Optimizer:
    """Returns a `PrivacyPlan.optimizer` whose optimizers have this fault."""
    sound = PrivacyPlan.optimizer

    def optimizer(plan: PrivacyPlan, *args: Any, **options: Any) -> Any:
        made = sound(plan, *args, **options)
        made.__class__ = type(fault.__name__, (fault, type(made)), {})
        return made

    return optimizer


@contextlib.contextmanager
def _changed(optimizer: Any, **values: Any) -> Iterator[None]:
    """The optimizer with other settings for a while."""
    before = {name: getattr(optimizer, name) for name in values}
    vars(optimizer).update(values)
    yield
    vars(optimizer).update(before)
