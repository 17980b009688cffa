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
    return _run_ranks("tests.two_workers", 2, folder, tiny_encoder)


@pytest.fixture(scope="session")
def noisy_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks added to steps of nobody: see `tests/noisy_ranks.py`."""
    return _run_ranks("tests.noisy_ranks", 4, tmp_path_factory.mktemp("noisy_ranks"))


def _run_ranks(module: str, num: int, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    import numpy as np

    command = [sys.executable, "-m", module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen([*command, str(rank), str(folder), *arguments], env=environment)
        for rank in range(num)
    ]
    try:
        assert [worker.wait(120) for worker in workers] == [0] * num
    finally:
        for worker in workers:
            worker.kill()
    results = []
    for rank in range(num):
        with np.load(folder / f"rank{rank}.npz") as arrays:
            results.append(dict(arrays))
    return results
