"""What an update takes, decided before it starts. `raysys plan` and backfill ask the same code.

    Root, Config -> Planner.plan(State) -> UpdatePlan -> reserve() -> UpdateStarted
                                                      -> planned_spend() -> privacy.budget

Neither Ray nor torch is imported, so that a dry run starts at once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

from raysys.config import Config
from raysys.errors import DataError
from raysys.ingest.pseudonym import Pseudonymizer, check_key
from raysys.ledger.records import PartitionRef, PrivacySpend, UpdateStarted
from raysys.ledger.state import State
from raysys.partitions.discover import EVERYTHING, Discovered, PartitionRange, discover
from raysys.partitions.periods import periods_of
from raysys.partitions.plan import UpdatePlan, plan_update, range_to_list, without_empty
from raysys.partitions.rows import partitions_without_rows
from raysys.privacy.budget import check_reservation
from raysys.privacy.spend import mechanisms
from raysys.storage import Root


class Planner:
    """Plans on the newest state, and lists the root anew only where that is needed.

    A listing that was made before another update committed may lack what that one consumed, and
    then it would look gone.
    """

    def __init__(
        self,
        root: Root,
        config: Config,
        within: PartitionRange = EVERYTHING,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._root = root
        self._config = config
        self._within = within
        self._clock = clock
        self._listed: tuple[str | None, Discovered, float] | None = None
        self._planned: tuple[int, UpdatePlan] | None = None

    def plan(self, state: State) -> UpdatePlan:
        """Returns the plan on a state, which was read before this is called.

        Raises:
          PartitionChangedError: As `plan_update`.
          EmptyPlanError: There is nothing to read.
          DataError: A file lies where it would never be read.
        """
        if self._planned is None or self._planned[0] != state.sequence:
            config = self._config.partitions
            if self._listed is None or self._listed[0] != state.head_state:
                found = discover(self._root, range_to_list(state, config, self._within))
                self._listed = state.head_state, found, self._clock()
            _, found, now = self._listed
            plan = plan_update(found, state, config, now, self._within)
            empty = partitions_without_rows(self._root, plan.partitions)
            self._planned = state.sequence, without_empty(plan, empty, state, config)
        return self._planned[1]

    @property
    def latest(self) -> UpdatePlan:
        """The plan on the last state asked about. Of a decision that was appended: the one made."""
        assert self._planned is not None, "plan() comes first"
        return self._planned[1]


def planned_spend(config: Config, plan: UpdatePlan) -> PrivacySpend:
    """Returns the mechanisms of an update of this plan, also where privacy is off."""
    return _spend(config, plan.partitions, first=plan.base_version is None)


def planned_spends(config: Config, plan: UpdatePlan, num_partitions: int) -> list[PrivacySpend]:
    """Returns the mechanisms of each update, where several read `num_partitions` of a plan each.

    It assumes that the gate lets the first version pass: while there is none, an update trains
    for `train.bootstrap_num_steps`.
    """
    starts = range(0, len(plan.partitions), num_partitions)
    parts = [plan.partitions[start : start + num_partitions] for start in starts]
    first = plan.base_version is None
    return [_spend(config, part, first=first and i == 0) for i, part in enumerate(parts)]


def _spend(config: Config, partitions: Sequence[PartitionRef], *, first: bool) -> PrivacySpend:
    train = config.train
    return mechanisms(
        config.privacy,
        num_steps=train.bootstrap_num_steps if first else train.num_steps,
        num_count_releases=len(periods_of(partitions, config.ingest.period_days)),
    )


def check_catalogue(plan: UpdatePlan, reason: str | None = None) -> None:
    """Refuses a first update without items before privacy is reserved for it.

    Args:
      reason: Why the item files have no rows, where they were read.

    Raises:
      DataError: There is no catalogue to start from.
    """
    if plan.base_state is None and (reason is not None or not plan.item_files):
        raise DataError(
            f"the catalogue is empty ({reason or 'no item files'}): write item rows below "
            "items/dt=YYYY-MM-DD/ first"
        )


def reserve(
    state: State, plan: UpdatePlan, config: Config, *, keys: Pseudonymizer, owner: str
) -> UpdateStarted:
    """Decides, on the state that directly precedes the record, what the update takes.

    Raises:
      ConfigError: The newest key is not the state's.
      BudgetExhaustedError: What privacy is left does not suffice.
    """
    check_key(keys, state.user_key_id, config.root)
    spend = planned_spend(config, plan)
    private = config.privacy.enabled
    if private:
        check_reservation(state, [spend], config.privacy)
    update_id = state.next_update_id()
    digest = hashlib.sha256(f"{config.ingest.seed} {update_id}".encode()).digest()
    return UpdateStarted(
        update_id=update_id,
        owner=owner,
        lease_expires_at=time.time() + config.lease.duration_s,
        partitions=plan.partitions,
        item_files=plan.item_files,
        set_aside=plan.set_aside,
        base_version=plan.base_version,
        base_state=plan.base_state,
        config_hash=config.hash(),
        user_key_id=keys.key_id,
        seed=int.from_bytes(digest[:6]),
        private=private,
        reserved=spend if private else None,
        permits_steps=private,
    )
