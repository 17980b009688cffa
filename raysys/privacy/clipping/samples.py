"""What Opacus gets: `parameter.grad_sample`, (U, ...), and the check that nothing else is there.

`DPOptimizer` takes per-user gradients set by hand; its hooks (`GradSampleModule`) are not used.

Shape suffix: U = users of the step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from raysys.errors import PrivacyError


def add_grad_sample(parameter: torch.Tensor, grad_sample: torch.Tensor) -> None:
    """Adds per-user gradients (U, ...) to a parameter, if it is trained."""
    if not parameter.requires_grad:
        return
    earlier = getattr(parameter, "grad_sample", None)
    total = grad_sample if earlier is None else earlier + grad_sample
    parameter.grad_sample = total  # type: ignore[attr-defined]


def require_per_user_gradients(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], num_users: int
) -> None:
    """Checks that every trainable parameter was reached through per-user functions alone.

    Raises:
      PrivacyError: A parameter has no per-user gradient, one of another number of users, or also
        an ordinary gradient, which would escape the clip.
    """
    for name, parameter in parameters:
        sample = getattr(parameter, "grad_sample", None)
        if sample is None or sample.shape != (num_users, *parameter.shape):
            found = "none" if sample is None else tuple(sample.shape)
            raise PrivacyError(
                f"{name}: expected per-user gradients of shape {(num_users, *parameter.shape)}, "
                f"found {found}; train it through per_user_linear or freeze it"
            )
        if parameter.grad is not None:
            raise PrivacyError(f"{name}: has a gradient that no clip bounds; freeze it")


def set_empty_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sets per-user gradients of zero users: an empty Poisson step is pure noise, and a step."""
    for parameter in parameters:
        parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
