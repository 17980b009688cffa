"""What two gloo ranks do, run by `tests/unit/conftest.py` as two processes.

python -m tests.two_workers RANK FOLDER ENCODER -> FOLDER/rank<RANK>.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from raysys.model.encoder import TextEncoder
from raysys.privacy.plan import PrivacyPlan
from raysys.storage import Root
from raysys.train.checkpoint import Checkpoints
from raysys.train.loop import TrainJob, train_on_shards
from tests import per_user, tiny_shop

NUM_USERS, NUM_STEPS = 10_000, 50
SAMPLING_PROB = 0.0256
WORLD_SIZE = 2
ENGINE_ADAPTERS = ("LoRA", "FFA-LoRA", "AdaLoRA", "LayerNorm", "Linear", "bias")
"""Kinds of trainable layers of `tests.per_user` whose gradients both ranks compute."""


def step_gradient(
    plan: PrivacyPlan, grad_sample: torch.Tensor, *, num_workers: int
) -> NDArray[np.float32]:
    """Returns what one step hands to the inner optimizer for per-user gradients (U, n)."""
    parameter = torch.nn.Parameter(torch.zeros(grad_sample.shape[1]))
    optimizer = plan.optimizer(torch.optim.SGD([parameter], lr=1.0), num_workers=num_workers)
    parameter.grad_sample = grad_sample.clone()  # type: ignore[attr-defined]
    optimizer.step()
    assert parameter.grad is not None
    return parameter.grad.numpy().copy()


def gradients_of_users() -> torch.Tensor:
    """Per-user gradients (U, n) of ten users, of norms from 0.01 to 1e4."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(10, 50, generator=generator), dim=1)
    return directions * torch.logspace(-2, 4, 10)[:, None]


def rows_of_rank(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a rank's token ids, and the user of each row."""
    return per_user.make_batch(seed=10 + rank), (per_user.USER_OF_ROW + rank) % per_user.USERS


def _by_engine(adapter: str, rank: int) -> dict[str, NDArray[np.float32]]:
    """One step without noise, at a clip norm of 1."""
    module = per_user.make_scorer(adapter)
    found = {
        f"{adapter}/{name}": sample.numpy().copy()
        for name, sample in per_user.by_engine(module, *rows_of_rank(rank)).items()
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    plan = tiny_shop.plan(noise_multiplier=0.0, l2_clip_norm=1.0, expected_batch_users=1)
    plan.optimizer(torch.optim.SGD(trained, lr=1.0), num_workers=WORLD_SIZE).step()
    step = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    return {**found, f"{adapter} step": step.numpy()}


def _results(rank: int, encoder: str, root: Root) -> dict[str, NDArray[np.float32]]:
    torch.manual_seed(0)  # a seed that all share must not make sampling repeat
    quiet = tiny_shop.plan(noise_multiplier=0.0)
    sampled = tiny_shop.plan(sampling_prob=SAMPLING_PROB, num_steps=NUM_STEPS)
    sampler = sampled.sampler(NUM_USERS, sampled.rng(0, rank))
    masks = np.zeros((NUM_STEPS, NUM_USERS), np.float32)
    for mask, users in zip(masks, sampler, strict=True):
        mask[users] = 1
    return {
        "clipped": step_gradient(quiet, gradients_of_users()[rank::2], num_workers=WORLD_SIZE),
        "masks": masks,
        **_trained("both", encoder, rank, has_users=True, checkpoints=Checkpoints(root, "u1")),
        **{f"kept {k}": v.numpy() for k, v in Checkpoints(root, "u1").load(5).tensors.items()},
        **_trained("one", encoder, rank, has_users=rank == 0),
        **{k: v for name in ENGINE_ADAPTERS for k, v in _by_engine(name, rank).items()},
    }


def _trained(
    name: str,
    encoder: str,
    rank: int,
    *,
    has_users: bool,
    checkpoints: Checkpoints | None = None,
) -> dict[str, NDArray[np.float32]]:
    job: TrainJob = tiny_shop.train_job(encoder)
    shards = [tiny_shop.shard(tiny_shop.outcomes(12, seed=rank)).examples] if has_users else []
    activations = TextEncoder(encoder, job.model.max_tokens).activations(tiny_shop.distinct_texts())
    trained = train_on_shards(
        job,
        shards,
        activations.select(tiny_shop.distinct_texts()),
        num_workers=WORLD_SIZE,
        on_step=lambda step: None,
        checkpoints=checkpoints,
    )
    return {
        f"{name}_merged": trained.adapted_weights["encoder.layer.1.output.dense"],
        f"{name}_skip": trained.head.weights["skip.weight"],
    }


def main(rank: int, folder: Path, encoder: str) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=WORLD_SIZE
    )
    results = _results(rank, encoder, Root((folder / "root").as_uri()))
    torch.distributed.destroy_process_group()
    np.savez(folder / f"rank{rank}.npz", **results)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
