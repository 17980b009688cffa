"""What the mechanisms of one update spend, known before any of its data is read.

    Config -> update_spend() -> PrivacySpend -> accounting, and PrivacyPlan that runs them
    Config -> life()         -> those of a number of updates, from the first one on

Apart from `privacy.plan`, so that a dry run needs no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from raysys.config import DEFAULT_NOISE_MULTIPLIER, Config, EvaluateConfig, PrivacyConfig
from raysys.ingest.groups import cohort_group
from raysys.ledger.records import PrivacySpend, UserGroup


def mechanisms(
    config: PrivacyConfig,
    *,
    num_steps: int,
    num_count_releases: int,
    noise_multiplier: float | None = None,
    evaluate: EvaluateConfig | None = None,
    group: UserGroup | None = None,
) -> PrivacySpend:
    """Returns the mechanisms of an update as the accountant sees them.

    Args:
      noise_multiplier: What `privacy.calibrate` makes of a horizon; else the config's own.
      evaluate: How its figures are released; None if they are not.
      group: Whom the steps read; None for everyone.
    """
    noise = noise_multiplier if noise_multiplier is not None else config.noise_multiplier
    noised = evaluate if evaluate is not None and evaluate.private else None
    return PrivacySpend(
        num_steps=num_steps,
        sampling_prob=config.sampling_prob,
        noise_multiplier=DEFAULT_NOISE_MULTIPLIER if noise is None else noise,
        num_count_releases=num_count_releases,
        count_noise_multiplier=config.count_noise_multiplier,
        num_evaluations=int(noised is not None),
        evaluation_noise_multiplier=noised.noise_multiplier if noised else 1.0,
        group=group,
    )


def update_spend(
    config: Config,
    *,
    first: bool,
    num_count_releases: int,
    noise_multiplier: float,
    group: UserGroup | None = None,
) -> PrivacySpend:
    """Returns the mechanisms of an update of this config.

    Args:
      first: Whether there is no version yet, so that it trains for `train.bootstrap_num_steps`.
    """
    train = config.train
    return mechanisms(
        config.privacy,
        num_steps=train.bootstrap_num_steps if first else train.num_steps,
        num_count_releases=num_count_releases,
        noise_multiplier=noise_multiplier,
        evaluate=config.evaluate,
        group=group,
    )


def life(first: PrivacySpend, later: PrivacySpend, num: int, cohorts: int) -> list[PrivacySpend]:
    """Returns the spends of `num` updates from the first one on; cohorts take turns."""
    spends = [first, *[later] * (num - 1)]
    if cohorts == 1:
        return spends
    return [
        dataclasses.replace(spend, group=cohort_group(cohorts, "any", turn))
        for turn, spend in enumerate(spends)
    ]


def with_noise(spends: list[PrivacySpend], noise_multiplier: float) -> Iterator[PrivacySpend]:
    """Yields the spends with other noise in their steps."""
    for spend in spends:
        yield dataclasses.replace(spend, noise_multiplier=noise_multiplier)
