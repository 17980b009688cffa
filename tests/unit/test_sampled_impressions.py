"""A click-through rate learned from sampled impressions is that of all requests.

answers, clicks -> rows as replicas write them -> clean -> split -> build_shard -> examples
"""

from __future__ import annotations

import dataclasses
import secrets

import numpy as np
import polars as pl
import pytest

from raysys.config import ImpressionConfig, LabelConfig, SchemaConfig
from raysys.errors import ConfigError
from raysys.ingest.clean import PseudonymCache, clean
from raysys.ingest.examples import ShardResult, ShardSettings, ShardState, build_shard
from raysys.ingest.features import DAY_S
from raysys.ingest.labels import IS_SAMPLED
from raysys.ingest.outcomes import split_events
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.seen import SEEN_SCHEMA
from raysys.partitions.schema import EVENT_SCHEMA, plan_columns
from raysys.serve.feedback import Batch, feedback_rows, to_frame
from raysys.serve.impressions import Impressions
from raysys.serve.request_id import RequestTag
from raysys.serve.schema import FeedbackRequest
from tests.shop import ingest_config, item_table, timeline

NUM_REQUESTS, NUM_ITEMS, NUM_SHOWN = 4000, 8, 4
CTR = 0.1
KEYS = Pseudonymizer(b"0123456789abcdef")
ITEM_IDS = [f"i{n}" for n in range(NUM_ITEMS)]


def tag(rng: np.random.Generator, user: int, sample_fraction: float) -> RequestTag:
    return RequestTag(
        nonce=rng.bytes(8).hex(),
        answered_at=0.0,
        version="v0001-aaaaaa",
        surface="recommend",
        pseudonym=KEYS.pseudonym(f"user-{user}"),
        has_user=True,
        rollout_id=None,
        arm="stable",
        bucket=0,
        num_shown=NUM_SHOWN,
        sample_fraction=sample_fraction,
    )


def traffic(sample_fraction: float, seed: int = 0) -> pl.DataFrame:
    """Rows of requests whose items are each clicked with probability CTR."""
    rng = np.random.default_rng(seed)
    batches: list[Batch] = []
    for number in range(NUM_REQUESTS):
        of_request = tag(rng, number % 1000, sample_fraction)
        ts = 3600.0 + number
        page = [ITEM_IDS[i] for i in rng.permutation(NUM_ITEMS)[:NUM_SHOWN]]
        request_id = f"{of_request.nonce}.x"
        if of_request.is_kept:
            batches.append(
                Impressions(
                    tag=of_request,
                    request_id=request_id,
                    item_ids=page,
                    ts=ts,
                    query=None,
                    user_key_id=KEYS.key_id,
                )
            )
        clicked = [item for item in page if rng.random() < CTR]
        if clicked:
            events = [{"event_type": "click", "item_id": i, "ts": ts + 60} for i in clicked]
            body = {"request_id": request_id, "events": events}
            feedback = FeedbackRequest.model_validate(body)
            batches.append(feedback_rows(of_request, feedback, now=0.0, user_key_id=KEYS.key_id))
    return to_frame(batches)


def built(
    frame: pl.DataFrame, *, needs_outcome: bool, sampling_is_told: bool = True
) -> ShardResult:
    plan = plan_columns(
        dict.fromkeys(EVENT_SCHEMA, True), EVENT_SCHEMA, SchemaConfig(), "events/a.parquet"
    )
    cleaned = clean(frame, plan, PseudonymCache(KEYS), (0.0, DAY_S))
    assert cleaned.refused.is_empty()
    outcomes, impressions, _ = split_events(
        cleaned.usable,
        seen=pl.DataFrame(schema=SEEN_SCHEMA),
        item_ids=ITEM_IDS,
        gains={"click": 1.0},
        ends=[DAY_S],
    )
    if not sampling_is_told:
        outcomes = outcomes.drop(IS_SAMPLED)
    before = item_table(NUM_ITEMS, as_of=0.0)
    settings = ShardSettings(
        timeline=timeline([before, dataclasses.replace(before, as_of=DAY_S)], [DAY_S]),
        window_start=DAY_S,
        horizon=DAY_S,
        ingest=ingest_config(max_positives=NUM_SHOWN),
        labels=LabelConfig(attribution_window_s=3600.0),
        needs_outcome=needs_outcome,
        seed=0,
    )
    return build_shard(outcomes, impressions, ShardState.nothing(), settings)


def estimated_ctr(result: ShardResult) -> float:
    """Share of the candidates of all examples that were clicked."""
    examples = result.examples
    valid = examples.candidates >= 0
    return float((examples.gains[valid] > 0).mean())


def four_errors(result: ShardResult) -> float:
    """Four standard errors of the estimate: a right one is outside once in 16,000 times."""
    num = int((result.examples.candidates >= 0).sum())
    return 4 * (CTR * (1 - CTR) / num) ** 0.5


class TestProbabilities:
    @pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
    def test_a_sampled_loop_learns_the_click_through_rate_of_all_requests(
        self, share: float
    ) -> None:
        result = built(traffic(share), needs_outcome=False)
        assert abs(estimated_ctr(result) - CTR) < four_errors(result)

    def test_taking_sampled_out_clicks_for_unshown_ones_would_not(self) -> None:
        """The negative control."""
        result = built(traffic(0.1), needs_outcome=False, sampling_is_told=False)
        assert estimated_ctr(result) > CTR + four_errors(result)

    def test_every_outcome_is_counted_where_it_went(self) -> None:
        rows = traffic(0.5)
        result = built(rows, needs_outcome=False)
        num_clicks = len(rows.filter(pl.col("event_type") == "click"))
        assert result.outcomes["attributed"] + result.outcomes["sampled_out"] == num_clicks
        assert 0.4 < result.outcomes["sampled_out"] / num_clicks < 0.6
        assert len(result.state.waiting.recent) == 0
        assert result.state.histories["item"].n_unique() == NUM_ITEMS


def test_a_softmax_still_learns_from_every_click() -> None:
    rows = traffic(0.1)
    result = built(rows, needs_outcome=True)
    clicked = set(rows.filter(pl.col("event_type") == "click")["request_id"])
    held_out = result.requests["held_out"]
    assert len(clicked) - held_out <= result.requests["trained"] <= len(clicked)
    assert result.outcomes["sampled_out"] > result.outcomes["attributed"] > 0
    negatives = (result.examples.candidates >= 0).sum(1) - (result.examples.gains > 0).sum(1)
    assert (negatives > 0).all()


class TestWhichRequestsAreKept:
    def test_is_all_rows_of_an_answer_or_none(self) -> None:
        shown = traffic(0.3).filter(pl.col("event_type") == "impression")
        per_request = shown.group_by("request_id").len()["len"]
        assert per_request.unique().to_list() == [NUM_SHOWN]
        assert abs(len(per_request) / NUM_REQUESTS - 0.3) < 4 * (0.3 * 0.7 / NUM_REQUESTS) ** 0.5

    def test_grows_with_the_share(self) -> None:
        for nonce in (secrets.token_hex(8) for _ in range(200)):
            kept = [
                dataclasses.replace(tag(np.random.default_rng(), 0, share), nonce=nonce).is_kept
                for share in (0.1, 0.5, 0.9, 1.0)
            ]
            assert kept == sorted(kept) and kept[-1]

    @pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
    def test_is_bounded_by_config(self, share: float) -> None:
        with pytest.raises(ConfigError, match=r"impressions\.sample_fraction: expected a fraction"):
            ImpressionConfig(sample_fraction=share)
