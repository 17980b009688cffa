"""Versions with planted faults, by name, for replicas in other processes.

The process that checks a version before it is loaded tries every item, and would refuse most of
these at once. Here faults begin with the traffic, as those do that no check foresees.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from raysys.ledger.records import UpdateCommitted
from raysys.storage import Root
from tests.fakes import FakeVersion

ITEMS = tuple(f"i{number:03}" for number in range(300))
"""`ITEMS[0]` is what every user wants, and stable puts it first."""
STRANGE_ITEMS = tuple(f"x{number:03}" for number in range(300))
STABLE_S = 0.02
"""Seconds that a version takes to score."""

Score = Callable[[np.ndarray], np.ndarray]


def _throws_for_some_items(scores: np.ndarray) -> np.ndarray:
    # 1 % of the items, none of which is among the first hundred, which the check at loading scores.
    if np.isin(-scores, (107, 207, 293)).any():
        raise RuntimeError("planted")
    return scores


def _nan_for_some_items(scores: np.ndarray) -> np.ndarray:
    return np.where(-scores >= 250, np.nan, scores)


def _slow(scores: np.ndarray) -> np.ndarray:
    time.sleep(4 * STABLE_S)  # beside what all take
    return scores


def _random(scores: np.ndarray) -> np.ndarray:
    return np.random.default_rng().normal(size=scores.shape).astype(np.float32)


FAULTS: dict[str, Score | None] = {
    "equal": None,
    "throws": _throws_for_some_items,
    "nan": _nan_for_some_items,
    "slow": _slow,
    "random": _random,
    "strange": None,
    "shifted": None,
}
"""Fault -> what it does to scores. Names of versions end with the fault."""


class _Shifted(FakeVersion):
    """Its item table is of another day: what it takes for an item is another one."""

    def score(self, history: object, candidates: np.ndarray, **more: object) -> np.ndarray:
        shifted = (candidates + 150) % len(ITEMS)
        return super().score(history, shifted, **more)  # type: ignore[arg-type]


def _is_check() -> bool:
    spec = sys.modules["__main__"].__spec__
    return spec is not None and spec.name == "raysys.serve.check"


def load_faulty(root: Root, record: UpdateCommitted) -> FakeVersion:
    """Stands for `registry.store.load_version`."""
    assert record.version is not None
    fault = record.version.rpartition("-")[2]
    planted = None if _is_check() else FAULTS.get(fault)

    def score(scores: np.ndarray) -> np.ndarray:
        time.sleep(STABLE_S)
        return planted(scores) if planted else scores

    kind = _Shifted if fault == "shifted" else FakeVersion
    return kind(record.version, STRANGE_ITEMS if fault == "strange" else ITEMS, score=score)
