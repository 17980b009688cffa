"""Tells the caller's mistake from a version's fault, where an answer and a catalogue disagree.

candidates, filters, items found x versions in memory -> fine | ApiError | ScoresError
"""

from __future__ import annotations

from collections.abc import Sequence

from raysys.rollout.view import RolloutView
from raysys.serve.candidates import Chosen
from raysys.serve.ranker import ResidentVersions, ScoresError, Servable
from raysys.serve.schema import ApiError, FeedbackRequest, Filters, name_some


def check_candidates(
    chosen: Chosen, version: Servable, versions: ResidentVersions, view: RolloutView
) -> None:
    """Lets an item pass that is only newer than the version.

    Raises:
      ApiError: 422 the shop has no such item, or the version has none of them.
      ScoresError: A canary lacks items that stable has.
    """
    unknown = chosen.unknown
    if not unknown:
        return
    is_canary = version.name == view.canary
    nowhere = [item for item in unknown if not versions.is_known(item)]
    if nowhere or (not len(chosen.items) and not is_canary):
        raise ApiError(
            422,
            f"candidates: {name_some(nowhere or unknown)} are not in the catalogue of version "
            f"{version.name}; leave them out until an update has read their item rows",
        )
    stable = versions.get(view.stable)
    if is_canary and stable is not None:
        lost = [item for item in unknown if stable.items.index_of(item) is not None]
        if lost:
            raise ScoresError(f"canary {version.name} lacks items of stable: {name_some(lost)}")


def check_found(
    item_ids: Sequence[str], version: Servable, versions: ResidentVersions, view: RolloutView
) -> None:
    """Checks what a version found by itself.

    Raises:
      ScoresError: A canary, which may be on trial with a wrong item table, found items that neither
        stable nor the shop's newest catalogue has.
    """
    if version.name != view.canary:
        return
    strange = [item for item in item_ids if versions.is_stranger(item, version)]
    if strange:
        raise ScoresError(
            f"canary {version.name} found items that no catalogue has: {name_some(strange)}"
        )


def check_filters(filters: Filters | None, versions: ResidentVersions) -> None:
    """Lets a name pass that any version knows, though the one that answers may not.

    Raises:
      ApiError: 422 no version in memory knows a category or brand: it is misspelt, or too new.
    """
    tables = [version.items for version in versions.all()]
    if filters is None or not tables:
        return
    for name, wanted, known in (
        ("category", filters.category, [table.category_names for table in tables]),
        ("brand", filters.brand, [table.brand_names for table in tables]),
    ):
        lost = [value for value in wanted or () if not any(value in names for names in known)]
        if lost:
            raise ApiError(
                422,
                f"filters.{name}: {name_some(lost)} is of no item of a version in memory; leave "
                "it out until an update has read item rows with it",
            )


def check_ranks(request: FeedbackRequest, num_shown: int) -> None:
    """Refuses places that the answer does not have, which would count for or against a version.

    Raises:
      ApiError: 422 an event has one.
    """
    for number, event in enumerate(request.events):
        if event.rank is not None and event.rank > num_shown:
            raise ApiError(
                422,
                f"events.{number}.rank: {event.rank} is beyond the {num_shown} items of "
                "the answer; send the item's rank in it",
            )
