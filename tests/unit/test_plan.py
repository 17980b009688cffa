"""The plan: each file is in exactly one committed update, whatever happens in between."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import PartitionConfig
from raysys.errors import DataError, EmptyPlanError, LedgerCorruptError, PartitionChangedError
from raysys.ledger.records import FileRef, PartitionRef, Record
from raysys.ledger.state import State
from raysys.partitions import layout
from raysys.partitions.discover import Discovered, discover, work_folders
from raysys.partitions.plan import UpdatePlan, orphan_folders, plan_update
from raysys.storage import Root
from tests.helpers import (
    abandoned,
    committed,
    entries,
    file_uses,
    folded,
    item_file,
    partition,
    started,
)

DEFAULT = PartitionConfig()
DAYS = ("2017-03-01", "2017-03-02", "2017-03-03")
LATER = datetime.datetime(2018, 1, 1, tzinfo=datetime.UTC).timestamp()


def found(*partitions: PartitionRef, items: tuple[FileRef, ...] = ()) -> Discovered:
    return Discovered(root_uri="file:///shop", partitions=partitions, item_files=items)


def consumed(*partitions: PartitionRef, items: tuple[FileRef, ...] = ()) -> State:
    first = started(partitions=partitions, item_files=items)
    return folded(first, committed(first))


def plan(
    there: Discovered, state: State | None = None, now: float = LATER, **config: object
) -> UpdatePlan:
    return plan_update(there, state or State(), dataclasses.replace(DEFAULT, **config), now)


class TestWhatIsNew:
    def test_the_first_update_reads_everything(self) -> None:
        parts = tuple(partition(day) for day in DAYS)
        assert plan(found(*parts, items=(item_file(),))) == UpdatePlan(
            partitions=parts,
            item_files=(item_file(),),
            base_version=None,
            base_state=None,
            watermark="2017-03-03",
            num_open=0,
        )

    def test_the_next_update_reads_only_new_partitions_from_the_last_ones_state(self) -> None:
        old, new = partition(DAYS[0]), partition(DAYS[1])
        planned = plan(found(old, new), consumed(old))
        assert planned.partitions == (new,) and planned.files == new.files
        assert planned.base_version == "v0001-aaaaaa" and planned.base_state == "u0001-aaaaaa"

    def test_a_held_update_consumes_and_gives_its_state_but_no_version(self) -> None:
        first = started(partitions=(partition(DAYS[0]),))
        state = folded(first, committed(first, version=None))
        planned = plan(found(partition(DAYS[0]), partition(DAYS[1])), state)
        assert [p.key for p in planned.partitions] == ["events/dt=2017-03-02"]
        assert planned.base_version is None and planned.base_state == "u0001-aaaaaa"

    def test_what_an_abandoned_update_had_reserved_is_planned_again(self) -> None:
        first = started(partitions=(partition(DAYS[0]),))
        there = found(partition(DAYS[0]))
        assert plan(there, folded(first, abandoned())) == plan(there)

    def test_what_an_active_update_has_reserved_counts_as_not_consumed(self) -> None:
        there = found(partition(DAYS[0]))
        assert plan(there, folded(started())).partitions == there.partitions

    def test_a_day_that_came_after_newer_ones_is_read_and_leaves_the_watermark(self) -> None:
        old, late = partition(DAYS[1]), partition(DAYS[0])
        planned = plan(found(late, old), consumed(old))
        assert planned.partitions == (late,) and planned.watermark == "2017-03-02"

    def test_the_oldest_come_first_when_their_number_is_limited(self) -> None:
        parts = tuple(partition(day) for day in DAYS)
        first = plan(found(*parts), max_partitions=2)
        assert first.partitions == parts[:2] and first.watermark == "2017-03-02"
        assert plan(found(*parts), consumed(*parts[:2]), max_partitions=2).partitions == parts[2:]

    def test_consumed_files_may_vanish(self) -> None:
        old, new = partition(DAYS[0], "a", "b"), partition(DAYS[1])
        assert plan(found(new), consumed(old)).partitions == (new,)
        assert plan(found(partition(DAYS[0], "a"), new), consumed(old)).partitions == (new,)

    def test_item_files_are_read_once_and_again_when_rewritten(self) -> None:
        old, new, changed = item_file("a"), item_file("b"), item_file("a", etag="other")
        state = consumed(partition(DAYS[0]), items=(old,))
        assert plan(found(partition(DAYS[1]), items=(old, new)), state).item_files == (new,)
        assert plan(found(partition(DAYS[1]), items=(changed,)), state).item_files == (changed,)


class TestOpenDays:
    END = datetime.datetime(2017, 3, 2, tzinfo=datetime.UTC).timestamp()

    @pytest.mark.parametrize(
        ("closed_after_s", "after_end_s", "is_read"),
        [
            pytest.param(0.0, -1.0, False, id="day-not-over"),
            pytest.param(0.0, 0.0, True, id="day-over"),
            pytest.param(3600.0, 3599.0, False, id="files-may-still-come"),
            pytest.param(3600.0, 3600.0, True, id="closed"),
        ],
    )
    def test_a_day_is_read_once_it_is_closed(
        self, closed_after_s: float, after_end_s: float, is_read: bool
    ) -> None:
        there = found(partition("2017-02-28"), partition("2017-03-01"))
        planned = plan(there, now=self.END + after_end_s, closed_after_s=closed_after_s)
        assert len(planned.partitions) == 1 + is_read and planned.num_open == 1 - is_read

    def test_an_open_day_alone_is_an_empty_plan_that_counts_it(self) -> None:
        with pytest.raises(EmptyPlanError, match="1 partitions known, none consumed; 1 still open"):
            plan(found(partition("2017-03-01")), now=self.END - 1)


class TestEmptyPlan:
    def test_says_what_is_known_and_up_to_which_day(self) -> None:
        parts = tuple(partition(day) for day in DAYS)
        with pytest.raises(EmptyPlanError) as caught:
            plan(found(*parts), consumed(*parts))
        assert str(caught.value) == (
            "nothing new below file:///shop: 3 partitions known, all consumed up to 2017-03-03; "
            "0 still open"
        )

    def test_of_an_empty_root_says_where_to_write(self) -> None:
        with pytest.raises(EmptyPlanError, match="write parquet files to events/dt=YYYY-MM-DD/"):
            plan(found())

    def test_new_items_alone_make_no_update(self) -> None:
        with pytest.raises(EmptyPlanError):
            plan(found(items=(item_file(),)))


class TestChangedPartitions:
    STATE = consumed(partition(DAYS[0], "a", "b"))
    LATE = found(partition(DAYS[0], "a", "b", "c", "d"), partition(DAYS[1]))
    REWRITTEN = found(partition(DAYS[0], "a", "b", etag="other"), partition(DAYS[1]))

    def test_late_files_are_refused_with_name_number_and_remedy(self) -> None:
        with pytest.raises(PartitionChangedError) as caught:
            plan(self.LATE, self.STATE)
        assert str(caught.value) == (
            "events/dt=2017-03-01/c (and 1 more) came after update u0001-aaaaaa consumed "
            "events/dt=2017-03-01; set partitions.late_files: consume to train on just the late "
            "files, or move them away"
        )

    @pytest.mark.parametrize("name", ["impressions-1.parquet", "feedback-1.parquet"])
    def test_what_replicas_wrote_is_never_late(self, name: str) -> None:
        """They write at any time of the day, and each file is complete by itself."""
        whole, served = partition(DAYS[0], "a.parquet", name), partition(DAYS[0], name)
        assert plan(found(whole), consumed(partition(DAYS[0]))).partitions == (served,)

    def test_late_files_alone_are_read_where_the_config_says_so(self) -> None:
        planned = plan(self.LATE, self.STATE, late_files="consume")
        assert planned.partitions == (partition(DAYS[0], "c", "d"), partition(DAYS[1]))

    @pytest.mark.parametrize("change", ["etag", "size"])
    def test_rewritten_files_are_refused_with_name_number_and_remedy(self, change: str) -> None:
        there = self.REWRITTEN
        if change == "size":
            old = partition(DAYS[0], "a", "b")
            files = tuple(dataclasses.replace(file, size_bytes=2) for file in old.files)
            there = found(dataclasses.replace(old, files=files))
        with pytest.raises(PartitionChangedError, match=r"/a \(and 1 more\) was consumed and then"):
            plan(there, self.STATE)

    def test_rewritten_files_are_left_alone_where_the_config_says_so(self) -> None:
        planned = plan(self.REWRITTEN, self.STATE, rewritten_files="ignore")
        assert planned.partitions == (partition(DAYS[1]),)

    def test_a_change_is_told_even_if_nothing_else_is_new(self) -> None:
        with pytest.raises(PartitionChangedError):
            plan(found(partition(DAYS[0], "a", "b", "c")), self.STATE)


class TestOrphans:
    FIRST = started("u0001-aaaaaa")
    KILLED = started("u0002-bbbbbb", partitions=(partition(DAYS[1]),))
    RUNNING = started("u0003-cccccc", partitions=(partition(DAYS[1]),))
    STATE = folded(
        FIRST, committed(FIRST, version="v0001-aaaaaa"), KILLED, abandoned("u0002-bbbbbb"), RUNNING
    )

    @pytest.mark.parametrize(
        ("folder", "is_orphan"),
        [
            ("staging/u0001-aaaaaa", True),
            ("staging/u0002-bbbbbb", True),
            ("staging/u0003-cccccc", False),
            ("state/u0001-aaaaaa", False),
            ("state/u0002-bbbbbb", True),
            ("state/u0003-cccccc", False),
            ("quarantine/u0001-aaaaaa", False),
            ("quarantine/u0002-bbbbbb", True),
            ("quarantine/u0003-cccccc", False),
            ("versions/v0001-aaaaaa", False),
            ("versions/v0002-bbbbbb", True),
            ("versions/v0002-cccccc", False),
            ("events/dt=2017-03-01", False),
            ("somebody/elses", False),
        ],
    )
    def test_are_what_neither_a_commit_nor_the_active_update_needs(
        self, folder: str, is_orphan: bool
    ) -> None:
        assert orphan_folders(self.STATE, [folder]) == ((folder,) if is_orphan else ())

    def test_are_all_that_is_left_of_a_ledger_that_committed_nothing(self) -> None:
        folders = ["staging/u1", "state/u1", "versions/v1", "quarantine/u1"]
        assert orphan_folders(State(), folders) == tuple(folders)


class TestDiscover:
    def test_finds_partitions_by_date_and_item_files(self, root: Root) -> None:
        names = ["events/dt=2017-03-02/b", "events/dt=2017-03-01/b", "events/dt=2017-03-01/a"]
        for name in [*names, "items/dt=2017-03-01/x", "items/y"]:
            root.put(f"{name}.parquet", name.encode())
        there = discover(root)
        assert there.root_uri == root.uri
        assert [[f.path for f in p.files] for p in there.partitions] == [
            ["events/dt=2017-03-01/a.parquet", "events/dt=2017-03-01/b.parquet"],
            ["events/dt=2017-03-02/b.parquet"],
        ]
        assert [f.path for f in there.item_files] == [
            "items/dt=2017-03-01/x.parquet",
            "items/y.parquet",
        ]
        assert there.partitions[0].files[0].size_bytes == len("events/dt=2017-03-01/a")

    def test_finds_nothing_in_an_empty_root(self, root: Root) -> None:
        assert discover(root) == Discovered(root_uri=root.uri, partitions=(), item_files=())

    @pytest.mark.parametrize(
        "path",
        [
            "events/2017-03-01/a.parquet",
            "events/dt=2017-3-1/a.parquet",
            "events/dt=2017-02-30/a.parquet",
            "events/dt=2017-03-01/hour=1/a.parquet",
            "events/a.parquet",
        ],
    )
    def test_a_file_that_would_never_be_read_is_an_error_that_names_its_place(
        self, local_root: Root, path: str
    ) -> None:
        local_root.put(path, b"")
        with pytest.raises(DataError) as caught:
            discover(local_root)
        assert (path if path.count("/") == 1 else path.rpartition("/")[0]) in str(caught.value)

    @pytest.mark.parametrize(
        "path",
        [
            "events/dt=2017-03-01/_SUCCESS",
            "events/dt=2017-03-01/a.parquet.crc",
            "events/dt=2017-03-01/.a.parquet",
            "events/_temporary/0/a.parquet",
        ],
    )
    def test_other_objects_and_hidden_ones_are_no_data(self, local_root: Root, path: str) -> None:
        local_root.put(path, b"")
        assert discover(local_root).partitions == ()

    def test_a_file_written_anew_is_seen_as_changed(self, root: Root) -> None:
        root.put("events/dt=2017-03-01/a.parquet", b"one")
        before = discover(root)
        root.put("events/dt=2017-03-01/a.parquet", b"two")
        with pytest.raises(PartitionChangedError):
            plan(discover(root), consumed(*before.partitions))

    def test_lists_the_folders_of_updates(self, root: Root) -> None:
        for folder in (layout.staging("u1"), layout.state_folder("u1"), layout.quarantine("u1")):
            root.put(f"{folder}/x", b"")
        root.put(f"{layout.version_folder('v1')}/x", b"")
        root.put("events/dt=2017-03-01/a.parquet", b"")
        assert work_folders(root) == ["staging/u1", "state/u1", "versions/v1", "quarantine/u1"]


Planner = Callable[[Discovered, State, PartitionConfig, float], UpdatePlan]
ARRIVE, START, CRASH, COMMIT, HOLD, EXPIRE = "arrive", "start", "crash", "commit", "hold", "expire"
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just(ARRIVE), st.sampled_from(DAYS), st.sampled_from("abc")),
        st.tuples(st.sampled_from([START, CRASH, COMMIT, HOLD, EXPIRE])),
    ),
    max_size=40,
)


class Shop:
    """Files that arrive, and updates that run, crash and commit, in any order."""

    def __init__(self, planner: Planner, max_partitions: int) -> None:
        self.planner = planner
        self.config = PartitionConfig(late_files="consume", max_partitions=max_partitions)
        self.files: dict[str, set[str]] = {}
        self.state = State()

    def append(self, record: Record) -> None:
        self.state = self.state.apply(entries([record], first=self.state.sequence + 1)[0])

    def step(self, action: str, *where: str) -> None:
        if action == ARRIVE:
            self.files.setdefault(where[0], set()).add(f"{where[1]}.parquet")
        elif action == START and self.state.active is None:
            self.start()
        elif action in (CRASH, EXPIRE) and self.state.active is not None:
            self.append(abandoned(self.state.active.update_id, reason=action))
        elif action in (COMMIT, HOLD) and self.state.active is not None:
            version = self.state.next_version(self.state.active.update_id)
            record = self.state.active.started
            self.append(committed(record, version=version if action == COMMIT else None))

    def start(self) -> bool:
        there = found(*(partition(day, *sorted(self.files[day])) for day in sorted(self.files)))
        try:
            planned = self.planner(there, self.state, self.config, LATER)
        except EmptyPlanError:
            return False
        update_id = f"u{self.state.num_started + 1:04d}-{self.state.sequence:06d}"
        self.append(started(update_id, partitions=planned.partitions))
        return True

    def run_to_the_end(self) -> None:
        self.step(CRASH)
        while self.start():
            self.step(COMMIT)

    @property
    def paths(self) -> set[str]:
        return {f"events/dt={day}/{name}" for day, names in self.files.items() for name in names}


@settings(max_examples=200)
@given(steps=STEPS, max_partitions=st.integers(0, 2))
def test_every_file_ends_in_exactly_one_committed_update(
    steps: list[tuple[str, ...]], max_partitions: int
) -> None:
    shop = Shop(plan_update, max_partitions)
    for step in steps:
        shop.step(*step)
    shop.run_to_the_end()
    uses = file_uses(shop.state.committed)
    assert uses.keys() == shop.paths
    assert all(len(updates) == 1 for updates in uses.values())
    assert len(shop.state.committed) + len(shop.state.abandoned) == shop.state.num_started


@settings(max_examples=100)
@given(
    before=st.lists(st.tuples(st.sampled_from(DAYS), st.sampled_from("abc"))),
    crashes=st.integers(0, 5),
)
def test_crashes_and_retries_plan_what_an_undisturbed_run_plans(
    before: list[tuple[str, str]], crashes: int
) -> None:
    undisturbed, disturbed = Shop(plan_update, 0), Shop(plan_update, 0)
    for shop in (undisturbed, disturbed):
        for day, name in before:
            shop.step(ARRIVE, day, name)
    for _ in range(crashes):
        disturbed.step(START)
        disturbed.step(CRASH)
    for shop in (undisturbed, disturbed):
        shop.run_to_the_end()
    assert [c.partitions for c in disturbed.state.committed] == [
        c.partitions for c in undisturbed.state.committed
    ]


def test_a_planner_that_forgets_what_was_consumed_is_caught() -> None:
    """The negative control: the same history with a planner that looks at an empty ledger."""

    def forgetful(
        there: Discovered, state: State, config: PartitionConfig, now: float
    ) -> UpdatePlan:
        return plan_update(there, State(), config, now)

    shop = Shop(forgetful, 0)
    for step in [(ARRIVE, DAYS[0], "a"), (START,), (COMMIT,)]:
        shop.step(*step)
    with pytest.raises(LedgerCorruptError, match="but an earlier update consumed it"):
        shop.start()


def test_a_planner_that_loses_files_is_caught() -> None:
    """The negative control: consuming a partition as a whole drops the files that came late."""

    def by_partition(
        there: Discovered, state: State, config: PartitionConfig, now: float
    ) -> UpdatePlan:
        new = [p for p in there.partitions if p.key not in state.consumed_partitions]
        return plan_update(found(*new), state, config, now)

    shop = Shop(by_partition, 0)
    for step in [(ARRIVE, DAYS[0], "a"), (START,), (COMMIT,), (ARRIVE, DAYS[0], "b")]:
        shop.step(*step)
    shop.run_to_the_end()
    assert shop.paths - file_uses(shop.state.committed).keys() == {"events/dt=2017-03-01/b.parquet"}
