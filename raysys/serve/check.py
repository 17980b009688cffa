"""Loads and tries one version in a process of its own: `python -m raysys.serve.check`.

    check_process -> stdin: how to load it -> load, check_version() -> stdout: one line of JSON

Whatever a version does here, crash, hang or eat memory, it does not do in a replica. The process
is polite: it runs at low priority, is the first to go when memory runs out, and ends by itself when
nobody waits for it any more. It imports no Ray, and torch only where a version needs it.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from raysys.errors import RaysysError, Transient
from raysys.ingest.features import UserHistory
from raysys.serve.ranker import ScoresError, Servable, score

BATCH_SIZE = 500
"""Items that are scored at once, as a large request has them."""
MAX_ITEMS = 200_000
"""Of a larger catalogue, as many items are scored, evenly spread."""
ODD_QUERIES = ("milk", "a" * 1000, "\N{GRINNING FACE} caf\N{LATIN SMALL LETTER E WITH ACUTE}", " ")
_NICE = 10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """What came of a check."""

    reason: str | None
    """Why the version did not pass, on one line; None if it did."""
    may_pass: bool = False
    """It failed for want of the store, and is worth another try."""


def check_version(version: Servable, *, max_items: int = MAX_ITEMS) -> None:
    """Has a version give what its golden requests say, and finite scores for all it may be asked.

    Raises:
      ArtifactError: A golden score is not the recorded one.
      ScoresError: A score or a probability cannot be ranked by.
    """
    version.check_golden()
    now, num_items = time.time(), len(version.items)
    places = np.arange(0, num_items, max(num_items // max_items, 1), dtype=np.int32)
    histories = [UserHistory.empty(), version.history_of(version.items.ids[:3], now)]
    for start in range(0, len(places), BATCH_SIZE):
        some = places[start : start + BATCH_SIZE]
        for history in histories:
            _check_probabilities(version, score(version, history, some, now, None))
    for query in (*ODD_QUERIES, *version.items.ids[:3]):
        score(version, histories[0], places[:BATCH_SIZE], now, query)


def _check_probabilities(version: Servable, scores: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    found = version.probabilities(scores)
    # Written so that a NaN fails.
    if found.shape != scores.shape or not np.all((found >= 0) & (found <= 1)):
        raise ScoresError(f"version {version.name} gave probabilities that are not in [0, 1]")


def result_of(check: Callable[[], None]) -> CheckResult:
    """Runs a check and says what came of it."""
    try:
        check()
    except Exception as error:
        kind = "" if isinstance(error, RaysysError | ScoresError) else f"{type(error).__name__}: "
        line = " ".join(f"{kind}{error}".split())[:1000]
        return CheckResult(reason=line, may_pass=isinstance(error, Transient | OSError))
    return CheckResult(reason=None)


def main() -> None:
    """Checks the version that stdin names."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not the answer
    faulthandler.enable()
    os.nice(_NICE)
    with suppress(OSError):  # not on every system
        Path("/proc/self/oom_score_adj").write_text("1000")
    limit_s, load, root, record = pickle.load(sys.stdin.buffer)
    signal.alarm(limit_s)  # for when the replica that would end it has gone
    result = result_of(lambda: check_version(load(root, record)))
    os.write(answer, json.dumps(dataclasses.asdict(result)).encode())
    sys.stderr.flush()
    os._exit(0)  # threads of libraries may not want to end


if __name__ == "__main__":
    main()
