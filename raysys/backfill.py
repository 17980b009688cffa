"""Catches up history in several updates, oldest first, until nothing in a range of days is left.

    PartitionRange -> all that is new in it -> budget of all updates -> run_update() again and again

Like Spark's AvailableNow with maxFilesPerTrigger: bounded updates, each committed by itself. What
is committed stays when a later update fails, and running the same backfill again goes on from it.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence

from raysys.config import Config
from raysys.errors import ConfigError, EmptyPlanError
from raysys.ledger.log import Log
from raysys.ledger.records import PrivacySpend, UpdateCommitted
from raysys.partitions.discover import PartitionRange
from raysys.privacy.budget import check_reservation
from raysys.reserve import Planner, planned_spends
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
    spends = plan_backfill(config, days)
    on_progress(f"{len(spends)} updates of at most {_limit(config, days) or 'all'} partitions each")
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
        on_progress(f"{len(commits)} of {max(len(spends), len(commits))} updates committed")


def plan_backfill(config: Config, days: PartitionRange) -> Sequence[PrivacySpend]:
    """Returns what each update needed would spend; none if nothing in the range is new.

    Raises:
      BudgetExhaustedError: Together they would spend more privacy than is left.
      PartitionChangedError: As `plan_update`.
    """
    root = Root(config.root)
    state = Log(root).refresh()
    # The limit is for one update: here all of them are planned.
    everything = dataclasses.replace(
        config, partitions=dataclasses.replace(config.partitions, max_partitions=0)
    )
    try:
        plan = Planner(root, everything, dataclasses.replace(days, max_partitions=0)).plan(state)
    except EmptyPlanError:
        return []
    spends = planned_spends(config, plan, _limit(config, days) or len(plan.partitions))
    if config.privacy.enabled:
        check_reservation(state, spends, config.privacy)
    return spends


def _limit(config: Config, days: PartitionRange) -> int:
    return days.max_partitions or config.partitions.max_partitions
