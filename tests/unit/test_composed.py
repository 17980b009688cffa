"""Disjoint users compose in parallel, updates one by one, and nobody is charged too little."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.ledger.records import PrivacySpend, SelectionSpend, UserGroup
from raysys.privacy.accounting import epsilon
from raysys.privacy.charges import charges
from raysys.privacy.composed import COARSE, FINE, Composed

DELTA = 1e-4
DAY = PrivacySpend(
    num_steps=195,
    sampling_prob=1024 / 200_000,
    noise_multiplier=1.0,
    num_count_releases=0,
    count_noise_multiplier=1.0,
)
SCHEMES = ("cohorts/3/key", "cohorts/2/other")


def of(scheme: int, index: int, spend: PrivacySpend = DAY) -> PrivacySpend:
    return dataclasses.replace(spend, group=UserGroup(scheme=SCHEMES[scheme], index=index))


def taking_turns(num_cohorts: int, num_updates: int) -> list[PrivacySpend]:
    return [of(0, turn % num_cohorts) for turn in range(num_updates)]


def one_by_one(spends: Sequence[PrivacySpend], interval: float = COARSE) -> Composed:
    composed = Composed.nothing(interval)
    for spend in spends:
        composed = composed.plus(spend)
    return composed


def equal(value: float) -> Any:
    """But for the last digits: sums that are composed in another order."""
    return pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    ("num_cohorts", "expected"), [(1, 9.744), (8, 3.072), (46, 1.283)], ids=str
)
def test_a_year_of_daily_updates_costs_a_user_the_turns_of_the_own_cohort(
    num_cohorts: int, expected: float
) -> None:
    num_turns = -(-365 // num_cohorts)
    found = epsilon(taking_turns(num_cohorts, 365), 1e-6)
    assert found == pytest.approx(expected, abs=2e-3)
    most = epsilon([DAY] * num_turns, 1e-6)
    assert found == equal(most), "what one cohort had, not less, not more"


def test_charging_the_cohort_with_the_fewest_turns_would_be_noticed() -> None:
    spends = [of(0, 0)] * 8 + [of(0, 1)]
    assert epsilon(spends, 1e-6) == pytest.approx(1.283, abs=2e-3)
    assert epsilon([of(0, 1)], 1e-6) == pytest.approx(0.597, abs=2e-3)


def test_releases_to_everyone_and_spends_of_other_schemes_are_charged_to_everyone() -> None:
    counts = dataclasses.replace(
        DAY, num_steps=0, num_count_releases=2, num_evaluations=1, evaluation_noise_multiplier=3.0
    )
    both = dataclasses.replace(of(0, 0), num_count_releases=2)
    assert epsilon([of(0, 0), of(0, 1), counts], DELTA) == equal(epsilon([DAY, counts], DELTA))
    no_counts = dataclasses.replace(both, num_count_releases=0)
    assert epsilon([both], DELTA) > epsilon([no_counts], DELTA)
    evaluated = [
        dataclasses.replace(of(0, i), num_evaluations=1, evaluation_noise_multiplier=3.0)
        for i in (0, 1)
    ]
    twice = dataclasses.replace(DAY, num_evaluations=2, evaluation_noise_multiplier=3.0)
    assert epsilon(evaluated, DELTA) == equal(epsilon([twice], DELTA))
    two_schemes = [of(0, 0), of(0, 1), of(1, 0), of(1, 1)]
    assert epsilon(two_schemes, DELTA) == equal(epsilon([DAY] * 3, DELTA)), "two of the other"


def test_a_rotation_of_the_key_falls_back_to_charging_everyone_for_what_was_before() -> None:
    before, after = [of(0, turn % 3) for turn in range(9)], [of(1, turn % 2) for turn in range(2)]
    worst = min(epsilon([DAY] * num, DELTA) for num in (9 + 1, 3 + 2))
    assert epsilon([*before, *after], DELTA) == equal(worst)


def test_the_trials_of_a_selection_are_charged_to_those_they_read() -> None:
    trials = SelectionSpend(
        method="compose", num_steps=195, sampling_prob=DAY.sampling_prob, noise_multiplier=1.0,
        score_noise_multiplier=1e6, num_trials=3, mean_trials=3.0, shape=0.0, delta=0.0,
        group=UserGroup(scheme=SCHEMES[0], index=0),
    )  # fmt: skip
    tuned = dataclasses.replace(of(0, 1), selection=trials)
    assert epsilon([tuned], DELTA) == pytest.approx(epsilon([DAY] * 3, DELTA), abs=2e-3)
    everyone = dataclasses.replace(tuned, selection=dataclasses.replace(trials, group=None))
    assert epsilon([everyone], DELTA) == pytest.approx(epsilon([DAY] * 4, DELTA), abs=2e-3)


def test_a_repetition_is_charged_to_those_whom_its_trials_read() -> None:
    """And not to those on whom its release was trained."""
    read = UserGroup(scheme=SCHEMES[0], index=0)
    trials = SelectionSpend(
        method="repeat", num_steps=5, sampling_prob=0.25, noise_multiplier=4.0,
        score_noise_multiplier=10.0, num_trials=0, mean_trials=3.0, shape=0.0, delta=1e-5,
        group=read,
    )  # fmt: skip
    tuned = dataclasses.replace(of(0, 1), selection=trials)
    assert {charge.group.index for charge in charges(tuned) if charge.group} == {0, 1}
    twice = dataclasses.replace(tuned, num_steps=0, group=None)
    (alone,) = charges(twice)
    assert alone.group == read


def groups() -> st.SearchStrategy[UserGroup | None]:
    known = [UserGroup(scheme=scheme, index=i) for scheme in SCHEMES for i in (0, 1)]
    return st.one_of(st.none(), st.sampled_from(known))


@st.composite
def small_spends(draw: st.DrawFn) -> PrivacySpend:
    return PrivacySpend(
        num_steps=draw(st.sampled_from([0, 1, 5])),
        sampling_prob=0.25,
        noise_multiplier=draw(st.sampled_from([2.0, 4.0])),
        num_count_releases=draw(st.integers(0, 1)),
        count_noise_multiplier=4.0,
        group=draw(groups()),
    )


def of_user(spends: Sequence[PrivacySpend], user: dict[str, int]) -> list[PrivacySpend]:
    """What one user was really exposed to: `user` says in which group of each scheme."""
    return [
        spend
        if spend.group is None or user[spend.group.scheme] == spend.group.index
        else dataclasses.replace(spend, num_steps=0)
        for spend in spends
    ]


def worst_user(spends: Sequence[PrivacySpend], delta: float, interval: float) -> float:
    """By brute force over every user that there can be. None is in no group of a scheme."""
    users = (dict(zip(SCHEMES, pair, strict=True)) for pair in itertools.product((0, 1), (0, 1)))
    ungrouped = (
        [dataclasses.replace(spend, group=None) for spend in of_user(spends, user)]
        for user in users
    )
    return max(Composed.at_once(of, interval).epsilon(delta) for of in ungrouped)


@given(st.lists(small_spends(), max_size=6))
@settings(max_examples=25, deadline=None)
def test_no_user_has_lost_more_than_is_reported(spends: list[PrivacySpend]) -> None:
    reported = one_by_one(spends).epsilon(DELTA)
    # Joined mechanisms are discretised otherwise, by less than a hundredth of a percent here.
    assert reported >= worst_user(spends, DELTA, FINE) * (1 - 1e-4) - 1e-4
    schemes = {spend.group.scheme for spend in spends if spend.group}
    if len(schemes) < 2:
        assert reported == pytest.approx(worst_user(spends, DELTA, COARSE), rel=2e-3, abs=1e-3)


def test_runs_on_several_groups_at_once_add_up() -> None:
    at_once = Composed.nothing().plus(of(0, 0), of(0, 1), of(0, 1))
    for composed in (at_once, one_by_one([of(0, 0), of(0, 1), of(0, 1)])):
        assert composed.everyone[None].ran.total() == 3 * 195
        assert [part.ran.total() for part in composed.groups.values()] == [195, 2 * 195]


def test_forgetting_the_other_schemes_would_be_noticed() -> None:
    spends = [of(0, 0), of(1, 0), of(1, 1)]
    forgotten = epsilon([of(0, 0)], DELTA)
    assert forgotten < worst_user(spends, DELTA, FINE) * 0.9 < epsilon(spends, DELTA)


def test_one_by_one_is_a_little_more_than_at_once_and_never_less() -> None:
    mixed = [
        dataclasses.replace(DAY, noise_multiplier=1 + i / 10, num_count_releases=i % 2)
        for i in range(12)
    ]
    at_once = epsilon(mixed, 1e-6)
    assert at_once <= one_by_one(mixed).epsilon(1e-6) <= at_once * 1.003


def test_the_losses_of_hundreds_of_updates_can_be_asked_for_at_last() -> None:
    composed = one_by_one([dataclasses.replace(DAY, num_steps=1)] * 1500, 0.05)
    assert composed.epsilon(1e-6) > 0
