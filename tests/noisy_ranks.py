"""What the ranks of groups of 2 and of 4 add to a step of nobody, run by `tests/unit/conftest.py`.

python -m tests.noisy_ranks FOLDER -> FOLDER/rank0.npz, …
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer

from raysys.config import PrivacyConfig
from raysys.privacy.plan import PrivacyPlan
from tests.broken_engines import NoiseOnEachRank, with_fault

NUM_COORDINATES = 250_000
WORLD_SIZES = (2, 4)
NUM_USERS, NUM_STEPS, SAMPLING_PROB = 2_000, 50, 0.0005
CONFIG = PrivacyConfig(
    noise_multiplier=2.0, l2_clip_norm=3.0, expected_batch_users=32, sampling_prob=SAMPLING_PROB
)
NOISE_STD = 2.0 * 3.0 / 32
"""noise_multiplier * l2_clip_norm / expected_batch_users of CONFIG."""


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
    with mock.patch.object(PrivacyPlan, "optimizer", with_fault(NoiseOnEachRank)):
        found["broken_own"], found["broken_total"] = empty_step(world_size)
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


def run_all(folder: Path) -> int:
    """Forks all ranks, so that torch is imported once; returns how many failed."""
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=main, args=(rank, folder), daemon=True)
        for rank in range(max(WORLD_SIZES))
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
    return sum(rank.exitcode != 0 for rank in ranks)


if __name__ == "__main__":
    sys.exit(run_all(Path(sys.argv[1])))
