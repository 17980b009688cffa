"""Replays a week of real baskets against the ranking endpoints, as the shop's own site would.

    basket of household H at time t -> POST /v1/rank (H, 100 candidates, t)
                                    -> POST /v1/feedback: which of the 10 shown were bought

Candidates are made without a look at the basket: what the household bought before, what sold most
before, and random items of the catalogue.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import polars as pl

NUM_CANDIDATES = 100
NUM_OWN = 50
NUM_POPULAR = 30
NUM_SHOWN = 10
NUM_CLIENTS = 32
"""Feedback is answered once it is durable, which happens about once a second for all together."""


@dataclasses.dataclass(frozen=True, slots=True)
class Visit:
    """One basket to come, and what the site would offer before it."""

    user_id: str
    ts: float
    candidates: list[str]
    bought: frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What one visit got."""

    user_id: str
    version: str | None
    """None where the request failed."""
    converted: bool
    during_canary: bool


def plan_visits(
    past: pl.DataFrame, week: pl.DataFrame, catalogue: Sequence[str], seed: int = 0
) -> list[Visit]:
    """Returns the week's baskets in the order of time, each with its candidates.

    Args:
      past: Events before the week: `user_id`, `item_id`, `ts`.
      week: Events of the week, with `request_id`.
      catalogue: Items that may be offered.
    """
    rng = np.random.default_rng(seed)
    listed = past.filter(pl.col("item_id").is_in(list(catalogue)))
    popular = _most_bought(listed, NUM_POPULAR * 3)
    own = {user: _most_bought(part, NUM_OWN) for (user,), part in listed.group_by("user_id")}
    baskets = week.group_by("user_id", "request_id").agg(pl.col("item_id"), pl.col("ts").min())
    visits = []
    for basket in baskets.sort("ts", "request_id").iter_rows(named=True):
        offered = [*own.get(basket["user_id"], [])]
        offered += list(rng.permutation(popular)[:NUM_POPULAR])
        offered += list(rng.choice(np.array(catalogue), NUM_CANDIDATES, replace=False))
        visits.append(
            Visit(
                user_id=basket["user_id"],
                ts=basket["ts"].timestamp(),
                candidates=[str(item) for item in dict.fromkeys(offered)][:NUM_CANDIDATES],
                bought=frozenset(basket["item_id"]),
            )
        )
    return visits


def replay(
    url: str,
    visits: Sequence[Visit],
    *,
    is_canary_running: Callable[[], bool],
    on_progress: Callable[[int], None],
) -> list[Answer]:
    """Sends all visits and returns their answers, in their order."""
    done, lock = [0], threading.Lock()
    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    with (
        httpx.Client(base_url=url, timeout=30, limits=limits) as client,
        ThreadPoolExecutor(NUM_CLIENTS) as pool,
    ):

        def visit(one: Visit) -> Answer:
            before = is_canary_running()
            answer = _visit(client, one)
            with lock:
                done[0] += 1
                on_progress(done[0])
            # A request on the edge of a transition belongs to neither side.
            during = before and is_canary_running()
            return dataclasses.replace(answer, during_canary=during)

        return list(pool.map(visit, visits))


def rank_body(visit: Visit) -> dict[str, Any]:
    """Returns the JSON body of a visit's ranking request."""
    return {
        "user_id": visit.user_id,
        "candidates": visit.candidates,
        "k": NUM_SHOWN,
        "ts": visit.ts,
    }


def _visit(client: httpx.Client, visit: Visit) -> Answer:
    try:
        ranked = client.post("/v1/rank", json=rank_body(visit))
        ranked.raise_for_status()
        answer = ranked.json()
        shown = [row["item_id"] for row in answer["ranking"]]
        bought = [item for item in shown if item in visit.bought]
        if bought:
            events = [{"event_type": "purchase", "item_id": i, "ts": visit.ts} for i in bought]
            body = {"request_id": answer["request_id"], "events": events}
            client.post("/v1/feedback", json=body).raise_for_status()
    except httpx.HTTPError as error:
        print(f"    failed: {error}", flush=True)
        return Answer(visit.user_id, version=None, converted=False, during_canary=False)
    return Answer(
        visit.user_id, version=answer["version"], converted=bool(bought), during_canary=False
    )


def _most_bought(events: pl.DataFrame, num: int) -> list[str]:
    counts = events.group_by("item_id").agg(pl.len(), pl.col("ts").max())
    return counts.sort(["len", "ts", "item_id"], descending=True)["item_id"].head(num).to_list()
