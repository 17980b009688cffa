"""Plan and fold together: whatever arrives, changes or crashes, each content is consumed once.

A `Shop` plays files that arrive, change and go, and updates that start, crash and commit, in any
order that hypothesis thinks of, against the real plan and the real fold.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import ChangeOutcome, PartitionConfig
from raysys.errors import EmptyPlanError, LedgerCorruptError, PartitionChangedError
from raysys.ledger.records import FileRef, PartitionRef, Record
from raysys.ledger.state import State
from raysys.partitions.discover import Discovered
from raysys.partitions.layout import label_order, partition_label
from raysys.partitions.plan import UpdatePlan, plan_update
from tests.helpers import abandoned, committed, entries, file_uses, found, started

Planner = Callable[[Discovered, State, PartitionConfig, float], UpdatePlan]
Step = tuple[str, ...]
LATER = 2e9
KEYS = ("events/dt=2017-03-01", "events/dt=2017-03-01/hour=05", "events/dt=2017-03-02")
LAST = "events/dt=2017-12-31"
NAMES = ("a.parquet", "b.parquet", "impressions-1.parquet")
CONTENTS = ("1", "2", "3")

write = st.tuples(
    st.just("write"), st.sampled_from(KEYS), st.sampled_from(NAMES), st.sampled_from(CONTENTS)
)
delete = st.tuples(st.just("delete"), st.sampled_from(KEYS), st.sampled_from(NAMES))
make_folder = st.tuples(st.just("make_folder"), st.sampled_from(KEYS))
update = st.tuples(st.sampled_from(["start", "crash", "commit", "hold"]))
outcomes = st.sampled_from(get_args(ChangeOutcome))
gone_outcomes = st.sampled_from(["fail", "quarantine"])
never_fail = st.sampled_from(["quarantine", "reprocess"])
any_config = st.builds(
    PartitionConfig,
    late_files=outcomes,
    rewritten_files=outcomes,
    vanished_files=gone_outcomes,
    empty_partitions=outcomes,
    max_partitions=st.integers(0, 2),
)
open_config = st.builds(
    PartitionConfig,
    late_files=never_fail,
    rewritten_files=never_fail,
    vanished_files=st.just("quarantine"),
    empty_partitions=never_fail,
    max_partitions=st.integers(0, 2),
)
ALL_REPROCESS = PartitionConfig(
    late_files="reprocess",
    rewritten_files="reprocess",
    vanished_files="quarantine",
    empty_partitions="reprocess",
)


class Shop:
    """A root's event files, and a ledger."""

    def __init__(self, config: PartitionConfig, planner: Planner = plan_update) -> None:
        self.planner = planner
        self.config = config
        self.folders: dict[str, dict[str, str]] = {}
        self.ever_written: set[str] = set()
        self.state = State()
        self.watermark = ""
        """Of the last plan."""

    def play(self, steps: Sequence[Step]) -> None:
        for name, *values in steps:
            getattr(self, name)(*values)

    def write(self, key: str, name: str, etag: str) -> None:
        self.folders.setdefault(key, {})[name] = etag
        self.ever_written |= set(self.contents())

    def delete(self, key: str, name: str) -> None:
        self.folders.get(key, {}).pop(name, None)

    def make_folder(self, key: str) -> None:
        self.folders.setdefault(key, {})

    def start(self) -> None:
        if self.state.active is None:
            try:
                planned = self.planner(self.listing(), self.state, self.config, LATER)
            except (EmptyPlanError, PartitionChangedError):
                return
            self.watermark = planned.watermark
            self._append(
                started(
                    f"u{self.state.num_started + 1:04d}-{self.state.sequence:06d}",
                    partitions=planned.partitions,
                    set_aside=planned.set_aside,
                )
            )

    def crash(self) -> None:
        if self.state.active is not None:
            self._append(abandoned(self.state.active.update_id))

    def commit(self, *, passes: bool = True) -> None:
        if self.state.active is not None:
            version = self.state.next_version(self.state.active.update_id) if passes else None
            before = self.state.watermark or self.watermark
            assert label_order(before) <= label_order(self.watermark), "it never moves back"
            record = self.state.active.started
            self._append(committed(record, version=version, watermark=self.watermark))

    def hold(self) -> None:
        self.commit(passes=False)

    def run_to_the_end(self) -> None:
        """Ends what is active, and updates until nothing is left to read."""
        self.crash()
        self.start()
        while self.state.active is not None:
            self.commit()
            self.start()

    def listing(self) -> Discovered:
        keys = sorted(self.folders, key=lambda key: label_order(partition_label(key)))
        return found(*(PartitionRef(key=key, files=tuple(self._files(key))) for key in keys))

    def contents(self) -> list[str]:
        """Everything that lies in the root now."""
        return [file.content for key in self.folders for file in self._files(key)]

    def _files(self, key: str) -> list[FileRef]:
        named = sorted(self.folders[key].items())
        return [FileRef(path=f"{key}/{name}", size_bytes=1, etag=etag) for name, etag in named]

    def _append(self, record: Record) -> None:
        self.state = self.state.apply(*entries([record], first=self.state.sequence + 1))


def consumed_once(shop: Shop) -> set[str]:
    """All consumed contents, after it is sure that each is consumed by one update only."""
    uses = Counter(
        file.content
        for commit in shop.state.committed
        for partition in commit.partitions
        for file in partition.files
    )
    assert [content for content, num_uses in uses.items() if num_uses > 1] == []
    assert len(file_uses(shop.state.committed)) == len(uses)
    return set(uses)


@settings(max_examples=200)
@given(steps=st.lists(write | delete | make_folder | update, max_size=40), config=any_config)
def test_no_content_is_consumed_twice_whatever_the_config_says(
    steps: list[Step], config: PartitionConfig
) -> None:
    shop = Shop(config)
    shop.play(steps)
    shop.run_to_the_end()
    assert consumed_once(shop) <= shop.ever_written
    assert shop.state.num_started == len(shop.state.committed) + len(shop.state.abandoned)


@settings(max_examples=200)
@given(steps=st.lists(write | delete | make_folder | update, max_size=40), config=open_config)
def test_everything_there_ends_as_consumed_or_set_aside_and_nothing_is_left_to_ask(
    steps: list[Step], config: PartitionConfig
) -> None:
    shop = Shop(config)
    shop.play([*steps, ("crash",), ("write", LAST, "a.parquet", "1")])
    shop.run_to_the_end()
    consumed = consumed_once(shop)
    assert set(shop.contents()) <= consumed | shop.state.settled_files.keys()
    strict = PartitionConfig(empty_partitions=config.empty_partitions)
    with pytest.raises(EmptyPlanError):
        plan_update(shop.listing(), shop.state, strict, LATER)


@settings(max_examples=200)
@given(steps=st.lists(write | delete | update, max_size=40), max_partitions=st.integers(0, 2))
def test_where_all_is_reprocessed_everything_there_is_consumed(
    steps: list[Step], max_partitions: int
) -> None:
    shop = Shop(dataclasses.replace(ALL_REPROCESS, max_partitions=max_partitions))
    shop.play(steps)
    shop.run_to_the_end()
    assert set(shop.contents()) <= consumed_once(shop)


@settings(max_examples=200)
@given(data=st.data(), arrivals=st.sets(st.tuples(st.just("write"), st.sampled_from(KEYS),
       st.sampled_from(NAMES), st.just("1"))), max_partitions=st.integers(0, 2))  # fmt: skip
def test_any_order_of_arrivals_crashes_and_commits_consumes_the_same(
    data: st.DataObject, arrivals: set[Step], max_partitions: int
) -> None:
    config = dataclasses.replace(ALL_REPROCESS, max_partitions=max_partitions)
    steps = data.draw(st.permutations(sorted(arrivals)))
    for what in data.draw(st.lists(update, max_size=20)):
        steps.insert(data.draw(st.integers(0, len(steps))), what)
    shop, undisturbed = Shop(config), Shop(config)
    shop.play(steps)
    undisturbed.play(sorted(arrivals))
    for one in (shop, undisturbed):
        one.run_to_the_end()
    assert consumed_once(shop) == consumed_once(undisturbed) == shop.ever_written


@settings(max_examples=200)
@given(
    rounds=st.lists(
        st.tuples(st.lists(write | delete | make_folder, max_size=6), st.integers(0, 3)), max_size=6
    ),
    config=any_config,
)
def test_updates_that_crash_and_are_run_again_do_what_undisturbed_ones_do(
    rounds: list[tuple[list[Step], int]], config: PartitionConfig
) -> None:
    """Each round: files change, then an update runs, after so many attempts that crash."""
    disturbed, undisturbed = Shop(config), Shop(config)
    for steps, num_crashes in rounds:
        for shop, crashes in ((disturbed, num_crashes), (undisturbed, 0)):
            shop.play([*steps, *[("start",), ("crash",)] * crashes, ("start",), ("commit",)])
    for shop in (disturbed, undisturbed):
        consumed_once(shop)
    assert done(disturbed) == done(undisturbed)


def done(shop: Shop) -> list[object]:
    """What each committed update did; ids of updates count attempts, so they may differ."""
    return [
        (commit.partitions, [(a.kind, a.file) for a in commit.set_aside], commit.watermark)
        for commit in shop.state.committed
    ]


class TestNegativeControls:
    """The same plays with a planner that is broken are caught."""

    def test_a_planner_that_forgets_what_was_consumed(self) -> None:
        shop = Shop(ALL_REPROCESS, lambda there, _, *rest: plan_update(there, State(), *rest))
        shop.play([("write", KEYS[0], "a.parquet", "1"), ("start",), ("commit",)])
        with pytest.raises(LedgerCorruptError, match="but an earlier update consumed it"):
            shop.start()

    def test_a_planner_that_forgets_which_contents_were_replaced(self) -> None:
        def forgetful(
            there: Discovered, state: State, config: PartitionConfig, now: float
        ) -> UpdatePlan:
            return plan_update(there, dataclasses.replace(state, settled_files={}), config, now)

        shop = Shop(ALL_REPROCESS, forgetful)
        for etag in ("1", "2"):
            shop.play([("write", KEYS[0], "a.parquet", etag), ("start",), ("commit",)])
        shop.write(KEYS[0], "a.parquet", "1")
        with pytest.raises(LedgerCorruptError, match="but an earlier update consumed it"):
            shop.start()

    def test_a_planner_that_loses_files_of_consumed_partitions(self) -> None:
        def by_partition(
            there: Discovered, state: State, config: PartitionConfig, now: float
        ) -> UpdatePlan:
            new = [p for p in there.partitions if p.key not in state.consumed_partitions]
            return plan_update(found(*new), state, config, now)

        shop = Shop(ALL_REPROCESS, by_partition)
        shop.play([("write", KEYS[0], "a.parquet", "1"), ("start",), ("commit",)])
        shop.write(KEYS[0], "b.parquet", "1")
        shop.run_to_the_end()
        assert set(shop.contents()) - consumed_once(shop) == {f"1 1 {KEYS[0]}/b.parquet"}
