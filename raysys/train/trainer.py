"""Runs the loop on Ray Train's workers and brings the new weights back.

    TrainJob + shards below staging/ -> train() -> TrainOutput

Workers read their own shards and the cached activations from the root; only per-step gradients
(about 4,000 numbers) cross the network. Rank 0 reports the result as a Ray Train checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from safetensors.numpy import load_file, save_file

from raysys.ingest.example_set import map_examples
from raysys.ingest.features import FloatArray
from raysys.ingest.pipeline import examples_path
from raysys.model.encoder import adapted_module_name, cache_folder, load_cached
from raysys.model.scorer import Head
from raysys.partitions.layout import staging
from raysys.storage import Root
from raysys.train.loop import Trained, TrainJob, train_on_shards


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainOutput:
    """What training brings back, alpha already applied."""

    head: Head
    adapter: dict[str, bytes]
    """Files of the delta in PEFT's format."""
    merged_weight: FloatArray
    """(d, h) the new output projection."""
    text_before: FloatArray
    """(M, d) embeddings of all texts by the previous version."""
    text_after: FloatArray
    adapted_module: str
    """Name of the encoder module that the delta belongs to."""


def train(
    job: TrainJob, texts: list[str], *, root: Root, cache: Root, update_id: str, num_shards: int
) -> TrainOutput:
    """Trains on the shards below `staging/<update_id>/`.

    Args:
      root: Where they are.
      cache: Where the activations of the texts are.

    A failed worker fails the update: a silent restart would spend the reserved privacy twice.
    """
    filesystem, base = root.arrow()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "job": job, "texts": texts, "root": root, "cache": cache, "update_id": update_id,
            "num_shards": num_shards,
        },
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.train.num_workers,
            resources_per_worker={"CPU": job.train.cpus_per_worker},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=f"{base}/{staging(update_id)}",
            storage_filesystem=filesystem,
            # Ray restarts the workers of a preempted node without end unless told otherwise.
            failure_config=FailureConfig(
                max_failures=0,
                max_preemption_failures=0,  # type: ignore[call-arg]
            ),
        ),
    )  # fmt: skip
    result = trainer.fit()
    assert result.checkpoint is not None, "rank 0 reports a checkpoint or raises"
    with result.checkpoint.as_directory() as folder:
        return _read_output(Path(folder))


def _worker(config: dict[str, Any]) -> None:
    job, root, update_id = config["job"], config["root"], config["update_id"]
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    shards = [
        map_examples(root, examples_path(update_id, shard))
        for shard in range(rank, config["num_shards"], num_workers)
    ]
    folder = cache_folder(job.model.encoder, job.model.max_tokens)
    num_steps = job.plan.spend.num_steps

    def on_step(step: int) -> None:
        if rank == 0 and (step % 10 == 0 or step == num_steps):
            # Not `print`: Ray Train replaces it and the line would come twice.
            sys.stdout.write(f"[train] step {step} of {num_steps}\n")
            sys.stdout.flush()

    trained = train_on_shards(
        job, shards, load_cached(config["cache"], folder).select(config["texts"]),
        num_workers=num_workers, on_step=on_step,
    )  # fmt: skip
    if rank != 0:
        ray.train.report({})
        return
    with tempfile.TemporaryDirectory() as directory:
        _write_output(Path(directory), trained, encoder=job.model.encoder)
        ray.train.report({"num_steps": num_steps}, checkpoint=Checkpoint.from_directory(directory))


def _write_output(folder: Path, trained: Trained, *, encoder: str) -> None:
    save_file(
        {k: np.ascontiguousarray(v) for k, v in trained.head.weights.items()},
        folder / "head.safetensors",
    )
    save_file(
        {
            "merged_weight": trained.merged_weight,
            "text_before": trained.text_before,
            "text_after": trained.text_after,
        },
        folder / "arrays.safetensors",
    )
    # The name as configured: PEFT would write this machine's path, and ask the hub about it.
    trained.peft_model.peft_config["default"].base_model_name_or_path = encoder
    trained.peft_model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    output = {"adapted_module": adapted_module_name(trained.peft_model.get_base_model())}
    (folder / "output.json").write_text(json.dumps(output))


def _read_output(folder: Path) -> TrainOutput:
    arrays = load_file(folder / "arrays.safetensors")
    adapter = [file for file in (folder / "adapter").iterdir() if file.name.startswith("adapter_")]
    return TrainOutput(
        merged_weight=arrays["merged_weight"],
        text_before=arrays["text_before"],
        text_after=arrays["text_after"],
        head=Head(weights=load_file(folder / "head.safetensors")),
        adapter={file.name: file.read_bytes() for file in adapter},
        **json.loads((folder / "output.json").read_text()),
    )
