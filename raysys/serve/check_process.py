"""Has a version checked by a child process, and says in one line why it did not pass.

    ResidentVersions -> ChildCheck.run() -> python -m raysys.serve.check -> passed, or an error

The replica only waits: for the child's end, its time or its memory. A thread looks 20 times a
second, and so what the child allocates in 50 ms comes on top of the limit.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray.cloudpickle

from raysys.errors import StorageUnavailableError, VersionCheckError
from raysys.ledger.records import UpdateCommitted
from raysys.serve.check import CheckResult
from raysys.serve.ranker import Servable
from raysys.storage import Root

_POLL_S = 0.05
_SPARE_S = 5
"""The child ends itself so long after its time, should nobody have ended it."""
_MAX_ANSWER_BYTES = 65_536

Job = tuple[Callable[[Root, UpdateCommitted], Servable], Root, UpdateCommitted]
"""How to load a version. The function goes to the child by name, or by value where it has none."""
JobOf = Callable[[str], Job]


class ChildCheck:
    """Checks versions, each in a new process."""

    def __init__(self, job_of: JobOf, *, timeout_s: float, max_bytes: int) -> None:
        self._job_of = job_of
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._is_stopped = threading.Event()

    def run(self, name: str) -> None:
        """Returns once a version has passed. Blocking, for seconds.

        Raises:
          VersionCheckError: It did not pass: by what it answered, crashed, or took.
          StorageUnavailableError: The check could not read what it needs; try again.
        """
        with tempfile.TemporaryFile() as job:
            limit_s = math.ceil(self._timeout_s) + _SPARE_S
            job.write(_pickled((limit_s, *self._job_of(name))))
            job.seek(0)
            process = _start(job)
        assert process.stdout is not None
        with process.stdout:
            try:
                self._wait(process)
                result = _answer(process)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if result.reason is not None and result.may_pass:
            raise StorageUnavailableError(result.reason)
        if result.reason is not None:
            raise VersionCheckError(result.reason)

    def stop(self) -> None:
        """Ends a check that is running: the replica goes."""
        self._is_stopped.set()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
                return
            if time.monotonic() > deadline:
                raise VersionCheckError(
                    f"its check took longer than {self._timeout_s:g} s (replica.check_timeout_s)"
                )
            used = resident_bytes(process.pid)
            if used > self._max_bytes:
                raise VersionCheckError(
                    f"its check took {used / 1e6:.0f} MB of memory, more than "
                    f"{self._max_bytes / 1e6:.0f} MB (replica.check_max_bytes)"
                )
            if self._is_stopped.is_set():
                raise StorageUnavailableError("the replica stops before the check has ended")


def _pickled(job: Any) -> bytes:
    data: bytes = ray.cloudpickle.dumps(job)  # type: ignore[no-untyped-call]
    return data


def _start(job: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "raysys.serve.check"],
        stdin=job,
        stdout=subprocess.PIPE,  # stderr goes where the replica's goes: to its log
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # One core at low priority: the others are for requests.
            "OMP_NUM_THREADS": "1",
            "POLARS_MAX_THREADS": "1",
        },
    )


def _answer(process: subprocess.Popen[bytes]) -> CheckResult:
    assert process.stdout is not None
    # What the child has started may hold the pipe open, so its end is not waited for.
    os.set_blocking(process.stdout.fileno(), False)
    data = process.stdout.read(_MAX_ANSWER_BYTES)
    if data:
        return CheckResult(**json.loads(data))
    code = process.returncode
    how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
    raise VersionCheckError(f"its check ended {how} before it had a result; see the replica's log")


def resident_bytes(pid: int) -> int:
    """Returns a process's resident memory; 0 if it is gone, or where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
