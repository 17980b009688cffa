"""Impressions become the rows that one by one would have been made of them."""

from __future__ import annotations

import dataclasses
import datetime

import polars as pl

from raysys.partitions.schema import EVENT_SCHEMA
from raysys.serve.feedback import to_frame
from raysys.serve.impressions import Impressions, impressions_frame
from raysys.serve.request_id import RequestTag

TAG = RequestTag(
    nonce="00ff00ff00ff00ff",
    answered_at=1_700_000_000.0,
    version="v0001-aaaaaa",
    surface="search",
    pseudonym="ab" * 16,
    has_user=True,
    rollout_id=None,
    arm="stable",
    bucket=0,
)


def shown(*items: str, nonce: str = TAG.nonce, query: str | None = "milk") -> Impressions:
    tag = dataclasses.replace(TAG, nonce=nonce)
    return Impressions(
        tag=tag, request_id=f"r-{nonce}", item_ids=items, ts=1_500_000_000.25, query=query,
        user_key_id="12345678",
    )  # fmt: skip


def test_each_item_of_each_answer_is_a_row_in_its_place() -> None:
    frame = impressions_frame(
        [shown("a", "b"), shown(nonce="none"), shown("b", nonce="f" * 16, query=None)]
    )
    assert frame.schema == pl.Schema(EVENT_SCHEMA)
    assert frame["event_id"].to_list() == [
        "00ff00ff00ff00ff-1", "00ff00ff00ff00ff-2", "ffffffffffffffff-1"
    ]  # fmt: skip
    assert frame.select("item_id", "position", "query").rows() == [
        ("a", 1, "milk"), ("b", 2, "milk"), ("b", 1, None)
    ]  # fmt: skip
    assert frame.row(1, named=True) == {
        "event_id": "00ff00ff00ff00ff-2",
        "event_type": "impression",
        "user_id": "ab" * 16,
        "item_id": "b",
        "ts": datetime.datetime(2017, 7, 14, 2, 40, 0, 250_000, datetime.UTC),
        "request_id": "r-00ff00ff00ff00ff",
        "query": "milk",
        "surface": "search",
        "version": "v0001-aaaaaa",
        "user_key_id": "12345678",
        "position": 2,
        "price": None,
        "quantity": None,
        "propensity": None,
        "sample_fraction": 1.0,
    }


def test_no_answers_are_no_rows() -> None:
    assert impressions_frame([]).schema == pl.Schema(EVENT_SCHEMA)
    assert to_frame([[], shown()]).is_empty()
