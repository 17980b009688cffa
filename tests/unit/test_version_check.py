"""A version that crashes, hangs or eats memory does so in a child, and is refused with the reason.

Versions and their files are real ones; the replica around them is `ResidentVersions`.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from raysys.errors import StorageUnavailableError
from raysys.ingest.features import UserHistory
from raysys.ledger.records import UpdateCommitted
from raysys.registry.store import load_version
from raysys.rollout.view import RolloutView
from raysys.serve.check_process import ChildCheck, resident_bytes
from raysys.serve.ranker import ResidentVersions
from raysys.storage import Root
from tests import planted_versions
from tests.fakes import FakeVersion
from tests.published import VERSION, publish_version, with_file, with_skip_weight

STABLE = "v0001-aaaaaa"
LIMITS: dict[str, Any] = {"timeout_s": 100.0, "max_bytes": 2**32}
Load = Callable[[Root, UpdateCommitted], Any]


@pytest.fixture
def record(local_root: Root, tiny_encoder: str) -> UpdateCommitted:
    return publish_version(local_root, tiny_encoder)


def view(stable: str = STABLE, canary: str | None = VERSION) -> RolloutView:
    return RolloutView(
        sequence=1, rollout_id="r0001", stable=stable, canary=canary, previous=None,
        weight_fraction=0.2,
    )  # fmt: skip


class Replica:
    """Stable is resident; the canary is to be loaded."""

    def __init__(
        self,
        root: Root,
        record: UpdateCommitted,
        load: Load = load_version,
        *,
        has_check: bool = True,
        **limits: Any,
    ) -> None:
        def load_here(name: str) -> Any:
            self.loads.append(name)
            return FakeVersion(STABLE) if name == STABLE else load(root, record)

        self.loads: list[str] = []
        self.check = ChildCheck(lambda name: (load, root, record), **{**LIMITS, **limits})
        self.versions = ResidentVersions(load_here, check_apart=self.check if has_check else None)

    def follow(self) -> int:
        """Loads stable, then the canary; returns how often stable answered meanwhile."""
        return asyncio.run(self._follow())

    async def _follow(self) -> int:
        await self.versions.follow(view(canary=None))
        stable, num_answers = self.versions.get(STABLE), 0
        assert stable is not None
        loading = asyncio.create_task(self.versions.follow(view()))
        while not loading.done():
            some = np.arange(3, dtype=np.int32)
            stable.score(UserHistory.empty(), some, now=0.0, query=None)
            num_answers += 1
            await asyncio.sleep(0.005)
        await loading
        return num_answers

    def refused(self) -> str:
        """Follows; returns why the canary was refused, having checked that stable answered on."""
        num_answers = self.follow()
        assert num_answers > 10
        assert self.loads == [STABLE], "the canary was not even loaded"
        assert [version.name for version in self.versions.all()] == [STABLE]
        reason = self.versions.refusal(view())
        assert reason is not None and "\n" not in reason
        return reason


def test_a_good_version_passes_and_is_loaded(local_root: Root, record: UpdateCommitted) -> None:
    replica = Replica(local_root, record)
    replica.follow()
    assert replica.loads == [STABLE, VERSION]
    assert replica.versions.refusal(view()) is None and replica.versions.failures() == {}
    assert replica.versions.get(VERSION) is not None


def _nan(weight: np.ndarray) -> np.ndarray:
    return weight * np.float32("nan")


Spoil = Callable[[Root, UpdateCommitted], UpdateCommitted]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(
            lambda root, record: with_file(
                root, record, "head.safetensors", lambda data: data[:-1] + b"!", is_committed=False
            ),
            r"head\.safetensors has sha256 .* the ledger says",
            id="wrong hash",
        ),
        pytest.param(
            lambda root, record: with_file(
                root, record, "texts.parquet", lambda data: data[: len(data) // 2]
            ),
            "ComputeError: ",
            id="truncated file",
        ),
        pytest.param(
            lambda root, record: with_file(root, record, "manifest.json", lambda data: b"{}"),
            "the manifest cannot be read",
            id="no manifest",
        ),
        pytest.param(
            lambda root, record: with_skip_weight(root, record, _nan),
            "scores a golden request nan away",
            id="NaN weights",
        ),
        pytest.param(
            lambda root, record: with_skip_weight(root, record, lambda weight: weight * 1.05),
            r"scores a golden request \d.* away from what training recorded",
            id="golden mismatch",
        ),
    ],
)
def test_spoilt_artifacts_are_refused(
    local_root: Root, record: UpdateCommitted, spoil: Spoil, reason: str
) -> None:
    replica = Replica(local_root, spoil(local_root, record))
    found = replica.refused()
    assert found.startswith(f"version {VERSION} cannot be served: ")
    _match(found, reason)


def _match(found: str, reason: str) -> None:
    assert re.search(reason, found), f"reason: {found}"


@pytest.mark.parametrize(
    ("load", "limits", "reason"),
    [
        pytest.param(planted_versions.load_exiting, {}, "ended with exit code 3 before", id="exit"),
        pytest.param(
            planted_versions.load_segfaulting, {}, "ended by SIGSEGV before", id="segfault"
        ),
        pytest.param(
            planted_versions.load_endless, {"timeout_s": 4.0},
            r"took longer than 4 s \(replica.check_timeout_s\)", id="endless loop",
        ),
        pytest.param(
            planted_versions.load_greedy, {"max_bytes": 700_000_000},
            r"MB of memory, more than 700 MB \(replica.check_max_bytes\)", id="memory bomb",
        ),
        pytest.param(
            planted_versions.load_failing_for_one_item, {}, "gave scores that are not finite",
            id="one bad item",
        ),
    ],
)  # fmt: skip
def test_what_would_harm_a_replica_is_refused(
    local_root: Root, record: UpdateCommitted, load: Load, limits: dict[str, Any], reason: str
) -> None:
    _match(Replica(local_root, record, load, **limits).refused(), reason)


def test_without_the_child_the_same_version_ends_the_process(
    local_root: Root, record: UpdateCommitted, tiny_encoder: str
) -> None:
    """Negative control: what is planted does harm."""
    code = f"""
from raysys.storage import Root
from tests import planted_versions
from tests.published import publish_version
from tests.unit.test_version_check import Replica
root = Root({local_root.uri!r})
record = publish_version(root, {tiny_encoder!r})
Replica(root, record, planted_versions.load_exiting, has_check=False).follow()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 3


def test_a_store_that_does_not_answer_is_asked_again_later(
    local_root: Root, record: UpdateCommitted
) -> None:
    replica = Replica(local_root, record, planted_versions.load_without_store)
    replica.follow()
    assert replica.versions.refusal(view()) is None, "it is no fault of the version"
    (reason,) = replica.versions.failures().values()
    assert reason.endswith("cannot be served: the store does not answer")


def test_what_a_library_prints_is_not_taken_for_the_answer(
    local_root: Root, record: UpdateCommitted
) -> None:
    check = ChildCheck(lambda name: (planted_versions.load_talkative, local_root, record), **LIMITS)
    check.run(VERSION)


def test_the_first_version_is_not_checked_apart(local_root: Root, record: UpdateCommitted) -> None:
    """There is nothing resident that it could harm, and a restart has to be quick."""
    checked: list[str] = []
    replica = Replica(local_root, record)
    replica.check.run = checked.append  # type: ignore[method-assign]
    asyncio.run(replica.versions.follow(view()))
    assert checked == [VERSION] and replica.loads == [STABLE, VERSION]


def test_a_replica_that_stops_ends_the_check(local_root: Root, record: UpdateCommitted) -> None:
    check = ChildCheck(lambda name: (planted_versions.load_endless, local_root, record), **LIMITS)
    found: list[Exception] = []

    def run() -> None:
        try:
            check.run(VERSION)
        except StorageUnavailableError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 30
    while not (children := _children()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children
    check.stop()
    thread.join(30)
    assert not thread.is_alive() and len(found) == 1
    assert not set(children) & set(_children())


def _children() -> list[int]:
    """Processes that run a check for this one."""
    found = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "raysys.serve.check"],
        capture_output=True,
        text=True,
    )
    return [int(pid) for pid in found.stdout.split()]


def test_memory_is_that_of_the_process() -> None:
    before = resident_bytes(os.getpid())
    held = np.ones(10_000_000)
    assert resident_bytes(os.getpid()) - before > 50_000_000
    assert held.size and resident_bytes(2**22 + 1) == 0
