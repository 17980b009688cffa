"""What turns queries into embeddings in a process: frozen layers once, and one cache for all.

    Manifest, VersionWeights -> Encoders.of() -> VersionEncoder.embed(query) -> (d,)

A version's encoder runs on ONNX Runtime if that gives the embeddings of its golden queries that
training recorded, and otherwise with torch. Embeddings of queries are kept by the matrices of the
encoder and the query: versions of one encoder share them, and one bound holds for all versions.

Shape suffixes: M = queries, d = width of the encoder.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from raysys.ingest.features import FloatArray
from raysys.model.encoder_files import resolve_encoder
from raysys.model.onnx_encoder import FrozenEncoder
from raysys.model.onnx_layers import UnsupportedEncoderError
from raysys.registry.version import Manifest

if TYPE_CHECKING:
    from raysys.model.encoder import TextEncoder

Runtime = Literal["onnx", "torch"]
MAX_CACHED_QUERIES = 10_000
TOLERANCE = 1e-4
"""Largest difference of a normalised embedding's component: training rounds activations to half
precision, which moves them by 3e-5."""
_NUM_COMPARED_TEXTS = 32

_logger = logging.getLogger(__name__)


class QueryCache:
    """The embeddings of queries that were used last. Threads may share it."""

    def __init__(self, max_queries: int = MAX_CACHED_QUERIES) -> None:
        self._max_queries = max_queries
        self._rows: OrderedDict[tuple[str, str], FloatArray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, encoder_key: str, query: str) -> FloatArray | None:
        """Returns an embedding (d,), None if it is not kept."""
        with self._lock:
            row = self._rows.get((encoder_key, query))
            if row is not None:
                self._rows.move_to_end((encoder_key, query))
            return row

    def put(self, encoder_key: str, query: str, row: FloatArray) -> None:
        """Keeps an embedding, and forgets the one that was not used for longest."""
        with self._lock:
            self._rows[encoder_key, query] = row
            self._rows.move_to_end((encoder_key, query))
            while len(self._rows) > self._max_queries:
                self._rows.popitem(last=False)


class VersionEncoder:
    """The encoder of a version. Threads may share it."""

    def __init__(
        self,
        key: str,
        runtime: Runtime,
        run: Callable[[Sequence[str]], FloatArray],
        cache: QueryCache,
    ) -> None:
        self.key = key
        """Same for versions whose encoders have the same matrices."""
        self.runtime = runtime
        self._run = run
        self._cache = cache

    def knows(self, query: str) -> bool:
        """Whether its embedding is kept."""
        return self._cache.get(self.key, query) is not None

    def embed(self, query: str) -> FloatArray:
        """Returns a query's embedding (d,), from the cache if it is there."""
        row = self._cache.get(self.key, query)
        return self.embed_all([query])[0] if row is None else row

    def embed_all(self, queries: Sequence[str]) -> FloatArray:
        """Encodes queries at once and keeps their embeddings, (M, d)."""
        rows = self._run(queries)
        for query, row in zip(queries, rows, strict=True):
            self._cache.put(self.key, query, row.copy())  # not the whole batch
        return rows


class Encoders:
    """The encoders of a process. Threads may share it."""

    def __init__(
        self, *, num_threads: int = 1, max_cached_queries: int = MAX_CACHED_QUERIES
    ) -> None:
        self.cache = QueryCache(max_cached_queries)
        self._num_threads = num_threads
        self._frozen: dict[tuple[str, int], FrozenEncoder] = {}
        self._lock = threading.Lock()

    def of(
        self,
        manifest: Manifest,
        weights: Mapping[str, FloatArray],
        texts: Sequence[str],
        text: FloatArray,
    ) -> VersionEncoder:
        """Returns the encoder of a version.

        Args:
          weights: Module name -> matrix, of each module that its line has changed.
          texts: Some queries or texts.
          text: (len(texts), d) their embeddings as training recorded them.
        """
        key = _key(manifest, weights)
        try:
            frozen = self._of_folder(manifest)
            frozen.prepare(weights)
            _compare(functools.partial(frozen.embed, weights=weights), texts, text)
        except UnsupportedEncoderError as error:
            _logger.warning(
                "version %s encodes queries with torch, which is slow: %s", manifest.version, error
            )
            return VersionEncoder(key, "torch", _with_torch(manifest, weights), self.cache)
        run = functools.partial(frozen.embed, weights=weights)
        return VersionEncoder(key, "onnx", run, self.cache)

    def num_sessions(self) -> int:
        """Sessions of ONNX Runtime in this process."""
        return sum(frozen.num_sessions for frozen in self._frozen.values())

    def _of_folder(self, manifest: Manifest) -> FrozenEncoder:
        with self._lock:
            name = (manifest.encoder, manifest.max_tokens)
            if name not in self._frozen:
                self._frozen[name] = FrozenEncoder(
                    resolve_encoder(manifest.encoder),
                    manifest.max_tokens,
                    num_threads=self._num_threads,
                )
            return self._frozen[name]


def torch_encoder(
    manifest: Manifest, weights: Mapping[str, FloatArray], cache: QueryCache | None = None
) -> VersionEncoder:
    """Returns the encoder as it was trained: what goldens are recorded with."""
    run = _with_torch(manifest, weights)
    return VersionEncoder(_key(manifest, weights), "torch", run, cache or QueryCache())


def _with_torch(
    manifest: Manifest, weights: Mapping[str, FloatArray]
) -> Callable[[Sequence[str]], FloatArray]:
    return _torch_encoder(manifest.encoder, manifest.max_tokens).with_weights(weights).embed


@functools.cache
def _torch_encoder(name: str, max_tokens: int) -> TextEncoder:
    from raysys.model.encoder import TextEncoder  # imports torch, for seconds

    return TextEncoder(name, max_tokens)


def _compare(
    embed: Callable[[Sequence[str]], FloatArray], texts: Sequence[str], text: FloatArray
) -> None:
    step = max(len(texts) // _NUM_COMPARED_TEXTS, 1)
    some = slice(0, step * _NUM_COMPARED_TEXTS, step)
    worst = float(np.abs(embed(texts[some]) - text[some]).max(initial=0.0))
    # Written so that a NaN fails.
    if not worst <= TOLERANCE:
        raise UnsupportedEncoderError(
            f"ONNX Runtime embeds texts {worst:.1e} away from what training recorded "
            f"(tolerance {TOLERANCE:.0e})"
        )


def _key(manifest: Manifest, weights: Mapping[str, FloatArray]) -> str:
    digest = hashlib.sha256(f"{manifest.encoder_sha256} {manifest.max_tokens}".encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].tobytes())
    return digest.hexdigest()
