"""Canary users of an audit: known gradients that go through the engine's own steps.

    Canaries.draw(…) -> Probe of train_on_shards() -> .scores, .included -> privacy.audit

A canary is a user whose gradient is replaced, after the backward pass and before the clip, by a
direction of its own. Directions lie on disjoint random coordinates of all trained weights together,
so they are orthogonal, up to as many as there are weights: none hides or fakes another. The auditor
knows all but which canaries take part and which steps sample them, and so takes the clipped
gradients of the other users off what each step releases.

Sources: Steinke et al. 2023 (arXiv 2305.08846); Nasr et al. 2023 (arXiv 2302.07956), whose canaries
by gradient these are.

Shape suffixes: U = users of a microbatch, M = canaries, D = trained weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer

from raysys.errors import ConfigError
from raysys.privacy.audit import Claim, Scores
from raysys.privacy.clipping import dense

NORM_OVER_CLIP = 100.0
"""Norm of a canary's gradient before the clip: an engine that does not clip cannot miss it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Directions:
    """Orthonormal vectors (M, D), each on coordinates of its own."""

    owner: NDArray[np.int64]
    """(D,) the canary whose coordinate it is."""
    value: NDArray[np.float32]
    """(D,) plus or minus one over the root of the owner's number of coordinates."""

    @classmethod
    def draw(cls, num: int, num_weights: int, rng: np.random.Generator) -> Directions:
        """Draws `num` directions.

        Raises:
          ConfigError: There are fewer weights than directions.
        """
        if num > num_weights:
            raise ConfigError(
                f"--canaries: expected at most {num_weights}, as many as trained weights, got {num}"
            )
        owner = rng.permutation(np.arange(num_weights) % num)
        signs = rng.choice([-1.0, 1.0], num_weights)
        value = (signs / np.sqrt(np.bincount(owner, minlength=num))[owner]).astype(np.float32)
        return cls(owner=owner, value=value)

    def vectors(self, which: NDArray[np.int64], part: slice = slice(None)) -> torch.Tensor:
        """Returns these directions, (len(which), D), or a part of their coordinates."""
        owner, value = self.owner[part], self.value[part]
        return torch.from_numpy(np.where(which[:, None] == owner, value, np.float32(0)))

    def along(self, vector: torch.Tensor) -> NDArray[np.float64]:
        """Returns the inner products (M,) of a vector (D,) with all directions."""
        return np.bincount(self.owner, self.value * vector.numpy()).astype(np.float64)


class Canaries:
    """A `train.loop.Probe`: half of the canaries, at random, are users after all the others."""

    def __init__(
        self,
        *,
        num: int,
        num_others: int,
        claim: Claim,
        l2_clip_norm: float,
        rng: np.random.Generator,
    ) -> None:
        """Draws who takes part.

        Args:
          num_others: Users of the run that are no canaries. Canaries that take part are the users
            from this index on.
          claim: Of the run; scores are its log likelihood ratios.
        """
        self.included: NDArray[np.bool_] = rng.random(num) < 0.5
        self.scores: Scores = np.zeros(num)
        """(M,) summed over the steps so far."""
        self.sums: Scores = np.zeros(num)
        """(M,) what the steps released along each direction, over the clip norm, added up."""
        self._of_user = np.flatnonzero(self.included)
        self._num_others = num_others
        self._claim, self._clip, self._rng = claim, l2_clip_norm, rng
        self._directions: Directions | None = None
        self._known = torch.zeros(0)

    @property
    def num_users(self) -> int:
        """Canaries that take part."""
        return len(self._of_user)

    def before_clip(
        self, users: NDArray[np.int64], parameters: Sequence[torch.nn.Parameter]
    ) -> None:
        """Replaces the gradients of canaries, and adds up the clipped ones of all others."""
        samples = [_rows(dense(parameter.grad_sample)) for parameter in parameters]  # type: ignore[attr-defined]
        directions = self._directions_of(sum(sample.shape[1] for sample in samples))
        is_canary = torch.from_numpy(users >= self._num_others)
        which = self._of_user[users[is_canary.numpy()] - self._num_others]
        norm = torch.stack([sample.norm(dim=1) for sample in samples]).norm(dim=0).cpu()
        factor = (self._clip / norm.clamp(min=1e-12)).clamp(max=1).masked_fill(is_canary, 0)
        start = 0
        for parameter, sample in zip(parameters, samples, strict=True):
            part = slice(start, start := start + sample.shape[1])
            self._known[part] += (factor.to(sample) @ sample).cpu()
            replaced = NORM_OVER_CLIP * self._clip * directions.vectors(which, part)
            sample[is_canary] = replaced.to(sample)
            parameter.grad_sample = sample.reshape(-1, *parameter.shape)  # type: ignore[attr-defined]

    def after_noise(self, optimizer: DPOptimizer) -> None:
        """Adds what a step of one worker releases to the scores."""
        released = torch.cat([parameter.grad.flatten() for parameter in optimizer.params])
        directions = self._directions_of(len(released))
        total = released.cpu().double() * optimizer.expected_batch_size - self._known
        seen = directions.along(total) / self._clip
        self.sums += seen
        self.scores += self._claim.log_likelihood_ratio(seen)
        self._known.zero_()

    def _directions_of(self, num_weights: int) -> Directions:
        if self._directions is None:
            self._directions = Directions.draw(len(self.scores), num_weights, self._rng)
            self._known = torch.zeros(num_weights, dtype=torch.float64)
        return self._directions


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns (U, …) as (U, n)."""
    return tensor.detach().flatten(1)
