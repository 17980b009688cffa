"""Work is cut so that tasks and shards grow in number with the data, and no row is lost."""

from __future__ import annotations

import dataclasses

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from raysys.config import IngestConfig
from raysys.ingest.examples import ShardState
from raysys.ingest.history import HISTORY_SCHEMA
from raysys.ingest.labels import CLOSED_SCHEMA, IMPRESSION_SCHEMA, OUTCOME_SCHEMA, Waiting
from raysys.ingest.pseudonym import HELD_OUT_SCHEMA, user_shard
from raysys.ingest.shard_state import (
    load_histories,
    load_shard_state,
    save_history_settings,
    save_shard_state,
)
from raysys.ingest.shards import (
    group_files,
    num_shards_for,
    overlapping,
    read_shard,
    shard_name,
    write_sharded,
)
from raysys.ingest.stats import ItemState, save_item_state
from raysys.ledger.records import FileRef, PartitionRef
from raysys.storage import Root
from tests.shop import HALF_LIFE_S, outcome

UPDATE = "u0001-aaaaaa"
USERS = [f"{(number * 2654435761) % 2**32:08x}{'f' * 24}" for number in range(200)]


def day(number: int, *sizes: int) -> PartitionRef:
    key = f"events/dt=2017-03-{number:02}"
    files = tuple(
        FileRef(path=f"{key}/{i}.parquet", size_bytes=size, etag="e")
        for i, size in enumerate(sizes)
    )
    return PartitionRef(key=key, files=files)


class TestGroupFiles:
    def test_a_thousand_small_files_are_a_few_tasks(self) -> None:
        tasks = group_files([day(d, *[10] * 40) for d in range(1, 26)], task_bytes=2_000)
        assert len(tasks) == 5
        assert {len(task) for task in tasks} == {200}

    def test_a_large_file_is_a_task_of_its_own(self) -> None:
        tasks = group_files([day(1, 10, 5_000, 10)], task_bytes=1_000)
        assert [[file.size_bytes for _, file in task] for task in tasks] == [[10], [5_000], [10]]

    @given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), max_size=9))
    def test_every_file_is_in_one_task_in_order_and_no_task_is_too_large(
        self, sizes: list[list[int]]
    ) -> None:
        partitions = [day(i + 1, *of_day) for i, of_day in enumerate(sizes)]
        tasks = group_files(partitions, task_bytes=100)
        files = [(p.key, file) for p in partitions for file in p.files]
        assert [pair for task in tasks for pair in task] == files
        assert all(sum(file.size_bytes for _, file in task) <= 100 for task in tasks)


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        pytest.param(0, 4, id="at least as many as configured"),
        pytest.param(400, 4, id="as large as they may be"),
        pytest.param(401, 8, id="twice as many beyond that"),
        pytest.param(4_000, 40, id="ten times the data, ten times the shards"),
    ],
)
def test_shards_grow_in_number_not_in_size(size_bytes: int, expected: int) -> None:
    config = IngestConfig(num_shards=4, shard_bytes=100)
    assert num_shards_for([day(1, size_bytes)], config) == expected


@given(num=st.integers(1, 12), num_before=st.integers(1, 12))
@settings(max_examples=60)
def test_the_files_that_can_hold_a_shards_users_are_found_whatever_their_number(
    num: int, num_before: int
) -> None:
    rows = pl.DataFrame({"user": USERS})
    names = [f"x/{shard_name(shard, num_before)}.parquet" for shard in range(num_before)]
    for shard in range(num):
        held = rows.filter(user_shard(num) == shard)
        needed = {names[i] for i in held.select(user_shard(num_before)).to_series()}
        found = overlapping(shard, num, names)
        assert needed <= set(found)
        if num % num_before == 0:
            assert len(found) == 1
        elif num_before % num == 0:
            assert len(found) == num_before // num


@given(
    chosen=st.lists(st.sampled_from(USERS), max_size=30),
    num_shards=st.integers(1, 7),
)
@settings(max_examples=40, deadline=None)
def test_what_is_written_by_shard_is_read_by_shard(chosen: list[str], num_shards: int) -> None:
    rows = pl.DataFrame(
        {"user": chosen, "n": range(len(chosen))}, schema={"user": pl.String(), "n": pl.Int64()}
    )
    data = write_sharded(rows, num_shards)

    class Holder(Root):
        def open_input(self, path: str) -> object:  # type: ignore[override]
            import pyarrow as pa

            return pa.BufferReader(data)

    shards = [read_shard(Holder("file:///x"), ["p"], shard)[0] for shard in range(num_shards)]
    for shard, part in enumerate(shards):
        expected = rows.filter(user_shard(num_shards) == shard) if len(rows) else rows
        assert part.rows() == expected.rows()


def test_a_shard_reads_its_own_range_of_what_a_task_wrote(local_root: Root) -> None:
    rows = pl.DataFrame({"user": USERS, "ts": [0.0] * len(USERS)})
    for task in range(3):
        local_root.put(f"staging/{task}.arrow", write_sharded(rows, 4))
    frames = read_shard(local_root, [f"staging/{task}.arrow" for task in range(3)], 2)
    assert len(frames) == 3
    assert set(pl.concat(frames)["user"]) == {u for u in USERS if int(u[:8], 16) % 4 == 2}


def shard_state(users: list[str]) -> ShardState:
    return ShardState(
        histories=pl.DataFrame(
            [{"user": u, "item": 1, "count": 1.0, "decayed": 0.5, "first_ts": 1.0, "last_ts": 2.0}
             for u in users],
            schema=HISTORY_SCHEMA,
        ),
        waiting=Waiting(
            impressions=pl.DataFrame(
                [{"user": u, "item": 2, "ts": 5.0, "request_id": "r"} for u in users],
                schema=IMPRESSION_SCHEMA,
            ),
            recent=pl.DataFrame(
                [{**outcome(u, 3, 6.0), "query": "q"} for u in users], schema=OUTCOME_SCHEMA
            ),
            closed=pl.DataFrame(
                [{"user": u, "request_id": "z", "ts": 1.0, "shown": True} for u in users],
                schema=CLOSED_SCHEMA,
            ),
        ),
        held_out=pl.DataFrame({"user": users, "held_out": [False] * len(users)},
                              schema=HELD_OUT_SCHEMA),
        as_of=9.0,
    )  # fmt: skip


def save(root: Root, num_shards: int) -> None:
    rows = pl.DataFrame({"user": USERS})
    items = dataclasses.replace(ItemState.empty(HALF_LIFE_S), as_of=9.0)
    save_item_state(root, UPDATE, items)
    save_history_settings(root, UPDATE, max_items=1)
    for shard in range(num_shards):
        held = rows.filter(user_shard(num_shards) == shard)["user"].to_list()
        save_shard_state(root, UPDATE, shard, num_shards, shard_state(held))


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 4), (4, 2), (3, 2), (1, 3)])
def test_a_shards_state_is_the_same_whatever_the_number_of_shards_was(
    local_root: Root, before: int, after: int
) -> None:
    save(local_root, before)
    everyone = []
    for shard in range(after):
        state = load_shard_state(local_root, UPDATE, shard, after)
        users = {u for u in USERS if int(u[:8], 16) % after == shard}
        assert set(state.histories["user"]) == users
        for name in ("impressions", "recent", "closed"):
            assert set(getattr(state.waiting, name)["user"]) == users
        assert state.as_of == 9.0
        everyone.append(state.histories)
    expected = shard_state(USERS).histories.sort("user")
    assert_frame_equal(pl.concat(everyone).sort("user"), expected)


def test_a_state_without_what_waits_reads_as_one_in_which_nothing_waits(local_root: Root) -> None:
    """As raysys 0.1 wrote it."""
    save(local_root, 1)
    for kind in ("impressions", "recent", "closed"):
        local_root.delete_prefix(f"state/{UPDATE}/{kind}")
    old = f"state/{UPDATE}/histories/0000-of-0001.parquet"
    local_root.put(f"state/{UPDATE}/histories/0000.parquet", local_root.read_bytes(old))
    local_root.delete_prefix(old)
    state = load_shard_state(local_root, UPDATE, 0, 2)
    assert len(state.histories) and state.waiting.recent.is_empty()
    assert len(load_histories(local_root, UPDATE)) == len(USERS)


def test_a_replica_reads_histories_up_to_the_last_event_and_cut_to_their_length(
    local_root: Root,
) -> None:
    save(local_root, 2)
    histories = load_histories(local_root, UPDATE)
    # One item is kept, and the one that waits to settle was bought last.
    found = histories.select("user", "item", "last_ts").rows()
    assert found == [(u, 3, 6.0) for u in sorted(USERS)]
