"""Late, rewritten, vanished and empty partitions: each has an outcome, and is asked about once."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest

from raysys.config import ChangeOutcome, PartitionConfig
from raysys.errors import ConfigError, EmptyPlanError, PartitionChangedError
from raysys.ledger.records import PartitionRef, SetAsideKind
from raysys.ledger.state import State
from raysys.partitions.changes import settle_without_rows
from raysys.partitions.discover import Discovered
from raysys.partitions.plan import UpdatePlan, plan_update
from tests.helpers import committed, consumed, entries, found, partition, started

DAY, NEXT = "2017-03-01", partition("2017-03-02")
KEY = "events/dt=2017-03-01"
LATER = 2e9
STATE = consumed(partition(DAY, "a", "b"))
BARE = PartitionRef(key=KEY, files=())
KINDS: tuple[SetAsideKind, ...] = get_args(SetAsideKind)
OPTIONS: dict[SetAsideKind, str] = {
    "late": "late_files",
    "rewritten": "rewritten_files",
    "vanished": "vanished_files",
    "empty": "empty_partitions",
}
CASES: dict[SetAsideKind, tuple[State, Discovered, str]] = {
    "late": (STATE, found(partition(DAY, "a", "b", "c", "d"), NEXT), f"{KEY}/c (and 1 more)"),
    "rewritten": (
        STATE,
        found(partition(DAY, "a", "b", etag="other"), NEXT),
        f"{KEY}/a (and 1 more)",
    ),
    "vanished": (STATE, found(NEXT), f"{KEY}/a (and 1 more)"),
    "empty": (State(), found(BARE, NEXT), KEY),
}
REASONS: dict[SetAsideKind, str] = {
    "late": f"came after update u0001-aaaaaa consumed {KEY}",
    "rewritten": "was written anew after update u0001-aaaaaa consumed it",
    "vanished": "is gone after update u0001-aaaaaa consumed it",
    "empty": "holds no data",
}


def sized(size_bytes: int, *names: str, etag: str = "e") -> PartitionRef:
    """The day's partition with files of this size."""
    part = partition(DAY, *names, etag=etag)
    files = tuple(dataclasses.replace(file, size_bytes=size_bytes) for file in part.files)
    return dataclasses.replace(part, files=files)


def plan(there: Discovered, state: State = STATE, **options: Any) -> UpdatePlan:
    return plan_update(there, state, PartitionConfig(**options), LATER)


def after(state: State, planned: UpdatePlan) -> State:
    """The state once an update of the plan has committed."""
    start = started(
        f"u{state.num_started + 1:04d}-bbbbbb",
        partitions=planned.partitions,
        set_aside=planned.set_aside,
    )
    for record in (start, committed(start)):
        state = state.apply(*entries([record], first=state.sequence + 1))
    return state


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_is_refused_by_default_with_name_number_and_remedy(self, kind: SetAsideKind) -> None:
        state, there, named = CASES[kind]
        with pytest.raises(PartitionChangedError) as caught:
            plan(there, state)
        message = str(caught.value)
        assert message.startswith(f"{named} {REASONS[kind]}; ")
        assert f"set partitions.{OPTIONS[kind]}: " in message and "\n" not in message

    def test_is_refused_even_if_nothing_else_is_new(self, kind: SetAsideKind) -> None:
        state, there, _ = CASES[kind]
        alone = dataclasses.replace(there, partitions=there.partitions[:-1])
        with pytest.raises(PartitionChangedError):
            plan(alone, state)

    def test_is_set_aside_with_its_reason_where_the_config_says_so(
        self, kind: SetAsideKind
    ) -> None:
        state, there, _ = CASES[kind]
        planned = plan(there, state, **{OPTIONS[kind]: "quarantine"})
        assert planned.partitions == (NEXT,)
        assert {(aside.kind, aside.reason) for aside in planned.set_aside} == {
            (kind, REASONS[kind])
        }
        assert len(planned.set_aside) == (1 if kind == "empty" else 2)

    def test_is_asked_about_once_only(self, kind: SetAsideKind) -> None:
        """Once it is recorded, even a config that says `fail` has nothing to object."""
        state, there, _ = CASES[kind]
        state = after(state, plan(there, state, **{OPTIONS[kind]: "quarantine"}))
        third = partition("2017-03-03")
        planned = plan(dataclasses.replace(there, partitions=(*there.partitions, third)), state)
        assert planned.partitions == (third,) and planned.set_aside == ()

    def test_alone_makes_no_update_but_is_told(self, kind: SetAsideKind) -> None:
        state, there, _ = CASES[kind]
        alone = dataclasses.replace(there, partitions=there.partitions[:-1])
        with pytest.raises(EmptyPlanError, match="to set aside, with the next update that reads"):
            plan(alone, state, **{OPTIONS[kind]: "quarantine"})

    @pytest.mark.parametrize("outcome", get_args(ChangeOutcome))
    def test_has_every_outcome_but_one(self, kind: SetAsideKind, outcome: ChangeOutcome) -> None:
        if (kind, outcome) == ("vanished", "reprocess"):
            with pytest.raises(ConfigError, match="what is gone cannot be read again"):
                PartitionConfig(vanished_files="reprocess")
        else:
            assert getattr(PartitionConfig(**{OPTIONS[kind]: outcome}), OPTIONS[kind]) == outcome


class TestLate:
    def test_files_alone_are_reprocessed(self) -> None:
        planned = plan(CASES["late"][1], late_files="reprocess")
        assert planned.partitions == (partition(DAY, "c", "d"), NEXT)

    @pytest.mark.parametrize("name", ["impressions-1.parquet", "feedback-1.parquet"])
    def test_is_never_what_replicas_wrote(self, name: str) -> None:
        """They write at any time of the day, and each file is complete by itself."""
        whole, served = partition(DAY, "a.parquet", name), partition(DAY, name)
        assert plan(found(whole), consumed(partition(DAY))).partitions == (served,)

    def test_is_a_file_only_once_it_has_content(self) -> None:
        whole = partition(DAY, "a", "b")
        (zero,) = sized(0, "c").files
        with_zero = dataclasses.replace(whole, files=(*whole.files, zero))
        assert plan(found(with_zero, NEXT)).partitions == (NEXT,)

    def test_files_that_were_set_aside_are_late_again_when_written_anew(self) -> None:
        state = after(STATE, plan(CASES["late"][1], late_files="quarantine"))
        whole = partition(DAY, "a", "b")
        (anew,) = partition(DAY, "c", etag="other").files
        there = found(dataclasses.replace(whole, files=(*whole.files, anew)), NEXT)
        with pytest.raises(PartitionChangedError, match="/c came after"):
            plan(there, state)

    def test_a_new_day_before_the_watermark_is_not_late(self) -> None:
        assert plan(found(partition("2017-02-01"), partition(DAY, "a", "b"))).partitions == (
            partition("2017-02-01"),
        )


class TestRewritten:
    @pytest.mark.parametrize(
        "changed", [sized(1, "a", "b", etag="x"), sized(2, "a", "b")], ids=["etag", "size"]
    )
    def test_is_a_file_of_another_etag_or_size(self, changed: PartitionRef) -> None:
        with pytest.raises(PartitionChangedError, match="was written anew"):
            plan(found(changed, NEXT))
        assert plan(found(changed, NEXT), rewritten_files="reprocess").partitions == (changed, NEXT)

    def test_contents_are_each_read_once_even_if_an_old_one_comes_back(self) -> None:
        first, second = (found(partition(DAY, "a", etag=etag), NEXT) for etag in ("1", "2"))
        state = after(consumed(partition(DAY, "a", etag="1")), plan(
            second, consumed(partition(DAY, "a", etag="1")), rewritten_files="reprocess"
        ))  # fmt: skip
        for there in (first, second):
            with pytest.raises(EmptyPlanError):
                plan(there, state, rewritten_files="reprocess")

    def test_contents_that_were_set_aside_are_not_asked_about_when_they_come_back(self) -> None:
        there = CASES["rewritten"][1]
        state = after(STATE, plan(there, rewritten_files="quarantine"))
        for again in (found(partition(DAY, "a", "b"), NEXT), there):
            with pytest.raises(EmptyPlanError):
                plan(again, state)

    def test_a_file_that_could_not_be_read_is_repaired_and_read_like_a_new_one(self) -> None:
        state = consumed(partition(DAY, "a", "b"), quarantined_files={f"{KEY}/a": "not parquet"})
        (repaired,) = partition(DAY, "a", etag="whole").files
        (other,) = partition(DAY, "b").files
        there = found(PartitionRef(key=KEY, files=(repaired, other)), NEXT)
        planned = plan(there, state)
        assert planned.files == (repaired, *NEXT.files)
        # The negative control: of the other file rows were trained.
        with pytest.raises(PartitionChangedError, match="/b was written anew"):
            plan(found(partition(DAY, "a", "b", etag="whole"), NEXT), state)

    def test_a_repaired_file_is_rewritten_if_it_changes_once_more(self) -> None:
        state = consumed(partition(DAY, "a"), quarantined_files={f"{KEY}/a": "not parquet"})
        state = after(state, plan(found(partition(DAY, "a", etag="whole")), state))
        with pytest.raises(PartitionChangedError, match="/a was written anew"):
            plan(found(partition(DAY, "a", etag="more"), NEXT), state)


class TestVanished:
    def test_partition_and_single_file_are_both_missed(self) -> None:
        for there in (found(NEXT), found(partition(DAY, "a"), NEXT)):
            with pytest.raises(PartitionChangedError, match=r"/b|1 more"):
                plan(there)

    def test_a_file_that_could_not_be_read_is_not_missed(self) -> None:
        state = consumed(partition(DAY, "a", "b"), quarantined_files={f"{KEY}/b": "not parquet"})
        assert plan(found(partition(DAY, "a"), NEXT), state).partitions == (NEXT,)

    def test_a_file_that_comes_back_is_as_if_it_had_never_gone(self) -> None:
        state = after(STATE, plan(found(NEXT), vanished_files="quarantine"))
        with pytest.raises(EmptyPlanError):
            plan(found(partition(DAY, "a", "b"), NEXT), state)


class TestEmpty:
    @pytest.mark.parametrize("empty", [BARE, sized(0, "a", "b")], ids=["no files", "0 bytes"])
    def test_is_waited_for_where_the_config_says_so(self, empty: PartitionRef) -> None:
        with pytest.raises(PartitionChangedError, match="holds no data"):
            plan(found(empty, NEXT), State())
        planned = plan(found(empty, NEXT), State(), empty_partitions="reprocess")
        assert planned.partitions == (NEXT,) and planned.set_aside == ()
        filled = partition(DAY, "a")
        state = after(State(), planned)
        assert plan(found(filled, NEXT), state).partitions == (filled,)

    def test_takes_the_partition_for_consumed_where_it_is_set_aside(self) -> None:
        state = after(State(), plan(found(BARE, NEXT), State(), empty_partitions="quarantine"))
        with pytest.raises(PartitionChangedError, match="/a came after update u0001-bbbbbb"):
            plan(found(partition(DAY, "a"), NEXT), state)
        for there in (found(BARE, NEXT), found(sized(0, "a"), NEXT), found(NEXT)):
            with pytest.raises(EmptyPlanError):
                plan(there, state)

    def test_one_file_with_content_makes_a_partition_of_all(self) -> None:
        (zero,) = sized(0, "zero").files
        mixed = PartitionRef(key=KEY, files=(*partition(DAY, "a").files, zero))
        assert plan(found(mixed), State()).partitions == (mixed,)

    def test_moves_the_watermark_but_not_past_what_is_left_for_later(self) -> None:
        last = PartitionRef(key="events/dt=2017-03-03", files=())
        there = found(partition(DAY), NEXT, last)
        planned = plan(there, State(), empty_partitions="quarantine")
        assert planned.watermark == "2017-03-03" and len(planned.set_aside) == 1
        limited = plan(there, State(), empty_partitions="quarantine", max_partitions=1)
        assert limited.watermark == DAY and limited.set_aside == ()

    def test_is_no_matter_while_its_time_is_not_over(self) -> None:
        planned = plan_update(found(partition(DAY), dataclasses.replace(NEXT, files=())), State(),
                              PartitionConfig(), 1488412800.0)  # fmt: skip
        assert planned.num_open == 1


class TestWithoutRows:
    PLANNED = (partition(DAY), NEXT)

    def settle(self, *empty: str, outcome: ChangeOutcome = "fail") -> Any:
        return settle_without_rows(
            self.PLANNED, empty, State(), PartitionConfig(empty_partitions=outcome)
        )

    def test_partitions_with_rows_are_all_committed(self) -> None:
        assert self.settle() == (self.PLANNED, ())

    def test_one_without_is_refused_by_default(self) -> None:
        with pytest.raises(PartitionChangedError, match=f"^{KEY} holds no data; "):
            self.settle(KEY)

    def test_or_consumed_and_noted(self) -> None:
        partitions, (aside,) = self.settle(KEY, outcome="quarantine")
        assert partitions == self.PLANNED and (aside.path, aside.kind) == (KEY, "empty")
        start = started(partitions=self.PLANNED)
        state = State()
        for record in (start, committed(start, set_aside=(aside,))):
            state = state.apply(*entries([record], first=state.sequence + 1))
        assert state.consumed_partitions.keys() == {KEY, NEXT.key}

    def test_or_left_for_the_next_update(self) -> None:
        assert self.settle(KEY, outcome="reprocess") == ((NEXT,), ())
        with pytest.raises(EmptyPlanError, match="holds no rows, and nothing else is new"):
            self.settle(KEY, NEXT.key, outcome="reprocess")
