"""An update that dies at any of its changes of the root, then runs again, ends as if undisturbed.

So does one that finds the disk full, once there is room again. See `test_storage_crashes.py` for
why an exception may stand for SIGKILL.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from raysys import reserve, update
from raysys.config import load_config
from raysys.errors import EmptyPlanError, RootError
from raysys.ledger.fold import Draft
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.ledger.records import Entry, UpdateCommitted, UpdateStarted
from raysys.ledger.state import State
from raysys.partitions.plan import plan_update
from raysys.registry.version import Manifest
from raysys.storage import Root
from tests.crashes import fill_disk_before, kill_at_request, kill_before
from tests.stub_steps import Steps
from tests.update_shop import DAYS, find_problems, write_catalogue, write_day, write_shop

STAGES = {
    "not started", "reserved", "ingested", "trained", "published", "committed", "cleaned up",
}  # fmt: skip


class Shop:
    """A root that can be put back to how it was."""

    def __init__(self, folder: Path, root: Root, encoder: str, steps: Steps) -> None:
        self.root = root
        # A renewal by the heartbeat would be a change at a time of its own.
        self.config = load_config(write_shop(folder, root, encoder, lease_s=600.0))
        self.steps = steps
        self._folder, self._saved = folder / "root", folder / "saved"
        self._num_saved_records = 0

    def save(self) -> None:
        self._num_saved_records = len(self.root.list("ledger"))
        shutil.rmtree(self._saved, ignore_errors=True)
        shutil.copytree(self._folder, self._saved)

    def restore(self) -> None:
        shutil.rmtree(self._folder)
        shutil.copytree(self._saved, self._folder)

    def update(self) -> None:
        self.steps.update(self.config)

    def update_again(self) -> None:
        """The same command; if the dead one had committed, there is nothing left to do."""
        try:
            self.update()
        except EmptyPlanError:
            assert Log(self.root).refresh().committed

    def stage(self) -> str:
        """How far the last update came, by what it left."""
        entries = list(Log(self.root).entries())[self._num_saved_records :]
        records = [entry.record for entry in entries]
        if not records:
            return "not started"
        assert isinstance(records[0], UpdateStarted)
        own = records[0].update_id
        if isinstance(records[-1], UpdateCommitted):
            return "committed" if self.root.list_folders("staging") else "cleaned up"
        if any(name.endswith(own[-7:]) for name in self.root.list_folders("versions")):
            return "published"
        if self.root.list(f"staging/{own}/train"):
            return "trained"
        return "ingested" if self.root.list(f"state/{own}") else "reserved"


class S3Shop(Shop):
    """The same on S3."""

    def save(self) -> None:
        self._num_saved_records = len(self.root.list("ledger"))
        self._contents = {info: self.root.read_bytes(info.path) for info in self.root.list("")}

    def restore(self) -> None:
        found = set(self.root.list(""))
        for info in found - self._contents.keys():
            self.root.delete_prefix(info.path)
        for info in self._contents.keys() - found:
            self.root.put(info.path, self._contents[info])


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    # A killed process loses nothing that the kernel has, so durability is not what is tested.
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    return Steps(monkeypatch)


def open_shop(shop: Shop) -> Shop:
    """A shop with a catalogue and two days that nobody read yet."""
    write_catalogue(shop.root)
    for day in DAYS[:2]:
        write_day(shop.root, day)
    shop.save()
    return shop


def grow(shop: Shop) -> Shop:
    """The same shop after an update, with two more days."""
    shop.update()
    for day in DAYS[2:4]:
        write_day(shop.root, day)
    shop.save()
    return shop


@pytest.fixture
def first_update(tmp_path: Path, tiny_encoder: str, steps: Steps) -> Shop:
    root = Root((tmp_path / "root").as_uri())
    return open_shop(Shop(tmp_path, root, tiny_encoder, steps))


@pytest.fixture
def second_update(first_update: Shop) -> Shop:
    return grow(first_update)


@pytest.fixture
def second_update_on_s3(tmp_path: Path, s3_root: str, tiny_encoder: str, steps: Steps) -> Shop:
    root = Root(f"{s3_root}/{uuid.uuid4().hex}")
    return grow(open_shop(S3Shop(tmp_path, root, tiny_encoder, steps)))


def crashes(shop: Shop) -> Iterator[int]:
    """Kills an update before each of its changes in turn; yields with the root as that left it."""
    num_changes = kill_before(None, shop.update)
    for change in range(num_changes):
        shop.restore()
        assert kill_before(change, shop.update) == change
        yield change


def consumed(root: Root) -> tuple[set[str], set[str], int]:
    """Event files, item files and how many versions were made of them."""
    state = Log(root).refresh()
    return set(state.consumed_files), set(state.consumed_item_files), len(state.versions)


def undisturbed(shop: Shop) -> tuple[set[str], set[str], int]:
    shop.update()
    assert find_problems(shop.root) == []
    result = consumed(shop.root)
    shop.restore()
    return result


@pytest.mark.parametrize("number", ["first_update", "second_update"])
def test_a_killed_update_that_runs_again_ends_as_an_undisturbed_one(
    number: str, request: pytest.FixtureRequest
) -> None:
    shop: Shop = request.getfixturevalue(number)
    expected, stages = undisturbed(shop), set()
    for change in crashes(shop):
        stages.add(shop.stage())
        shop.update_again()
        assert find_problems(shop.root) == [], f"killed before change {change}"
        assert consumed(shop.root) == expected, f"killed before change {change}"
    assert stages == STAGES


def test_so_does_one_that_is_killed_again_while_it_takes_over(second_update: Shop) -> None:
    shop = second_update
    expected = undisturbed(shop)
    for change in crashes(shop):
        kill_before(change, shop.update_again)
        shop.update_again()
        assert find_problems(shop.root) == [], f"killed twice before change {change}"
        assert consumed(shop.root) == expected, f"killed twice before change {change}"


def test_so_does_one_on_s3_that_is_killed_at_any_request(second_update_on_s3: Shop) -> None:
    """Killed before the first is sent, and once each has acted and its answer is not there yet.

    The latter is also before the next one is sent: in between nothing changes the root.
    """
    shop = second_update_on_s3
    expected, stages = undisturbed(shop), set()
    num_requests = kill_at_request(None, shop.update, acted=True)
    moments = [(0, False), *((request, True) for request in range(num_requests))]
    for request, acted in moments:
        shop.restore()
        assert kill_at_request(request, shop.update, acted=acted) == request
        stages.add(shop.stage())
        shop.update_again()
        assert find_problems(shop.root) == [], f"killed at request {request}"
        assert consumed(shop.root) == expected, f"killed at request {request}"
    assert stages == STAGES


def test_an_update_that_finds_the_disk_full_says_so_and_ends_well_once_there_is_room(
    second_update: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    shop = second_update
    expected, told = undisturbed(shop), []
    num_changes = kill_before(None, shop.update)
    for change in range(num_changes):
        shop.restore()
        try:
            fill_disk_before(change, shop.update)
        except RootError as error:
            told.append(str(error))
        assert find_torn(shop.root) == [], f"disk full at change {change}"
        shop.update_again()
        assert find_problems(shop.root) == [], f"disk full at change {change}"
        assert consumed(shop.root) == expected, f"disk full at change {change}"
    pattern = (
        rf"root {shop.root.uri}: cannot write (\S+) \(No space left on device\); free some space"
    )
    paths = [match[1] for text in told if (match := re.match(pattern, text))]
    assert len(paths) == len(told)
    # What failed first is told, although the lease could not be given up either.
    for folder in ("ledger/", "staging/", "state/", "quarantine/", "versions/"):
        assert any(path.startswith(folder) for path in paths)
    assert "stays active until its lease expires" in caplog.text


def find_torn(root: Root) -> list[str]:
    """Objects that a reader must not see: records that do not read, and writes under way."""
    Log(root).refresh()
    return [
        info.path for info in root.list("") if info.path.startswith(".tmp") or not info.size_bytes
    ]


class LateLease(Lease):
    """Broken for a negative control: what was published is written only after the commit."""

    root: Root
    pending: ClassVar[dict[str, bytes]] = {}

    def commit(self, record: UpdateCommitted) -> Entry:
        entry = super().commit(record)
        for path, data in self.pending.items():
            self.root.put(path, data)
        return entry


def publish_late(patch: pytest.MonkeyPatch, shop: Shop) -> None:
    def publish(root: Root, manifest: Manifest, *rest: Any, **named: Any) -> dict[str, str]:
        hashes = shop.steps.publish(root, manifest, *rest, **named)
        folder = f"versions/{manifest.version}"
        LateLease.pending = {info.path: root.read_bytes(info.path) for info in root.list(folder)}
        root.delete_prefix(folder)
        return hashes

    LateLease.root = shop.root
    shop.steps.lease_class = LateLease
    patch.setattr(update, "publish", publish)


def never_clean_up(patch: pytest.MonkeyPatch, shop: Shop) -> None:
    patch.setattr(update, "delete_orphans", lambda root, log: None)


def clean_up_too_much(patch: pytest.MonkeyPatch, shop: Shop) -> None:
    patch.setattr("raysys.partitions.orphans.orphan_folders", lambda state, folders: folders)


def forget_abandoned_charges(patch: pytest.MonkeyPatch, shop: Shop) -> None:
    def charge(draft: Draft, update_id: str, spent: Any, status: str) -> None:
        if status == "abandoned":
            draft.spends.pop(draft.place_in_spends.pop(update_id))

    patch.setattr("raysys.ledger.fold._charge", charge)


def plan_without_ledger(patch: pytest.MonkeyPatch, shop: Shop) -> None:
    patch.setattr("raysys.ledger.rules._double_use", lambda *args: None)
    patch.setattr(
        reserve, "plan_update", lambda found, state, *rest: plan_update(found, State(), *rest)
    )


BREAKS = {
    publish_late: "is missing",
    never_clean_up: "belongs to no committed update",
    clean_up_too_much: "is missing",
    forget_abandoned_charges: "was not charged its reservation",
    plan_without_ledger: "is in [",
}


@pytest.mark.parametrize(
    ("breaks", "problem"), BREAKS.items(), ids=[breaks.__name__ for breaks in BREAKS]
)
def test_an_update_that_breaks_its_word_is_caught(
    breaks: Callable[[pytest.MonkeyPatch, Shop], None],
    problem: str,
    second_update: Shop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breaks(monkeypatch, second_update)
    assert problem in first_problem(second_update)


def first_problem(shop: Shop) -> str:
    for _ in crashes(shop):
        shop.update_again()
        for problem in find_problems(shop.root):
            return problem
    return "none"
