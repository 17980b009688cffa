"""A shop with versions that are ready to be served, as many as wanted, made in seconds.

    write_shop(folder) -> config file, catalogue, histories, published versions, ledger

Catalogue, texts, prices and histories are those of a real grocery retailer (Complete Journey): its
best-selling products, and what each household bought in the last weeks. Versions are published and
committed by the project's own code, and a replica checks and loads them as any other. They differ
by some noise in the head and in a matrix of the encoder, as if an update had trained them: what
they rank is of no worth, what it costs is that of real ones.
"""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import numpy as np
import polars as pl
import shop_ledger

from raysys.config import load_config
from raysys.ingest.completejourney import load_products, load_transactions
from raysys.ingest.features import DAY_S
from raysys.ingest.history import HISTORY_SCHEMA, merge_histories
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.shard_state import shard_path
from raysys.ingest.stats import ItemState, release, save_item_state, upsert
from raysys.ledger.log import Log
from raysys.ledger.records import Record, UpdateStarted
from raysys.model.encoder import TextEncoder, TokenActivations
from raysys.model.encoder_files import BUNDLED, BUNDLED_SHA256
from raysys.model.scorer import Head
from raysys.partitions.periods import Period
from raysys.partitions.schema import ITEM_SCHEMA
from raysys.registry.loaded import VersionWeights
from raysys.registry.store import publish, text_indexes
from raysys.registry.version import Manifest
from raysys.storage import Root
from raysys.storage.parquet import to_parquet

HALF_LIFE_S = 28 * DAY_S
HISTORY_DAYS = 90
MAX_ITEMS_A_HISTORY = 500
NOW = datetime.datetime(2017, 12, 31, tzinfo=datetime.UTC).timestamp()
ADAPTED = "encoder.layer.5.output.dense"
MAX_TOKENS = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shop:
    """What a benchmark needs to know of a shop that was written."""

    config: Path
    root: Root
    versions: list[str]
    """Committed, oldest first. The first is stable, and nothing is on trial."""
    item_ids: list[str]
    texts: list[str]
    """Of each item, as the encoder reads it."""
    user_ids: list[str]
    """Raw ids of those that have a history."""


def write_shop(
    folder: Path, *, num_items: int = 20_000, num_versions: int = 2, extra_config: str = ""
) -> Shop:
    """Writes a shop below `folder`, with a config and a key file beside its root."""
    (folder / "key").write_bytes(b"a benchmark's key, no secret at all")
    root = Root((folder / "root").as_uri())
    config = folder / "shop.yaml"
    config.write_text(f"root: {root.uri}\npseudonyms:\n  key_file: key\n{extra_config}")
    keys = Pseudonymizer.from_config(load_config(config).pseudonyms)
    sold = load_transactions().with_columns(pl.col("ts").dt.timestamp("ms") / 1000)
    items = _item_state(sold, num_items)
    histories = _histories(sold, items, keys)
    encoder = TextEncoder(BUNDLED, MAX_TOKENS)
    texts = encoder.activations(text_indexes(items.table())[0])
    versions = [
        _publish(root, number, items, histories, _weights(encoder, texts, number), keys.key_id)
        for number in range(1, num_versions + 1)
    ]
    return Shop(
        config=config,
        root=root,
        versions=versions,
        item_ids=items.catalogue["item_id"].to_list(),
        texts=items.table().texts,
        user_ids=sorted(sold["user_id"].unique()),
    )


def _item_state(sold: pl.DataFrame, num_items: int) -> ItemState:
    """The catalogue of the best-selling products, at their median price, with their counts."""
    best = (
        sold.group_by("item_id")
        .agg(pl.len().alias("sales"), pl.col("unit_price").median().alias("price"))
        .sort("sales", "item_id", descending=[True, False])
        .join(load_products(), on="item_id", maintain_order="left")
        .head(num_items)
    )
    listed = best.with_columns(updated_at=pl.lit(0)).select(
        pl.col(name).cast(dtype) for name, dtype in ITEM_SCHEMA.items()
    )
    before = upsert(ItemState.empty(HALF_LIFE_S), listed)
    counts = before.catalogue.join(best, on="item_id", maintain_order="left")["sales"].to_numpy()
    year = Period(end=NOW, num_days=365.0)
    return release(before, counts[None].astype(np.float64), [year], noise_std=1.0)[-1]


def _histories(sold: pl.DataFrame, items: ItemState, keys: Pseudonymizer) -> pl.DataFrame:
    """What each household bought lately, under its pseudonym."""
    users = sold["user_id"].unique()
    names = pl.DataFrame({"user_id": users, "user": [keys.pseudonym(user) for user in users]})
    events = (
        sold.filter(pl.col("ts") >= NOW - HISTORY_DAYS * DAY_S)
        .join(items.catalogue.select("item_id").with_row_index("item"), on="item_id")
        .join(names, on="user_id")
        .select("user", "item", "ts", weight=pl.lit(1.0))
    )
    return merge_histories(
        pl.DataFrame(schema=HISTORY_SCHEMA), events, histories_as_of=NOW, as_of=NOW,
        half_life_s=HALF_LIFE_S, max_items=MAX_ITEMS_A_HISTORY,
    )  # fmt: skip


def _publish(
    root: Root,
    number: int,
    items: ItemState,
    histories: pl.DataFrame,
    weights: VersionWeights,
    user_key_id: str,
) -> str:
    """Writes state and version of one update, and commits it."""
    begun = dataclasses.replace(shop_ledger.start(number, None), user_key_id=user_key_id)
    update_id, version = begun.update_id, shop_ledger.version_of(begun)
    save_item_state(root, update_id, items)
    root.put(shard_path(update_id, "histories", 0, 1), to_parquet(histories))
    artifacts = publish(root, _manifest(version, begun), weights, adapter={}, report="# None\n")
    commit = shop_ledger.commit(begun, number)
    log = Log(root)
    _append(log, begun)
    _append(log, dataclasses.replace(commit, artifacts=artifacts, user_key_id=user_key_id))
    return version


def _append(log: Log, record: Record) -> None:
    log.transact(lambda state: record)


def _weights(encoder: TextEncoder, texts: TokenActivations, seed: int) -> VersionWeights:
    rng = np.random.default_rng(seed)
    matrix = encoder.model.get_submodule(ADAPTED).weight.numpy()
    adapted = {ADAPTED: matrix + 0.01 * _noise(rng, matrix)}
    start = Head.decayed_frequency(32).weights
    return VersionWeights(
        head=Head(weights={name: value + _noise(rng, value) for name, value in start.items()}),
        adapted_weights=adapted,
        texts=texts.texts,
        text=encoder.with_weights(adapted).finish(texts),
    )


def _noise(rng: np.random.Generator, like: np.ndarray) -> np.ndarray:
    return rng.normal(0, 0.1, like.shape).astype(np.float32)


def _manifest(version: str, begun: UpdateStarted) -> Manifest:
    return Manifest(
        version=version,
        update_id=begun.update_id,
        base_version=None,
        encoder=BUNDLED,
        encoder_sha256=BUNDLED_SHA256,
        adapter="lora",
        adapted_modules=(ADAPTED,),
        max_tokens=MAX_TOKENS,
        lora_rank=4,
        alpha=1.0,
        state=begun.update_id,
    )
