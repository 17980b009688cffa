"""`run_update` with its heavy steps replaced.

    Steps(monkeypatch).update(config) -> UpdateCommitted    (milliseconds, no Ray, no torch work)

Plan, reservation, lease, gate, commit and clean-up are the real ones, and the replaced steps write
objects in the places where the real ones do.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from raysys import update
from raysys.config import Config, ModelConfig
from raysys.evaluate.metrics import METRIC_NAMES, Comparison, Interval
from raysys.ingest import pipeline
from raysys.ingest.pipeline import Ingested, IngestJob, cases_path, examples_path
from raysys.ingest.shard_state import shard_path
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.ledger.records import FileRef, PrivacySpend, UpdateCommitted
from raysys.model.scorer import Head
from raysys.model.targets import Cut
from raysys.partitions.layout import quarantine, staging, state_folder
from raysys.privacy import budget
from raysys.registry.loaded import VersionWeights
from raysys.registry.store import hash_files, hash_state
from raysys.registry.version import Manifest, version_path
from raysys.storage import Root
from raysys.train.blocks import charged
from raysys.train.loop import TrainJob
from raysys.train.output import TrainOutput
from tests.helpers import FakeClock
from tests.shop import item_table

_MODULE = "encoder.layer.1.output.dense"
_WEIGHT = np.zeros((2, 2), np.float32)
_TEXTS = np.zeros((8, 2), np.float32)


@dataclasses.dataclass(frozen=True)
class _Counted:
    """In place of `Composed`: every update costs epsilon 0.01."""

    num_updates: int

    def plus(self, *spends: PrivacySpend) -> _Counted:
        return _Counted(self.num_updates + len(spends))

    def epsilon(self, delta: float) -> float:
        return 0.01 * self.num_updates


class Steps:
    """The replaced steps. Waiting for a dead one's lease takes no time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = FakeClock()
        self.lease_class = Lease
        self.leases: list[Lease] = []
        for name in ("ingest", "encode_new_texts", "train", "compare", "load_weights", "publish"):
            patch.setattr(update, name, getattr(self, name))
        patch.setattr(update, "Lease", self.lease)
        # The accountant takes longer than all the rest; what matters here is what it is given.
        patch.setattr(budget, "life_so_far", lambda root, state: _Counted(len(state.spends)))
        patch.setattr(update, "keep", lambda root, state: None)

    def update(self, config: Config) -> UpdateCommitted:
        """Runs one update."""
        return update.run_update(config)

    def lease(self, log: Log, **settings: Any) -> Lease:
        lease = self.lease_class(
            log, clock=self.clock, monotonic=self.clock, sleep=self.wait, **settings
        )
        self.leases.append(lease)
        return lease

    def wait(self, seconds: float) -> None:
        """Waits longer than any lease at once, not many times a second."""
        self.clock.advance(3600.0)

    def ingest(self, job: IngestJob, item_files: Iterable[FileRef]) -> Ingested:
        name = job.update_id
        state = Log(job.root).refresh()
        assert state.active is not None and state.active.update_id == name
        if job.config.privacy.enabled:
            assert state.spends[-1][0] == name, "privacy is charged before an event is read"
        job.root.put(f"{staging(name)}/clean/0000/000000.parquet", b"clean")
        job.root.put(f"{quarantine(name)}/rows-2017-03-01.parquet", b"refused")
        job.root.put(f"{state_folder(name)}/items.parquet", name.encode())
        job.root.put(examples_path(name, 0), b"examples")
        job.root.put(cases_path(name, 0), b"cases")
        job.root.put(shard_path(name, "histories", 0, 2), name.encode())
        table = item_table()
        return Ingested(
            num_rows=1, num_users=1, num_examples=1, num_shards=2, row_counts={"outcome": 1},
            column_counts={}, example_hashes={},
            label_counts={"impressions": {}, "outcomes": {"without_impression": 1}, "requests": {}},
            quarantined_files={}, items=table, items_before=table,
        )  # fmt: skip

    def encode_new_texts(self, root: Root, config: ModelConfig, texts: list[str], cut: Cut) -> int:
        root.put("cache/activations/all.npz", b"activations")
        return len(texts)

    def train(
        self, job: TrainJob, texts: list[str], *, root: Root, update_id: str, **rest: Any
    ) -> TrainOutput:
        self.leases[-1].renew()
        permit_all_steps(job, root, update_id)
        root.put(f"{staging(update_id)}/train/checkpoint/head.safetensors", b"head")
        return self.output(job)

    def output(self, job: TrainJob) -> TrainOutput:
        """What training brings back."""
        return TrainOutput(
            head=job.head, adapter={"adapter_model.safetensors": b"delta"},
            adapted_modules=(_MODULE,), adapted_weights={_MODULE: _WEIGHT},
            text_before=_TEXTS, text_after=_TEXTS,
        )  # fmt: skip

    def compare(self, root: Root, update_id: str, *, after_trials: bool, **rest: Any) -> Comparison:
        self.judged_after_trials = after_trials
        same = {name: Interval(mean=0.0, low=0.0, high=0.0) for name in METRIC_NAMES}
        return Comparison(
            num_holdout_users=100, before=same, after=same, difference=same,
            num_prequential_users=100, prequential=same,
        )  # fmt: skip

    def load_weights(self, root: Root, record: UpdateCommitted) -> tuple[None, VersionWeights]:
        return None, VersionWeights(
            head=Head.decayed_frequency(8),
            adapted_weights={_MODULE: _WEIGHT},
            texts=[],
            text=_TEXTS,
        )

    def publish(
        self,
        root: Root,
        manifest: Manifest,
        weights: VersionWeights,
        *,
        adapter: Mapping[str, bytes],
        report: str,
    ) -> dict[str, str]:
        paths = [version_path(manifest.version, name) for name in ("manifest.json", "report.md")]
        root.put(paths[0], manifest.to_bytes())
        root.put(paths[1], report.encode())
        return hash_files(root, paths) | hash_state(root, manifest.state)


def permit_all_steps(job: TrainJob, root: Root, update_id: str) -> None:
    """Has the ledger permit the steps of a private job, as training itself does."""
    num_steps = job.plan.spend.num_steps
    if job.plan.enabled:
        take = charged(root, update_id, num_steps=num_steps, size=job.train.checkpoint_steps)
        assert sum(map(len, iter(lambda: take(0), range(num_steps, num_steps)))) == num_steps


def ingest_in_a_row(patch: pytest.MonkeyPatch) -> None:
    """Has updates ingest for real, without Ray: the tasks of its graph are called in a row."""

    def in_a_row(task: Callable[..., Any], rows: list[Any], **_: Any) -> list[Any]:
        return [json.loads(json.dumps(task(row))) for row in rows]

    patch.setattr(update, "ingest", pipeline.ingest)
    patch.setattr(pipeline, "run_tasks", in_a_row)
    patch.setattr(pipeline.ray, "put", lambda value: value)
    patch.setattr(pipeline.ray, "get", lambda value: value)
