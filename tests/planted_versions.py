"""Loaders of versions that go wrong. They go to other processes by name, so this imports little."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import numpy as np

from raysys.errors import StorageUnavailableError
from raysys.ledger.records import UpdateCommitted
from raysys.registry.loaded import LoadedVersion
from raysys.registry.store import load_version
from raysys.storage import Root


def _spoilt(root: Root, record: UpdateCommitted, score: Any) -> LoadedVersion:
    version = load_version(root, record)
    version.score = score  # type: ignore[method-assign]
    return version


def load_exiting(root: Root, record: UpdateCommitted) -> LoadedVersion:
    return _spoilt(root, record, lambda *args, **kwargs: os._exit(3))


def load_segfaulting(root: Root, record: UpdateCommitted) -> LoadedVersion:
    return _spoilt(root, record, lambda *args, **kwargs: ctypes.string_at(0))


def load_endless(root: Root, record: UpdateCommitted) -> LoadedVersion:
    def score(*args: object, **kwargs: object) -> None:
        while True:
            pass

    return _spoilt(root, record, score)


def load_greedy(root: Root, record: UpdateCommitted) -> LoadedVersion:
    def score(*args: object, **kwargs: object) -> None:
        held = []
        while True:
            held.append(np.ones(1_000_000))
            time.sleep(0.001)  # so that it does not outrun its watcher by much

    return _spoilt(root, record, score)


def load_failing_for_one_item(root: Root, record: UpdateCommitted) -> LoadedVersion:
    """One that scores all but the last item of its catalogue, which no golden request shows."""
    version = load_version(root, record)
    inner, last = version.score, len(version.items) - 1

    def score(history: Any, candidates: np.ndarray, *, now: float, query: str | None) -> Any:
        scores = inner(history, candidates, now=now, query=query)
        return np.where(candidates == last, np.float32("nan"), scores)

    version.score = score  # type: ignore[method-assign]
    version.check_golden = lambda: None  # type: ignore[method-assign]
    return version


def load_without_store(root: Root, record: UpdateCommitted) -> LoadedVersion:
    raise StorageUnavailableError("the store does not answer")


def load_talkative(root: Root, record: UpdateCommitted) -> LoadedVersion:
    """A good one, whose libraries print."""
    print('{"reason": "this is no answer"}', flush=True)
    os.write(1, b"nor is this")
    return load_version(root, record)
