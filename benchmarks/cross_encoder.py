"""What a cross-encoder would cost: query and text of each candidate go through MiniLM together.

    median_ms(pairs) -> milliseconds for all pairs of one request

The weights are those of the bundled encoder, under a random linear head: no cross-encoder's weights
are at hand offline. The architecture is that of `cross-encoder/ms-marco-MiniLM-L6-v2`, so the time
is its time, and the scores are of no worth.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer

from raysys.model.encoder import load_encoder
from raysys.model.encoder_files import BUNDLED, resolve_encoder

WHAT = "MiniLM-L6 weights, random head, torch fp32 on all cores, padded to the longest pair"


def median_ms(pairs: Sequence[tuple[str, str]], *, num_repeats: int) -> float:
    """Returns the median time that scoring the pairs takes."""
    folder = resolve_encoder(BUNDLED)
    encoder = load_encoder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    head = torch.nn.Linear(encoder.config.hidden_size, 1)
    torch.set_num_threads(os.cpu_count() or 1)
    queries, texts = zip(*pairs, strict=True)

    def score() -> torch.Tensor:
        batch = tokenizer(list(queries), list(texts), padding=True, return_tensors="pt")
        scores: torch.Tensor = head(encoder(**batch).last_hidden_state[:, 0])
        return scores

    times = []
    with torch.inference_mode():
        assert score().shape == (len(pairs), 1)
        for _ in range(num_repeats):
            begun = time.perf_counter()
            score()
            times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e3
