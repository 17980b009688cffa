"""AdaLoRA's ranks during an update: which singular values are kept, decided step by step.

    Ranks.of(adapter) -> attach(optimizer); after each private step: after_step(optimizer, step)

`privacy.adalora` decides from noised gradients alone, so ranks cost no privacy. Every module starts
with `adalora_initial_rank`. After a tenth of the steps, ranks fall to a mean of `lora_rank`, which
the last quarter trains on. What decisions depend on goes into checkpoints, so a run that goes on
behind lost steps decides from what it had seen. Other adapters have nothing to decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from peft import PeftModel

from raysys.model.adapter import NAME, Adapter
from raysys.privacy.adalora import add_orthogonal_gradients, allocate_ranks

_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
"""PEFT's names of a weight's smoothed importance, and of how much that varies."""
_KEPT = "kept"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The rank decisions of one adapter."""

    peft_model: PeftModel | None
    """With AdaLoRA; None if there is nothing to decide."""

    @classmethod
    def of(cls, adapter: Adapter) -> Ranks:
        """Returns the decisions of a fresh adapter."""
        return cls(peft_model=adapter.peft_model if adapter.config.adapter == "adalora" else None)

    def attach(self, optimizer: DPOptimizer) -> None:
        """Keeps the factors near orthogonal, by a gradient that no user's data is in."""
        if (model := self.peft_model) is not None:
            optimizer.attach_step_hook(lambda _: add_orthogonal_gradients(model))

    def after_step(self, optimizer: DPOptimizer, step: int) -> None:
        """Decides, after the optimizer's step number `step`, counted from 1.

        Raises:
          PrivacyError: As `allocate_ranks`.
        """
        if self.peft_model is None:
            return
        config = _config(self.peft_model)
        last, pattern = config.total_step - config.tfinal, config.rank_pattern or {}
        is_final = 0 < sum(map(sum, pattern.values())) <= config.target_r * len(pattern)
        if step > last and not is_final:
            step = last  # it was lost with a worker, and is made up for
        if step >= last and not is_final and not _allocator(self.peft_model).exp_avg_ipt:
            return  # nothing has been seen that a decision could be made from
        allocate_ranks(self.peft_model, optimizer, step)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what later decisions depend on, all of it from noised gradients."""
        if self.peft_model is None:
            return {}
        allocator, pattern = _allocator(self.peft_model), _config(self.peft_model).rank_pattern
        tensors = {f"{_KEPT}/{name}": torch.tensor(kept) for name, kept in (pattern or {}).items()}
        for average in _AVERAGES:
            for name, value in getattr(allocator, average).items():
                tensors[f"{average}/{name}"] = value.cpu().clone()
        return tensors

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Sets what `state` returned."""
        if self.peft_model is None:
            return
        allocator, pattern = _allocator(self.peft_model), {}
        weights = dict(self.peft_model.get_base_model().named_parameters())
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == _KEPT:
                pattern[name] = value.tolist()
                continue
            getattr(allocator, kind)[name] = value.to(weights[name].device)
            # PEFT overwrites it in each step, and takes its absence for the first step.
            allocator.ipt[name] = torch.zeros_like(weights[name])
        _config(self.peft_model).rank_pattern = pattern or None

    def emptied(self) -> list[torch.Tensor]:
        """Returns the singular values of modules that have lost all of their rank."""
        if self.peft_model is None:
            return []
        pattern = _config(self.peft_model).rank_pattern or {}
        weights = dict(self.peft_model.get_base_model().named_parameters())
        return [weights[name] for name, kept in pattern.items() if not any(kept)]


def _config(peft_model: PeftModel) -> Any:
    return peft_model.peft_config[NAME]


def _allocator(peft_model: PeftModel) -> Any:
    return peft_model.base_model.rankallocator
