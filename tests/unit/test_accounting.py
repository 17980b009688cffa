"""Epsilon is the published value, whatever the order and grouping of the spends."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from opacus.accountants import PRVAccountant
from scipy.stats import norm

from raysys.errors import PrivacyError
from raysys.ledger.records import PrivacySpend, SelectionSpend
from raysys.privacy import accounting
from raysys.privacy.accounting import epsilon, event
from raysys.privacy.charges import EpsilonDelta, charges


def spend(num_steps: int = 0, **changes: Any) -> PrivacySpend:
    values = {
        "num_steps": num_steps,
        "sampling_prob": 0.25,
        "noise_multiplier": 4.5,
        "num_count_releases": 0,
        "count_noise_multiplier": 12.0,
    }
    return PrivacySpend(**{**values, **changes})


DAY = spend(195, sampling_prob=1024 / 200_000, noise_multiplier=1.0)
MIXED = [
    spend(60, num_count_releases=2),
    spend(15, num_count_releases=1),
    spend(15, noise_multiplier=3.0),
    spend(15, sampling_prob=0.1, num_count_releases=1, count_noise_multiplier=8.0),
    spend(15, num_count_releases=1),
]


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """Delta of one Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    half, ratio = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
    return float(norm.cdf(half - ratio) - math.exp(epsilon) * norm.cdf(-half - ratio))


def composed_one_by_one(spends: list[PrivacySpend], delta: float) -> float:
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for one in spends:
        accountant.compose(event(one))
    return float(accountant.get_epsilon(delta))


def test_the_usual_training_run_has_its_published_epsilon() -> None:
    run = spend(14_062, sampling_prob=256 / 60_000, noise_multiplier=1.1)
    assert epsilon([run], 1e-5) == pytest.approx(2.382, abs=2e-3)
    assert renyi(event(run), 1e-5) == pytest.approx(2.597, abs=2e-3)
    # Another library's account of the same loss distribution, an upper bound by its own error.
    opacus = PRVAccountant()
    opacus.history = [(1.1, 256 / 60_000, 14_062)]
    assert opacus.get_epsilon(1e-5) == pytest.approx(2.392, abs=2e-3)


@pytest.mark.parametrize(
    ("num_days", "expected"),
    [(1, 0.597), (8, 1.283), (30, 2.457), (90, 4.42), (365, 9.77)],
    ids=str,
)
def test_daily_updates_compose_to_their_published_epsilon(num_days: int, expected: float) -> None:
    # Discretisation differs a little by how a year is grouped: 9.744 here, 9.77 day by day.
    assert epsilon([DAY] * num_days, 1e-6) == pytest.approx(expected, rel=4e-3)


def test_renyi_accounting_would_not_pass_for_the_reference_values() -> None:
    accountant = rdp.RdpAccountant()
    accountant.compose(event(DAY))
    assert accountant.get_epsilon(1e-6) == pytest.approx(1.225, abs=2e-3)


def renyi(one: Any, delta: float = 1e-6) -> float:
    accountant = rdp.RdpAccountant()
    accountant.compose(one)
    return float(accountant.get_epsilon(delta))


class TestSelections:
    """The values of facts.md are of one Gaussian of sigma squared 5, without a score."""

    GAUSSIAN = dp_accounting.GaussianDpEvent(math.sqrt(5))

    @pytest.mark.parametrize(
        ("shape", "expected"), [(0.0, 3.452), (1.0, 4.069), (math.inf, 4.607)],
        ids=["logarithmic", "geometric", "poisson"],
    )  # fmt: skip
    def test_a_random_number_of_trials_has_its_published_epsilon(
        self, shape: float, expected: float
    ) -> None:
        found = renyi(RepeatAndSelectDpEvent(self.GAUSSIAN, 10, shape))
        assert found == pytest.approx(expected, abs=2e-3)

    def test_one_trial_and_a_fixed_number_have_theirs(self) -> None:
        ten = dp_accounting.SelfComposedDpEvent(self.GAUSSIAN, 10)
        assert renyi(self.GAUSSIAN) == pytest.approx(2.143, abs=2e-3)
        assert renyi(ten) == pytest.approx(7.766, abs=2e-3)

    @pytest.mark.parametrize(
        ("shape", "expected"), [(0.0, 3.452), (1.0, 4.069)], ids=["logarithmic", "geometric"]
    )
    def test_a_repeated_selection_is_charged_so_much(self, shape: float, expected: float) -> None:
        """The score, with nearly infinite noise, costs nothing, and a step of all users is one."""
        selected = spend(selection=trials("repeat", shape=shape, delta=1e-6))
        (charge,) = charges(selected)
        assert isinstance(charge.event, EpsilonDelta) and charge.num == 1
        assert charge.event.epsilon == pytest.approx(expected, abs=2e-3)
        assert epsilon([selected], 2e-6) <= charge.event.epsilon + 1e-3
        assert epsilon([selected], 1e-7) == math.inf, "its own delta is a part of the budget's"

    def test_a_fixed_number_is_charged_each_in_full(self) -> None:
        ten = spend(selection=trials("compose"))
        each = spend(num_count_releases=10, count_noise_multiplier=math.sqrt(5))
        # 7.766 by Renyi divergences; privacy loss distributions are tighter.
        assert epsilon([ten], 1e-6) == pytest.approx(7.286, abs=5e-3)
        assert epsilon([ten], 1e-6) == pytest.approx(epsilon([each], 1e-6), rel=2e-3)
        assert epsilon([spend(selection=trials("compose", num_trials=9))], 1e-6) < 7.0

    def test_the_score_is_charged_with_each_trial(self) -> None:
        for method in ("compose", "repeat"):
            free, dear = (
                spend(selection=trials(method, delta=1e-6, score_noise_multiplier=noise))
                for noise in (1e6, 2.0)
            )
            assert epsilon([dear], 2e-6) > epsilon([free], 2e-6) * 1.05

    def test_for_the_small_daily_update_a_fixed_number_is_cheaper(self) -> None:
        tenfold = dataclasses.replace(DAY, num_steps=1950)
        assert epsilon([tenfold], 1e-6) == pytest.approx(1.424, abs=2e-3)
        poisson = renyi(RepeatAndSelectDpEvent(event(DAY), 10, math.inf))
        assert poisson == pytest.approx(1.734, abs=2e-3)

    def test_a_selection_without_a_delta_of_its_own_is_refused(self) -> None:
        with pytest.raises(PrivacyError, match="no epsilon below 500 at delta 0"):
            charges(spend(selection=trials("repeat", delta=0.0)))

    def test_orders_that_do_not_converge_are_left_out_without_a_word(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The accountant would say so once for each, before the budget's own output."""
        hard = {"num_steps": 50, "sampling_prob": 0.25, "noise_multiplier": 0.45}
        found = epsilon([spend(selection=trials("repeat", delta=1e-6, **hard))], 1e-5)
        assert 20 < found < 500 and caplog.text == ""
        renyi(event(dataclasses.replace(DAY, sampling_prob=0.25, noise_multiplier=0.45)))
        assert "failed to converge" in caplog.text, "it does warn of such orders"

    def test_a_selection_that_is_forgotten_would_be_noticed(self) -> None:
        selected = spend(1, selection=trials("compose"))
        assert epsilon([dataclasses.replace(selected, selection=None)], 1e-6) < 1.0
        assert epsilon([selected], 1e-6) > 7.0


def trials(method: str, **changes: Any) -> SelectionSpend:
    values = {
        "num_steps": 1, "sampling_prob": 1.0, "noise_multiplier": math.sqrt(5),
        "score_noise_multiplier": 1e6, "num_trials": 10, "mean_trials": 10.0, "shape": 0.0,
        "delta": 0.0,
    }  # fmt: skip
    return SelectionSpend(method=method, **{**values, **changes})  # type: ignore[arg-type]


def test_an_evaluation_is_charged_as_the_gaussian_that_it_is() -> None:
    evaluated = spend(num_evaluations=4, evaluation_noise_multiplier=4.0)
    counted = spend(num_count_releases=1, count_noise_multiplier=2.0)
    assert epsilon([evaluated], 1e-4) == pytest.approx(epsilon([counted], 1e-4), rel=1e-6)


def test_equal_mechanisms_joined_cost_what_they_cost_one_by_one() -> None:
    joined = epsilon(MIXED, 1e-4)
    assert joined == pytest.approx(composed_one_by_one(MIXED, 1e-4), rel=2e-3)
    orders = itertools.islice(itertools.permutations(MIXED), 30, 120, 60)
    assert all(epsilon(order, 1e-4) == pytest.approx(joined, rel=1e-6) for order in orders)


def test_joining_spends_of_different_noise_is_noticed() -> None:
    as_if_of_one_noise = [spend(120, num_count_releases=4)]
    correct = composed_one_by_one(MIXED, 1e-4)
    assert epsilon(as_if_of_one_noise, 1e-4) < correct * (1 - 2e-3)


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(spend(1, sampling_prob=1.0, noise_multiplier=2.0), id="a step of all users"),
        pytest.param(
            spend(0, num_count_releases=1, count_noise_multiplier=2.0), id="a release of counts"
        ),
        pytest.param(
            spend(0, num_count_releases=4, count_noise_multiplier=4.0), id="four releases"
        ),
    ],
)
def test_an_unsampled_mechanism_is_charged_as_the_plain_gaussian(one: PrivacySpend) -> None:
    found = epsilon([one], 1e-4)
    assert gaussian_delta(found, 2.0) == pytest.approx(1e-4, rel=5e-3)
    assert gaussian_delta(found * 0.99, 2.0) > 1.03e-4


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(spend(16, num_count_releases=1), id="another step"),
        pytest.param(spend(15, num_count_releases=2), id="another release"),
        pytest.param(spend(15, num_count_releases=1, sampling_prob=0.3), id="more users a step"),
        pytest.param(spend(15, num_count_releases=1, noise_multiplier=4.0), id="less noise"),
        pytest.param(
            spend(15, num_count_releases=1, count_noise_multiplier=10.0), id="less count noise"
        ),
    ],
)
def test_whatever_reveals_more_costs_more(more: PrivacySpend) -> None:
    assert epsilon([more], 1e-4) > epsilon([spend(15, num_count_releases=1)], 1e-4)


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-4) == epsilon([spend(0)], 1e-4) == 0.0


def test_the_figures_say_what_they_are_about() -> None:
    assert accounting.UNIT == "user"
    assert accounting.RELATION == "add or remove one user"
    assert "PLD" in accounting.ACCOUNTANT
