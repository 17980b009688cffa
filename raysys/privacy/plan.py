"""One frozen object from which sampler, noise and accounting of an update are all built.

    PrivacyPlan.of(config, spend) -> .spend (as the ledger reserved it)
                                  -> .group (whose examples ingest makes)
                                  -> .sampler(num_users), .optimizer(…) (on each worker)

Sampler and accountant cannot disagree, because neither gets its numbers from anywhere else.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from raysys.config import PrivacyConfig
from raysys.ledger.records import PrivacySpend, UserGroup
from raysys.privacy.entropy import unguessable_generator
from raysys.privacy.optimizer import DistributedPerUserOptimizer
from raysys.privacy.sampling import PoissonSampler
from raysys.privacy.spend import mechanisms

NO_CLIP_NORM = torch.finfo(torch.float32).max
"""Finite: Opacus multiplies it by the noise multiplier, and 0 times infinity is not 0."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyPlan:
    """The mechanisms of one update."""

    enabled: bool
    spend: PrivacySpend
    l2_clip_norm: float
    expected_batch_users: int

    @classmethod
    def of(cls, config: PrivacyConfig, spend: PrivacySpend) -> PrivacyPlan:
        """Plans what is, or would be, reserved."""
        return cls(
            enabled=config.enabled,
            spend=spend,
            l2_clip_norm=config.l2_clip_norm,
            expected_batch_users=config.expected_batch_users,
        )

    @classmethod
    def for_update(
        cls,
        config: PrivacyConfig,
        *,
        num_steps: int,
        num_count_releases: int,
    ) -> PrivacyPlan:
        """Plans an update from the config and from what is known before any data is read."""
        spend = mechanisms(config, num_steps=num_steps, num_count_releases=num_count_releases)
        return cls.of(config, spend)

    @property
    def group(self) -> UserGroup | None:
        """The users who are charged for the steps: nobody else's examples may be trained on."""
        return self.spend.group if self.enabled else None

    @property
    def reserved(self) -> PrivacySpend | None:
        """What the ledger is charged, None without privacy."""
        return self.spend if self.enabled else None

    def rng(self, seed: int, world_rank: int, step: int = 0) -> np.random.Generator:
        """Returns the generator of a worker's draws from a step on.

        Under privacy it comes from the operating system's entropy, whatever the seed: a seed that
        ranks share would give them the same masks, and one that is known would undo the
        amplification by sampling. Without privacy it comes from the seed, so that an update can be
        replayed.
        """
        return (
            np.random.default_rng()
            if self.enabled
            else np.random.default_rng([seed, world_rank, step])
        )

    def sampler(
        self, num_users: int, rng: np.random.Generator, *, num_steps: int | None = None
    ) -> PoissonSampler:
        """Returns the sampler of a worker that holds `num_users` users, of all steps by default."""
        return PoissonSampler(
            num_users=num_users,
            num_steps=self.spend.num_steps if num_steps is None else num_steps,
            sampling_prob=self.spend.sampling_prob,
            rng=rng,
        )

    def optimizer(
        self, inner: torch.optim.Optimizer, *, num_workers: int
    ) -> DistributedPerUserOptimizer:
        """Wraps an optimizer: clips each user, sums over workers, adds noise once.

        Needs an initialised `torch.distributed` group. Opacus divides the sum by the number of
        workers as well, hence the share of the fixed normaliser. Without privacy nothing is
        clipped and no noise is added; sampling and normaliser stay the same. Noise has a generator
        of its own, filled with the operating system's entropy: no seed can repeat it.
        """
        # Noise is drawn where the gradients are.
        generator = unguessable_generator(inner.param_groups[0]["params"][0].device)
        return DistributedPerUserOptimizer(
            inner,
            noise_multiplier=self.spend.noise_multiplier if self.enabled else 0.0,
            max_grad_norm=self.l2_clip_norm if self.enabled else NO_CLIP_NORM,
            expected_batch_size=self.expected_batch_users / num_workers,
            loss_reduction="mean",
            generator=generator,
        )
