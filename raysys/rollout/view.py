"""What replicas have to know of a rollout.

ledger State -> RolloutView -> serve.service
"""

from __future__ import annotations

import dataclasses

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

    @classmethod
    def of(cls, state: State) -> RolloutView:
        """Reads the view off the ledger's state."""
        return cls(
            sequence=state.sequence,
            rollout_id=state.rollout.rollout_id if state.rollout else None,
            stable=state.stable,
            canary=state.canary,
            previous=state.previous,
            weight_fraction=state.weight_fraction,
            catalogue=state.head_state,
            user_key_id=state.user_key_id,
        )

    def says_the_same(self, other: RolloutView) -> bool:
        """Whether nothing but the ledger's length differs."""
        return dataclasses.replace(self, sequence=other.sequence) == other
