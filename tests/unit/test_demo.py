"""The demo's own arithmetic: which days, which candidates, and which share of whom."""

from __future__ import annotations

import datetime
import itertools

import polars as pl
import pytest
from replay import NUM_CANDIDATES, Answer, plan_visits
from run import NUM_INCREMENTS, canary_share, days_of, summarise_rollout

from raysys.config import parse_config
from raysys.ledger.records import RolloutChanged
from raysys.ledger.state import State

CATALOGUE = [f"item-{i:03}" for i in range(300)]
START = datetime.datetime(2017, 3, 13, tzinfo=datetime.UTC)


def events(*rows: tuple[str, str, str]) -> pl.DataFrame:
    """Events of (user, request, item), a minute apart."""
    return pl.DataFrame(
        {
            "user_id": [user for user, _, _ in rows],
            "request_id": [request for _, request, _ in rows],
            "item_id": [item for _, _, item in rows],
            "ts": [START + datetime.timedelta(minutes=i) for i in range(len(rows))],
        }
    )


def test_the_updates_and_the_replay_cover_days_without_gap_or_overlap() -> None:
    spans = [days_of(week) for week in range(NUM_INCREMENTS + 2)]
    for (_, last), (first, _) in itertools.pairwise(spans):
        assert first == last + datetime.timedelta(days=1)


def test_candidates_do_not_depend_on_what_is_about_to_be_bought() -> None:
    past = events(("ann", "1", "item-001"), ("ann", "2", "item-002"), ("bob", "3", "item-003"))
    weeks = [events(("ann", "9", bought)) for bought in ("item-250", "item-251")]
    (one,), (other,) = (plan_visits(past, week, CATALOGUE) for week in weeks)
    assert one.candidates == other.candidates
    assert one.bought != other.bought


def test_candidates_are_distinct_items_of_the_catalogue_the_households_own_first() -> None:
    past = events(("ann", "1", "item-007"), ("ann", "1", "not-listed"), ("bob", "2", "item-008"))
    (visit,) = plan_visits(past, events(("ann", "9", "item-001")), CATALOGUE)
    assert visit.candidates[0] == "item-007"
    assert len(visit.candidates) == len(set(visit.candidates)) == NUM_CANDIDATES
    assert set(visit.candidates) <= set(CATALOGUE)


def test_a_basket_is_one_visit_however_many_items_it_has() -> None:
    week = events(("ann", "9", "item-001"), ("ann", "9", "item-002"), ("ann", "10", "item-003"))
    visits = plan_visits(week, week, CATALOGUE)
    assert [visit.bought for visit in visits] == [{"item-001", "item-002"}, {"item-003"}]


@pytest.mark.parametrize("phase", ["promoted", "rolled_back"])
def test_the_split_counts_each_household_once_and_only_under_the_canary(phase: str) -> None:
    """A frequent household weighs once: its requests are no independent draws."""
    answers = [Answer("ann", "v2", False, True)] * 8
    answers += [Answer(user, "v1", False, True) for user in ("bob", "cid", "dan")]
    answers += [Answer("eve", "v2", False, False), Answer("fay", None, False, False)]
    rollout = RolloutChanged(
        rollout_id="r0001",
        phase="promoted" if phase == "promoted" else "rolled_back",
        stable="v2" if phase == "promoted" else "v1",
        canary=None,
        previous="v1" if phase == "promoted" else None,
        weight_fraction=0.0,
        actor="controller",
        reason="",
        measurement=None,
    )
    config = parse_config({"root": "file:///shop", "pseudonyms": {"key_file": "key"}})
    found = summarise_rollout(config, State(rollout=rollout), answers)
    assert (found["observed_fraction"], found["requests"]) == (0.25, 4)
    assert (found["observed_fraction_all"], found["requests_all"]) == (8 / 11, 11)
    assert found["failed"] == 1


def test_no_answers_have_no_share() -> None:
    assert canary_share([], "v1") is None
