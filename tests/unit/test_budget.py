"""The budget refuses what would exceed it, and never reports less than was spent."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import PrivacyConfig
from raysys.errors import BudgetExhaustedError
from raysys.ledger.records import PrivacySpend, Record, UpdateStarted
from raysys.ledger.state import State
from raysys.privacy import accounting
from raysys.privacy.budget import check_reservation, report_budget, spent_epsilon
from raysys.privacy.composed import Composed
from tests.helpers import SPEND, abandoned, committed, folded, partition, started

CONFIG = PrivacyConfig(epsilon_total=2.0, delta=1e-4)


def epsilon(spends: list[PrivacySpend], delta: float) -> float:
    """Composed one by one, as the ledger's life is."""
    composed = Composed.nothing()
    for spend in spends:
        composed = composed.plus(spend)
    return composed.epsilon(delta)


def start(number: int, reserved: PrivacySpend | None = SPEND) -> UpdateStarted:
    return started(
        f"u{number:04}-aaaaaa",
        partitions=(partition(f"2017-03-{number:02}"),),
        reserved=reserved,
        private=reserved is not None,
    )


def with_updates(num: int) -> State:
    return folded(
        *[record for i in range(1, num + 1) for record in (start(i), committed(start(i)))]
    )


def test_composing_one_by_one_is_never_less_than_all_at_once_and_hardly_more() -> None:
    at_once = accounting.epsilon([SPEND] * 30, CONFIG.delta)
    assert at_once <= epsilon([SPEND] * 30, CONFIG.delta) < at_once * 1.001


def test_an_update_within_the_budget_is_told_what_it_will_have_spent() -> None:
    after = check_reservation(with_updates(1), [SPEND], CONFIG)
    assert after == pytest.approx(epsilon([SPEND, SPEND], CONFIG.delta))
    assert after > spent_epsilon(with_updates(1), CONFIG.delta) > 0


def test_the_update_that_would_exceed_the_budget_is_refused_with_the_numbers() -> None:
    state = with_updates(2)
    spent, after = (epsilon([SPEND] * num, CONFIG.delta) for num in (2, 3))
    tight = dataclasses.replace(CONFIG, epsilon_total=(spent + after) / 2)
    with pytest.raises(BudgetExhaustedError) as refused:
        check_reservation(state, [SPEND], tight)
    text = str(refused.value)
    assert f"to {after:.3f} of privacy.epsilon_total {tight.epsilon_total:g}" in text
    assert f"(spent {spent:.3f}; unit: a user; neighbours: add or remove one user; delta" in text
    assert "\n" not in text

    wide = dataclasses.replace(CONFIG, epsilon_total=after)
    assert check_reservation(state, [SPEND], wide) == after, "the bound itself may be reached"


def test_a_budget_that_forgets_abandoned_updates_would_let_it_pass() -> None:
    """The negative control of the refusal: the same ledger without the abandoned updates."""
    records: list[Record] = []
    for number in (1, 2, 3):
        records += [start(number), abandoned(f"u{number:04}-aaaaaa")]
    after = epsilon([SPEND] * 4, CONFIG.delta)
    tight = dataclasses.replace(CONFIG, epsilon_total=after * 0.99)
    with pytest.raises(BudgetExhaustedError):
        check_reservation(folded(*records), [SPEND], tight)
    assert check_reservation(State(), [SPEND], tight) < tight.epsilon_total


def test_an_abandoned_update_stays_charged_in_full() -> None:
    state = folded(start(1), abandoned("u0001-aaaaaa"), start(2), committed(start(2)))
    report = report_budget(state, CONFIG)
    assert [(u.update_id, u.status) for u in report.updates] == [
        ("u0001-aaaaaa", "abandoned"),
        ("u0002-aaaaaa", "committed"),
    ]
    assert report.epsilon_spent == pytest.approx(epsilon([SPEND] * 2, CONFIG.delta))


def test_an_update_counts_from_its_reservation_on() -> None:
    report = report_budget(folded(start(1)), CONFIG)
    assert [u.status for u in report.updates] == ["reserved"]
    assert report.epsilon_spent == pytest.approx(epsilon([SPEND], CONFIG.delta))


def test_a_commit_that_ran_fewer_steps_gives_the_rest_back() -> None:
    less = dataclasses.replace(SPEND, num_steps=SPEND.num_steps - 5)
    state = folded(start(1), committed(start(1), spent=less))
    assert spent_epsilon(state, CONFIG.delta) == pytest.approx(epsilon([less], CONFIG.delta))
    assert epsilon([less], CONFIG.delta) < epsilon([SPEND], CONFIG.delta)


def test_an_update_without_privacy_is_not_in_the_figures() -> None:
    state = folded(start(1, None), committed(start(1, None)))
    assert report_budget(state, CONFIG).updates == ()
    assert spent_epsilon(state, CONFIG.delta) == 0.0


def test_the_report_adds_up_and_says_what_it_means() -> None:
    report = report_budget(with_updates(3), CONFIG)
    cumulative = [u.epsilon_cumulative for u in report.updates]
    assert cumulative == sorted(cumulative) and len(set(cumulative)) == 3
    assert cumulative[0] == report.updates[0].epsilon_alone
    assert report.epsilon_spent == cumulative[-1]
    assert report.epsilon_left == pytest.approx(CONFIG.epsilon_total - report.epsilon_spent)
    assert cumulative[-1] < sum(u.epsilon_alone for u in report.updates), "composition is advanced"
    assert (report.unit, report.relation) == ("user", "add or remove one user")
    assert report.delta == CONFIG.delta and "PLD" in report.accountant


def test_abandoned_updates_count_in_what_reports_state_as_spent() -> None:
    state = with_updates(2)
    statuses = ("abandoned", "committed")
    spends = tuple((u, s, t) for (u, s, _), t in zip(state.spends, statuses, strict=True))
    mixed = dataclasses.replace(state, spends=spends)
    assert spent_epsilon(mixed, CONFIG.delta) == report_budget(mixed, CONFIG).epsilon_spent
    alone = dataclasses.replace(state, spends=spends[1:])
    assert spent_epsilon(mixed, CONFIG.delta) > spent_epsilon(alone, CONFIG.delta)


def test_what_is_left_is_never_negative() -> None:
    report = report_budget(with_updates(2), dataclasses.replace(CONFIG, epsilon_total=0.1))
    assert (report.epsilon_left, report.updates_left) == (0.0, 0)


@pytest.mark.parametrize("epsilon_total", [0.9, 1.5], ids="of epsilon {}".format)
def test_the_updates_left_are_those_that_really_fit(epsilon_total: float) -> None:
    config = dataclasses.replace(CONFIG, epsilon_total=epsilon_total)
    state = with_updates(1)
    left = report_budget(state, config).updates_left
    fits = [epsilon([SPEND] * (1 + num), config.delta) <= epsilon_total for num in range(left + 2)]
    assert fits == [True] * (left + 1) + [False]


def test_an_abandoned_update_that_ran_little_is_not_what_the_next_one_is_like() -> None:
    config = dataclasses.replace(CONFIG, epsilon_total=1.5)
    state = with_updates(1)
    spends = (*state.spends, ("u0002-aaaaaa", dataclasses.replace(SPEND, num_steps=1), "abandoned"))
    report = report_budget(dataclasses.replace(state, spends=spends), config)
    left = report.updates_left
    assert left is not None
    ran = [spend for _, spend, _ in spends]
    fits = [epsilon([*ran, *[SPEND] * num], config.delta) <= 1.5 for num in (left, left + 1)]
    assert fits == [True, False]


def test_the_updates_left_stop_being_counted_at_a_thousand() -> None:
    tiny = PrivacySpend(
        num_steps=1, sampling_prob=0.001, noise_multiplier=20.0,
        num_count_releases=0, count_noise_multiplier=12.0,
    )  # fmt: skip
    state = folded(start(1, tiny), committed(start(1, tiny)))
    assert report_budget(state, CONFIG).updates_left == 1000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["committed", "held", "abandoned"]), max_size=8), st.booleans())
def test_no_order_of_crashes_and_retries_reports_less_than_was_started(
    ends: list[str], one_is_running: bool
) -> None:
    records: list[Record] = []
    for number, end in enumerate(ends, start=1):
        begun = start(number)
        ended = {
            "committed": committed(begun),
            "held": committed(begun, version=None),
            "abandoned": abandoned(begun.update_id),
        }
        records += [begun, ended[end]]
    if one_is_running:
        records.append(start(len(ends) + 1))
    charged = [spend for _, spend, _ in folded(*records).spends]
    assert charged == [SPEND] * (len(ends) + one_is_running)
