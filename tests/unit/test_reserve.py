"""What an update takes: a plan on the newest state and listing, and privacy for each part of it."""

from __future__ import annotations

import dataclasses

import pytest

from raysys.config import Config, PartitionConfig, PrivacyConfig, PseudonymConfig, TrainConfig
from raysys.errors import ConfigError, DataError, EmptyPlanError, PartitionChangedError
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ledger.records import PartitionRef, Record
from raysys.ledger.state import State
from raysys.partitions.discover import PartitionRange, discover
from raysys.reserve import Planner, check_catalogue, planned_spend, planned_spends, reserve
from raysys.storage import Root
from tests.helpers import committed, entries, partition, started

KEYS, OTHER = Pseudonymizer(b"0123456789abcdef"), Pseudonymizer(b"another 16 bytes")
DAYS = tuple(f"events/dt=2017-03-{day:02}" for day in range(1, 6))


def config_of(root: Root, **sections: object) -> Config:
    return Config(root=root.uri, pseudonyms=PseudonymConfig(key_file="key"), **sections)  # type: ignore[arg-type]


def put(root: Root, *keys: str) -> None:
    for key in keys:
        root.put(f"{key}/a.parquet", b"x")


def after(state: State, *records: Record) -> State:
    for record in records:
        state = state.apply(*entries([record], first=state.sequence + 1))
    return state


def after_update(state: State, *partitions: PartitionRef) -> State:
    start = started(f"u{state.num_started + 1:04d}-aaaaaa", partitions=partitions)
    return after(state, start, committed(start))


class TestPlanner:
    @pytest.fixture(autouse=True)
    def _count_listings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_listings = 0

        def counted(root: Root, within: PartitionRange) -> object:
            self.num_listings += 1
            return discover(root, within)

        monkeypatch.setattr("raysys.reserve.discover", counted)

    def test_lists_once_while_no_update_commits(self, local_root: Root) -> None:
        put(local_root, *DAYS[:2])
        planner = Planner(local_root, config_of(local_root))
        first = planner.plan(State())
        put(local_root, DAYS[2])
        active = after(State(), started("u0001-bbbbbb", partitions=(partition("2017-04-01"),)))
        assert planner.plan(active).partitions == first.partitions
        assert planner.latest == planner.plan(active) and self.num_listings == 1

    def test_misses_nothing_that_another_update_consumed_after_the_first_listing(
        self, local_root: Root
    ) -> None:
        """A file that came and was consumed since then is not gone."""
        put(local_root, *DAYS[:2])
        planner = Planner(local_root, config_of(local_root))
        planner.plan(State())
        put(local_root, DAYS[2])
        state = after_update(State(), *discover(local_root).partitions)
        put(local_root, DAYS[3])
        assert [p.key for p in planner.plan(state).partitions] == [DAYS[3]]
        assert self.num_listings == 2

    def test_lists_no_more_than_the_config_looks_back(
        self, local_root: Root, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(local_root, *DAYS)
        state = after_update(State(), *discover(local_root).partitions[:4])
        local_root.delete_prefix(DAYS[0])
        with pytest.raises(PartitionChangedError):
            Planner(local_root, config_of(local_root)).plan(state)
        config = config_of(local_root, partitions=PartitionConfig(check_back_days=1))
        assert [p.key for p in Planner(local_root, config).plan(state).partitions] == [DAYS[4]]

    def test_keeps_to_its_range(self, local_root: Root) -> None:
        put(local_root, *DAYS)
        within = PartitionRange(max_partitions=2)
        planned = Planner(local_root, config_of(local_root), within).plan(State())
        assert [p.key for p in planned.partitions] == list(DAYS[:2]) and planned.num_left == 3

    def test_of_a_refusal_keeps_nothing(self, local_root: Root) -> None:
        planner = Planner(local_root, config_of(local_root))
        for _ in range(2):
            with pytest.raises(EmptyPlanError):
                planner.plan(State())


class TestSpends:
    CONFIG = TrainConfig(num_steps=3, bootstrap_num_steps=7)

    def test_the_first_update_takes_the_steps_of_a_bootstrap(self, local_root: Root) -> None:
        put(local_root, *DAYS)
        config = config_of(local_root, train=self.CONFIG)
        plan = Planner(local_root, config).plan(State())
        assert planned_spend(config, plan).num_steps == 7
        later = dataclasses.replace(plan, base_version="v0001-aaaaaa")
        assert planned_spend(config, later).num_steps == 3

    def test_a_plan_in_parts_costs_a_bootstrap_once_and_counts_by_part(
        self, local_root: Root
    ) -> None:
        put(local_root, *DAYS, "events/dt=2017-04-01")
        config = config_of(local_root, train=self.CONFIG)
        plan = Planner(local_root, config).plan(State())
        parts = planned_spends(config, plan, 2, lambda ahead: None)
        assert [(s.num_steps, s.num_count_releases) for s in parts] == [(7, 1), (3, 1), (3, 2)]


class TestReserve:
    def test_records_what_the_plan_says(self, local_root: Root) -> None:
        put(local_root, *DAYS[:2])
        config = config_of(local_root, privacy=PrivacyConfig(enabled=False))
        plan = Planner(local_root, config).plan(State())
        record = reserve(State(), plan, config, keys=KEYS, owner="me")
        assert (record.partitions, record.set_aside) == (plan.partitions, plan.set_aside)
        assert record.reserved is None and not record.private
        assert State().problem(record) is None

    def test_refuses_another_key(self, local_root: Root) -> None:
        put(local_root, *DAYS)
        config = config_of(local_root, privacy=PrivacyConfig(enabled=False))
        state = after_update(State(), *discover(local_root).partitions[:1])
        plan = Planner(local_root, config).plan(state)
        with pytest.raises(ConfigError, match=r"keys given are .*, but the histories"):
            reserve(state, plan, config, keys=OTHER, owner="me")

    def test_a_first_update_needs_a_catalogue_a_later_one_does_not(self, local_root: Root) -> None:
        put(local_root, DAYS[0])
        plan = Planner(local_root, config_of(local_root)).plan(State())
        with pytest.raises(DataError, match=r"empty \(no item files\)"):
            check_catalogue(plan)
        with pytest.raises(DataError, match=r"empty \(no rows\)"):
            check_catalogue(plan, "no rows")
        check_catalogue(dataclasses.replace(plan, base_state="u0001-aaaaaa"), "no rows")
