"""Decides whether what was trained may become a version. Pure.

Comparison + GateConfig -> judge() -> Decision (passed | held, with the reason)
"""

from __future__ import annotations

import dataclasses

from raysys.config import GateConfig
from raysys.evaluate.metrics import Comparison
from raysys.ledger.records import Verdict


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A verdict and its reason in one sentence."""

    verdict: Verdict
    reason: str


def judge(comparison: Comparison, config: GateConfig) -> Decision:
    """Holds back what may be worse than the version before it, or what nobody can tell about."""
    num, change = comparison.num_holdout_users, comparison.difference["ndcg10"]
    if num < config.min_holdout_users:
        return Decision(
            verdict="held",
            reason=f"only {num} held-out users in the window, gate.min_holdout_users is "
            f"{config.min_holdout_users}",
        )
    shown = f"NDCG@10 {change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}] on {num} users"
    # Written so that a NaN holds back.
    if not change.low >= -config.max_ndcg10_drop:
        return Decision(
            verdict="held",
            reason=f"{shown} may fall by more than gate.max_ndcg10_drop {config.max_ndcg10_drop:g}",
        )
    return Decision(verdict="passed", reason=shown)
