"""`POST /v1/ads`: probability times bid, above a reserve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from raysys.config import BlockRule, BoostRule, CategoryCapRule, RuleConfig
from raysys.storage import Root
from tests.fakes import FakeVersion
from tests.serving import STABLE, error_of, events, make, one_version, order, post, unless_checked

BIDS = {"apple": 1.0, "bread": 4.0, "cheese": 2.0, "dates": 0.0}
"""Probabilities are 0.5, 0.27, 0.12 and 0.05: worth 0.5, 1.08, 0.24 and 0."""


@pytest.fixture
def client(local_root: Root) -> Iterator[TestClient]:
    with make(local_root, one_version()).client() as client:
        yield client


def ads_of(bids: dict[str, float]) -> list[dict[str, Any]]:
    return [{"item_id": item, "bid": bid} for item, bid in bids.items()]


def ads(client: TestClient, bids: dict[str, float] | None = None, **body: Any) -> dict[str, Any]:
    candidates = ads_of(BIDS if bids is None else bids)
    return post(client, "/v1/ads", {"candidates": candidates, **body})


def test_ads_are_ranked_by_probability_times_bid(client: TestClient) -> None:
    answer = ads(client)
    assert set(answer) == {
        "request_id", "version", "ranking", "unknown_candidates", "num_below_reserve",
    }  # fmt: skip
    # By probability alone, apple would be first; by bid alone, cheese second.
    assert order(answer) == ["bread", "apple", "cheese", "dates"]
    for item in answer["ranking"]:
        assert item["expected_value"] == item["probability"] * item["bid"]
        assert item["bid"] == BIDS[item["item_id"]]
    assert answer["ranking"][0]["score"] == -1.0
    assert answer["num_below_reserve"] == 0


def test_ads_below_the_reserve_are_left_out_and_counted(client: TestClient) -> None:
    answer = ads(client, reserve=0.4)
    assert (order(answer), answer["num_below_reserve"]) == (["bread", "apple"], 2)
    exactly = ads(client, {"apple": 1.0}, reserve=0.5)
    assert (order(exactly), exactly["num_below_reserve"]) == (["apple"], 0)
    none = ads(client, reserve=99)
    assert (none["ranking"], none["num_below_reserve"]) == ([], 4)


def test_the_reserve_of_the_config_counts_where_the_request_has_none(local_root: Root) -> None:
    with make(local_root, one_version(), reserve=0.4).client() as client:
        assert order(ads(client)) == ["bread", "apple"]
        assert len(ads(client, reserve=0)["ranking"]) == 4


def test_k_limits_the_answer_but_not_the_count(client: TestClient) -> None:
    answer = ads(client, k=1, reserve=0.3)
    assert (order(answer), answer["num_below_reserve"]) == (["bread"], 2)


def test_equal_values_are_ranked_by_item_id(client: TestClient) -> None:
    free = dict.fromkeys(["dates", "bread", "apple"], 0.0)
    assert order(ads(client, free)) == ["apple", "bread", "dates"]


def test_a_user_and_a_query_count(client: TestClient) -> None:
    assert order(ads(client, history=["cheese"]))[0] == "cheese"
    assert order(ads(client, query="bread", user_id="alice"))[0] == "bread"


def test_blocks_and_caps_hold_for_ads_and_boosts_do_not(local_root: Root) -> None:
    rules = [
        RuleConfig(block=BlockRule(items=("bread",))),
        RuleConfig(boost=BoostRule(items=("dates",), add=50.0)),
        RuleConfig(category_cap=CategoryCapRule(max_items=1, first=2)),
    ]
    with make(local_root, one_version(), rules=rules).client() as client:
        answer = ads(client, {**BIDS, "dates": 9.0}, explain=True)
    # Worth: apple 0.5, dates 0.43, cheese 0.24; apple and dates are fruit both.
    assert order(answer) == ["apple", "cheese", "dates"]
    assert answer["ranking"][2]["rules"] == ["category_cap 1 in first 2"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"candidates": []}, "candidates: has 0 entries; send at least 1"),
        ({"candidates": ["apple"]}, "candidates.0: expected"),
        ({"candidates": [{"item_id": "apple"}]}, "candidates.0.bid: is missing; send it"),
        ({"candidates": [{"item_id": "apple", "bid": -1}]}, "candidates.0.bid: expected greater"),
        ({"candidates": [{"item_id": "apple", "bid": "1"}]}, "candidates.0.bid: expected a valid"),
        ({"candidates": [{"item_id": "apple", "bid": 1e16}]}, "candidates.0.bid: expected less"),
        ({"candidates": [{"item_id": "apple", "bid": None}]}, "candidates.0.bid: expected a valid"),
        ({"candidates": ads_of({"apple": 1}) * 2}, "candidates: 'apple' stand twice; send each"),
        ({"candidates": ads_of({"tv": 1})}, "candidates: 'tv' are not in the catalogue of version"),
        ({"candidates": ads_of({f"i{i}": 1 for i in range(1001)})}, "candidates: has 1001 entries"),
        ({"candidates": ads_of({"apple": 1}), "reserve": -1}, "reserve: expected greater"),
    ],
    ids=[
        "none", "no-bids", "no-bid", "negative", "text", "huge", "null", "twice", "unknown", "many",
        "reserve",
    ],
)  # fmt: skip
def test_bad_ads_get_one_line_that_names_the_value(
    client: TestClient, body: Any, message: str
) -> None:
    assert error_of(client.post("/v1/ads", json=body), 422).startswith(message)


def no_probability(scores: np.ndarray) -> np.ndarray:
    return np.full_like(scores, np.nan)


@pytest.mark.parametrize("path", ["/v1/ads", "/v1/rank"])
def test_probabilities_that_are_none_are_a_failure_of_the_version(
    local_root: Root, path: str
) -> None:
    stable = FakeVersion(STABLE)
    stable.probabilities = unless_checked(no_probability)  # type: ignore[method-assign]
    with make(local_root, one_version(), stable).client() as client:
        candidates = ads_of({"apple": 1}) if path == "/v1/ads" else ["apple"]
        response = client.post(path, json={"candidates": candidates})
        assert "probabilities that are not in [0, 1]" in error_of(response, 500)


def test_what_was_shown_becomes_impressions_of_the_surface(local_root: Root) -> None:
    with make(local_root, one_version()).client() as client:
        answer = ads(client, reserve=0.3, user_id="alice")
    rows = events(local_root).sort("position")
    assert rows["item_id"].to_list() == order(answer) == ["bread", "apple"]
    assert rows["surface"].unique().to_list() == ["ads"]
