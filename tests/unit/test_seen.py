"""An event is read once over all updates, and finding that out costs as much as the increment."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.ingest.features import DAY_S
from raysys.ingest.seen import days_of, read_seen, seen_bytes, updates_to_ask
from raysys.storage import Root
from tests.helpers import committed, partition, started

PATH = "state/u1/seen/0000-of-0001.parquet"


def rows(*events: tuple[str, str, float]) -> pl.DataFrame:
    schema = {"user": pl.String(), "event_id": pl.String(), "ts": pl.Float64()}
    return pl.DataFrame(list(events), schema=schema, orient="row")


def known(root: Root, *events: tuple[str, str, float], days: list[int]) -> set[tuple[Any, ...]]:
    root.put(PATH, seen_bytes(rows(*events)))
    return set(read_seen(root, [PATH], pl.Series(days)).select("user", "event_id").rows())


def test_the_events_of_the_days_asked_for_are_found(local_root: Root) -> None:
    events = [("a", "e1", 0.0), ("a", "e2", DAY_S - 1), ("b", "e1", DAY_S), ("b", "e9", -1.0)]
    assert known(local_root, *events, days=[0]) == {("a", "e1"), ("a", "e2")}
    assert known(local_root, *events, days=[1, -1]) == {("b", "e1"), ("b", "e9")}
    assert known(local_root, *events, days=[7]) == set()


def test_no_events_are_an_index_too(local_root: Root) -> None:
    assert known(local_root, days=[0]) == set()
    assert read_seen(local_root, [], pl.Series([0])).is_empty()


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("efg"), st.integers(0, 4))))
@settings(max_examples=50, deadline=None)
def test_each_day_has_a_row_group_of_its_own(events: list[tuple[str, str, int]]) -> None:
    frame = rows(*((who, event, DAY_S * day) for who, event, day in events))
    parquet = pq.ParquetFile(io.BytesIO(seen_bytes(frame)))
    days = sorted({day for _, _, day in events})
    assert parquet.num_row_groups == len(days)
    assert parquet.read().num_rows == len(set(events))
    assert days_of(frame).to_list() == [day for _, _, day in events]


class CountingRoot(Root):
    """Counts the bytes that are read."""

    num_bytes = 0

    def open_input(self, path: str) -> BinaryIO:
        data, root = super().open_input(path), self

        class Counting(io.BufferedIOBase):
            def read(self, size: int | None = -1) -> bytes:
                got = data.read(-1 if size is None else size)
                root.num_bytes += len(got)
                return got

            def seek(self, place: int, whence: int = 0) -> int:
                return data.seek(place, whence)

            def tell(self) -> int:
                return data.tell()

            def close(self) -> None:
                data.close()
                super().close()

            def readable(self) -> bool:
                return True

            def seekable(self) -> bool:
                return True

        return Counting()  # type: ignore[return-value]


def test_other_days_are_not_read(local_root: Root) -> None:
    root = CountingRoot(local_root.uri)
    events = [
        (f"{n * 7919 % 9973:032x}", f"{n * 104729:x}", DAY_S * (n % 50)) for n in range(50_000)
    ]
    root.put(PATH, seen_bytes(rows(*events)))
    size = len(root.read_bytes(PATH))
    assert len(read_seen(root, [PATH], pl.Series([3]))) == 1_000
    one_day, root.num_bytes = root.num_bytes, 0
    assert len(read_seen(root, [PATH], pl.Series(range(50)))) == 50_000
    # The negative control: all days do cost the whole file.
    assert root.num_bytes > 0.9 * size
    assert one_day < 0.3 * size


@pytest.mark.parametrize(
    ("day", "asked"),
    [
        pytest.param("2017-03-01", ["u0001-aaaaaa"], id="the same day, late"),
        pytest.param("2017-03-03", ["u0001-aaaaaa", "u0002-bbbbbb"], id="days that touch"),
        pytest.param("2017-03-09", ["u0002-bbbbbb"], id="the newest"),
        pytest.param("2017-05-01", [], id="none is near"),
    ],
)
def test_only_updates_that_read_neighbouring_days_are_asked(day: str, asked: list[str]) -> None:
    first = committed(started("u0001-aaaaaa", partitions=(partition("2017-03-01"),)))
    later = tuple(partition(f"2017-03-{d:02}") for d in (4, 8))
    second = committed(started("u0002-bbbbbb", partitions=later))
    assert list(updates_to_ask([first, second], [partition(day)])) == asked
