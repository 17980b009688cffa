"""A shop and an encoder small enough to train in a second: 40 items, 4 categories.

Every user buys items of one category, and none of them twice. The head before training ranks what
was bought before first, which is wrong here: whoever learns from this shop gets better.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from transformers import BertConfig, BertModel, BertTokenizerFast
from transformers.utils import logging as transformers_logging

from raysys.config import IngestConfig, LabelConfig, ModelConfig, TrainConfig
from raysys.ingest.examples import ShardResult, ShardSettings, ShardState, build_shard
from raysys.ingest.features import DAY_S
from raysys.ingest.labels import OUTCOME_SCHEMA
from raysys.ingest.stats import ItemState, Timeline, item_texts, release, upsert
from raysys.ledger.records import PrivacySpend
from raysys.model.scorer import Head
from raysys.partitions.periods import Period
from raysys.partitions.schema import ITEM_SCHEMA
from raysys.privacy.plan import PrivacyPlan
from raysys.train.loop import TrainJob
from tests.shop import impressions

NUM_ITEMS, NUM_CATEGORIES, NUM_DAYS = 40, 4, 4
DAY_0 = 1000 * DAY_S
WINDOW_START = DAY_0 + (NUM_DAYS - 1) * DAY_S
"""The last day, which no training example is made of."""
HALF_LIFE_S = 28 * DAY_S
INGEST = IngestConfig(
    num_history_negatives=10, num_popularity_negatives=4, num_uniform_negatives=12
)


def write_encoder(folder: Path) -> str:
    """Writes a random two-layer BERT of width 16 with its tokenizer; returns its name."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *(f"w{i}" for i in range(60))]
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = BertModel(
            BertConfig(
                vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=32, initializer_range=0.5,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(words)}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return str(folder)


def model_config(encoder: str, **changes: Any) -> ModelConfig:
    return ModelConfig(encoder=encoder, max_tokens=8, hidden_units=8, **changes)


def plan(*, enabled: bool = True, **changes: Any) -> PrivacyPlan:
    """A plan of 5 steps that half of the users take part in; its noise may be 0, for tests."""
    spend = {
        "num_steps": 5,
        "sampling_prob": 0.5,
        "noise_multiplier": 1.0,
        "num_count_releases": 1,
        "count_noise_multiplier": 12.0,
    }
    rest = {"l2_clip_norm": 1.0, "expected_batch_users": 32}
    for name, value in changes.items():
        (spend if name in spend else rest)[name] = value
    return PrivacyPlan(enabled=enabled, spend=PrivacySpend(**spend), **rest)


def catalogue() -> pl.DataFrame:
    """Items of 4 categories; every fifth shares its text with the one before it."""
    rows = [
        {
            "item_id": f"i{i:02}",
            "title": f"w{i - (i % 5 == 4)} w{i % 7}",
            "category": f"w{50 + i // 10}",
            "price": 1.0 + i,
        }
        for i in range(NUM_ITEMS)
    ]
    return pl.DataFrame(rows, schema=ITEM_SCHEMA).with_columns(
        updated_at=pl.lit(0).cast(ITEM_SCHEMA["updated_at"])
    )


def item_states() -> list[ItemState]:
    """The state before the only period of the shop, and the one after it."""
    before = upsert(ItemState.empty(HALF_LIFE_S), catalogue())
    counts = np.random.default_rng(5).normal(20.0, 8.0, (1, NUM_ITEMS))
    end = DAY_0 + NUM_DAYS * DAY_S
    return release(before, counts, [Period(end=end, num_days=NUM_DAYS)], noise_std=1.0)


def outcomes(num_users: int, *, seed: int = 0, query: str | None = None) -> pl.DataFrame:
    """What `build_shard` reads: each user buys two new items of the own category a day."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num_users):
        user = rng.bytes(16).hex()
        category = number % NUM_CATEGORIES
        items = 10 * category + rng.permutation(10)[: 2 * NUM_DAYS]
        for day, pair in enumerate(items.reshape(NUM_DAYS, 2)):
            for item in pair:
                rows.append(
                    {
                        "event_id": f"{user}-{item}",
                        "user": user,
                        "item": int(item),
                        "ts": DAY_0 + day * DAY_S + 3600.0 + number,
                        "request_id": f"{user}-{day}",
                    }
                )
    constant = {
        "weight": pl.lit(1.0),
        "gain": pl.lit(3.0),
        "query": pl.lit(query, pl.String),
    }
    frame = pl.DataFrame(rows).with_columns(**constant)
    return frame.select(pl.col(name).cast(dtype) for name, dtype in OUTCOME_SCHEMA.items())


def shard(events: pl.DataFrame, *, seed: int = 0) -> ShardResult:
    """Examples, cases and histories of these events."""
    timeline = Timeline.of(item_states(), [DAY_0 + NUM_DAYS * DAY_S])
    settings = ShardSettings(
        timeline=timeline, window_start=WINDOW_START, horizon=timeline.after.as_of, ingest=INGEST,
        labels=LabelConfig(), needs_outcome=True, seed=seed,
    )  # fmt: skip
    return build_shard(events, impressions(), ShardState.nothing(), settings)


def random_head(*, hidden_units: int = 8, seed: int = 0) -> Head:
    """A head in which every weight matters, as it is after some updates."""
    rng = np.random.default_rng(seed)
    shapes = Head.decayed_frequency(hidden_units).weights
    return Head(
        weights={k: rng.normal(0, 0.5, v.shape).astype(np.float32) for k, v in shapes.items()}
    )


def train_job(encoder: str, **changes: Any) -> TrainJob:
    """A job from the decayed-frequency head; `train` and `model` are dicts of changes."""
    model, train = changes.pop("model", {}), changes.pop("train", {})
    values: dict[str, Any] = {
        "model": model_config(encoder, **model),
        "train": TrainConfig(**{"num_workers": 1, **train}),
        "plan": plan(),
        "learning_rate": 0.02,
        "head": Head.decayed_frequency(8),
        "adapted_weights": None,
        "text_of_item": text_of_item(),
        "seed": 0,
    }
    return TrainJob(**{**values, **changes})


def distinct_texts() -> list[str]:
    return list(dict.fromkeys(item_texts(catalogue())))


def text_of_item() -> NDArray[np.int32]:
    """Index of each item's text among the distinct ones."""
    place = {text: i for i, text in enumerate(distinct_texts())}
    return np.array([place[text] for text in item_texts(catalogue())], np.int32)
