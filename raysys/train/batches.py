"""Random access to a worker's examples by user, as the arguments of a forward pass.

    examples of a worker's shards -> Batches.take(users) -> {features, text_index, gains, …}

Shape suffixes: U = users of a microbatch, R = requests of a user, K = candidates, A = attended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from raysys.ingest.example_set import ExampleSet
from raysys.ingest.features import FloatArray, IndexArray

_FIELDS = ("candidates", "gains", "weight", "log_q", "features", "attended", "attention")


class Batches:
    """The users of a worker, numbered from 0."""

    def __init__(
        self,
        shards: list[ExampleSet],
        *,
        text_of_item: IndexArray,
        text_before: torch.Tensor,
        query_text: Mapping[str, torch.Tensor],
        requests_per_step: int,
        device: torch.device,
    ) -> None:
        self._shards = shards
        self._text_of_item = text_of_item
        self._text = text_before
        self._query_text = query_text
        self._requests_per_step = requests_per_step
        self._device = device
        self._rows = list(_rows_of_users(shards))

    @property
    def num_users(self) -> int:
        """How many users the worker holds."""
        return len(self._rows)

    def take(self, users: NDArray[np.int64], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Returns one random choice of requests for each user: the arguments of a forward pass."""
        rows = [self._choose(user, rng) for user in users]  # (U,) of (shard, rows)
        num_requests = max(len(chosen) for _, chosen in rows)
        fields = {
            name: np.stack(
                [_padded(getattr(self._shards[s], name)[r], num_requests) for s, r in rows]
            )
            for name in _FIELDS
        }
        # A padded request repeats the first one, with no candidate and hence no loss or gradient.
        for user, (_, chosen) in enumerate(rows):
            fields["candidates"][user, len(chosen) :] = -1
            fields["gains"][user, len(chosen) :] = 0.0
        candidates = fields["candidates"]
        text_index = torch.from_numpy(self._text_of_item[candidates].astype(np.int64))
        batch = {
            "features": torch.from_numpy(fields["features"]),
            "text_index": text_index,
            "history_text": self._history_text(fields["attended"], fields["attention"]),
            "query_text": self._query_texts(rows, num_requests),
            "gains": torch.from_numpy(fields["gains"]),
            "weight": torch.from_numpy(fields["weight"]),
            "log_q": torch.from_numpy(fields["log_q"]),
            "valid": torch.from_numpy(candidates >= 0),
        }
        return {name: value.to(self._device) for name, value in batch.items()}

    def _choose(self, user: np.int64, rng: np.random.Generator) -> tuple[int, NDArray[np.int64]]:
        shard, rows = self._rows[user]
        return shard, rng.permutation(rows)[: self._requests_per_step]

    def _history_text(self, attended: IndexArray, attention: FloatArray) -> torch.Tensor:
        index = torch.from_numpy(self._text_of_item[attended].astype(np.int64))
        pooled = torch.einsum("ura,urad->urd", torch.from_numpy(attention), self._text[index])
        return normalize(pooled, dim=-1)

    def _query_texts(
        self, rows: list[tuple[int, NDArray[np.int64]]], num_requests: int
    ) -> torch.Tensor:
        out = torch.zeros(len(rows), num_requests, self._text.shape[1])
        for user, (shard, chosen) in enumerate(rows):
            for place, row in enumerate(chosen):
                query = self._shards[shard].queries[row]
                if query:
                    out[user, place] = self._query_text[query]
        return out


def _rows_of_users(shards: list[ExampleSet]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    for index, shard in enumerate(shards):
        starts = np.flatnonzero(np.diff(shard.user, prepend=-1))
        for rows in np.split(np.arange(len(shard.user)), starts[1:]) if len(starts) else []:
            yield index, rows


def _padded(rows: NDArray[Any], num: int) -> NDArray[Any]:
    return (
        rows
        if len(rows) == num
        else np.concatenate([rows, np.repeat(rows[:1], num - len(rows), 0)])
    )
