"""The plan: which partitions an update reads, and from where it starts."""

from __future__ import annotations

import dataclasses
import datetime

import pytest

from raysys.config import PartitionConfig
from raysys.errors import EmptyPlanError, PartitionChangedError
from raysys.ledger.state import State
from raysys.partitions.discover import Discovered, PartitionRange
from raysys.partitions.plan import UpdatePlan, orphan_folders, plan_update, range_to_list
from tests.helpers import (
    abandoned,
    committed,
    consumed,
    folded,
    found,
    item_file,
    partition,
    started,
)

DEFAULT = PartitionConfig()
DAYS = ("2017-03-01", "2017-03-02", "2017-03-03")
LATER = datetime.datetime(2018, 1, 1, tzinfo=datetime.UTC).timestamp()


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
        assert first.num_left == 1
        assert plan(found(*parts), consumed(*parts[:2]), max_partitions=2).partitions == parts[2:]

    def test_item_files_are_read_once_and_again_when_rewritten(self) -> None:
        old, new, changed = item_file("a"), item_file("b"), item_file("a", etag="other")
        days = [partition(day) for day in DAYS[:2]]
        state = consumed(days[0], items=(old,))
        assert plan(found(*days, items=(old, new)), state).item_files == (new,)
        assert plan(found(*days, items=(changed,)), state).item_files == (changed,)


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


class TestHours:
    HOURS = tuple(partition(f"2017-03-01T{hour:02}") for hour in (4, 5, 6))

    def test_an_hour_is_read_once_it_is_over(self) -> None:
        six = datetime.datetime(2017, 3, 1, 6, tzinfo=datetime.UTC).timestamp()
        planned = plan(found(*self.HOURS), now=six)
        assert planned.partitions == self.HOURS[:2] and planned.num_open == 1
        assert planned.watermark == "2017-03-01T05"
        assert plan(found(*self.HOURS), now=six - 1).partitions == self.HOURS[:1]
        assert plan(found(*self.HOURS), now=six, closed_after_s=1).partitions == self.HOURS[:1]

    def test_the_watermark_is_what_ends_last_whatever_kind_it_is(self) -> None:
        day = partition("2017-03-01")
        after_hours, after_day = consumed(*self.HOURS), consumed(day)
        assert plan(found(*self.HOURS, day), after_hours).watermark == "2017-03-01"
        assert plan(found(*self.HOURS, day), after_day).watermark == "2017-03-01"
        later = partition("2017-03-02T00")
        assert plan(found(day, later), after_day).watermark == "2017-03-02T00"

    def test_a_consumed_hour_is_told_from_the_others_of_its_day(self) -> None:
        planned = plan(found(*self.HOURS), consumed(self.HOURS[1]))
        assert planned.partitions == (self.HOURS[0], self.HOURS[2])


class TestRange:
    PARTS = tuple(partition(f"2017-03-{day:02}") for day in range(1, 6))
    MIDDLE = PartitionRange(first=datetime.date(2017, 3, 2), last=datetime.date(2017, 3, 4))

    def test_only_the_range_is_read(self) -> None:
        planned = plan_update(found(*self.PARTS), State(), DEFAULT, LATER, self.MIDDLE)
        assert planned.partitions == self.PARTS[1:4]

    def test_its_limit_goes_before_the_configs(self) -> None:
        config = dataclasses.replace(DEFAULT, max_partitions=3)
        one = dataclasses.replace(self.MIDDLE, max_partitions=1)
        for within, num in ((self.MIDDLE, 3), (one, 1)):
            planned = plan_update(found(*self.PARTS), State(), config, LATER, within)
            assert planned.partitions == self.PARTS[1 : 1 + num] and planned.num_left == 3 - num

    def test_what_lies_outside_is_not_compared(self) -> None:
        state = consumed(self.PARTS[0], self.PARTS[1])
        inside = plan_update(found(*self.PARTS[1:]), state, DEFAULT, LATER, self.MIDDLE)
        assert inside.partitions == self.PARTS[2:4]
        with pytest.raises(PartitionChangedError, match="is gone"):
            plan(found(*self.PARTS[1:]), state)


class TestHorizon:
    """`check_back_days` keeps old partitions out of sight."""

    PARTS = tuple(partition(f"2017-03-{day:02}") for day in range(1, 11))
    STATE = consumed(*PARTS[:9])
    CONFIG = dataclasses.replace(DEFAULT, check_back_days=3)

    def test_days_that_ended_longer_before_the_watermark_are_not_listed(self) -> None:
        assert range_to_list(self.STATE, self.CONFIG) == PartitionRange(
            first=datetime.date(2017, 3, 6)
        )
        assert range_to_list(State(), self.CONFIG) == PartitionRange()
        assert range_to_list(self.STATE, DEFAULT) == PartitionRange()

    def test_of_hours_it_is_the_day_that_counts(self) -> None:
        state = consumed(partition("2017-03-09T05"))
        assert range_to_list(state, self.CONFIG).first == datetime.date(2017, 3, 6)

    def test_nor_compared_nor_missed(self) -> None:
        planned = plan(found(*self.PARTS[5:]), self.STATE, check_back_days=3)
        assert planned.partitions == self.PARTS[9:] and planned.set_aside == ()
        changed = (partition("2017-03-01", etag="other"), partition("2017-02-01"))
        assert plan(found(*changed, *self.PARTS[5:]), self.STATE, check_back_days=3) == planned

    def test_what_it_leaves_in_sight_is_compared(self) -> None:
        """The negative control."""
        for there in (self.PARTS[6:], (partition("2017-03-06", etag="other"), *self.PARTS[6:])):
            with pytest.raises(PartitionChangedError, match="dt=2017-03-06/"):
                plan(found(*there), self.STATE, check_back_days=3)

    def test_a_range_that_starts_before_it_reads_old_partitions_but_compares_none(self) -> None:
        old = partition("2016-12-31")
        within = PartitionRange(first=datetime.date.min)
        assert range_to_list(self.STATE, self.CONFIG, within) == within
        there = found(old, partition("2017-03-02", etag="other"), *self.PARTS[5:])
        planned = plan_update(there, self.STATE, self.CONFIG, LATER, within)
        assert planned.partitions == (old, self.PARTS[9])


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
        with pytest.raises(EmptyPlanError) as caught:
            plan(found())
        assert str(caught.value) == (
            "nothing below file:///shop/events; write parquet files to events/dt=YYYY-MM-DD/ or "
            "events/dt=YYYY-MM-DD/hour=HH/"
        )

    def test_new_items_alone_make_no_update(self) -> None:
        with pytest.raises(EmptyPlanError):
            plan(found(items=(item_file(),)))


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
