"""Unit tests run without a cluster: starting Ray in one of them is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest


@pytest.fixture(autouse=True)
def _forbid_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("a unit test started Ray; move it to tests/cluster")

    monkeypatch.setattr("ray.init", refuse)


@pytest.fixture(scope="session")
def world() -> Iterator[None]:
    """A `torch.distributed` group of this process alone."""
    import torch

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def two_workers(
    tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of two ranks of one group computed: see `tests/two_workers.py`."""
    folder = tmp_path_factory.mktemp("two_workers")
    command = [sys.executable, "-m", "tests.two_workers"]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder), tiny_encoder], env=_environment())
        for rank in range(2)
    ]
    try:
        assert [worker.wait(120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return _results(folder, 2)


@pytest.fixture(scope="session")
def noisy_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks added to steps of nobody: see `tests/noisy_ranks.py`."""
    folder = tmp_path_factory.mktemp("noisy_ranks")
    command = [sys.executable, "-m", "tests.noisy_ranks", str(folder)]
    subprocess.run(command, env=_environment(), check=True, timeout=120)
    return _results(folder, 4)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def _results(folder: Path, num_ranks: int) -> list[dict[str, Any]]:
    import numpy as np

    results = []
    for rank in range(num_ranks):
        with np.load(folder / f"rank{rank}.npz") as arrays:
            results.append(dict(arrays))
    return results
