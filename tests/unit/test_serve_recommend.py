"""`POST /v1/recommend`: own, similar, popular and trending items, filtered, then ranked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from raysys.config import RetrievalConfig
from raysys.ingest.features import UserHistory
from raysys.partitions.schema import EVENT_SCHEMA
from raysys.serve.candidates import Chosen, Recommended
from raysys.serve.schema import Filters
from raysys.serve.shelf import Shelves
from raysys.storage import Root
from tests.fakes import FakeVersion, item_table
from tests.serving import STABLE, error_of, events, make, one_version, order, post

NUM = 40
IDS = [f"i{i:02}" for i in range(NUM)]


@pytest.fixture
def client(local_root: Root) -> Iterator[TestClient]:
    with make(local_root, one_version()).client() as client:
        yield client


def recommend(client: TestClient, **body: Any) -> dict[str, Any]:
    return post(client, "/v1/recommend", body)


def choose(
    history: list[str],
    num_candidates: int,
    *,
    filters: Filters | None = None,
    exclude_seen: bool = False,
    **changes: Any,
) -> list[str]:
    made = FakeVersion(STABLE, item_table(IDS, **changes))
    shelf = Shelves(RetrievalConfig(num_candidates=num_candidates), ()).of(made)
    past = made.history_of(history, 1000.0) if history else UserHistory.empty()
    selection = Recommended(filters=filters, exclude_seen=exclude_seen)
    chosen: Chosen = selection.choose(made, shelf, past, None, 1)
    assert len(set(chosen.items.tolist())) == len(chosen.items)
    return [IDS[i] for i in chosen.items]


def test_candidates_are_own_items_then_similar_popular_and_trending_ones_in_turn() -> None:
    trend = np.zeros(NUM, np.float32)
    trend[[20, 30]] = (0.2, 0.9)
    assert choose(["i00"], 8, trend=trend) == [
        "i00", "i39", "i30", "i01", "i38", "i20", "i02", "i37",
    ]  # fmt: skip


def test_a_long_history_takes_half_of_the_places() -> None:
    found = choose(IDS[:20], 8)
    assert len(found) == 8
    assert len(set(found[:4]) - set(IDS[:20])) == 0
    assert {"i39", "i38"} <= set(found)


def test_a_cold_user_gets_popular_items() -> None:
    assert choose([], 4) == ["i39", "i38", "i37", "i36"]


def test_seen_items_are_left_out_on_demand_and_their_places_are_filled() -> None:
    seen = ["i39", "i38", "i05"]
    found = choose(seen, 10, exclude_seen=True)
    assert len(found) == 10
    assert not set(found) & set(seen)
    assert set(seen) <= set(choose(seen, 10))


def test_a_rare_filter_is_filled_from_the_whole_catalogue() -> None:
    rare = Filters(min_price=3.0, max_price=5.0)
    assert (
        sorted(choose(["i39"], 1, filters=rare)) == ["i02"]
        or len(choose(["i39"], 1, filters=rare)) == 1
    )
    assert sorted(choose(["i39"], 10, filters=rare)) == ["i02", "i03", "i04"]


def test_an_answer_ranks_what_was_chosen_for_the_history(client: TestClient) -> None:
    answer = recommend(client, history=["dates"], k=3)
    assert set(answer) == {"request_id", "version", "ranking"}
    assert order(answer) == ["dates", "apple", "bread"]
    assert order(recommend(client, history=["dates"], exclude_seen=True))[0] == "apple"
    assert "dates" not in order(recommend(client, history=["dates"], exclude_seen=True))


def test_without_user_and_history_popular_items_are_ranked(local_root: Root) -> None:
    few = RetrievalConfig(num_candidates=2)
    with make(local_root, one_version(), retrieval=few).client() as client:
        assert order(recommend(client, k=2)) == ["cheese", "dates"]
        assert order(recommend(client, user_id="nobody knows", k=2)) == ["cheese", "dates"]


def test_filters_hold(client: TestClient) -> None:
    fruit = {"category": ["fruit"], "exclude_items": ["apple"]}
    assert order(recommend(client, filters=fruit)) == ["dates"]
    bad = client.post("/v1/recommend", json={"filters": {"colour": "red"}})
    assert error_of(bad, 422).startswith("filters.colour: is no attribute of the item table")


def test_a_query_is_no_part_of_a_recommendation(client: TestClient) -> None:
    response = client.post("/v1/recommend", json={"query": "cheese"})
    assert error_of(response, 422).startswith("query: is an unknown key")


def test_what_was_shown_becomes_impressions_of_the_surface(local_root: Root) -> None:
    with make(local_root, one_version()).client() as client:
        answer = recommend(client, user_id="alice", k=2)
    rows = events(local_root).sort("position")
    assert rows.schema == EVENT_SCHEMA
    assert rows["item_id"].to_list() == order(answer)
    assert rows["surface"].unique().to_list() == ["recommend"]
