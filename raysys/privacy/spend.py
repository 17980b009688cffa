"""What the mechanisms of one update spend, known before any of its data is read.

    PrivacyConfig -> mechanisms() -> PrivacySpend -> accounting, and PrivacyPlan that runs them

Apart from `privacy.plan`, so that a dry run needs no torch.
"""

from __future__ import annotations

from raysys.config import PrivacyConfig
from raysys.ledger.records import PrivacySpend


def mechanisms(config: PrivacyConfig, *, num_steps: int, num_count_releases: int) -> PrivacySpend:
    """Returns the mechanisms of an update as the accountant sees them."""
    return PrivacySpend(
        num_steps=num_steps,
        sampling_prob=config.sampling_prob,
        noise_multiplier=config.noise_multiplier,
        num_count_releases=num_count_releases,
        count_noise_multiplier=config.count_noise_multiplier,
    )
