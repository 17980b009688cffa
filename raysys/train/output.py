"""What a training run writes, and how the driver reads it: one folder.

    Trained -> write_output(folder) -> Ray Train's checkpoint -> read_output(folder) -> TrainOutput

Before it leaves the worker it is read back into fresh objects and must score as what was trained.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from raysys.ingest.features import FloatArray
from raysys.model.encoder import TextEncoder, TokenActivations, adapted_module_name
from raysys.model.scorer import Head
from raysys.train import health
from raysys.train.loop import Trained, TrainJob


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


def write_output(folder: Path, trained: Trained, *, encoder: str) -> None:
    """Writes what the driver needs, and nothing else that depends on single users."""
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


def read_output(folder: Path) -> TrainOutput:
    """Reads what `write_output` wrote."""
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


def require_reloads(
    folder: Path, trained: Trained, job: TrainJob, activations: TokenActivations
) -> None:
    """Checks that a folder, read into fresh objects, scores as what was trained.

    Raises:
      HealthError: The head, the merged weight or the adapter is another one.
    """
    probe = health.probe(activations)
    if not probe.texts:
        return
    encoder = TextEncoder(job.model.encoder, job.model.max_tokens)
    written = encoder.finish(probe, trained.merged_weight)
    health.require_same_texts(trained.text_after[: len(probe.texts)], written)
    expected = health.probe_scores(trained.head, written)
    output = read_output(folder)
    found = health.probe_scores(output.head, encoder.finish(probe, output.merged_weight))
    health.require_same_scores("the version as reloaded", expected, found)
    merged = health.merged_from_adapter(
        folder / "adapter",
        TextEncoder(job.model.encoder, job.model.max_tokens),
        job.adapted_weight,
    )
    found = health.probe_scores(output.head, encoder.finish(probe, merged))
    health.require_same_scores("the adapter as reloaded", expected, found)
