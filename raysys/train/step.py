"""One training step of one worker: sample users, per-user gradients, clip, sum, noise, AdamW.

    Stepper(job, module, batches, adam, …).run(step)

An empty step is taken like all others, so ranks stay in step and every step is charged as planned.
What a step draws depends on nothing that ran before it: under privacy the operating system's
entropy, otherwise (seed, rank, step). So no noise comes twice whatever is run again, and without
privacy a block that is run again, after a failure or in a replay, comes out the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer

from raysys.config import TrainConfig
from raysys.model.losses import LOSSES
from raysys.model.ranker import RankerModule
from raysys.model.ranks import Ranks
from raysys.privacy.clipping import set_empty_gradients
from raysys.privacy.plan import PrivacyPlan
from raysys.train.batches import Batches

_LABELS = ("gains", "weight", "log_q", "valid")


class Probe(Protocol):
    """What an audit does within each step: `train.canaries`."""

    def before_clip(
        self, users: NDArray[np.int64], parameters: Sequence[torch.nn.Parameter]
    ) -> None:
        """Sees, and may replace, the gradients `grad_sample` (U, ...) of these users (U,)."""

    def after_noise(self, optimizer: DPOptimizer) -> None:
        """Sees what one step releases: `grad` of the optimizer's parameters."""


class Stepper:
    """Runs single steps on the weights of one module."""

    def __init__(
        self,
        module: RankerModule,
        batches: Batches,
        adam: torch.optim.Optimizer,
        *,
        train: TrainConfig,
        plan: PrivacyPlan,
        learning_rate: float,
        seed: int,
        num_workers: int,
        ranks: Ranks,
        probe: Probe | None = None,
    ) -> None:
        self._module, self._batches, self._adam = module, batches, adam
        self._train, self._plan = train, plan
        self._learning_rate, self._seed = learning_rate, seed
        self._ranks = ranks
        self._optimizer = plan.optimizer(adam, num_workers=num_workers)
        ranks.attach(self._optimizer)
        self._probe = probe
        if probe is not None:
            hooks = [probe.after_noise, self._optimizer.step_hook]  # Opacus keeps only one
            self._optimizer.attach_step_hook(lambda made: [hook(made) for hook in hooks if hook])
        self._is_checked = False
        self.losses: list[float] = []
        """Of the users sampled so far. Sensitive: for tests, never reported."""

    def run(self, step: int) -> None:
        """Runs step number `step` of the plan, counted from 0."""
        rng = self._plan.rng(self._seed, torch.distributed.get_rank(), step)
        (users,) = self._plan.sampler(self._batches.num_users, rng, num_steps=1)
        for group in self._adam.param_groups:
            group["lr"] = self._learning_rate * max(1 - step / self._plan.spend.num_steps, 0)
        parts = np.array_split(users, max(-(-len(users) // self._train.microbatch_users), 1))
        for i, part in enumerate(parts):
            self._optimizer.zero_grad(set_to_none=True)
            self._set_gradients(self._batches.take(part, rng) if len(part) else None)
            if self._probe is not None and len(part):
                self._probe.before_clip(part, [p for _, p in self._module.trainable()])
            # Opacus clips and sums every part, and adds noise and steps with the last one only.
            self._optimizer.signal_skip_step(do_skip=i < len(parts) - 1)
            self._optimizer.step()
        self._ranks.after_step(self._optimizer, step + 1)
        self._optimizer.zero_grad(set_to_none=True)

    def _set_gradients(self, batch: dict[str, torch.Tensor] | None) -> None:
        if batch is None:
            set_empty_gradients(parameter for _, parameter in self._module.trainable())
        else:
            # Once, before the first gradient is used: later steps compute by the same code.
            check = not self._is_checked
            losses = backward(self._module, batch, self._train.loss, check=check)
            self.losses.extend(losses)
            # Of one user nothing can be told, and a loss of NaN hides whatever it depends on.
            self._is_checked = self._is_checked or sum(map(math.isfinite, losses)) > 1


def backward(
    module: RankerModule,
    batch: Mapping[str, torch.Tensor],
    loss_name: str,
    *,
    check: bool = False,
) -> list[float]:
    """Sets the per-user gradients of a batch; returns each user's loss.

    Args:
      check: Also that no user's loss depends on another user.

    Raises:
      PrivacyError: The loss is not one number a user, or else as `PerUserGradients.backward`.
    """
    labels = {name: batch[name] for name in _LABELS}
    scores = module(**{name: x for name, x in batch.items() if name not in labels})
    loss = LOSSES[loss_name](scores, **labels)
    if check:
        module.require_independent_users(loss)
    module.backward(loss)
    return list(loss.detach().tolist())
