"""An update killed before any of its changes on disk, then run again, ends as if undisturbed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from raysys import update
from raysys.config import load_config
from raysys.errors import EmptyPlanError
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.ledger.records import Entry, UpdateCommitted, UpdateStarted
from raysys.ledger.state import State
from raysys.partitions.plan import plan_update
from raysys.registry.version import Manifest
from raysys.storage import Root
from tests.stub_steps import Steps, kill_before
from tests.update_shop import DAYS, find_problems, write_catalogue, write_day, write_shop


class Shop:
    """A root that can be put back to how it was."""

    def __init__(self, folder: Path, encoder: str, steps: Steps) -> None:
        self.root = Root((folder / "root").as_uri())
        self.config = load_config(write_shop(folder, self.root, encoder))
        self.steps = steps
        self._folder, self._saved = folder / "root", folder / "saved"

    def save(self) -> None:
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
        before = len(list(Log(Root(self._saved.as_uri())).entries()))
        records = [entry.record for entry in list(Log(self.root).entries())[before:]]
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


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    # A killed process loses nothing that the kernel has, so durability is not what is tested.
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    return Steps(monkeypatch)


@pytest.fixture
def first_update(tmp_path: Path, tiny_encoder: str, steps: Steps) -> Shop:
    """A shop with a catalogue and two days that nobody read yet."""
    shop = Shop(tmp_path, tiny_encoder, steps)
    write_catalogue(shop.root)
    for day in DAYS[:2]:
        write_day(shop.root, day)
    shop.save()
    return shop


@pytest.fixture
def second_update(first_update: Shop) -> Shop:
    """The same shop after an update, with two more days."""
    first_update.update()
    for day in DAYS[2:4]:
        write_day(first_update.root, day)
    first_update.save()
    return first_update


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
    assert stages == {
        "not started", "reserved", "ingested", "trained", "published", "committed", "cleaned up",
    }  # fmt: skip


def test_so_does_one_that_is_killed_again_while_it_takes_over(second_update: Shop) -> None:
    shop = second_update
    expected = undisturbed(shop)
    for change in crashes(shop):
        kill_before(change, shop.update_again)
        shop.update_again()
        assert find_problems(shop.root) == [], f"killed twice before change {change}"
        assert consumed(shop.root) == expected, f"killed twice before change {change}"


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
    def charge(state: State, update_id: str, spent: Any, status: str) -> tuple[Any, ...]:
        kept = [spend for spend in state.spends if status != "abandoned" or spend[0] != update_id]
        return tuple(kept)

    patch.setattr("raysys.ledger.state._charge", charge)


def plan_without_ledger(patch: pytest.MonkeyPatch, shop: Shop) -> None:
    patch.setattr("raysys.ledger.state._double_use", lambda *args: None)
    patch.setattr(
        update, "plan_update", lambda found, state, *rest: plan_update(found, State(), *rest)
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
