"""How many trials a selection runs, by which method, and what it is charged: before any data."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any, ClassVar

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from raysys.config import Config, parse_config
from raysys.errors import ConfigError, PrivacyError
from raysys.ledger.records import PrivacySpend, SelectionSpend
from raysys.privacy import charges, selection
from raysys.privacy.accounting import epsilon
from raysys.privacy.composed import Composed
from raysys.privacy.selection import (
    check_space,
    draw_num_trials,
    draw_values,
    halting_probability,
    noise_score,
    num_trials_quantile,
    plan_selection,
)

DAILY = PrivacySpend(
    num_steps=195,
    sampling_prob=1024 / 200_000,
    noise_multiplier=1.0,
    num_count_releases=0,
    count_noise_multiplier=1.0,
)
GAUSSIAN = dataclasses.replace(DAILY, num_steps=1, sampling_prob=1.0, noise_multiplier=5**0.5)
NO_SCORE = {"score_noise_multiplier": 1e6, "delta_fraction": 0.999}
"""So that a trial is the mechanism of the reference values alone."""


def shop(tune: dict[str, Any], **privacy: Any) -> Config:
    body = {"root": "file:///shop", "pseudonyms": {"key_file": "key"}, "tune": tune}
    return parse_config({**body, "privacy": {"delta": 1e-6, **privacy}})


def plan(update: PrivacySpend, **tune: Any) -> selection.SelectionPlan:
    return plan_selection(shop(tune), update, Composed.nothing(), "key")


def repeated(mean: float, shape: float) -> SelectionSpend:
    found = plan(DAILY, method="repeat", mean_trials=mean, shape=shape).selection
    assert (found.mean_trials, found.shape) == (mean, shape)
    return found


class TestMethod:
    def test_for_the_small_daily_update_composition_is_cheaper(self) -> None:
        found = plan(DAILY, **NO_SCORE)
        assert found.selection.method == "compose"
        assert found.epsilon_by_method["compose"] == pytest.approx(1.424, rel=2e-3)
        assert found.epsilon_by_method["repeat"] > 1.734

    def test_for_one_gaussian_release_repetition_is_cheaper(self) -> None:
        found = plan(GAUSSIAN, **NO_SCORE)
        assert found.selection.method == "repeat"
        assert found.epsilon_by_method["repeat"] == pytest.approx(3.452, rel=2e-3)

    def test_what_was_spent_before_decides_too(self) -> None:
        """The cheaper one is the one after which the model's whole life has cost less."""
        earlier = [GAUSSIAN] * 3
        found = plan_selection(shop({}), DAILY, Composed.nothing().plus(*earlier), "key")
        alone = plan(DAILY)
        for method, after in found.epsilon_by_method.items():
            assert after > alone.epsilon_by_method[method]
        assert min(found.epsilon_by_method.values()) == pytest.approx(
            epsilon([*earlier, found.spend], 1e-6), rel=2e-3
        )

    @pytest.mark.parametrize("method", ["repeat", "compose"])
    def test_the_config_may_decide(self, method: str) -> None:
        assert plan(DAILY, method=method).selection.method == method

    def test_what_has_no_bound_is_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(charges, "_MOST_EPSILON", 1.0)
        found = plan(DAILY, mean_trials=7.5)
        assert found.selection.method == "compose"
        assert found.epsilon_by_method["repeat"] == float("inf")
        with pytest.raises(PrivacyError, match=r"7\.5 trials on average has no epsilon below 1 "):
            plan(DAILY, method="repeat", mean_trials=7.5)

    def test_one_trial_on_average_is_one_trial(self) -> None:
        found = plan(GAUSSIAN, mean_trials=1.0).selection
        assert (found.method, found.num_trials) == ("compose", 1)


class TestSpend:
    def test_the_best_trials_weights_are_the_release(self) -> None:
        spend = plan(DAILY).spend
        assert spend.num_steps == 0 and spend.selection is not None
        assert spend.selection.num_steps == DAILY.num_steps

    def test_the_number_of_a_repetition_stands_nowhere(self) -> None:
        found = plan(DAILY, method="repeat").selection
        assert (found.num_trials, found.mean_trials, found.delta) == (0, 10.0, 1e-7)

    def test_a_fixed_number_is_the_mean_rounded_up(self) -> None:
        found = plan(DAILY, method="compose", mean_trials=2.5).selection
        assert (found.num_trials, found.mean_trials, found.delta) == (3, 3.0, 0.0)

    def test_a_shard_pays_for_trials_and_the_others_for_the_release(self) -> None:
        found = plan(DAILY, method="shard").spend
        assert found.num_steps == DAILY.num_steps and found.selection is not None
        tried, trained = found.selection.group, found.group
        assert tried is not None and trained is not None
        assert tried.scheme == trained.scheme and (tried.index, trained.index) == (0, 1)
        # In parallel: whoever is in one group is charged for that one alone.
        both = epsilon([found], 1e-6)
        trials = dataclasses.replace(found, num_steps=0)
        release = dataclasses.replace(found, selection=None)
        assert both == pytest.approx(max(epsilon([trials], 1e-6), epsilon([release], 1e-6)))
        everyone = dataclasses.replace(found.selection, group=None)
        overlapping = dataclasses.replace(found, group=None, selection=everyone)
        assert epsilon([overlapping], 1e-6) > both * 1.02

    def test_candidates_of_unequal_noise_are_charged_the_maximum_at_every_order(self) -> None:
        noises = (1.5, 1.0, 4.0)
        config = {"space": {"privacy.noise_multiplier": list(noises)}}
        charged = plan(DAILY, **config).selection
        most = np.max([_rdp(charged, noise) for noise in noises], axis=0)
        assert np.array_equal(most, _rdp(charged, charged.noise_multiplier))
        assert (most > _rdp(charged, float(np.mean(noises)))).all(), "the mean would not do"

    def test_without_drawn_noise_it_is_that_of_the_update(self) -> None:
        assert plan(GAUSSIAN).selection.noise_multiplier == GAUSSIAN.noise_multiplier


def _rdp(charged: SelectionSpend, noise_multiplier: float) -> Any:
    step = dp_accounting.PoissonSampledDpEvent(
        charged.sampling_prob, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, charged.num_steps))
    return accountant._rdp


class TestNumber:
    """The truncated negative binomial of Papernot and Steinke, definition 1."""

    @pytest.mark.parametrize("mean", [1.5, 3.0, 10.0])
    @pytest.mark.parametrize(
        "shape", [0.0, 0.5, 1.0, 3.0], ids=["logarithmic", "half", "geometric", "three"]
    )
    def test_draws_follow_the_distribution(self, mean: float, shape: float) -> None:
        spend, rng = repeated(mean, shape), random.Random(0)
        drawn = Counter(draw_num_trials(spend, rng) for _ in range(20_000))
        assert _p_value(drawn, mean, shape) > 1e-3
        other = 2.0 if shape == 0 else 0.0
        if mean > 2:
            assert _p_value(drawn, mean, other) < 1e-6, "the test tells two shapes apart"

    def test_the_geometric_is_that_of_numpy(self) -> None:
        spend, rng = repeated(4.0, 1.0), random.Random(1)
        ours = np.array([draw_num_trials(spend, rng) for _ in range(20_000)])
        theirs = np.random.default_rng(0).geometric(0.25, 20_000)
        for k in range(1, 8):
            assert (ours == k).mean() == pytest.approx((theirs == k).mean(), abs=0.015)

    @given(mean=st.floats(1.01, 500), shape=st.floats(0, 5))
    def test_the_parameter_is_the_accountants(self, mean: float, shape: float) -> None:
        from dp_accounting.rdp import rdp_privacy_accountant

        theirs = rdp_privacy_accountant._gamma_truncated_negative_binomial(shape, mean)
        assert halting_probability(mean, shape) == pytest.approx(theirs, rel=1e-6)

    def test_a_number_far_in_the_tail_comes_to_an_end(self) -> None:
        class Unlucky(random.Random):
            def random(self) -> float:
                return 1 - 2**-53

        assert 300 < draw_num_trials(repeated(10.0, 1.0), Unlucky()) < 1000

    def test_a_composition_runs_the_number_that_is_charged(self) -> None:
        spend = plan(DAILY, method="compose", mean_trials=7.0).selection
        assert {draw_num_trials(spend, random.Random(seed)) for seed in range(5)} == {7}

    def test_quantiles_are_those_of_the_draws(self) -> None:
        spend, rng = repeated(10.0, 0.0), random.Random(2)
        drawn = np.array([draw_num_trials(spend, rng) for _ in range(20_000)])
        assert (drawn <= num_trials_quantile(10.0, 0.0, 0.9)).mean() == pytest.approx(0.9, abs=0.01)


def _p_value(drawn: Counter[int], mean: float, shape: float) -> float:
    """Of a chi-squared test against the definition, as the paper writes it."""
    gamma, total = halting_probability(mean, shape), sum(drawn.values())
    expected, product, k = [], 1.0, 0
    while len(expected) < 200:
        k += 1
        product *= (k - 1 + shape) / k if k > 1 or shape else 1.0
        probability = (1 - gamma) ** k * product
        probability /= gamma**-shape - 1 if shape else np.log(1 / gamma)
        if probability * total < 10:
            break
        expected.append(probability * total)
    found = [float(drawn[k]) for k in range(1, len(expected) + 1)]
    rest = total - sum(found)
    return float(chisquare([*found, rest], [*expected, total - sum(expected)]).pvalue)


class TestDraws:
    SPACE: ClassVar[dict[str, Any]] = {"model.lora_rank": (2, 4), "train.alpha": (0.5, 1.0)}

    def test_each_value_is_uniform_and_none_depends_on_another(self) -> None:
        rng = random.Random(0)
        drawn = Counter(tuple(draw_values(self.SPACE, rng).values()) for _ in range(4_000))
        assert len(drawn) == 4 and chisquare(list(drawn.values())).pvalue > 1e-3

    def test_a_space_must_not_be_empty(self) -> None:
        with pytest.raises(ConfigError, match=r"tune\.space: expected values to choose from"):
            check_space(shop({}))
        check_space(shop({"space": {"model.lora_rank": [2]}}))


def test_a_scores_noise_is_as_large_as_charged() -> None:
    spend = plan(DAILY, score_noise_multiplier=3.0).selection
    noised = np.array([noise_score(5.0, spend) for _ in range(10_000)])
    assert noised.mean() == pytest.approx(5.0, abs=0.15)
    assert noised.std() == pytest.approx(3.0, rel=0.04)
    assert len(set(noised.tolist())) == len(noised)
