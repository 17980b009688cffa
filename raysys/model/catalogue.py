"""Encodes catalogue texts that no update has encoded yet, as Ray Data tasks.

    texts - cached texts --map--> cache/activations/…

The cache is named by its content, so what a killed update encoded is there for the next one.
"""

from __future__ import annotations

import functools
from typing import Any

import ray

from raysys.config import ModelConfig
from raysys.model.encoder import TextEncoder, cache_folder, cached_texts, store_cached
from raysys.model.targets import Cut
from raysys.storage import Root

TEXTS_A_TASK = 1024


def encode_new_texts(root: Root, config: ModelConfig, texts: list[str], cut: Cut) -> int:
    """Caches the activations at a cut of the texts that are not cached yet; returns how many."""
    folder = cache_folder(config.encoder, config.max_tokens, cut)
    new = sorted(set(texts) - cached_texts(root, folder))
    if not new:
        return 0
    rows = [{"texts": new[i : i + TEXTS_A_TASK]} for i in range(0, len(new), TEXTS_A_TASK)]
    encode = functools.partial(_encode, root=root, config=config, cut=cut)
    ray.data.from_items(rows, override_num_blocks=len(rows)).map(encode, num_cpus=1).take_all()
    return len(new)


def _encode(row: dict[str, Any], root: Root, config: ModelConfig, cut: Cut) -> dict[str, Any]:
    encoder = _encoder(config.encoder, config.max_tokens)
    folder = cache_folder(config.encoder, config.max_tokens, cut)
    store_cached(root, folder, encoder.activations(list(row["texts"]), cut))
    return {"num_texts": len(row["texts"])}


@functools.cache
def _encoder(name: str, max_tokens: int) -> TextEncoder:
    return TextEncoder(name, max_tokens)
