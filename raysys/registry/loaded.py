"""A version in memory: what a replica, a check and a benchmark rank with.

    store.load_version() -> LoadedVersion -> score(), probabilities(), explain()

Versions share the frozen encoder of their process and differ by a head, some encoder matrices and
an embedding for each text. Golden requests are recorded when it is published, and scored again by
whoever loads it.

Shape suffixes: K = candidates, M = distinct texts, d = width of the encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from raysys.errors import ArtifactError
from raysys.evaluate.calibrate import Calibration, without_fit
from raysys.ingest.example_set import NUM_ATTENDED
from raysys.ingest.features import FloatArray, IndexArray, ItemTable, UserHistory, features
from raysys.model.explain import explain
from raysys.model.scorer import Head, head_inputs, pool_history
from raysys.registry.encoders import Runtime, VersionEncoder, torch_encoder
from raysys.registry.version import Manifest

GOLDEN_TOLERANCE = 1e-3
"""Largest difference of a golden score: matrix kernels differ a little between processors."""
NUM_GOLDEN_CANDIDATES = 50
ODD_QUERY = "Cr\u00e8me FRA\u00ceCHE, 2 x 200 g \N{GRINNING FACE}"
"""A golden query that tells tokenizers apart."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VersionWeights:
    """What a version adds to its encoder and its state."""

    head: Head
    adapted_weights: Mapping[str, FloatArray]
    """Module name -> matrix with all deltas merged, of each module that its line has changed."""
    texts: list[str]
    text: FloatArray
    """(M, d) normalised embeddings of `texts`."""


class LoadedVersion:
    """A version in memory. Threads may share it."""

    def __init__(
        self,
        manifest: Manifest,
        weights: VersionWeights,
        items: ItemTable,
        histories: Mapping[str, UserHistory],
        golden: Sequence[Mapping[str, object]] = (),
        user_key_id: str | None = None,
        encoder: VersionEncoder | None = None,
    ) -> None:
        self.name = manifest.version
        self.manifest = manifest
        self.items = items
        self.golden = golden
        self.user_key_id = user_key_id
        self._weights = weights
        self._histories = histories
        place = {text: i for i, text in enumerate(weights.texts)}
        self._text_of_item: IndexArray = np.array([place[text] for text in items.texts], np.int32)
        self.encoder = encoder or torch_encoder(manifest, weights.adapted_weights)
        self.calibration = manifest.calibration or self._without_fit()
        """How scores become probabilities; without one of its own the best that can be said."""

    def history(self, user: str) -> UserHistory:
        """Returns the history of a pseudonym, an empty one if it is unknown."""
        return self._histories.get(user) or UserHistory.empty()

    def history_of(self, item_ids: Sequence[str], now: float) -> UserHistory:
        """Returns the history that a request brings along: its items, all as of now."""
        items = self.items.indexes_of(item_ids)
        return UserHistory.empty().extend(
            items,
            np.full(len(items), now),
            np.ones(len(items)),
            as_of=now,
            half_life_s=self.items.half_life_s,
        )

    @property
    def text_vectors(self) -> FloatArray:
        """(M, d) normalised embeddings of the catalogue's distinct texts."""
        return self._weights.text

    @property
    def text_of_item(self) -> IndexArray:
        """(N,) row in `text_vectors` of each item's text."""
        return self._text_of_item

    def knows_query(self, query: str) -> bool:
        """Whether `score` needs no encoder for this query."""
        return self.encoder.knows(query)

    def embed_query(self, query: str) -> FloatArray:
        """Returns the normalised embedding of a search, (d,)."""
        return self.encoder.embed(query)

    def embed_queries(self, queries: Sequence[str]) -> None:
        """Has `score` know these queries. Blocking, some ms for each."""
        self.encoder.embed_all(queries)

    @property
    def encoder_key(self) -> str:
        """Same for versions that embed queries alike."""
        return self.encoder.key

    @property
    def encoder_runtime(self) -> Runtime:
        """What runs its encoder."""
        return self.encoder.runtime

    def score(
        self, history: UserHistory, candidates: IndexArray, *, now: float, query: str | None
    ) -> FloatArray:
        """Returns the score of each candidate, (K,); higher is better.

        Args:
          candidates: (K,) indexes into `items`.
          now: UNIX seconds of the request.
          query: Text of a search. One that is not known yet runs the encoder (some ms).
        """
        return self._weights.head.score(self._inputs(history, candidates, now, query))

    def probabilities(self, scores: FloatArray) -> FloatArray:
        """Returns a probability for each score, (K,) in [0, 1], never falling as scores rise.

        What they are probabilities of is `calibration.event`.
        """
        return self.calibration.probabilities(scores)

    def explain(
        self, history: UserHistory, candidates: IndexArray, *, now: float, query: str | None
    ) -> dict[str, FloatArray]:
        """Returns the parts of each candidate's score by name, (K,) each; they add up to it.

        Args: as `score`. Names and meaning: `model.explain`.
        """
        return explain(self._weights.head, self._inputs(history, candidates, now, query))

    def flags(self, scores: FloatArray) -> NDArray[np.bool_]:
        """Returns which candidates the version flags, (K,): those probable enough.

        Raises:
          ValueError: Its scores are no log odds: it was trained on another loss than pointwise.
        """
        if self.manifest.loss != "pointwise":
            raise ValueError(
                f"version {self.name} was trained on the {self.manifest.loss} loss, whose scores "
                "only rank; train.loss: pointwise gives probabilities"
            )
        return 1 / (1 + np.exp(-scores)) >= self.manifest.decision_threshold

    def check_golden(self) -> None:
        """Scores the requests that were recorded at training.

        Raises:
          ArtifactError: There are none, or a score is not finite or not the recorded one.
        """
        if not self.golden:
            raise ArtifactError(f"version {self.name} has no golden requests")
        for request in self.golden:
            expected = np.array(request["scores"], np.float32)
            got = self._golden_scores(request)
            # Written so that a NaN fails.
            if not np.all(np.abs(got - expected) <= GOLDEN_TOLERANCE):
                worst = float(np.max(np.abs(got - expected)))
                raise ArtifactError(
                    f"version {self.name} scores a golden request {worst:.4f} away from what "
                    f"training recorded (tolerance {GOLDEN_TOLERANCE}); it is not served"
                )
            self._check_probabilities(expected, request.get("probabilities"))

    def _check_probabilities(self, scores: FloatArray, recorded: object) -> None:
        if recorded is None:  # of a version whose manifest had schema 2 or less
            return
        expected, got = np.array(recorded, np.float32), self.probabilities(scores)
        # Of the recorded scores, so they are as exact as the calibration; rare events are small.
        if not np.allclose(got, expected, rtol=1e-4, atol=0):
            raise ArtifactError(
                f"version {self.name} gives a golden request probabilities up to {got.max():.3g}, "
                f"training recorded up to {expected.max():.3g}; it is not served"
            )

    def record_golden(self) -> list[dict[str, object]]:
        """Returns golden requests. Made of items alone: no user is in them."""
        ids = self.items.ids
        step = max(len(ids) // NUM_GOLDEN_CANDIDATES, 1)
        some = ids[::step][:NUM_GOLDEN_CANDIDATES]
        queries = [None, self.items.texts[0], ODD_QUERY]
        requests: list[dict[str, object]] = [
            {
                "history": some[i : i + 3],
                "candidates": some,
                "now": self.items.as_of,
                "query": query,
            }
            for i, query in enumerate(queries)
        ]
        for request, query in zip(requests, queries, strict=True):
            scores = self._golden_scores(request)
            request["scores"] = scores.tolist()
            request["probabilities"] = self.probabilities(scores).tolist()
            if query is not None:
                request["embedding"] = self.embed_query(query).tolist()
        return requests

    def _without_fit(self) -> Calibration:
        everything = np.arange(len(self.items), dtype=np.int32)
        nobody = UserHistory.empty()
        reference = self.score(nobody, everything, now=self.items.as_of, query=None)
        return without_fit(self.manifest.loss, reference)

    def _inputs(
        self, history: UserHistory, candidates: IndexArray, now: float, query: str | None
    ) -> FloatArray:
        text = self._weights.text[self._text_of_item[candidates]]
        attended, attention = history.attention(NUM_ATTENDED)
        pooled = pool_history(self._weights.text[self._text_of_item[attended]], attention)
        return head_inputs(
            features(history, self.items, candidates, now=now),
            None if pooled is None else text @ pooled,
            text @ self.embed_query(query) if query else None,
        )

    def _golden_scores(self, request: Mapping[str, object]) -> FloatArray:
        now, history, candidates = request["now"], request["history"], request["candidates"]
        query = request["query"]
        assert isinstance(now, float) and isinstance(history, list) and isinstance(candidates, list)
        assert query is None or isinstance(query, str)
        return self.score(
            self.history_of(history, now), self.items.indexes_of(candidates), now=now, query=query
        )
