"""AdaLoRA under privacy: ranks are decided from noised gradients alone.

    engine.backward -> optimizer.step() (clips, noises, steps) -> allocate_ranks(…) -> zero_grad

PEFT's `RankAllocator` scores each singular value by `p * p.grad`, smoothed over steps, and zeroes
the least important ones. After a private step `p.grad` is the noised sum of clipped gradients that
the inner optimizer was given, and `p` follows from such sums, so ranks are post-processing: they
cost no privacy. Before the step, or beside it, they would release what no noise covers.

PEFT's orthogonal regularisation is a term of the loss; here it is a gradient of its own, added
after the noise. It depends on the weights alone, so it must neither be clipped with a user's
gradient nor take room below the clip norm.

Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512.
"""

from __future__ import annotations

from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel

from raysys.errors import PrivacyError

RankPattern = dict[str, list[bool]]


def allocate_ranks(model: PeftModel, optimizer: DPOptimizer, step: int) -> RankPattern | None:
    """Updates AdaLoRA's importances and masks, right after a step of the private optimizer.

    Args:
      step: Number of steps taken, from 1; PEFT's schedule (`tinit`, `tfinal`, `deltaT`,
        `total_step`) says at which of them ranks change.

    Returns:
      Which singular values are kept, by name of the parameter, as of now; None before the first
      decision.

    Raises:
      PrivacyError: The gradients are not those of a private step that was just taken.
    """
    tuner: Any = model.base_model
    if not isinstance(tuner, AdaLoraModel):
        raise PrivacyError(f"allocate_ranks: expected AdaLoRA, found {type(tuner).__name__}")
    _require_noised(_adapter_parameters(model), optimizer)
    tuner.update_and_allocate(step)  # type: ignore[no-untyped-call]
    config: Any = model.peft_config[model.active_adapter]
    pattern: RankPattern | None = config.rank_pattern
    return pattern


def add_orthogonal_gradients(model: PeftModel) -> None:
    """Adds the gradient of AdaLoRA's regularisation to `grad`: keeps P and Q near orthogonal.

    Attach it to the private optimizer, which calls it after the noise and before the step:
    `optimizer.attach_step_hook(lambda _: add_orthogonal_gradients(model))`. All workers add the
    same, so that their mean is the same too.
    """
    config: Any = model.peft_config[model.active_adapter]
    factors = [
        (name, p) for name, p in _adapter_parameters(model) if "lora_A" in name or "lora_B" in name
    ]
    with torch.no_grad():
        for name, parameter in factors:
            assert parameter.grad is not None
            rows = parameter if "lora_A" in name else parameter.T  # (r, d)
            excess = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
            size = torch.linalg.vector_norm(excess).clamp(min=torch.finfo(rows.dtype).tiny)
            gradient = 2 * excess @ rows / size * (config.orth_reg_weight / len(factors))
            parameter.grad += gradient if "lora_A" in name else gradient.T


def _adapter_parameters(model: PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    adapter = model.active_adapter
    return [(n, p) for n, p in model.named_parameters() if "lora_" in n and f".{adapter}" in n]


def _require_noised(
    parameters: list[tuple[str, torch.nn.Parameter]], optimizer: DPOptimizer
) -> None:
    held = {id(parameter) for parameter in optimizer.params}
    for name, parameter in parameters:
        # Opacus marks the sum of clipped gradients when it has put its noised copy into `grad`.
        noised = getattr(getattr(parameter, "summed_grad", None), "_processed", False)
        if id(parameter) not in held or not noised or parameter.grad is None:
            raise PrivacyError(
                f"{name}: no noised gradient; allocate ranks after optimizer.step() of the private "
                "optimizer that holds this weight, and before zero_grad()"
            )
