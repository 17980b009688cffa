"""What the ranks of groups of 2 and of 4 add to a step of nobody, run by `tests/unit/conftest.py`.

python -m tests.noisy_ranks RANK FOLDER -> FOLDER/rank<RANK>.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DistributedDPOptimizer, DPOptimizer

from raysys.config import PrivacyConfig
from raysys.privacy import plan as engine
from raysys.privacy.plan import PrivacyPlan
from raysys.privacy.sampling import PoissonSampler

NUM_COORDINATES = 250_000
WORLD_SIZES = (2, 4)
NUM_USERS, NUM_STEPS, SAMPLING_PROB = 2_000, 50, 0.0005
CONFIG = PrivacyConfig(
    noise_multiplier=2.0, l2_clip_norm=3.0, expected_batch_users=32, sampling_prob=SAMPLING_PROB
)
NOISE_STD = 2.0 * 3.0 / 32
"""noise_multiplier * l2_clip_norm / expected_batch_users of CONFIG."""


class NoiseOnEachRank(DistributedDPOptimizer):
    """A broken engine: the noise of a step grows with the number of workers."""

    add_noise = DPOptimizer.add_noise


class NotTimesClip(DistributedDPOptimizer):
    """A broken engine: noise that does not grow with the clip norm."""

    def add_noise(self) -> None:
        clip, self.max_grad_norm = self.max_grad_norm, 1.0
        super().add_noise()
        self.max_grad_norm = clip


class DropsEmptySteps(PoissonSampler):
    """A broken sampler, as Opacus' distributed one: ranks lose step."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        return (users for users in super().__iter__() if len(users))


def plan() -> PrivacyPlan:
    """The plan that all ranks run."""
    return PrivacyPlan.for_update(CONFIG, num_steps=NUM_STEPS, num_count_releases=0)


def empty_step(
    num_workers: int, num_coordinates: int = NUM_COORDINATES
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns what this rank adds to an empty step, and what the step hands to AdamW."""
    parameter = torch.nn.Parameter(torch.zeros(num_coordinates))
    optimizer = plan().optimizer(torch.optim.SGD([parameter], lr=1.0), num_workers=num_workers)
    own: list[NDArray[np.float32]] = []

    def keep(optimizer: DPOptimizer) -> None:
        (parameter,) = optimizer.params
        own.append(parameter.grad.numpy().copy())

    optimizer.attach_step_hook(keep)
    parameter.grad_sample = torch.zeros(0, num_coordinates)  # type: ignore[attr-defined]
    optimizer.step()
    assert parameter.grad is not None
    return own[0], parameter.grad.numpy().copy()


def _results(rank: int, world_size: int) -> dict[str, NDArray[np.float32]]:
    torch.manual_seed(0)  # a seed that all share must not make noise repeat
    own, total = empty_step(world_size)
    sampler = plan().sampler(NUM_USERS, plan().rng(0, rank))
    found = {
        "own": own,
        "total": total,
        "again": empty_step(world_size)[1],
        "sizes": np.array([len(users) for users in sampler], np.float32),
    }
    sound = engine.DistributedDPOptimizer
    engine.DistributedDPOptimizer = NoiseOnEachRank
    found["broken_own"], found["broken_total"] = empty_step(world_size)
    engine.DistributedDPOptimizer = sound
    return {f"{name}_{world_size}": values for name, values in found.items()}


def main(rank: int, folder: Path) -> None:
    results = {}
    for world_size in WORLD_SIZES:
        if rank < world_size:
            store = f"file://{folder}/store{world_size}"
            torch.distributed.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=world_size
            )
            results.update(_results(rank, world_size))
            torch.distributed.destroy_process_group()
    np.savez(folder / f"rank{rank}.npz", **results)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
