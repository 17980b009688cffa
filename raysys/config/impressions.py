"""What a replica keeps of what it shows, and how it compares versions in the shadow."""

from __future__ import annotations

import dataclasses

from raysys.config.checks import AT_LEAST_1, check, require


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImpressionConfig:
    """Which answers become impressions, that is rows of `events/`."""

    sample_fraction: float = 1.0
    """Share of requests whose impressions are kept, each drawn by a hash of its random id: all
    items of an answer, or none. What came of the others is still stored, and trained on only where
    the loss needs no item without an outcome (`train.loss: listwise`)."""

    def __post_init__(self) -> None:
        share = self.sample_fraction
        require(
            0 < share <= 1,
            "impressions.sample_fraction",
            share,
            "a fraction in (0, 1]: an update needs some impressions to learn from",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShadowConfig:
    """How a canary is compared with stable on requests that stable and canary both rank."""

    sample_fraction: float = 0.0
    """Share of requests that both rank once they were answered, while a canary is on trial, also
    at weight 0. The answer stays that of the split. 0: none."""
    k: int = 10
    """Top items of the two rankings whose overlap is measured."""
    max_waiting: int = 32
    """Requests that may wait for their comparison at a replica; further ones are left out."""

    def __post_init__(self) -> None:
        share = self.sample_fraction
        require(0 <= share <= 1, "shadow.sample_fraction", share, "a fraction in [0, 1]")
        check(self, "shadow", AT_LEAST_1, "k", "max_waiting")
