"""The event writer: grouped, durable before it is acknowledged, bounded."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from collections.abc import Awaitable, Callable

import polars as pl
import pytest

from raysys.errors import StorageUnavailableError
from raysys.serve.feedback import EventWriter, Row, feedback_rows
from raysys.serve.request_id import RequestIds, RequestTag
from raysys.serve.schema import FeedbackRequest
from raysys.storage import Root
from tests.fakes import FakeMetrics

TAG = RequestTag(
    nonce="00ff00ff00ff00ff",
    answered_at=1_700_000_000.0,
    version="v0001-aaaaaa",
    surface="ads",
    pseudonym="ab" * 16,
    has_user=True,
    rollout_id=None,
    arm="stable",
    bucket=0,
)


def rows(*items: str, ts: float = 1_500_000_000.0) -> list[Row]:
    events = [{"event_type": "click", "item_id": item, "ts": ts} for item in items]
    feedback = FeedbackRequest.model_validate({"request_id": "r", "events": events})
    return feedback_rows(TAG, feedback, now=0.0, user_key_id="12345678")


def stored(root: Root) -> list[str]:
    found = []
    for info in root.list("events"):
        found += pl.read_parquet(io.BytesIO(root.read_bytes(info.path)))["item_id"].to_list()
    return sorted(found)


def run(writer: EventWriter, scenario: Callable[[], Awaitable[None]]) -> None:
    async def body() -> None:
        task = asyncio.create_task(writer.run())
        await scenario()
        writer.close()
        await task

    asyncio.run(body())


def test_rows_that_wait_together_share_a_file(root: Root) -> None:
    writer = EventWriter(root, "feedback", interval_s=0.05)

    async def scenario() -> None:
        await writer.write(rows("first"))
        await asyncio.gather(*(writer.write(rows(f"i{n}")) for n in range(20)))
        assert len(stored(root)) == 21

    run(writer, scenario)
    names = [info.path for info in root.list("events")]
    assert len(names) == 2
    assert all(name.startswith("events/dt=2017-07-14/feedback-") for name in names)


def test_each_day_has_its_own_partition(local_root: Root) -> None:
    writer = EventWriter(local_root, "feedback", interval_s=0.01)

    async def scenario() -> None:
        await writer.write([*rows("a"), *rows("b", ts=1_500_000_000 + 86_400)])

    run(writer, scenario)
    assert local_root.list_folders("events") == ["dt=2017-07-14", "dt=2017-07-15"]


def test_closing_writes_what_waits(local_root: Root) -> None:
    writer = EventWriter(local_root, "impressions", interval_s=60.0)

    async def scenario() -> None:
        await writer.write(rows("a"))
        writer.add(rows("b", "c"))

    run(writer, scenario)
    assert stored(local_root) == ["a", "b", "c"]


def test_an_outage_fails_feedback_and_keeps_impressions(
    local_root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = EventWriter(local_root, "feedback", interval_s=0.01)

    def unavailable(path: str, data: bytes) -> None:
        raise StorageUnavailableError("no answer in 5 s")

    async def scenario() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(local_root, "put", unavailable)
            writer.add(rows("seen"))
            with pytest.raises(StorageUnavailableError):
                await writer.write(rows("clicked"))
        assert stored(local_root) == []

    run(writer, scenario)
    assert stored(local_root) == ["seen"]


def test_impressions_beyond_the_bound_are_dropped_oldest_first_and_counted(
    local_root: Root,
) -> None:
    metrics = FakeMetrics()
    writer = EventWriter(
        local_root, "impressions", interval_s=0.01, metrics=metrics, max_waiting_rows=3
    )

    async def scenario() -> None:
        writer.add(rows("a", "b"))
        writer.add(rows("c", "d", "e"))

    run(writer, scenario)
    assert (stored(local_root), metrics.num_dropped) == (["c", "d", "e"], 2)
    assert metrics.num_written == 3


def test_a_caller_that_went_away_does_not_hold_up_the_others(local_root: Root) -> None:
    writer = EventWriter(local_root, "feedback", interval_s=0.01)

    async def scenario() -> None:
        gone = asyncio.create_task(writer.write(rows("gone")))
        await asyncio.sleep(0)
        gone.cancel()
        await writer.write(rows("here"))

    run(writer, scenario)
    assert "here" in stored(local_root)


def test_the_same_event_sent_again_has_the_same_id() -> None:
    first, again, other = rows("a")[0], rows("a")[0], rows("b")[0]
    assert first["event_id"] == again["event_id"] != other["event_id"]


@pytest.mark.parametrize("place", range(12))
def test_changing_any_part_of_a_request_id_breaks_it(place: int) -> None:
    ids = RequestIds(b"0123456789abcdef")
    fields = ids.sign(TAG).split(".")
    assert ids.read(".".join(fields)) == TAG
    fields[place] += "0"
    assert ids.read(".".join(fields)) is None


@pytest.mark.parametrize("request_id", ["", ".", "a.b.c", "é.é", "x" * 500])
def test_what_was_never_a_request_id_reads_as_none(request_id: str) -> None:
    assert RequestIds(b"0123456789abcdef").read(request_id) is None


def test_another_key_does_not_read_it() -> None:
    signed = RequestIds(b"0123456789abcdef").sign(TAG)
    assert RequestIds(b"another key 0123").read(signed) is None


def test_feedback_says_that_not_all_impressions_are_kept() -> None:
    tag = dataclasses.replace(TAG, sample_fraction=0.3, propensity=0.2, num_shown=2)
    event = {"event_type": "click", "item_id": "a", "rank": 2}
    feedback = FeedbackRequest.model_validate({"request_id": "r", "events": [event]})
    (row,) = feedback_rows(tag, feedback, now=0.0, user_key_id="12345678")
    assert (row["sample_fraction"], row["propensity"], row["position"]) == (0.3, 0.2, 2)


@pytest.mark.parametrize("propensity", [None, 0.0, 0.0001, 0.2, 1 / 3, 1.0])
def test_a_request_id_carries_shares_to_six_digits(propensity: float | None) -> None:
    ids = RequestIds(b"0123456789abcdef")
    tag = dataclasses.replace(TAG, propensity=propensity, sample_fraction=1 / 7, num_shown=1000)
    read = ids.read(ids.sign(tag))
    assert read is not None and read.num_shown == 1000
    assert read.propensity == pytest.approx(propensity, abs=1e-6)
    assert read.sample_fraction == pytest.approx(1 / 7, abs=1e-6)
