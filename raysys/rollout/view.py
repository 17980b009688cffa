"""What replicas have to know of a rollout.

ledger State -> RolloutView -> serve.service
"""

from __future__ import annotations

import dataclasses

from raysys.config import RolloutConfig, parse_rollout
from raysys.errors import ConfigError
from raysys.ledger.records import RolloutPhase
from raysys.ledger.state import State


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RolloutView:
    """Which versions are to be resident, and who gets which."""

    sequence: int
    """Ledger record that this view is at least as new as."""
    rollout_id: str | None
    stable: str | None
    canary: str | None
    previous: str | None
    weight_fraction: float
    catalogue: str | None = None
    """The newest update: its catalogue says which items the shop has, also where no version in
    memory knows them yet, or knows them any more."""
    user_key_id: str | None = None
    """The key of the pseudonyms in the head state, None before the first update."""
    phase: RolloutPhase | None = None
    """None if there never was a rollout."""
    analysis_id: str | None = None
    """What requests count for, and only that: the rollout, and which of its weights. Traffic of two
    weights is not pooled, since a day's good hours would then count for one version only."""
    rules: RolloutConfig | None = None
    """As recorded when the rollout started; None if nothing was."""

    @classmethod
    def of(cls, state: State) -> RolloutView:
        """Reads the view off the ledger's state."""
        rollout = state.rollout
        return cls(
            sequence=state.sequence,
            rollout_id=rollout.rollout_id if rollout else None,
            stable=state.stable,
            canary=state.canary,
            previous=state.previous,
            weight_fraction=state.weight_fraction,
            catalogue=state.head_state,
            user_key_id=state.user_key_id,
            phase=rollout.phase if rollout else None,
            analysis_id=analysis_id(rollout.rollout_id, rollout.stage) if rollout else None,
            rules=_rules(state),
        )

    def says_the_same(self, other: RolloutView) -> bool:
        """Whether nothing but the ledger's length differs."""
        return dataclasses.replace(self, sequence=other.sequence) == other


def analysis_id(rollout_id: str, stage: int) -> str:
    """Returns what the requests of one weight of a rollout count for.

    >>> analysis_id("r0001", 0), analysis_id("r0001", 1)
    ('r0001', 'r0001-1')
    """
    return f"{rollout_id}-{stage}" if stage else rollout_id


def _rules(state: State) -> RolloutConfig | None:
    if state.rollout_rules is None:
        return None
    try:
        return parse_rollout(state.rollout_rules)
    except ConfigError:
        return None  # of another release: a replica counts by its own config rather than not at all
