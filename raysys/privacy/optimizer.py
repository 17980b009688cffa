"""Opacus' private optimizers, with a clip of our own: same interface, same noise, same sums.

    parameter.grad_sample (U, ...) -> clip each user -> sum over users -> noise once -> step

What differs from Opacus: a user whose gradient is not finite contributes nothing (theirs makes the
sum NaN, which no noise hides); sums and noise of half-precision weights are float32, rounded after
the noise; and the passes over the gradients are two products without copies.

Shape suffix: U = users of a microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from opacus.optimizers import DistributedDPOptimizer, DPOptimizer
from opacus.optimizers.optimizer import (
    _check_processed_flag,
    _generate_noise,
    _mark_as_processed,
)

from raysys.errors import PrivacyError
from raysys.privacy.clipping.factored import FactoredGradients

Gradients = torch.Tensor | FactoredGradients


class _ClipsUsers(DPOptimizer):  # type: ignore[misc]
    """The steps of `DPOptimizer` between per-user gradients and the inner optimizer."""

    def clip_and_accumulate(self) -> None:
        """Adds the clipped sum over users to each parameter's `summed_grad`."""
        for parameter in self.params:
            _check_processed_flag(_batches(parameter))
        samples = self.grad_samples
        norms = user_norms(samples)
        finite = torch.isfinite(norms)
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        if not finite.all():
            factors = torch.where(finite, factors, 0.0)
            samples = [without_users(sample, finite) for sample in samples]
        for parameter, sample in zip(self.params, samples, strict=True):
            total = weighted_sum(sample, factors).view_as(parameter)
            if parameter.summed_grad is None:
                parameter.summed_grad = total
            else:
                parameter.summed_grad += total
            _mark_as_processed(_batches(parameter))

    def _get_flat_grad_sample(self, parameter: torch.Tensor) -> Gradients:
        sample = getattr(parameter, "grad_sample", None)
        if isinstance(sample, FactoredGradients):
            return sample
        flat: torch.Tensor = super()._get_flat_grad_sample(parameter)
        return flat

    @property
    def accumulated_iterations(self) -> int:
        """Number of batches in each `grad_sample`, for which the sum is divided."""
        found = {len(_batches(parameter)) for parameter in self.params}
        if len(found) != 1:
            raise ValueError("Number of accumulated steps is inconsistent across parameters")
        return found.pop()

    def add_noise(self) -> None:
        """Puts the noised sum into `grad`."""
        for parameter in self.params:
            _check_processed_flag(parameter.summed_grad)
            total = parameter.summed_grad
            if self._adds_noise:
                noise = _generate_noise(
                    std=self.noise_multiplier * self.max_grad_norm,
                    reference=total,
                    generator=self.generator,
                    secure_mode=self.secure_mode,
                )
                total = total + noise
            parameter.grad = total.to(parameter.dtype, copy=not self._adds_noise)
            _mark_as_processed(parameter.summed_grad)

    def scale_grad(self) -> None:
        """Divides by the expected number of users, which is fixed in advance."""
        if self.loss_reduction == "mean":
            divisor = self.expected_batch_size * self.accumulated_iterations
            torch._foreach_div_([parameter.grad for parameter in self.params], divisor)

    @property
    def _adds_noise(self) -> bool:
        return True


class PerUserOptimizer(_ClipsUsers):
    """`DPOptimizer` of one process."""


class DistributedPerUserOptimizer(_ClipsUsers, DistributedDPOptimizer):  # type: ignore[misc]
    """`DistributedDPOptimizer`: rank 0 alone adds noise, before the sum over workers.

    Raises:
      PrivacyError: A weight is in half precision: the other ranks' sums would be rounded before
        the noise, by amounts that no clip bounds.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        super().__init__(optimizer, **options)
        for parameter in self.params:
            if torch.finfo(parameter.dtype).bits < 32:
                raise PrivacyError(
                    f"a trained weight is {parameter.dtype}, expected float32 or more: sums are "
                    "rounded before the noise; keep weights in float32 and use autocast for speed"
                )

    @property
    def _adds_noise(self) -> bool:
        return bool(self.rank == 0)


def user_norms(samples: Sequence[Gradients]) -> torch.Tensor:
    """Returns each user's norm over all parameters, (U,), for gradients (U, ...) of each."""
    norms = [_norms(sample) for sample in samples]
    by_parameter = torch.stack([norm.to(norms[0]) for norm in norms])
    total: torch.Tensor = torch.linalg.vector_norm(by_parameter, dim=0)
    return total


def weighted_sum(sample: Gradients, weights: torch.Tensor) -> torch.Tensor:
    """Returns the sum over users by weights (U,)."""
    if isinstance(sample, FactoredGradients):
        return sample.weighted_sum(weights)
    total: torch.Tensor = weights.to(sample.dtype) @ _flat(sample)
    return total


def without_users(sample: Gradients, kept: torch.Tensor) -> Gradients:
    """Returns gradients that are zero for users not `kept`, (U,): 0 times infinity is not."""
    if isinstance(sample, FactoredGradients):
        return sample.without_users(kept)
    zeroed: torch.Tensor = torch.where(kept.view(-1, *[1] * (sample.dim() - 1)), sample, 0.0)
    return zeroed


def _norms(sample: Gradients) -> torch.Tensor:
    if isinstance(sample, FactoredGradients):
        own: torch.Tensor = sample.norms
        return own
    norms: torch.Tensor = torch.linalg.vector_norm(_flat(sample), dim=1)
    return norms


def _flat(sample: torch.Tensor) -> torch.Tensor:
    return sample.reshape(len(sample), sample.shape[1:].numel())


def _batches(parameter: torch.Tensor) -> list[Gradients]:
    """Opacus' hooks make a list of several backward passes before a step; the engine refuses it."""
    sample: Any = getattr(parameter, "grad_sample", None)
    batches: list[Gradients] = sample if isinstance(sample, list) else [sample]
    return batches
