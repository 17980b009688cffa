"""Catches up history in several updates, oldest first, until nothing in a range of days is left.

    PartitionRange -> all that is new in it -> budget of all updates -> run_update() again and again

Like Spark's AvailableNow with maxFilesPerTrigger: bounded updates, each committed by itself. What
is committed stays when a later update fails, and running the same backfill again goes on from it.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable

from raysys.config import Config
from raysys.errors import ConfigError, EmptyPlanError
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted, UserGroup
from raysys.partitions.discover import PartitionRange
from raysys.privacy.accounting import statement
from raysys.privacy.budget import check_reservation
from raysys.reserve import Planner, group_in_turn, planned_spends
from raysys.storage import Root

RunUpdate = Callable[[PartitionRange], UpdateCommitted]
Progress = Callable[[str], None]


def run_backfill(
    config: Config, days: PartitionRange, run_update: RunUpdate, on_progress: Progress
) -> list[UpdateCommitted]:
    """Runs updates of at most `days.max_partitions` until nothing in the range is new.

    Args:
      days: Without a first day, from the beginning, however far the config looks back.
      run_update: Runs one update within the range that it is given.

    Raises:
      ConfigError: The range is no range.
      BudgetExhaustedError: Privacy does not suffice for all updates needed. None was started.
      RaysysError: An update failed; those before it are committed.
    """
    first = days.first or datetime.date.min
    if days.max_partitions < 0:
        raise ConfigError(f"--max-partitions: expected 0 or more, got {days.max_partitions}")
    if days.last is not None and days.last < first:
        raise ConfigError(f"--last {days.last} is before --first {first}; swap them")
    days = dataclasses.replace(days, first=first)
    plan = plan_backfill(config, days)
    on_progress(plan.describe())
    commits: list[UpdateCommitted] = []
    while True:
        try:
            commits.append(run_update(days))
        except EmptyPlanError as error:
            on_progress(f"{len(commits)} updates committed; {error}")
            return commits
        except BaseException:
            done = ", ".join(commit.update_id for commit in commits) or "none"
            on_progress(f"stopped; committed before that: {done}. Run it again to go on")
            raise
        on_progress(f"{len(commits)} of {max(plan.num_updates, len(commits))} updates committed")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BackfillPlan:
    """What it takes to read all that is new in a range now."""

    num_partitions: int
    num_updates: int
    epsilon_after: float | None
    """Of all updates so far and these; None without privacy, or if nothing is new."""
    statement: str
    """What that figure is about."""

    def describe(self) -> str:
        """Returns the plan as one line.

        >>> plan = BackfillPlan(num_partitions=7, num_updates=3, epsilon_after=2.0,
        ...                     statement="unit: a user; delta 0.0001")
        >>> plan.describe()[:74]
        '7 partitions are new and take 3 updates; epsilon will be 2.000 after them '
        >>> plan.describe()[74:]
        '(unit: a user; delta 0.0001)'
        """
        cost = ""
        if self.epsilon_after is not None:
            cost = f"; epsilon will be {self.epsilon_after:.3f} after them ({self.statement})"
        return f"{self.num_partitions} partitions are new and take {self.num_updates} updates{cost}"


def plan_backfill(config: Config, days: PartitionRange) -> BackfillPlan:
    """Returns what a backfill takes.

    Raises:
      BudgetExhaustedError: Together the updates would spend more privacy than is left.
      PartitionChangedError: As `plan_update`.
    """
    root = Root(config.root)
    state = Log(root).refresh()
    # The limit is for one update: here all of them are planned.
    unlimited = dataclasses.replace(config.partitions, max_partitions=0)
    planner = Planner(
        root,
        dataclasses.replace(config, partitions=unlimited),
        dataclasses.replace(days, max_partitions=0),
    )
    try:
        plan = planner.plan(state)
    except EmptyPlanError:
        return BackfillPlan(num_partitions=0, num_updates=0, epsilon_after=None, statement="")
    limit = days.max_partitions or config.partitions.max_partitions or len(plan.partitions)
    key_id = Pseudonymizer.from_config(config.pseudonyms).key_id

    def groups(ahead: int) -> UserGroup | None:
        return group_in_turn(config, state, key_id, ahead)

    spends, privacy = planned_spends(config, plan, limit, groups), config.privacy
    return BackfillPlan(
        num_partitions=len(plan.partitions),
        num_updates=len(spends),
        epsilon_after=check_reservation(state, spends, privacy, root) if privacy.enabled else None,
        statement=statement(privacy.delta),
    )
