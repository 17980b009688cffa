"""A replica in a process of its own, for tests to kill: real HTTP, a real root, fake versions.

python -m tests.lone_replica ROOT PORT
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import uvicorn

from raysys.config import HttpConfig
from raysys.serve.api import create_api
from raysys.storage import Root
from tests.fakes import FakeReplica, FakeVersion
from tests.helpers import committed, started

VERSION = "v0001-aaaaaa"
IMPRESSIONS_INTERVAL_S = 600.0
"""Impressions wait for so long that a test sees them lost."""


class LoneReplica:
    """The process, and what a test does with it."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self._process = process
        self.url = url

    def kill(self) -> None:
        """Ends it as a lost node does: at once, and without a word."""
        os.kill(self._process.pid, signal.SIGKILL)
        assert self._process.wait(10) == -signal.SIGKILL


@contextlib.contextmanager
def lone_replica(root: Root, port: int) -> Iterator[LoneReplica]:
    """A replica of a root, from when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.lone_replica", root.uri, str(port)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    replica = LoneReplica(process, f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 60
        while not _is_ready(replica.url):
            assert process.poll() is None, f"the replica ended with {process.returncode}"
            assert time.monotonic() < deadline, "the replica did not start within 60 s"
            time.sleep(0.1)
        yield replica
    finally:
        process.kill()
        process.wait(10)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def main(uri: str, port: str) -> None:
    first = started("u0001-aaaaaa", partitions=())
    replica = FakeReplica(
        Root(uri),
        {VERSION: FakeVersion(VERSION)},
        [first, committed(first, version=VERSION)],
        impressions_interval_s=IMPRESSIONS_INTERVAL_S,
    )
    uvicorn.run(create_api(replica.replica, HttpConfig()), port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
