"""What a training run writes, and how the driver reads it: one folder.

    Trained -> write_output(folder) -> Ray Train's checkpoint -> read_output(folder) -> TrainOutput

Before it leaves the worker it is read back into fresh objects and must score as what was trained.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from raysys.ingest.features import FloatArray
from raysys.model.encoder import TextEncoder, TokenActivations
from raysys.model.scorer import Head
from raysys.train import health
from raysys.train.loop import Trained, TrainJob


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainOutput:
    """What training brings back, alpha already applied."""

    head: Head
    adapter: dict[str, bytes]
    """Files of the delta in PEFT's format; none if only the head was trained."""
    adapted_weights: dict[str, FloatArray]
    """The new version's matrices by module, of all that its line has changed."""
    text_before: FloatArray
    """(M, d) embeddings of all texts by the previous version."""
    text_after: FloatArray
    adapted_modules: tuple[str, ...]
    """Names of the encoder modules that the delta belongs to."""


def write_output(folder: Path, trained: Trained, *, encoder: str) -> None:
    """Writes what the driver needs, and nothing else that depends on single users."""
    save_file(
        {k: np.ascontiguousarray(v) for k, v in trained.head.weights.items()},
        folder / "head.safetensors",
    )
    save_file(
        {
            "text_before": trained.text_before,
            "text_after": trained.text_after,
        },
        folder / "arrays.safetensors",
    )
    save_file(dict(trained.adapted_weights), folder / "encoder.safetensors")
    if trained.peft_model is not None:
        # The name as configured: PEFT would write this machine's path, and ask the hub about it.
        trained.peft_model.peft_config["default"].base_model_name_or_path = encoder
        trained.peft_model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    output = {"adapted_modules": trained.adapted_modules}
    (folder / "output.json").write_text(json.dumps(output))


def read_output(folder: Path) -> TrainOutput:
    """Reads what `write_output` wrote."""
    arrays = load_file(folder / "arrays.safetensors")
    adapter = sorted((folder / "adapter").glob("adapter_*"))
    output = json.loads((folder / "output.json").read_text())
    return TrainOutput(
        adapted_weights=load_file(folder / "encoder.safetensors"),
        text_before=arrays["text_before"],
        text_after=arrays["text_after"],
        head=Head(weights=load_file(folder / "head.safetensors")),
        adapter={file.name: file.read_bytes() for file in adapter},
        adapted_modules=tuple(output["adapted_modules"]),
    )


def require_reloads(
    folder: Path, trained: Trained, job: TrainJob, activations: TokenActivations
) -> None:
    """Checks that a folder, read into fresh objects, scores as what was trained.

    Raises:
      HealthError: The head, a matrix or the adapter is another one.
    """
    probe = health.probe(activations)
    if not probe.texts:
        return
    encoder = TextEncoder(job.model.encoder, job.model.max_tokens)
    written = encoder.with_weights(trained.adapted_weights).finish(probe)
    health.require_same_texts(trained.text_after[: len(probe.texts)], written)
    expected = health.probe_scores(trained.head, written)
    output = read_output(folder)
    text = encoder.with_weights(output.adapted_weights).finish(probe)
    found = health.probe_scores(output.head, text)
    health.require_same_scores("the version as reloaded", expected, found)
    if output.adapter:
        adapted = _with_adapter(folder / "adapter", job)
        found = health.probe_scores(output.head, adapted.finish(probe))
        health.require_same_scores("the adapter as reloaded", expected, found)


def _with_adapter(folder: Path, job: TrainJob) -> TextEncoder:
    """Returns the previous version's encoder with the adapter of a folder merged into it."""
    # An own one: merging adds to its matrices in place.
    encoder = TextEncoder(job.model.encoder, job.model.max_tokens)
    based = encoder.with_weights(job.adapted_weights or {})
    PeftModel.from_pretrained(based.model, str(folder)).merge_and_unload()
    return based
