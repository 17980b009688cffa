"""`raysys plan`: a dry run: what the next update would read, set aside, train on and spend."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from raysys.cli.options import ConfigOption, JsonOption, TuneOption, open_shop
from raysys.cli.show import active_json, active_lines, print_result, table
from raysys.config import Config, ModelConfig
from raysys.errors import ConfigError, RaysysError
from raysys.ledger.records import PartitionRef, PrivacySpend
from raysys.ledger.state import State
from raysys.partitions.plan import UpdatePlan
from raysys.storage import Root

if TYPE_CHECKING:
    from raysys.privacy.budget import Forecast
    from raysys.privacy.selection import SelectionPlan

_MAX_ROWS = 40
"""Partitions listed for people; `--json` lists all."""


def plan(config: ConfigOption, as_json: JsonOption = False, tune: TuneOption = False) -> None:
    """Show what the next update would read, set aside and spend. Changes nothing.

    With --tune the next update is one that jobs/tune.py runs.

    Ends with 1 and the update's own message where the update would be refused.
    """
    # dp-accounting takes most of a second to import, which the other commands need not wait for.
    from raysys.privacy.budget import forecast
    from raysys.reserve import Planner, group_in_turn, planned_spend

    shop, log = open_shop(config)
    root, state = Root(shop.root), log.refresh()
    planned = Planner(root, shop).plan(state)
    spend = planned_spend(shop, planned, group_in_turn(shop, state, _key_id(shop, state)))
    selected = _selection(shop, state, spend) if tune else None
    if selected is not None:
        spend = selected.spend
    expected = forecast(state, [spend], shop.privacy, root) if shop.privacy.enabled else None
    refusal = _refusal(shop, state, planned, spend, tune=tune)
    print_result(
        _body(shop, state, planned, spend, expected, refusal)
        | ({"epsilon_by_method": selected.epsilon_by_method} if selected else {}),
        as_json,
        [
            *_partition_lines(planned),
            *(f"set aside  {aside.path}: {aside.reason}" for aside in planned.set_aside),
            _start_line(planned),
            f"watermark  {planned.watermark} (now {state.watermark or 'none'})",
            *_spend_lines(shop, spend, expected),
            *(_selection_lines(selected) if selected else []),
            *active_lines(state),
        ],
    )
    if refusal is not None:
        raise refusal


def _selection(shop: Config, state: State, spend: PrivacySpend) -> SelectionPlan | None:
    """Returns the trials of the next update, None if they cost nothing."""
    from raysys.privacy.kept import life_so_far
    from raysys.privacy.selection import check_choice, check_space, plan_selection

    check_space(shop)
    check_choice(shop, is_first=state.head_version is None)
    if not shop.privacy.enabled:
        return None
    life = life_so_far(Root(shop.root), state)
    return plan_selection(shop, spend, life, _key_id(shop, state))


def _selection_lines(planned: SelectionPlan) -> list[str]:
    """Returns how many trials there will be and why they are charged as they are."""
    from raysys.privacy.selection import num_trials_quantile

    trials = planned.selection
    num = f"{trials.num_trials} of {trials.num_steps} steps"
    if trials.method == "repeat":
        most = num_trials_quantile(trials.mean_trials, trials.shape, 0.99)
        num = (
            f"a random number, {trials.mean_trials:g} on average and up to {most} in 99 of 100 "
            f"selections, of {trials.num_steps} steps"
        )
    costs = ", ".join(f"{name} {cost:.3f}" for name, cost in planned.epsilon_by_method.items())
    where = (
        f", on users of group {trials.group.scheme}:{trials.group.index}" if trials.group else ""
    )
    return [
        f"trials     {num}{where}",
        f"method     {trials.method}: epsilon after the update by method: {costs}",
    ]


def _key_id(shop: Config, state: State) -> str:
    """Returns the key whose pseudonyms the update would split, as far as that can be told."""
    from raysys.ingest.pseudonym import Pseudonymizer

    try:
        return Pseudonymizer.from_config(shop.pseudonyms).key_id
    except ConfigError:
        return state.user_key_id or "unknown"


def _refusal(
    shop: Config, state: State, planned: UpdatePlan, spend: PrivacySpend, *, tune: bool
) -> RaysysError | None:
    """Returns what the update would raise before it reads: the first of what can be told now."""
    from raysys.ingest.pseudonym import Pseudonymizer, check_key
    from raysys.privacy.budget import check_reservation
    from raysys.reserve import check_catalogue

    def key() -> None:
        check_key(Pseudonymizer.from_config(shop.pseudonyms), state.user_key_id, shop.root)

    def budget() -> None:
        if shop.privacy.enabled:
            check_reservation(state, [spend], shop.privacy, Root(shop.root))

    def targets() -> None:
        # PEFT takes seconds to import, and targets that are not set are there in any encoder.
        if tune and any(key.startswith("model.") for key in shop.tune.space):
            from raysys.model.adapter import check_targets

            check_targets(shop)
        elif shop.model.target_modules != ModelConfig().target_modules:
            from raysys.model.adapter import activations_cut

            activations_cut(shop.model)

    catalogue = functools.partial(check_catalogue, planned)
    checks: Sequence[Callable[[], None]] = (key, budget, targets, catalogue)
    for check in checks:
        try:
            check()
        except RaysysError as error:
            return error
    return None


def _body(
    shop: Config,
    state: State,
    planned: UpdatePlan,
    spend: PrivacySpend,
    expected: Forecast | None,
    refusal: RaysysError | None,
) -> dict[str, Any]:
    return {
        "root": shop.root,
        "partitions": [_partition_json(partition) for partition in planned.partitions],
        "num_files": len(planned.files),
        "size_bytes": planned.size_bytes,
        "num_item_files": len(planned.item_files),
        "item_files": [file.path for file in planned.item_files],
        "set_aside": [dataclasses.asdict(aside) for aside in planned.set_aside],
        "base_version": planned.base_version,
        "base_state": planned.base_state,
        "watermark": planned.watermark,
        "watermark_now": state.watermark,
        "num_open": planned.num_open,
        "num_left": planned.num_left,
        "spend": dataclasses.asdict(spend),
        "private": shop.privacy.enabled,
        "privacy": expected
        and {
            **dataclasses.asdict(expected),
            "statement": expected.statement,
            "noise": _noise_line(shop, spend),
        },
        "refusal": refusal and str(refusal),
        "active": active_json(state),
    }


def _partition_json(partition: PartitionRef) -> dict[str, Any]:
    size_bytes = sum(file.size_bytes for file in partition.files)
    return {"key": partition.key, "num_files": len(partition.files), "size_bytes": size_bytes}


def _partition_lines(planned: UpdatePlan) -> list[str]:
    listed = [_partition_json(partition) for partition in planned.partitions[:_MAX_ROWS]]
    rows = [[p["key"], p["num_files"], f"{p['size_bytes']:,}"] for p in listed]
    num_partitions = len(planned.partitions)
    more = num_partitions - len(rows)
    left = f", {planned.num_left} left for later updates" if planned.num_left else ""
    return [
        *table(["partition", "files", "bytes"], rows),
        *([f"… and {more} more"] if more else []),
        f"{num_partitions} partitions and {len(planned.item_files)} item files are new "
        f"({planned.size_bytes:,} bytes), {planned.num_open} partitions still open{left}",
    ]


def _start_line(planned: UpdatePlan) -> str:
    state = f"the state of {planned.base_state}" if planned.base_state else "no state"
    return f"starts     from {planned.base_version or 'a head set by hand'} and {state}"


def _spend_lines(shop: Config, spend: PrivacySpend, expected: Forecast | None) -> list[str]:
    what = f"{spend.num_steps} steps"
    if spend.selection is not None:
        what = f"trials and {what}" if spend.num_steps else "trials"
    what += f" and {spend.num_count_releases} releases of item counts"
    if spend.num_evaluations:
        what += f" and {spend.num_evaluations} of evaluations"
    if expected is None:
        from raysys.privacy.statement import NOT_PRIVATE

        return [f"trains     {what}", NOT_PRIVATE]
    from raysys.privacy.calibrate import at_least

    return [
        f"spends     {what}: epsilon {expected.epsilon_alone:.3f} alone, from "
        f"{expected.epsilon_spent:.3f} to {expected.epsilon_after:.3f} of "
        f"{expected.epsilon_total:g}, {expected.epsilon_left:.3f} left",
        f"           {expected.statement}",
        *([f"users      of group {spend.group.scheme}:{spend.group.index}"] if spend.group else []),
        f"noise      {_noise_line(shop, spend)}",
        f"lasts      for {at_least(expected.updates_left)} updates like this one, it included",
    ]


def _noise_line(shop: Config, spend: PrivacySpend) -> str:
    """Returns where the noise comes from, and whether the budget lasts for the horizon with it."""
    from raysys.privacy.calibrate import describe

    if spend.selection is not None:
        kept = "" if shop.privacy.horizon is None else "; privacy.horizon counts no trials"
        least = spend.selection.noise_multiplier
        return f"{least:g} or more, as a trial draws from tune.space{kept}"
    return describe(shop, spend.noise_multiplier)
