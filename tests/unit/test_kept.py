"""What is kept of the composed loss saves time, and nothing rests on it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from raysys.ledger.log import Log
from raysys.ledger.records import KEPT_LOSSES, KeptLoss, PrivacySpend, UserGroup
from raysys.ledger.state import State
from raysys.ledger.verify import verify
from raysys.privacy import kept
from raysys.privacy.composed import Composed
from raysys.privacy.kept import forget, keep, life_so_far
from raysys.storage import Root
from tests.helpers import SPEND, abandoned, committed, partition, started

DELTA = 1e-4


@pytest.fixture(autouse=True)
def _new_process() -> None:
    forget()


@pytest.fixture
def _composed_alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how many updates are added to what was read or to nothing."""
    added: list[int] = []
    plus = Composed.plus

    def counted(self: Composed, *spends: PrivacySpend) -> Composed:
        if len(spends) == 1:
            added.append(1)
        return plus(self, *spends)

    monkeypatch.setattr(Composed, "plus", counted)
    return added


def spend_of(number: int) -> PrivacySpend:
    group = UserGroup(scheme="cohorts/2/key", index=number % 2) if number > 2 else None
    return dataclasses.replace(SPEND, noise_multiplier=4.0 + number, group=group)


def live(root: Root, numbers: range) -> State:
    """Runs updates as production does: keep, then name it in the start."""
    log = Log(root)
    for number in numbers:
        forget()
        start = started(
            f"u{number:04}-aaaaaa",
            partitions=(partition(f"2017-03-{number:02}"),),
            reserved=spend_of(number),
            kept_loss=keep(root, log.refresh()),
        )
        end = abandoned(start.update_id) if number % 3 == 2 else committed(start)
        for record in (start, end):
            log.transact(lambda state, record=record: record)  # type: ignore[misc]
    forget()
    return log.refresh()


def from_records(state: State) -> float:
    forget()
    return life_so_far(None, state).epsilon(DELTA)


def test_a_life_that_is_kept_update_by_update_is_that_of_the_records(
    root: Root, _composed_alone: list[int]
) -> None:
    state = live(root, range(1, 7))
    assert state.kept_loss is not None and state.kept_loss.num_updates == 5
    _composed_alone.clear()
    found = life_so_far(root, state)
    assert len(_composed_alone) == 1, "only the update after those that are kept was added"
    assert found.epsilon(DELTA) == from_records(state)
    assert found.groups.keys() == life_so_far(None, state).groups.keys()


def test_only_the_two_newest_are_kept_and_verify_knows_the_last(local_root: Root) -> None:
    state = live(local_root, range(1, 6))
    names = local_root.list_names(KEPT_LOSSES)
    assert [name[:6] for name in names] == ["000003", "000004"]
    assert state.kept_loss is not None and state.kept_loss.path.endswith(names[-1])
    assert verify(local_root).ignored == ()
    local_root.delete_prefix(KEPT_LOSSES)
    (ignored,) = verify(local_root).ignored
    assert "is gone: the budget is composed from the records" in ignored


def nothing(root: Root, kept: KeptLoss) -> None:
    root.delete_prefix(kept.path)


def flipped(root: Root, kept: KeptLoss) -> None:
    data = bytearray(root.read_bytes(kept.path))
    data[len(data) // 2] ^= 1
    root.put(kept.path, bytes(data))


def torn(root: Root, kept: KeptLoss) -> None:
    root.put(kept.path, root.read_bytes(kept.path)[:100])


def cheaper(root: Root, kept: KeptLoss) -> None:
    """A sound file with the same head, of mechanisms that lose nothing."""
    with np.load(io.BytesIO(root.read_bytes(kept.path))) as arrays:
        changed = dict(arrays)
    for name, probs in changed.items():
        if name != "head":
            changed[name] = np.where(np.arange(len(probs)) == 0, 1.0, 0.0)
    buffer = io.BytesIO()
    np.savez(buffer, **changed)
    root.put(kept.path, buffer.getvalue())


@pytest.mark.parametrize(
    "damage", [nothing, flipped, torn, cheaper], ids=["gone", "flipped", "torn", "forged"]
)
def test_a_damaged_file_is_told_and_all_is_composed_anew(
    local_root: Root, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    state = live(local_root, range(1, 5))
    assert state.kept_loss is not None
    expected = from_records(state)
    damage(local_root, state.kept_loss)
    assert life_so_far(local_root, state).epsilon(DELTA) == expected
    assert "is not used, the budget is composed from the records" in caplog.text


@pytest.mark.parametrize("changed", ["COARSE", "_SCHEMA"])
def test_one_of_another_discretisation_or_release_is_not_used(
    local_root: Root, changed: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    state = live(local_root, range(1, 4))
    expected = from_records(state)
    monkeypatch.setattr(kept, changed, 7)
    assert life_so_far(local_root, state).epsilon(DELTA) == expected
    assert "it was made from" in caplog.text


def test_one_that_was_made_from_other_spends_is_not_used(local_root: Root, caplog: Any) -> None:
    """The negative control of trust: a sound file of a cheaper life, named by the record."""
    state = live(local_root, range(1, 4))
    cheap = dataclasses.replace(SPEND, num_steps=1)
    cheaper = dataclasses.replace(
        state, kept_loss=None, spends=tuple((u, cheap, s) for u, _, s in state.spends)
    )
    lie = keep(local_root, cheaper)
    deceived, expected = dataclasses.replace(state, kept_loss=lie), from_records(state)
    keep(local_root, cheaper)
    assert life_so_far(local_root, deceived).epsilon(DELTA) == expected, "in the same process"
    forget()
    assert life_so_far(local_root, deceived).epsilon(DELTA) == expected, "in another one"
    assert "it was made from" in caplog.text
    assert life_so_far(local_root, cheaper).epsilon(DELTA) < expected * 0.7


def test_a_running_update_is_not_kept_but_counts(local_root: Root) -> None:
    before = live(local_root, range(1, 3))
    running = started("u0003-aaaaaa", partitions=(partition("2017-03-03"),))
    Log(local_root).transact(lambda state: running)
    state = Log(local_root).refresh()
    found = keep(local_root, state)
    assert found is not None and found.num_updates == 2
    assert life_so_far(local_root, state).epsilon(DELTA) > from_records(before)


def test_without_an_update_nothing_is_written(local_root: Root) -> None:
    assert keep(local_root, State()) is None and local_root.list("") == []


def test_a_full_disk_keeps_nothing_and_stops_nobody(
    local_root: Root, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from raysys.errors import RootError

    state = live(local_root, range(1, 4))

    def full(self: Root, path: str, data: bytes) -> None:
        raise RootError("no space left")

    monkeypatch.setattr(Root, "put", full)
    assert keep(local_root, state) is None
    assert "is not kept: no space left" in caplog.text


@pytest.fixture(name="root", params=["local"])
def _root(local_root: Root) -> Iterator[Root]:
    yield local_root
