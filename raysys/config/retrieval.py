"""How candidates of `search` and `recommend` are found, and what an ad has to be worth."""

from __future__ import annotations

import dataclasses

from raysys.config.checks import AT_LEAST_1, check, require

_MAX_CANDIDATES = 5000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalConfig:
    """How many items are ranked for an answer, and how they are found."""

    num_candidates: int = 300
    """Items that are found, filtered and then ranked; more where a request's `k` is larger."""
    exact_below: int = 30_000
    """Catalogues of fewer distinct texts are searched exactly, and need no index: so many take
    1.4 ms and no memory on one core. For more, an HNSW graph is built as a version is loaded."""

    def __post_init__(self) -> None:
        check(self, "retrieval", AT_LEAST_1, "exact_below")
        num = self.num_candidates
        expected = f"from 1 to {_MAX_CANDIDATES}"
        require(1 <= num <= _MAX_CANDIDATES, "retrieval.num_candidates", num, expected)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdsConfig:
    """How `ads` chooses."""

    reserve: float = 0.0
    """An ad is shown only if probability times bid is at least this, unless the request names
    another reserve. In the shop's currency, per outcome that the version was trained on."""

    def __post_init__(self) -> None:
        require(0 <= self.reserve <= 1e15, "ads.reserve", self.reserve, "in [0, 1e15]")
