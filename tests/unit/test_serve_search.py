"""`POST /v1/search`: items found by a query, filtered while they are found, then ranked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient

from raysys.config import BlockRule, PinRule, RetrievalConfig, RuleConfig
from raysys.storage import Root
from tests.fakes import FakeVersion, item_table
from tests.serving import STABLE, error_of, events, make, one_version, order, post

MANY = [f"i{i:05}" for i in range(10_000)]


@pytest.fixture
def client(local_root: Root) -> Iterator[TestClient]:
    with make(local_root, one_version()).client() as client:
        yield client


def search(client: TestClient, query: str = "bread", **body: Any) -> dict[str, Any]:
    return post(client, "/v1/search", {"query": query, **body})


def test_an_answer_has_what_was_found_in_the_order_of_the_ranker(client: TestClient) -> None:
    answer = search(client)
    assert set(answer) == {"request_id", "version", "ranking"}
    assert order(answer) == ["apple", "bread", "cheese", "dates"]
    assert answer["ranking"][1] == {
        "item_id": "bread", "rank": 2, "score": -1.0,
        "probability": pytest.approx(0.2689, abs=1e-4),
    }  # fmt: skip


def test_only_the_nearest_are_ranked_but_never_fewer_than_k(local_root: Root) -> None:
    few = RetrievalConfig(num_candidates=2)
    with make(local_root, one_version(), retrieval=few).client() as client:
        # Of the two nearest to dates, the ranker prefers cheese.
        assert order(search(client, "dates", k=2)) == ["cheese", "dates"]
        assert order(search(client, "dates", k=3)) == ["bread", "cheese", "dates"]


def test_the_user_counts_and_a_history_takes_its_place(client: TestClient) -> None:
    assert order(search(client, user_id="alice"))[0] == "apple"
    assert order(search(client, history=["dates"]))[0] == "dates"


def test_k_limits_the_answer_and_is_10_by_default(local_root: Root) -> None:
    stable = FakeVersion(STABLE, MANY[:50])
    with make(local_root, one_version(), stable).client() as client:
        assert len(search(client)["ranking"]) == 10
        assert len(search(client, k=40)["ranking"]) == 40
        assert len(search(client, k=1000)["ranking"]) == 50


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        pytest.param({"category": ["fruit"]}, ["apple", "dates"], id="category"),
        pytest.param({"category": ["fruit", "dairy"]}, ["apple", "cheese", "dates"], id="any-of"),
        pytest.param({"brand": ["umbra"]}, ["bread", "dates"], id="brand"),
        pytest.param({"category": ["fruit"], "brand": ["umbra"]}, ["dates"], id="both"),
        pytest.param({"min_price": 2, "max_price": 3.0}, ["bread", "cheese"], id="price"),
        pytest.param({"min_price": 99}, [], id="none-passes"),
        pytest.param({"exclude_items": ["apple", "new"]}, ["bread", "cheese", "dates"], id="ids"),
        pytest.param({}, ["apple", "bread", "cheese", "dates"], id="no-filter"),
    ],
)
def test_filters_hold(client: TestClient, filters: dict[str, Any], expected: list[str]) -> None:
    assert order(search(client, filters=filters)) == expected


def test_an_item_without_a_price_is_in_no_range(local_root: Root) -> None:
    table = item_table(["apple", "bread"])
    table.price[0] = float("nan")
    with make(local_root, one_version(), FakeVersion(STABLE, table)).client() as client:
        assert order(search(client, filters={"min_price": 0})) == ["bread"]
        assert order(search(client, filters={"max_price": 1e9})) == ["bread"]
        assert order(search(client)) == ["apple", "bread"]


@pytest.mark.parametrize("num_candidates", [1, 300])
def test_a_filter_that_3_of_10000_items_pass_finds_all_3(
    local_root: Root, num_candidates: int
) -> None:
    rare = [3000, 7000, 9999]
    table = item_table(MANY, category_names=("common", "rare"))
    table.category[rare] = 1
    stable = FakeVersion(STABLE, table)
    few = RetrievalConfig(num_candidates=num_candidates)
    with make(local_root, one_version(), stable, retrieval=few).client() as client:
        found = order(search(client, "first", filters={"category": ["rare"]}))
        assert found == [MANY[i] for i in rare]
        # A filter after the search, which this one is not, would find none.
        assert not set(found) & set(order(search(client, "first", k=300)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param({}, "query: is missing; send it", id="no-query"),
        pytest.param({"query": " "}, "query: expected text that is not blank", id="blank"),
        pytest.param({"query": "x" * 1001}, "query: expected", id="long"),
        pytest.param(
            {"query": "a", "filters": {"in_stock": True}},
            "filters.in_stock: is no attribute of the item table; filter by category, brand, "
            "min_price, max_price, exclude_items, or leave it out",
            id="no-such-attribute",
        ),
        pytest.param(
            {"query": "a", "filters": {"category": ["fruit", "toys"]}},
            "filters.category: 'toys' is of no item of a version in memory; leave it out until",
            id="unknown-category",
        ),
        pytest.param(
            {"query": "a", "filters": {"brand": ["nobody"]}}, "filters.brand: 'nobody'", id="brand"
        ),
        pytest.param(
            {"query": "a", "filters": {"category": []}}, "filters.category: has 0 entries", id="[]"
        ),
        pytest.param(
            {"query": "a", "filters": {"category": ["c"] * 101}},
            "filters.category: has 101 entries; send at most 100",
            id="many",
        ),
        pytest.param(
            {"query": "a", "filters": {"min_price": "3"}},
            "filters.min_price: expected a valid number, got '3'",
            id="text-price",
        ),
        pytest.param(
            {"query": "a", "filters": {"min_price": 3, "max_price": 1}},
            "filters: min_price 3.0 is above max_price 1.0; swap them",
            id="empty-range",
        ),
        pytest.param({"query": "a", "k": 1001}, "k: expected less than or equal to", id="k"),
        pytest.param({"query": "a", "candidates": ["a"]}, "candidates: is an unknown key", id="c"),
    ],
)
def test_a_bad_search_gets_one_line_that_names_the_value(
    client: TestClient, body: Any, message: str
) -> None:
    assert error_of(client.post("/v1/search", json=body), 422).startswith(message)


def test_what_was_shown_becomes_impressions_of_the_surface(
    local_root: Root,
) -> None:
    with make(local_root, one_version()).client() as client:
        answer = search(client, "fruit salad", k=3, user_id="alice")
    rows = events(local_root).sort("position")
    assert rows["item_id"].to_list() == order(answer)
    assert rows["surface"].unique().to_list() == ["search"]
    assert rows["query"].unique().to_list() == ["fruit salad"]
    assert rows["request_id"].unique().to_list() == [answer["request_id"]]


def test_a_block_does_not_starve_an_answer(local_root: Root) -> None:
    rules = [RuleConfig(block=BlockRule(items=("dates", "cheese")))]
    few = RetrievalConfig(num_candidates=2)
    with make(local_root, one_version(), rules=rules, retrieval=few).client() as client:
        assert order(search(client, "dates", k=2)) == ["apple", "bread"]


def test_a_pin_shows_an_item_that_was_not_found_unless_a_filter_is_against_it(
    local_root: Root,
) -> None:
    pin = [RuleConfig(pin=PinRule(item="apple", position=1, queries=("dates",)))]
    few = RetrievalConfig(num_candidates=2)
    with make(local_root, one_version(), rules=pin, retrieval=few).client() as client:
        pinned = search(client, "Dates", k=2, explain=True)
        assert order(pinned) == ["apple", "cheese"]
        assert [item["rules"] for item in pinned["ranking"]] == [["pin position=1"], []]
        assert "apple" not in order(search(client, "dates", k=2, filters={"min_price": 3}))
        assert "apple" not in order(search(client, "dates please", k=2))
    shown = events(local_root).filter(pl.col("position") == 1)["item_id"].to_list()
    assert shown.count("apple") == 1  # what was shown is logged, not what the model had first
