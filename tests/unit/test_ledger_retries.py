"""Any order of arrivals, crashes, lost answers, lost races and take-overs consumes each file once.

Three writers work on one ledger and have all the bad luck that a process or a store can have. The
take-overs are the worst there can be: any writer may give up any other at any time, as if no clock
could be trusted. The log is the real one, over files and over a store in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import LedgerCorruptError, StorageUnavailableError
from raysys.ledger import snapshots
from raysys.ledger.log import Log
from raysys.ledger.records import Entry, Record, UpdateAbandoned, UpdateStarted
from raysys.ledger.state import State, fold
from raysys.ledger.verify import verify
from raysys.storage import Root
from tests.helpers import committed, file_uses, partition, renewed, rollout, started

NUM_WRITERS = 3
DAYS = [f"2017-03-{day:02d}" for day in range(1, 6)]


class Crash(BaseException):
    """The process ends here: nothing of it runs on."""


class UnluckyRoot(Root):
    """A store on which one `misfortune` at a time can be laid; it strikes at the next append."""

    misfortune: str = "none"
    rival: Callable[[], object] | None = None

    def put_if_absent(self, path: str, data: bytes) -> bool:
        misfortune = self.misfortune
        if misfortune != "crash at snapshot":
            self.misfortune = "none"
        if misfortune == "crash before":
            raise Crash
        if misfortune == "no answer":
            raise StorageUnavailableError("not written")
        if misfortune == "lost race" and self.rival is not None:
            self.rival()
        created = self.create(path, data)
        if misfortune == "crash after":
            raise Crash
        if misfortune == "lost answer":
            raise StorageUnavailableError("written, but nobody told")
        return created

    def put(self, path: str, data: bytes) -> None:
        if self.misfortune == "crash at snapshot":
            raise Crash
        self.replace(path, data)

    def create(self, path: str, data: bytes) -> bool:
        return super().put_if_absent(path, data)

    def replace(self, path: str, data: bytes) -> None:
        super().put(path, data)


class MemoryRoot(UnluckyRoot):
    """Objects in a dictionary, which all roots of one URI share."""

    stores: ClassVar[dict[str, dict[str, bytes]]] = {}

    @property
    def objects(self) -> dict[str, bytes]:
        return self.stores.setdefault(self.uri, {})

    def read_bytes(self, path: str) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    def list_names(self, folder: str, after: str = "") -> list[str]:
        names = [p.removeprefix(f"{folder}/") for p in self.objects if p.startswith(f"{folder}/")]
        return sorted(name for name in names if "/" not in name and name > after)

    def replace(self, path: str, data: bytes) -> None:
        self.objects[path] = data

    def create(self, path: str, data: bytes) -> bool:
        return self.objects.setdefault(path, data) is data

    def delete_prefix(self, prefix: str) -> None:
        self.objects.pop(prefix, None)


class OverwritingMemoryRoot(MemoryRoot):
    """Broken for the negative control: it has no conditional write, so every writer wins."""

    def create(self, path: str, data: bytes) -> bool:
        self.objects[path] = data
        return True


class Writer:
    """One process after the other, each with its own view of the ledger."""

    def __init__(self, root: UnluckyRoot, world: World) -> None:
        self.root = root
        self.world = world
        self.restart()

    def restart(self) -> None:
        self.log = Log(self.root)
        self.update: UpdateStarted | None = None

    def append(self, decide: Callable[[State], Record | None]) -> Entry | None:
        try:
            entry = self.log.transact(decide)
        except StorageUnavailableError:
            return None
        except Crash:
            self.restart()
            return None
        if entry is not None:
            self.world.acknowledged.append(entry)
        return entry

    def start(self) -> None:
        entry = self.append(self.world.plan)
        if entry is not None and isinstance(entry.record, UpdateStarted):
            self.update = entry.record

    def commit(self) -> None:
        mine = self.update
        if mine is not None:
            version = f"v{mine.update_id[1:]}"
            self.append(lambda state: self._if_mine(state, committed(mine, version=version)))

    def renew(self) -> None:
        if (mine := self.update) is not None:
            self.append(lambda state: self._if_mine(state, renewed(mine.update_id)))

    def take_over(self) -> None:
        self.append(
            lambda state: (
                UpdateAbandoned(update_id=state.active.update_id, reason="lease expired")
                if state.active
                else None
            )
        )

    def roll(self) -> None:
        self.append(lambda state: rollout(reason=str(state.sequence)))

    def _if_mine(self, state: State, record: Record) -> Record | None:
        assert self.update is not None
        is_mine = state.active is not None and state.active.update_id == self.update.update_id
        return record if is_mine else None


ACTIONS = ["start", "commit", "renew", "take_over", "roll", "restart"]
CRASHES = ["crash before", "crash after", "crash at snapshot"]
LUCK = ["none", "none", *CRASHES, "no answer", "lost answer", "lost race"]
Step = tuple[str, int, str, str]
"""Action, writer, its luck, and what the next writer does if it is a lost race."""
steps = st.lists(
    st.tuples(
        st.sampled_from([*ACTIONS, "arrive"]),
        st.integers(0, NUM_WRITERS - 1),
        st.sampled_from(LUCK),
        st.sampled_from(ACTIONS),
    ),
    max_size=40,
)


class World:
    """Files that arrive, and the writers that consume them."""

    def __init__(self, make_root: Callable[[], UnluckyRoot]) -> None:
        self.arrived: list[tuple[str, str]] = []
        self.acknowledged: list[Entry] = []
        self.make_root = make_root
        self.writers = [Writer(make_root(), self) for _ in range(NUM_WRITERS)]

    def plan(self, state: State) -> UpdateStarted | None:
        parts = [partition(day, name) for day, name in self.arrived]
        new = tuple(p for p in parts if p.files[0].path not in state.consumed_files)
        if state.active is not None or not new:
            return None
        return started(state.next_update_id(), partitions=new)

    def step(self, action: str, number: int, luck: str, rival_action: str) -> None:
        if action == "arrive":
            self.arrived.append((DAYS[len(self.arrived) % len(DAYS)], f"{len(self.arrived)}.x"))
            return
        writer, rival = self.writers[number], self.writers[(number + 1) % NUM_WRITERS]
        writer.root.misfortune = luck
        writer.root.rival = getattr(rival, rival_action)
        getattr(writer, action)()
        writer.root.misfortune = "none"

    def run_to_the_end(self) -> None:
        writer = Writer(self.make_root(), self)
        for action in (writer.take_over, writer.start, writer.commit):
            action()

    def check(self) -> None:
        root = self.make_root()
        log = Log(root)
        entries, state = list(log.entries()), log.refresh()
        uses = file_uses(state.committed)
        assert all(len(updates) == 1 for updates in uses.values())
        assert uses.keys() == {f"events/dt={day}/{name}" for day, name in self.arrived}
        assert state == fold(entries) and verify(root).num_records == len(entries)
        assert all(writer.log.refresh() == state for writer in self.writers)
        assert all(entries[entry.sequence - 1] == entry for entry in self.acknowledged)
        assert len({entry.sequence for entry in self.acknowledged}) == len(self.acknowledged)
        assert len(state.spends) == state.num_started


def run(make_root: Callable[[], UnluckyRoot], drawn: list[Step]) -> None:
    world = World(make_root)
    for step in drawn:
        world.step(*step)
    world.run_to_the_end()
    world.check()


@pytest.fixture(autouse=True, scope="module")
def _often() -> object:
    """Snapshots so often that most loads start from one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "INTERVAL", 3)
        yield


_memory = iter(range(10**9))


def memory(kind: type[MemoryRoot] = MemoryRoot) -> Callable[[], UnluckyRoot]:
    uri = f"file:///memory/{next(_memory)}"
    return lambda: kind(uri)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_in_memory_every_file_is_consumed_once(drawn: list[Step]) -> None:
    run(memory(), drawn)


@settings(max_examples=25, deadline=None)
@given(steps)
def test_on_files_every_file_is_consumed_once(drawn: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        uri = (Path(folder) / "root").as_uri()
        run(lambda: UnluckyRoot(uri), drawn)


RACE: list[Step] = [
    ("arrive", 0, "none", "roll"),
    ("start", 0, "lost race", "start"),
    ("commit", 0, "none", "roll"),
    ("commit", 1, "none", "roll"),
]


def test_two_that_start_at_once_are_one_after_the_other() -> None:
    run(memory(), RACE)


def test_a_store_without_conditional_writes_is_caught() -> None:
    """The negative control: the same race, where both writers believe that they won."""
    with pytest.raises(LedgerCorruptError, match="ledger record 1 was changed"):
        run(memory(OverwritingMemoryRoot), RACE)
