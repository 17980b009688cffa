"""What the mechanisms of one update spend, known before any of its data is read.

    PrivacyConfig -> mechanisms() -> PrivacySpend -> accounting, and PrivacyPlan that runs them

Apart from `privacy.plan`, so that a dry run needs no torch.
"""

from __future__ import annotations

from raysys.config import EvaluateConfig, PrivacyConfig
from raysys.ledger.records import PrivacySpend


def mechanisms(
    config: PrivacyConfig,
    *,
    num_steps: int,
    num_count_releases: int,
    evaluate: EvaluateConfig | None = None,
) -> PrivacySpend:
    """Returns the mechanisms of an update as the accountant sees them.

    Args:
      evaluate: How its figures are released; None if they are not.
    """
    noise = evaluate.noise_multiplier if evaluate is not None and evaluate.private else None
    return PrivacySpend(
        num_steps=num_steps,
        sampling_prob=config.sampling_prob,
        noise_multiplier=config.noise_multiplier,
        num_count_releases=num_count_releases,
        count_noise_multiplier=config.count_noise_multiplier,
        num_evaluations=int(noise is not None),
        evaluation_noise_multiplier=1.0 if noise is None else noise,
    )
