"""Opacus' private optimizers, with a clip of our own: same interface, same noise, same sums.

    parameter.grad_sample (U, ...) -> clip each user -> sum over users -> noise once -> step

What differs from Opacus: a user whose gradient is not finite contributes nothing (theirs makes the
sum NaN, which no noise hides); sums and noise of half-precision weights are float32, rounded after
the noise; and the passes over the gradients are two products without copies.

Shape suffix: U = users of a microbatch.
"""

from __future__ import annotations

from typing import Any

import torch
from opacus.optimizers import DistributedDPOptimizer, DPOptimizer
from opacus.optimizers.optimizer import (
    _check_processed_flag,
    _generate_noise,
    _mark_as_processed,
)

from raysys.errors import PrivacyError


class _ClipsUsers(DPOptimizer):  # type: ignore[misc]
    """The steps of `DPOptimizer` between per-user gradients and the inner optimizer."""

    def clip_and_accumulate(self) -> None:
        """Adds the clipped sum over users to each parameter's `summed_grad`."""
        parameters = self.params
        for parameter in parameters:
            _check_processed_flag(parameter.grad_sample)
        samples = [
            sample.reshape(len(sample), parameter.numel())
            for parameter, sample in zip(parameters, self.grad_samples, strict=True)
        ]
        norms = user_norms(samples)
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        finite = torch.isfinite(norms)
        if not finite.all():
            factors = torch.where(finite, factors, 0.0)
            samples = [torch.where(finite[:, None], sample, 0.0) for sample in samples]
        for parameter, sample in zip(parameters, samples, strict=True):
            total = (factors.to(sample.dtype) @ sample).view_as(parameter)
            if parameter.summed_grad is None:
                parameter.summed_grad = total
            else:
                parameter.summed_grad += total
            _mark_as_processed(parameter.grad_sample)

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


def user_norms(samples: list[torch.Tensor]) -> torch.Tensor:
    """Returns each user's norm over all parameters, (U,), for gradients (U, n) of each."""
    norms = [torch.linalg.vector_norm(sample, dim=1) for sample in samples]
    by_parameter = torch.stack([norm.to(norms[0]) for norm in norms])
    total: torch.Tensor = torch.linalg.vector_norm(by_parameter, dim=0)
    return total
