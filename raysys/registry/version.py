"""What a version is made of: names, files, and the manifest that says so.

    versions/<version>/manifest.json        what it is, from what, with which settings
                       head.safetensors     the hybrid head
                       encoder.safetensors  the encoder matrices that its line has changed
                       adapter/             this update's delta in PEFT's format, if it has one
                       texts.parquet        every catalogue text with its embedding
                       golden.json          requests with the scores that they must get
                       report.md            before and after, and the privacy statement
    state/<update_id>/ …                    item statistics and histories that it serves with

A version is immutable: its folder is written once, and the ledger holds the sha256 of every file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from raysys.errors import ArtifactError
from raysys.evaluate.calibrate import Calibration
from raysys.partitions.layout import version_folder

MANIFEST_SCHEMA_VERSION = 3
"""1 had one adapted module, `adapted_module`, and always LoRA on it; 2 no calibration."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The facts that a replica needs to serve a version, and an operator to trace it."""

    version: str
    update_id: str
    base_version: str | None
    encoder: str
    """As configured: a name, a folder or a hub id."""
    encoder_sha256: str
    adapter: str
    """As configured: lora, adalora, or none where the update trained the head alone."""
    adapted_modules: tuple[str, ...]
    """Full names of the encoder modules that this update's delta belongs to."""
    max_tokens: int
    lora_rank: int
    alpha: float
    state: str
    """The update whose `state/` folder it serves with."""
    loss: str = "listwise"
    """As trained; scores of `pointwise` are log odds of an outcome."""
    decision_threshold: float = 0.5
    """Probability from which a candidate is flagged."""
    selected: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Dotted config key -> the value that a selection chose; {} without one."""
    calibration: Calibration | None = None
    """How scores become probabilities; None of a version that was published without."""
    schema_version: int = MANIFEST_SCHEMA_VERSION

    def to_bytes(self) -> bytes:
        """Returns JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Reads what `to_bytes` wrote.

        Raises:
          ArtifactError: Not a manifest, or of a newer raysys.
        """
        try:
            body: dict[str, Any] = json.loads(data)
            if body["schema_version"] > MANIFEST_SCHEMA_VERSION:
                raise ArtifactError(
                    f"the manifest has schema_version {body['schema_version']}, this raysys reads "
                    f"up to {MANIFEST_SCHEMA_VERSION}: upgrade raysys"
                )
            return cls(**_migrated(body))
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"the manifest cannot be read: {error}") from error


def _migrated(body: dict[str, Any]) -> dict[str, Any]:
    if body["schema_version"] == 1:
        body |= {"adapter": "lora", "adapted_modules": [body.pop("adapted_module")]}
    calibration = body.get("calibration")
    return {
        **body,
        "adapted_modules": tuple(body["adapted_modules"]),
        "calibration": calibration and Calibration(**calibration),
        "schema_version": MANIFEST_SCHEMA_VERSION,
    }


def version_path(version: str, name: str) -> str:
    """Returns the path of one of a version's files, relative to the root."""
    return f"{version_folder(version)}/{name}"
