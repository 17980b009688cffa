"""Queries that wait are encoded together, each once, and fail each for itself."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from raysys.serve.queries import QueryBatcher


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Runs a test in an event loop of its own."""

    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


class Encoder:
    """Notes its batches; each waits until it is let go, if it is held."""

    encoder_key = "e"

    def __init__(self, *, is_held: bool = False, broken: Sequence[str] = ()) -> None:
        self.batches: list[list[str]] = []
        self.known: set[str] = set()
        self.broken = set(broken)
        self.go = threading.Event()
        if not is_held:
            self.go.set()

    def knows_query(self, query: str) -> bool:
        return query in self.known

    def embed_queries(self, queries: Sequence[str]) -> None:
        self.batches.append(list(queries))
        assert self.go.wait(10)
        if self.broken & set(queries):
            raise ValueError(f"cannot encode {sorted(self.broken & set(queries))}")
        self.known.update(queries)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def tasks(
    batcher: QueryBatcher, encoder: Encoder, queries: Sequence[str]
) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(batcher.ready(encoder, query)) for query in queries]


@in_a_loop
async def test_queries_that_come_while_a_batch_runs_are_the_next_batch() -> None:
    batcher, encoder = QueryBatcher(max_batch=3), Encoder(is_held=True)
    first = tasks(batcher, encoder, ["a"])
    await until(lambda: encoder.batches)
    rest = tasks(batcher, encoder, ["b", "c", "d", "e"])
    await asyncio.sleep(0.02)
    assert encoder.batches == [["a"]] and not any(task.done() for task in [*first, *rest])
    encoder.go.set()
    await asyncio.gather(*first, *rest)
    assert encoder.batches == [["a"], ["b", "c", "d"], ["e"]]


@in_a_loop
async def test_equal_queries_are_encoded_once_also_while_they_are_encoded() -> None:
    batcher, encoder = QueryBatcher(), Encoder(is_held=True)
    first = tasks(batcher, encoder, ["a", "a"])
    await until(lambda: encoder.batches)
    more = tasks(batcher, encoder, ["a", "b", "b"])
    await asyncio.sleep(0.02)
    encoder.go.set()
    await asyncio.gather(*first, *more)
    assert encoder.batches == [["a"], ["b"]]
    await batcher.ready(encoder, "a")
    assert len(encoder.batches) == 2, "it is known"


@in_a_loop
async def test_versions_of_one_encoder_wait_in_one_line_and_others_do_not_wait_for_them() -> None:
    batcher, stable, same, other = QueryBatcher(), Encoder(is_held=True), Encoder(), Encoder()
    same.known, other.encoder_key = stable.known, "another"
    waiting = [*tasks(batcher, stable, ["a"]), *tasks(batcher, same, ["a"])]
    await until(lambda: stable.batches)
    await batcher.ready(other, "a")
    assert not any(task.done() for task in waiting) and same.batches == []
    stable.go.set()
    await asyncio.gather(*waiting)


@in_a_loop
async def test_a_query_that_fails_costs_the_others_of_its_batch_nothing() -> None:
    batcher, encoder = QueryBatcher(wait_s=0.05), Encoder(broken=["bad"])
    outcomes = await asyncio.gather(
        *(batcher.ready(encoder, query) for query in ("a", "bad", "b")), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), ValueError, type(None)]
    assert encoder.batches == [["a", "bad", "b"], ["a"], ["bad"], ["b"]]
    encoder.broken.clear()
    await batcher.ready(encoder, "bad")
    assert encoder.known == {"a", "b", "bad"}, "it is tried anew for the next request"


@in_a_loop
async def test_a_client_that_goes_away_takes_no_other_along() -> None:
    batcher, encoder = QueryBatcher(), Encoder(is_held=True)
    gone, stays = tasks(batcher, encoder, ["a", "a"])
    await until(lambda: encoder.batches)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    encoder.go.set()
    await stays
    assert encoder.batches == [["a"]]


@in_a_loop
async def test_an_error_that_nobody_waits_for_is_quiet() -> None:
    batcher, encoder = QueryBatcher(), Encoder(is_held=True, broken=["a"])
    (gone,) = tasks(batcher, encoder, ["a"])
    await until(lambda: encoder.batches)
    gone.cancel()
    encoder.go.set()
    await until(lambda: gone.done())
    await batcher.ready(encoder, "b")
    assert encoder.known == {"b"}


@in_a_loop
async def test_the_first_query_waits_for_others_as_long_as_it_may() -> None:
    batcher, encoder = QueryBatcher(max_batch=2, wait_s=60.0), Encoder()
    await asyncio.gather(*tasks(batcher, encoder, ["a", "b"]))
    assert encoder.batches == [["a", "b"]], "a full batch waits no longer"
    batcher, encoder = QueryBatcher(max_batch=8, wait_s=0.02), Encoder()
    await batcher.ready(encoder, "c")
    assert encoder.batches == [["c"]]


@in_a_loop
async def test_the_lines_of_versions_that_went_are_forgotten_once_nobody_waits() -> None:
    batcher, encoder = QueryBatcher(), Encoder(is_held=True)
    waiting = tasks(batcher, encoder, ["a"])
    await until(lambda: encoder.batches)
    batcher.forget([])
    assert list(batcher._lines) == ["e"]
    encoder.go.set()
    await asyncio.gather(*waiting)
    batcher.forget([])
    assert batcher._lines == {}
