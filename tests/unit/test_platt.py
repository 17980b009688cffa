"""Probabilities are as frequent as they say, on users whom they were not fitted on."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import EvaluateConfig
from raysys.evaluate.calibrate import (
    Calibration,
    Fit,
    center_of,
    intercept_of,
    sigmoid,
    without_fit,
)
from raysys.evaluate.compare import Arms, Scale, Weights, measure
from raysys.evaluate.estimate import shares
from raysys.evaluate.odds import COARSE, EVENTS, FINE, Bins, Odds
from raysys.evaluate.platt import MIN_SHOWN_USERS, Tally, calibration_error, fit, fit_halves
from raysys.evaluate.private import Figures, Release
from raysys.ingest.cases import Case, read_cases
from raysys.ingest.features import FEATURE_NAMES, UserHistory
from raysys.model.scorer import Head
from tests import tiny_shop

NUM_ITEMS = 400
TAKEN = EVENTS.index("taken")
UNCALIBRATED = Calibration(slope=1.0, intercept=0.0, event="trained")


def case(
    positives: list[int] | np.ndarray,
    shown: list[int] | np.ndarray = (),
    shown_positive: list[bool] | np.ndarray = (),
    draw: float = 0.0,
) -> Case:
    return Case(
        held_out=True, tried=False, draw=draw, history=UserHistory.empty(), now=0.0,
        positives=np.array(positives, np.int32), gains=np.ones(len(positives), np.float32),
        shown=np.array(shown, np.int32), shown_positive=np.array(shown_positive, bool),
    )  # fmt: skip


class World:
    """Users who take items with the probabilities of a known calibration."""

    def __init__(self, num_users: int, truth: Calibration, *, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.public = rng.normal(0.0, 1.0, NUM_ITEMS)
        self.scores, self.cases = [], []
        for _ in range(num_users):
            scores = self.public + rng.normal(0.0, 0.3, NUM_ITEMS)
            own = rng.choice(NUM_ITEMS, rng.integers(0, 20), replace=False)
            scores[own] += rng.gamma(4.0, 0.7, len(own))
            chances = sigmoid(truth.slope * scores + truth.intercept)
            took = np.flatnonzero(rng.random(NUM_ITEMS) < chances)
            self.scores.append(scores)
            self.cases.append(case(took, draw=rng.random()))
        self.center = center_of(self.public)

    def odds(self, bins: Bins) -> Odds:
        out = Odds.empty(len(self.cases), bins)
        for i, (scores, one) in enumerate(zip(self.scores, self.cases, strict=True)):
            if len(one.positives):
                out.set_taken(i, one, scores.astype(np.float32), self.center, bins)
        return out

    def halves(self) -> np.ndarray:
        half = np.array([one.half for one in self.cases])
        odds = self.odds(FINE)
        return np.stack([odds.totals(half == which) for which in (0, 1)])

    def fit(self) -> Fit:
        found = fit_halves(self.halves(), self.center, NUM_ITEMS)
        assert found is not None
        return found

    def tally(self) -> Tally:
        return Tally.of(self.halves().sum(axis=0)[TAKEN])

    def error(self, calibration: Calibration) -> float:
        """Over the base rate."""
        tally = self.tally()
        return calibration_error(tally, calibration, self.center) / tally.rate


TRUTHS = [
    pytest.param(Calibration(slope=slope, intercept=intercept, event="taken"), id=name)
    for slope, intercept, name in (
        (1.0, -4.5, "log odds less a constant"),
        (0.5, -4.0, "overconfident scores"),
        (2.0, -7.0, "timid scores"),
        (1.0, -1.0, "frequent events"),
    )
]


class TestExactFit:
    @pytest.mark.parametrize("truth", TRUTHS)
    def test_it_finds_the_truth_and_its_error_is_small_on_other_users(
        self, truth: Calibration
    ) -> None:
        world, others = World(600, truth), World(600, truth, seed=9)
        found = world.fit()
        assert found.slope == pytest.approx(truth.slope, rel=0.1)
        assert others.error(found.calibration) < 0.1
        assert found.mean_predicted == pytest.approx(found.base_rate, rel=0.01)
        assert found.expected_error is not None
        assert found.expected_error / found.base_rate < 0.15

    @pytest.mark.parametrize("truth", TRUTHS)
    def test_the_sigmoid_of_the_scores_would_not_do(self, truth: Calibration) -> None:
        """The negative control."""
        world = World(600, truth)
        fitted = world.error(world.fit().calibration)
        assert world.error(UNCALIBRATED) > max(0.3, 5 * fitted)

    def test_each_bin_of_probabilities_is_as_frequent_as_it_says(self) -> None:
        truth = Calibration(slope=0.7, intercept=-3.0, event="taken")
        found, others = World(600, truth).fit().calibration, World(600, truth, seed=9)
        scores = np.concatenate(others.scores).astype(np.float32)
        took = np.concatenate([np.isin(np.arange(NUM_ITEMS), c.positives) for c in others.cases])
        predicted = found.probabilities(scores)
        for part in np.array_split(np.argsort(predicted), 20):
            expected = float(predicted[part].mean())
            allowed = 4 * math.sqrt(expected / len(part)) + 0.05 * expected
            assert took[part].mean() == pytest.approx(expected, abs=allowed)

    def test_a_shift_of_all_scores_changes_no_probability(self) -> None:
        world = World(200, Calibration(slope=1.0, intercept=-4.0, event="taken"))
        found = world.fit().calibration.probabilities(np.float32([0.0, 1.0, 2.0]))
        world.scores = [scores + 100 for scores in world.scores]
        world.center += 100
        again = world.fit().calibration.probabilities(np.float32([100.0, 101.0, 102.0]))
        np.testing.assert_allclose(found, again, rtol=1e-4)

    def test_scores_that_rank_the_wrong_way_give_everyone_the_base_rate(self) -> None:
        world = World(200, Calibration(slope=1.0, intercept=-4.0, event="taken"))
        world.scores = [-scores for scores in world.scores]
        found = world.fit()
        assert found.slope == 0.0
        found_rates = found.calibration.probabilities(np.float32([-9.0, 0.0, 9.0]))
        np.testing.assert_allclose(found_rates, found.base_rate, rtol=0.05)

    def test_one_user_is_fitted_by_the_prior_and_tells_no_error(self) -> None:
        world = World(1, Calibration(slope=1.0, intercept=-4.0, event="taken"), seed=3)
        found = world.fit()
        assert found.num_users == 1 and found.expected_error is None
        assert 0.3 < found.slope < 2.0 and math.isfinite(found.intercept)

    def test_of_no_user_nothing_is_fitted(self) -> None:
        assert fit_halves(np.zeros((2, 2, 4 + 2 * len(FINE))), 0.0, NUM_ITEMS) is None

    def test_users_without_a_positive_make_the_event_rare_and_not_impossible(self) -> None:
        odds = Odds.empty(50, FINE)
        for i in range(50):
            one = case([], shown=[0, 1], shown_positive=[False, False])
            odds.set_shown(i, one, np.zeros(2, np.float32), 0.0, FINE)
        halves = np.stack([odds.totals(np.arange(50) % 2 == which) for which in (0, 1)])
        found = fit_halves(halves, 0.0, 3)
        assert found is not None and (found.event, found.base_rate) == ("shown", 0.0)
        assert 0 < found.calibration.probabilities(np.zeros(1, np.float32))[0] < 0.01

    def test_all_positives_are_no_certainty(self) -> None:
        tally = Tally(bins=FINE, num_users=5, num_pairs=5, rate=1.0, lift=1.0,
                      candidates=FINE.count(np.ones(1)))  # fmt: skip
        found = fit(tally, "taken", 0.0, 1.0)
        assert found is not None and math.isfinite(found.intercept)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_user_whose_scores_are_not_finite_is_left_out(self, value: float) -> None:
        world = World(100, Calibration(slope=1.0, intercept=-4.0, event="taken"))
        expected = fit_halves(self.without_first(world), world.center, NUM_ITEMS)
        world.scores[0] = np.where(np.arange(NUM_ITEMS) == 7, value, world.scores[0])
        assert world.fit() == expected

    def without_first(self, world: World) -> np.ndarray:
        half = np.array([one.half for one in world.cases])
        half[0] = -1
        odds = world.odds(FINE)
        return np.stack([odds.totals(half == which) for which in (0, 1)])

    @settings(deadline=None, max_examples=30)
    @given(
        scores=st.lists(
            st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, math.nan, math.inf]),
            min_size=2, max_size=8,
        ),
        took=st.integers(0, 255),
    )  # fmt: skip
    def test_whatever_the_scores_there_is_a_finite_calibration_or_none(
        self, scores: list[float], took: int
    ) -> None:
        positives = [i for i in range(len(scores)) if took >> i & 1]
        odds = Odds.empty(1, FINE)
        with np.errstate(over="ignore", invalid="ignore"):
            center = center_of(np.float32(scores))
            if positives:
                odds.set_taken(0, case(positives), np.float32(scores), center, FINE)
        halves = np.stack([odds.totals(np.array([which == 0])) for which in (0, 1)])
        found = fit_halves(halves, center, len(scores))
        if found is None:
            assert not positives or not np.isfinite(scores).all()
        else:
            assert found.calibration.slope >= 0


class TestEvents:
    def halves(self, num_shown: int) -> np.ndarray:
        odds = Odds.empty(200, FINE)
        scores = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
        for i in range(100):
            odds.set_taken(i, case([3]), scores, 0.0, FINE)
        for i in range(100, 100 + num_shown):
            one = case([], shown=[2, 3], shown_positive=[False, True])
            odds.set_shown(i, one, scores[[2, 3]], 0.0, FINE)
        return np.stack([odds.totals(np.arange(200) % 2 == which) for which in (0, 1)])

    def test_where_a_shop_logs_what_it_shows_they_are_of_that(self) -> None:
        found = fit_halves(self.halves(MIN_SHOWN_USERS), 0.0, 4)
        assert found is not None and (found.event, found.num_users) == ("shown", MIN_SHOWN_USERS)
        assert found.base_rate == 0.5

    def test_where_it_hardly_does_they_are_of_what_is_taken(self) -> None:
        found = fit_halves(self.halves(MIN_SHOWN_USERS - 1), 0.0, 4)
        assert found is not None and (found.event, found.num_users) == ("taken", 100)
        assert found.base_rate == 0.25

    def test_a_user_weighs_the_same_however_much_was_shown(self) -> None:
        odds = Odds.empty(2, FINE)
        much = case([], shown=range(100), shown_positive=[False] * 100)
        odds.set_shown(0, much, np.zeros(100, np.float32), 0.0, FINE)
        little = case([], shown=[0], shown_positive=[True])
        odds.set_shown(1, little, np.zeros(1, np.float32), 0.0, FINE)
        totals = odds.totals(np.ones(2, bool))[EVENTS.index("shown")]
        assert Tally.of(totals).rate == 0.5


class TestProbabilities:
    @settings(deadline=None)
    @given(
        slope=st.floats(0, 1e3), intercept=st.floats(-1e6, 1e6),
        scores=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
    )  # fmt: skip
    def test_they_lie_in_the_unit_interval_and_never_fall_as_scores_rise(
        self, slope: float, intercept: float, scores: list[float]
    ) -> None:
        calibration = Calibration(slope=slope, intercept=intercept, event="taken")
        with np.errstate(invalid="ignore"):
            found = calibration.probabilities(np.sort(np.float32(scores)))
        if slope == 0 and np.isinf(scores).any():
            return
        assert found.dtype == np.float32
        assert (found >= 0).all() and (found <= 1).all() and (np.diff(found) >= 0).all()

    @pytest.mark.parametrize(
        ("slope", "intercept"), [(-0.1, 0.0), (math.nan, 0.0), (1.0, math.inf)]
    )
    def test_a_calibration_that_is_none_is_refused(self, slope: float, intercept: float) -> None:
        with pytest.raises(ValueError, match="expected a finite calibration of slope >= 0"):
            Calibration(slope=slope, intercept=intercept, event="taken")

    def test_where_nothing_was_fitted_pointwise_scores_are_log_odds(self) -> None:
        assert without_fit("pointwise", np.zeros(3, np.float32)) == UNCALIBRATED

    def test_and_others_share_one_item_among_the_catalogue(self) -> None:
        scores = np.float32(np.random.default_rng(0).normal(0, 2, 500))
        found = without_fit("listwise", scores)
        assert found.event == "next"
        assert found.probabilities(scores).sum() == pytest.approx(1.0, rel=1e-4)

    def test_that_needs_neither_an_item_nor_finite_scores(self) -> None:
        assert math.isfinite(intercept_of(np.zeros(0, np.float32), 0.1))
        assert math.isfinite(intercept_of(np.float32([math.nan, math.inf, 0.0]), 0.3))


def figures_of(world: World) -> Figures:
    num = len(world.cases)
    is_ranked = np.array([one.is_ranked for one in world.cases])
    return Figures(
        held_out=np.ones(num, bool), is_ranked=is_ranked, before=np.zeros((num, 3)),
        after=np.zeros((num, 3)), masses=np.zeros((num, 5)), odds=world.odds(COARSE),
    )  # fmt: skip


class TestNoisedFit:
    def fit(self, world: World, noise_multiplier: float, seed: int) -> Fit:
        config = EvaluateConfig(private=True, noise_multiplier=noise_multiplier)
        release = Release.of(config, "taken", NUM_ITEMS)
        total = release.total(figures_of(world))
        std = noise_multiplier * release.l2_sensitivity
        noised = total + np.random.default_rng(seed).normal(0.0, std, total.shape)
        public = COARSE.count(world.public - world.center) / NUM_ITEMS
        found = release.fit(noised, world.center, public)
        assert found is not None
        return found

    def test_of_many_users_it_is_nearly_what_is_true(self) -> None:
        world = World(1500, Calibration(slope=0.7, intercept=-4.0, event="taken"))
        found = [self.fit(world, 0.5, seed) for seed in range(8)]
        errors = [world.error(one.calibration) for one in found]
        assert np.median(errors) < 0.3 < world.error(UNCALIBRATED)
        assert np.mean([one.slope for one in found]) == pytest.approx(0.7, abs=0.15)

    def test_what_noise_hides_is_left_to_the_prior(self) -> None:
        world = World(200, Calibration(slope=2.0, intercept=-7.0, event="taken"))
        slopes = [self.fit(world, 5.0, seed).slope for seed in range(8)]
        assert max(abs(slope - 1.0) for slope in slopes) < 0.4

    def test_its_mean_is_not_far_off_even_so(self) -> None:
        world = World(400, Calibration(slope=1.0, intercept=-4.5, event="taken"))
        rate = world.tally().rate
        found = [self.fit(world, 5.0, seed).base_rate / rate for seed in range(8)]
        assert 0.3 < np.median(found) < 3

    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 10_000), noise=st.floats(0.3, 100), event=st.sampled_from(EVENTS))
    def test_whatever_the_noise_there_is_a_finite_calibration_or_none(
        self, seed: int, noise: float, event: str
    ) -> None:
        config = EvaluateConfig(private=True, noise_multiplier=noise)
        release = Release.of(config, event, NUM_ITEMS)  # type: ignore[arg-type]
        num = sum(part.width for part in release.parts.values())
        noised = 200 * np.random.default_rng(seed).normal(0.5, 1.0, num)
        found = release.fit(noised, 0.0, np.full(len(COARSE), 1 / len(COARSE)))
        assert found is None or (found.calibration.slope >= 0 and 0 < found.base_rate < 1)

    def test_of_too_few_users_nothing_is_said(self) -> None:
        release = Release.of(EvaluateConfig(private=True), "taken", NUM_ITEMS)
        nobody = np.zeros(sum(part.width for part in release.parts.values()))
        assert release.fit(nobody, 0.0, np.full(len(COARSE), 1 / len(COARSE))) is None

    @given(
        values=st.lists(st.floats(-5, 5), min_size=1, max_size=10),
        std=st.floats(1e-4, 10),
    )
    def test_noisy_shares_become_shares(self, values: list[float], std: float) -> None:
        stds = std * np.linspace(1.0, 0.01, len(values))
        found = shares(np.array(values), stds)
        assert (found >= 0).all() and found.sum() == pytest.approx(1.0)

    def test_shares_without_noise_stay_as_they_are(self) -> None:
        exact = np.array([0.2, 0.5, 0.3])
        np.testing.assert_allclose(shares(exact, np.array([1.0, 0.1, 0.01])), exact, atol=1e-9)


class TestTinyShop:
    """From a shard's cases to probabilities, as an update does it."""

    def cases(self) -> list[Case]:
        buffer = io.BytesIO()
        tiny_shop.shard(tiny_shop.outcomes(300)).cases.write_parquet(buffer)
        found = read_cases(buffer.getvalue())
        return [dataclasses.replace(one, held_out=True) for one in found]

    def measured(self, head: Head, cases: list[Case] | None = None) -> tuple[Figures, Scale]:
        rng = np.random.default_rng(0)
        text = rng.normal(size=(len(tiny_shop.distinct_texts()), 4)).astype(np.float32)
        weights = Weights(head=head, text=text)
        arms = Arms(
            items=tiny_shop.item_states()[0].table(), text_of_item=tiny_shop.text_of_item(),
            before=weights, after=weights,
        )  # fmt: skip
        scale = Scale(center=center_of(arms.reference()), bins=FINE)
        return measure(self.cases() if cases is None else cases, arms, scale), scale

    def fit(self, head: Head) -> tuple[Fit, float]:
        figures, scale = self.measured(head)
        half = np.arange(len(figures.held_out)) % 2
        halves = np.stack([figures.odds.totals(half == which) for which in (0, 1)])
        found = fit_halves(halves, scale.center, tiny_shop.NUM_ITEMS)
        assert found is not None
        tally = Tally.of(halves.sum(axis=0)[TAKEN])
        return found, calibration_error(tally, UNCALIBRATED, scale.center)

    def head(self, name: str, weight: float) -> Head:
        weights = dict(Head.decayed_frequency(8).weights)
        skip = np.zeros_like(weights["skip.weight"])
        skip[0, FEATURE_NAMES.index(name)] = weight
        return Head(weights={**weights, "skip.weight": skip})

    def test_scores_that_know_the_category_become_the_chances_of_it(self) -> None:
        found, uncalibrated = self.fit(self.head("category_share", 6.0))
        assert (found.event, found.num_users) == ("taken", 300)
        assert found.base_rate == pytest.approx(2 / tiny_shop.NUM_ITEMS)
        assert found.expected_error is not None
        assert found.expected_error < 0.1 * found.base_rate < uncalibrated

    def test_scores_that_tell_nothing_become_the_base_rate(self) -> None:
        """Nobody buys an item twice here, so what was bought before is the wrong way round."""
        found, _ = self.fit(self.head("own_bought", 3.0))
        assert found.slope == 0.0
        assert found.mean_predicted == pytest.approx(found.base_rate, rel=0.01)

    def test_what_was_shown_is_scored_as_all_items_are(self) -> None:
        window = self.cases()[0]
        everything = np.arange(tiny_shop.NUM_ITEMS, dtype=np.int32)
        nothing = {"positives": window.positives[:0], "gains": window.gains[:0]}
        taken = np.isin(everything, window.positives)
        shown = dataclasses.replace(window, **nothing, shown=everything, shown_positive=taken)
        figures, _ = self.measured(tiny_shop.random_head(), [window, shown])
        assert figures.is_ranked.tolist() == [True, False]
        assert figures.odds.is_fitted.tolist() == [[False, True], [True, False]]
        for part in ("rate", "lift", "candidates", "positives"):
            values = getattr(figures.odds, part)
            np.testing.assert_allclose(values[0, TAKEN], values[1, EVENTS.index("shown")])
