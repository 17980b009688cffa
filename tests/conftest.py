"""For all tests: a local root, one on a real S3 server over HTTP, and a small text encoder."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysys.storage import Root
from raysys.storage.patience import Patience
from tests.faulty_s3 import FaultyS3

QUICK = Patience(
    connect_timeout_s=5.0, read_timeout_s=5.0, first_delay_s=0.005, max_delay_s=0.02,
    give_up_after_s=30.0,
)  # fmt: skip
"""Asks again at once, and for longer than any test breaks the store."""
HASTY = dataclasses.replace(QUICK, read_timeout_s=0.05)
"""The same where the store is silent. It may ask twice also where the store is only slow."""
IMPATIENT = dataclasses.replace(HASTY, give_up_after_s=0.04)
"""Asks a store that answers at once about five times, and a silent one once."""
BUCKET = "raysys-test"
SERVE_S3 = """
import os, sys, threading
def follow_the_tests():  # also when they are killed: their end of the pipe closes then
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=follow_the_tests, daemon=True).start()
from moto.server import main
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""


@pytest.fixture(scope="session")
def s3_root() -> Iterator[str]:
    """URI of an empty bucket on a local S3 server; AWS_* point every client and child to it."""
    port = _free_port()
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE_S3, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            _create_bucket(endpoint, server)
            yield f"s3://{BUCKET}"
    finally:
        os.kill(server.pid, signal.SIGTERM)
        server.communicate(timeout=10)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    """An empty root of each kind."""
    if request.param == "local":
        return Root((tmp_path / "root").as_uri())
    bucket: str = request.getfixturevalue("s3_root")
    return Root(f"{bucket}/{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def _faulty_s3(s3_root: str) -> Iterator[FaultyS3]:
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        yield proxy


@pytest.fixture
def faulty_s3(_faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A healthy way to the S3 server, for this test's clients and children, that can be broken."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", _faulty_s3.endpoint)
    _faulty_s3.forget()
    yield _faulty_s3
    _faulty_s3.heal()


@pytest.fixture
def faulty_root(faulty_s3: FaultyS3, s3_root: str) -> Root:
    """An empty root on S3, reached through `faulty_s3`."""
    return Root(f"{s3_root}/{uuid.uuid4().hex}", QUICK)


@pytest.fixture
def local_root(tmp_path: Path) -> Root:
    """An empty local root, for what does not depend on the store."""
    return Root((tmp_path / "root").as_uri())


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer encoder, which `model.encoder` may name."""
    from tests import tiny_shop

    return tiny_shop.write_encoder(tmp_path_factory.mktemp("encoder"))


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _create_bucket(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
    deadline = time.monotonic() + 60
    while True:
        assert server.poll() is None, f"the S3 server ended with {server.returncode}"
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except urllib.error.URLError:
            assert time.monotonic() < deadline, "the S3 server did not start within 60 s"
            time.sleep(0.1)
