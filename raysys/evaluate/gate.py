"""Decides whether what was trained may become a version. Pure.

Comparison + GateConfig -> judge() -> Decision (passed | held, with the reason)
"""

from __future__ import annotations

import dataclasses
import math

from raysys.config import GateConfig
from raysys.evaluate.metrics import Comparison
from raysys.ledger.records import Verdict


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A verdict and its reason in one sentence."""

    verdict: Verdict
    reason: str


def judge(comparison: Comparison, config: GateConfig) -> Decision:
    """Holds back what may be worse than the version before it, or what nobody can tell about.

    Of a private comparison it reads what was noised and nothing else, so the verdict costs nothing.
    """
    num, change = comparison.num_holdout_users, comparison.difference["ndcg10"]
    about = "about " if comparison.private else ""
    if num < config.min_holdout_users:
        return _held(
            f"only {about}{num} held-out users in the window, gate.min_holdout_users is "
            f"{config.min_holdout_users}"
        )
    shown = (
        f"NDCG@10 {change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}] on {about}{num} users"
    )
    if math.isnan(change.low):
        return _held(
            f"the change of NDCG@10 on {about}{num} users cannot be told"
            f"{_too_noisy(comparison, config)}"
        )
    # Written so that a NaN holds back.
    if not change.low >= -config.max_ndcg10_drop:
        return _held(
            f"{shown} may fall by more than gate.max_ndcg10_drop {config.max_ndcg10_drop:g}"
            f"{_too_noisy(comparison, config)}"
        )
    return Decision(verdict="passed", reason=shown)


def _held(reason: str) -> Decision:
    return Decision(verdict="held", reason=reason)


def _too_noisy(comparison: Comparison, config: GateConfig) -> str:
    noise = comparison.noise_half_width
    if noise <= config.max_ndcg10_drop:
        return ""
    return (
        f"; noise alone is +-{noise:.4f}, so even equal versions are held: lower "
        "evaluate.noise_multiplier or evaluate.max_difference, or evaluate more users"
    )
