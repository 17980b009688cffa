"""Runs the loop on Ray Train's workers and brings the new weights back.

    TrainJob + shards below staging/ -> train() -> TrainOutput

Workers read their own shards and the cached activations from the root; only per-step gradients
(about 4,000 numbers) cross the network. When a worker dies, Ray Train starts the group anew, maybe
a smaller one: shards are dealt again, and training goes on behind the steps that were permitted.
Rank 0 reports the result as a Ray Train checkpoint.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import (
    Checkpoint,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from raysys.config import TrainConfig
from raysys.ingest.example_set import map_examples
from raysys.ingest.pipeline import examples_path
from raysys.model.adapter import activations_cut
from raysys.model.encoder import cache_folder, load_cached
from raysys.partitions.layout import staging
from raysys.storage import Root
from raysys.train.blocks import NextSteps, charged, uncharged
from raysys.train.checkpoint import Checkpoints
from raysys.train.failures import RefuseRetries, told
from raysys.train.loop import TrainJob, train_on_shards
from raysys.train.output import TrainOutput, read_output, require_reloads, write_output

_NEVER_S = float("inf")


def train(
    job: TrainJob, texts: list[str], *, root: Root, cache: Root, update_id: str, num_shards: int
) -> TrainOutput:
    """Trains on the shards below `staging/<update_id>/`.

    Under privacy the update must be the active one of the root's ledger, which permits its steps.

    Args:
      root: Where they are.
      cache: Where the activations of the texts are.

    Raises:
      LeaseLostError: The update was given up meanwhile.
      WorkersLostError: Workers died more often than `train.max_failures`.
      RaysysError: As its subclass says.
    """
    filesystem, base = root.arrow()
    with_gpu = use_gpu(job.train)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "job": job, "texts": texts, "root": root, "cache": cache, "update_id": update_id,
            "num_shards": num_shards,
        },
        torch_config=TorchConfig(backend="nccl" if with_gpu else "gloo"),
        scaling_config=_scaling(job.train, use_gpu=with_gpu),
        run_config=RunConfig(
            name="train",
            storage_path=f"{base}/{staging(update_id)}",
            storage_filesystem=filesystem,
            callbacks=[RefuseRetries()],  # type: ignore[list-item]
            # Ray restarts the workers of a preempted node without end unless told otherwise.
            failure_config=FailureConfig(
                max_failures=job.train.max_failures,
                max_preemption_failures=job.train.max_failures,  # type: ignore[call-arg]
            ),
        ),
    )  # fmt: skip
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise told(error, job.train.max_failures) from error
    assert result.checkpoint is not None, "rank 0 reports a checkpoint or raises"
    with result.checkpoint.as_directory() as folder:
        return read_output(Path(folder))


def _scaling(train: TrainConfig, *, use_gpu: bool) -> ScalingConfig:
    fewest, most = _fewest_workers(train), train.num_workers
    # Two equal bounds would make it wait for the autoscaler's coordinator all the same.
    num_workers: Any = most if fewest == most else (fewest, most)
    return ScalingConfig(
        num_workers=num_workers,
        resources_per_worker={"CPU": train.cpus_per_worker},
        use_gpu=use_gpu,
        # A healthy group is not resized: that stops it at any step, and what was permitted is lost.
        elastic_resize_monitor_interval_s=_NEVER_S,  # type: ignore[call-arg]
    )


def use_gpu(train: TrainConfig) -> bool:
    """Returns whether each worker gets a GPU, on the cluster that this process is connected to."""
    if train.use_gpu != "auto":
        return train.use_gpu
    num_gpus: float = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
    return num_gpus >= _fewest_workers(train)


def _fewest_workers(train: TrainConfig) -> int:
    return train.min_workers or train.num_workers


def _worker(config: dict[str, Any]) -> None:
    job, root, update_id = config["job"], config["root"], config["update_id"]
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    shards = [
        map_examples(root, examples_path(update_id, shard))
        for shard in range(rank, config["num_shards"], num_workers)
    ]
    cut = activations_cut(job.model, job.adapted_weights or ())
    folder = cache_folder(job.model.encoder, job.model.max_tokens, cut)
    activations = load_cached(config["cache"], folder).select(config["texts"])
    num_steps = job.plan.spend.num_steps

    def on_step(step: int) -> None:
        if rank == 0 and (step % 10 == 0 or step == num_steps):
            # Not `print`: Ray Train replaces it and the line would come twice.
            sys.stdout.write(f"[train] step {step} of {num_steps}\n")
            sys.stdout.flush()

    trained = train_on_shards(
        job, shards, activations, num_workers=num_workers, on_step=on_step,
        next_steps=_next_steps(job, root, update_id), checkpoints=Checkpoints(root, update_id),
        device=ray.train.torch.get_device(),
    )  # fmt: skip
    if rank != 0:
        ray.train.report({})
        return
    with tempfile.TemporaryDirectory() as directory:
        write_output(Path(directory), trained, encoder=job.model.encoder)
        require_reloads(Path(directory), trained, job, activations)
        ray.train.report({"num_steps": num_steps}, checkpoint=Checkpoint.from_directory(directory))


def _next_steps(job: TrainJob, root: Root, update_id: str) -> NextSteps:
    num_steps, size = job.plan.spend.num_steps, job.train.checkpoint_steps
    if not job.plan.enabled:
        return uncharged(num_steps=num_steps, size=size)
    return charged(root, update_id, num_steps=num_steps, size=size)
