"""`run_update` with its heavy steps replaced, and a kill before any chosen change on disk.

    Steps(monkeypatch).update(config) -> UpdateCommitted    (milliseconds, no Ray, no torch work)
    kill_before(change, action)                             (leaves the disk as kill -9 does)

Plan, reservation, lease, gate, commit and clean-up are the real ones, and the replaced steps write
objects in the places where the real ones do.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from raysys import update
from raysys.config import Config, ModelConfig
from raysys.evaluate.compare import Weights
from raysys.evaluate.metrics import METRIC_NAMES, Comparison, Interval
from raysys.ingest import pipeline
from raysys.ingest.pipeline import Ingested, IngestJob, cases_path, examples_path, histories_path
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.ledger.records import FileRef, UpdateCommitted
from raysys.model.scorer import Head
from raysys.partitions.layout import quarantine, staging, state_folder
from raysys.privacy import budget
from raysys.registry.store import VersionWeights, hash_files, hash_state
from raysys.registry.version import Manifest, version_path
from raysys.storage import Root
from raysys.train.loop import TrainJob
from raysys.train.trainer import TrainOutput
from tests.helpers import FakeClock
from tests.shop import item_table

_WEIGHT = np.zeros((2, 2), np.float32)
_TEXTS = np.zeros((8, 2), np.float32)


class Steps:
    """The replaced steps. Time passes between updates, so that a dead one's lease has expired."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = FakeClock()
        self.lease_class = Lease
        self.leases: list[Lease] = []
        for name in ("ingest", "encode_new_texts", "train", "compare", "load_weights", "publish"):
            patch.setattr(update, name, getattr(self, name))
        patch.setattr(update, "Lease", self.lease)
        # The accountant takes longer than all the rest; what matters here is what it is given.
        patch.setattr(budget, "epsilon", lambda spends, delta: 0.01 * len(spends))

    def update(self, config: Config) -> UpdateCommitted:
        """Runs one update, long after whatever ran before."""
        self.clock.advance(3600.0)
        return update.run_update(config)

    def lease(self, log: Log, **settings: Any) -> Lease:
        lease = self.lease_class(log, clock=self.clock, sleep=self.clock.sleep, **settings)
        self.leases.append(lease)
        return lease

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
        job.root.put(histories_path(name, 0), name.encode())
        table = item_table()
        return Ingested(
            num_rows=1, num_users=1, num_examples=1, row_counts={"outcome": 1},
            quarantined_files={}, items=table, items_before=table,
        )  # fmt: skip

    def encode_new_texts(self, root: Root, config: ModelConfig, texts: list[str]) -> int:
        root.put("cache/activations/all.npz", b"activations")
        return len(texts)

    def train(
        self, job: TrainJob, texts: list[str], *, root: Root, update_id: str, num_shards: int
    ) -> TrainOutput:
        self.leases[-1].renew()
        root.put(f"{staging(update_id)}/train/checkpoint/head.safetensors", b"head")
        return TrainOutput(
            head=job.head, adapter={"adapter_model.safetensors": b"delta"}, adapted_module="dense",
            merged_weight=_WEIGHT, text_before=_TEXTS, text_after=_TEXTS,
        )  # fmt: skip

    def compare(
        self, root: Root, update_id: str, *, before: Weights, after: Weights, **rest: Any
    ) -> Comparison:
        same = {name: Interval(mean=0.0, low=0.0, high=0.0) for name in METRIC_NAMES}
        return Comparison(
            num_holdout_users=100, before=same, after=same, difference=same,
            num_prequential_users=100, prequential=same,
        )  # fmt: skip

    def load_weights(self, root: Root, record: UpdateCommitted) -> tuple[None, VersionWeights]:
        return None, VersionWeights(
            head=Head.decayed_frequency(8), adapted_weight=_WEIGHT, texts=[], text=_TEXTS
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


def ingest_in_a_row(patch: pytest.MonkeyPatch) -> None:
    """Has updates ingest for real, without Ray: the tasks of its graph are called in a row."""

    def in_a_row(job: IngestJob, task: Callable[..., Any], rows: list[Any]) -> list[Any]:
        return [task(row, job=job) for row in rows]

    patch.setattr(update, "ingest", pipeline.ingest)
    patch.setattr(pipeline, "_map", in_a_row)
    patch.setattr(pipeline.ray, "put", lambda value: value)
    patch.setattr(pipeline.ray, "get", lambda value: value)


class Killed(BaseException):
    """Stands for kill -9: no handler of ours catches it, and nothing changes the disk after it."""


class _Victim:
    """Counts what the thread that made it changes on disk, and dies before the chosen change."""

    def __init__(self, dies_before: int | None) -> None:
        self.num_changes = 0
        self.is_dead = False
        self._dies_before = dies_before
        self._thread = threading.get_ident()

    def change(self) -> None:
        if threading.get_ident() != self._thread:
            return
        self.is_dead = self.is_dead or self.num_changes == self._dies_before
        if self.is_dead:
            raise Killed
        self.num_changes += 1


_victim: _Victim | None = None
_is_hooked = False
_CHANGES = {"os.link", "os.symlink", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def _on_audit(event: str, args: tuple[Any, ...]) -> None:
    if _victim is None:
        return
    opens_to_write = event == "open" and args[2] & os.O_ACCMODE != os.O_RDONLY
    if event in _CHANGES or opens_to_write:
        _victim.change()


def kill_before(change: int | None, action: Callable[[], object]) -> int:
    """Runs `action`, which dies before it makes change number `change`; returns how many it made.

    Python tells its audit hooks of each file that it is about to create, link, rename or delete, so
    no change of the disk is missed, whichever code makes it.
    """
    global _victim, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_on_audit)
        _is_hooked = True
    victim = _victim = _Victim(change)
    try:
        action()
    except Killed:
        assert victim.is_dead
    finally:
        _victim = None
    return victim.num_changes
