"""One user moves what an evaluation releases by no more than the noise is made for, and intervals
cover as often as they say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raysys.config import Config, EvaluateConfig, GateConfig, PrivacyConfig, PseudonymConfig
from raysys.errors import ConfigError
from raysys.evaluate.calibrate import Event
from raysys.evaluate.compare import chosen
from raysys.evaluate.estimate import Array
from raysys.evaluate.gate import judge
from raysys.evaluate.metrics import METRIC_NAMES, Comparison
from raysys.evaluate.odds import COARSE, EVENTS, Odds
from raysys.evaluate.private import KNOTS, Figures, Part, Release, auc_masses
from raysys.ingest.cases import Case
from raysys.ingest.features import UserHistory
from raysys.privacy.spend import mechanisms

CONFIG = EvaluateConfig(private=True)
RELEASE = Release.of(CONFIG)
ANY = st.floats(allow_nan=True, allow_infinity=True)
METRIC = st.one_of(st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf, -7.0]), ANY)


class NoClip(Release):
    """A broken release: what a user adds is scaled, and not clipped."""

    def _scaled(self, part: Part, values: Array, is_member: NDArray[np.bool_]) -> Array:
        values = values.reshape(len(is_member), part.width)
        return np.where(is_member[:, None], values / self._unit(part), 0.0)


class OnePerPart(Release):
    """A broken release: it takes the largest part for the whole."""

    @property
    def l2_sensitivity(self) -> float:
        return math.sqrt(max(part.share for part in self.parts.values()))


def broken(kind: type[Release]) -> Release:
    return kind(**{f.name: getattr(RELEASE, f.name) for f in dataclasses.fields(RELEASE)})


def figures_of(
    users: list[tuple[bool, list[float], list[float], list[float]]],
    odds: Odds | None = None,
) -> Figures:
    held_out, before, after, masses = zip(*users, strict=True) if users else ((), (), (), ())
    return Figures(
        held_out=np.array(held_out, bool),
        is_ranked=np.ones(len(users), bool),
        odds=Odds.empty(len(users), COARSE) if odds is None else odds,
        before=np.array(before, float).reshape(-1, len(METRIC_NAMES)),
        after=np.array(after, float).reshape(-1, len(METRIC_NAMES)),
        masses=np.array(masses, float).reshape(-1, len(KNOTS)),
    )


def take(figures: Figures, rows: Any) -> Figures:
    return Figures(**{f.name: getattr(figures, f.name)[rows] for f in dataclasses.fields(figures)})


def largest_move(release: Release, figures: Figures) -> float:
    """The largest L2 distance of the sums, over all users that may leave."""
    everyone, num = release.total(figures), len(figures.held_out)
    without = (take(figures, np.arange(num) != who) for who in range(num))
    return max((float(np.linalg.norm(everyone - release.total(w))) for w in without), default=0.0)


def odds_of(rows: Sequence[tuple[bool, float, float, Sequence[float]]]) -> Odds:
    """Of both events alike: whether fitted, rate, lift, and candidates in each bin."""
    out = Odds.empty(len(rows), COARSE)
    for user, (is_fitted, rate, lift, candidates) in enumerate(rows):
        out.is_fitted[user], out.rate[user], out.lift[user] = is_fitted, rate, lift
        out.candidates[user] = candidates
    return out


def shop_odds(num: int, seed: int = 0) -> Odds:
    """Users of 1,000 items: most score about 0, those bought before higher."""
    rng = np.random.default_rng([seed, 1])
    rows = []
    for _ in range(num):
        own = rng.poisson(20) / 1000
        shares = (1 - own) * np.array([0.1, 0.4, 0.3, 0.15, 0.05, 0, 0, 0, 0, 0])
        shares[4:9] += own * np.array([0.3, 0.3, 0.2, 0.15, 0.05])
        rate = rng.geometric(0.2) / 1000
        rows.append((True, rate, 4.0 * rate, shares))
    return odds_of(rows)


def population(num: int, *, held_out: float = 0.2, seed: int = 0, loss: float = 0.0) -> Figures:
    """Users whose figures are about those of a real shop."""
    rng = np.random.default_rng(seed)
    ndcg, auc = rng.beta(1, 3, num), rng.beta(6, 1.2, num)
    bought = (rng.random(num) < 0.6).astype(float)
    moved = np.where(rng.random(num) < 0.5, 0, rng.standard_t(3, num) * 0.04) - loss
    lost = np.where(rng.random(num) < 0.03, 1 - bought, bought)
    after = [ndcg + moved, lost, auc + rng.normal(0, 0.02, num)]
    return Figures(
        held_out=rng.random(num) < held_out,
        is_ranked=np.ones(num, bool),
        odds=shop_odds(num, seed),
        before=np.stack([ndcg, bought, auc], axis=1),
        after=np.clip(np.stack(after, axis=1), 0, 1),
        masses=np.stack([auc_masses(np.array([value])) for value in auc]),
    )


class TestSensitivity:
    @settings(deadline=None, max_examples=60)
    @given(
        users=st.lists(
            st.tuples(
                st.booleans(),
                st.lists(METRIC, min_size=3, max_size=3),
                st.lists(METRIC, min_size=3, max_size=3),
                st.lists(METRIC, min_size=len(KNOTS), max_size=len(KNOTS)),
                st.tuples(
                    st.booleans(),
                    METRIC,
                    METRIC,
                    st.lists(METRIC, min_size=len(COARSE), max_size=len(COARSE)),
                ),
            ),
            max_size=6,
        ),
        max_difference=st.floats(1e-3, 1.0),
        event=st.sampled_from(EVENTS),
        num_items=st.integers(1, 100_000),
    )
    def test_leaving_a_user_out_moves_the_sums_by_at_most_the_sensitivity_whatever_was_measured(
        self, users: list[Any], max_difference: float, event: Event, num_items: int
    ) -> None:
        config = dataclasses.replace(CONFIG, max_difference=max_difference)
        release = Release.of(config, event, num_items)
        figures = figures_of([user[:4] for user in users], odds_of([user[4] for user in users]))
        with np.errstate(all="ignore"):
            moved = largest_move(release, figures)
        assert moved <= release.l2_sensitivity + 1e-9

    def test_no_user_of_a_shop_moves_them_by_more(self) -> None:
        assert largest_move(RELEASE, population(400)) <= RELEASE.l2_sensitivity + 1e-9

    def test_a_user_can_move_them_by_all_of_it(self) -> None:
        masses = auc_masses(np.array([1.0])).tolist()
        odds = odds_of([(True, 1.0, COARSE.edges[-1], [0.0] * 9 + [1.0])])
        for user in ((True, [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], masses),
                     (False, [0.0, 0.0, 1.0], [0.0] * 3, masses)):  # fmt: skip
            moved = largest_move(RELEASE, figures_of([user], odds))
            assert moved == pytest.approx(RELEASE.l2_sensitivity, rel=1e-6)

    def test_a_user_of_a_window_who_was_shown_something_too_moves_them_by_no_more(self) -> None:
        """Two rows, of which each fills what the other leaves."""
        masses = auc_masses(np.array([1.0])).tolist()
        rows = [(True, [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], masses)] * 2
        full = (1.0, float(COARSE.edges[-1]), [0.0] * 9 + [1.0])
        odds = odds_of([(False, *full), (True, *full)])
        both = dataclasses.replace(figures_of(rows, odds), is_ranked=np.array([True, False]))
        release = Release.of(CONFIG, "shown", 1000)
        moved = float(np.linalg.norm(release.total(both)))
        assert moved == pytest.approx(release.l2_sensitivity, rel=1e-6)
        twice = dataclasses.replace(both, is_ranked=np.array([True, True]))
        assert np.linalg.norm(release.total(twice)) > 1.3 * release.l2_sensitivity

    def test_without_the_clip_a_user_would_move_them_by_more(self) -> None:
        one_each = [6.0 * mass for mass in auc_masses(np.array([1.0]))]
        figures = figures_of([(False, [0.0, 0.0, 1.0], [0.0] * 3, one_each)])
        assert largest_move(broken(NoClip), figures) > 2 * RELEASE.l2_sensitivity
        assert largest_move(RELEASE, figures) <= RELEASE.l2_sensitivity + 1e-9

    def test_the_largest_part_alone_would_be_too_little(self) -> None:
        alone = broken(OnePerPart)
        assert largest_move(alone, population(400)) > alone.l2_sensitivity

    def test_a_histogram_weighs_1_however_many_positives_a_user_has(self) -> None:
        shares = np.random.default_rng(0).random(37)
        masses = auc_masses(shares)
        assert masses.sum() == pytest.approx(1.0) and (masses >= 0).all()
        assert masses @ KNOTS == pytest.approx(shares.mean())


class TestWhoIsScored:
    def case(self, draw: float, *, held_out: bool = False) -> Case:
        return Case(
            held_out=held_out, tried=True, draw=draw, history=UserHistory.empty(), now=0.0,
            positives=np.array([0], np.int32), gains=np.array([1.0], np.float32),
            shown=np.zeros(0, np.int32), shown_positive=np.zeros(0, bool),
        )  # fmt: skip

    def moved_by_another(self, config: EvaluateConfig) -> int:
        """How many of the others are scored or not, because of one more user."""
        others = [self.case(i / 10) for i in range(10)]
        alone = {case.draw for case in chosen(others, config, 1)}
        among = chosen([*others, self.case(0.05, held_out=True)], config, 1)
        return len(alone ^ {case.draw for case in among if not case.held_out})

    def test_one_more_user_pushes_nobody_out(self) -> None:
        for fraction in (0.3, 1.0):
            assert self.moved_by_another(EvaluateConfig(private=True, max_users=5,
                                                        sample_fraction=fraction)) == 0  # fmt: skip

    def test_with_a_cap_one_would(self) -> None:
        assert self.moved_by_another(EvaluateConfig(max_users=5)) == 1

    def test_a_fraction_is_of_the_users_draws(self) -> None:
        config = EvaluateConfig(private=True, sample_fraction=0.25)
        found = chosen([self.case(i / 100) for i in range(100)], config, 4)
        assert [case.draw for case in found] == [i / 100 for i in range(25)]


class TestNoise:
    def test_it_has_the_deviation_that_is_charged_times_the_sensitivity(self) -> None:
        spend = mechanisms(PrivacyConfig(), num_steps=1, num_count_releases=1, evaluate=CONFIG)
        assert spend.num_evaluations == 1
        assert spend.evaluation_noise_multiplier == CONFIG.noise_multiplier
        zeros = np.zeros(100_000)
        std = spend.evaluation_noise_multiplier * RELEASE.l2_sensitivity
        # Nine standard errors: the noise has no seed.
        assert RELEASE.noise(zeros).std() == pytest.approx(std, rel=9 / math.sqrt(2 * len(zeros)))

    def test_two_releases_differ_and_no_global_seed_repeats_them(self) -> None:
        zeros = np.zeros(50)
        np.random.seed(0)
        first = RELEASE.noise(zeros)
        np.random.seed(0)
        assert not np.isclose(first, RELEASE.noise(zeros)).any()

    def test_an_evaluation_that_is_not_private_is_not_charged(self) -> None:
        spend = mechanisms(
            PrivacyConfig(), num_steps=1, num_count_releases=1, evaluate=EvaluateConfig()
        )
        assert spend.num_evaluations == 0

    def test_noise_that_nothing_accounts_for_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"evaluate\.private: expected false where privacy"):
            Config(
                root="s3://b", pseudonyms=PseudonymConfig(key_file="key"), evaluate=CONFIG,
                privacy=PrivacyConfig(enabled=False),
            )  # fmt: skip


def exact_means(figures: Figures, limit: float) -> dict[str, Array]:
    held = take(figures, figures.held_out)
    limits = np.array([limit, 1.0, limit])
    change = np.clip(held.after - held.before, -limits, limits).mean(axis=0)
    before = held.before.mean(axis=0)
    return {
        "before": before,
        "after": before + change,
        "difference": change,
        "prequential": figures.before.mean(axis=0),
    }


class TestEstimates:
    def test_without_noise_they_are_the_means(self) -> None:
        figures = population(2000)
        comparison = RELEASE.comparison(RELEASE.total(figures))
        assert comparison.num_holdout_users == figures.held_out.sum()
        assert comparison.num_prequential_users == 2000
        for arm, means in exact_means(figures, CONFIG.max_difference).items():
            found = [getattr(comparison, arm)[name].mean for name in METRIC_NAMES]
            assert found == pytest.approx(means.tolist(), abs=1e-9)

    @pytest.mark.parametrize("noise_multiplier", [1.0, 5.0, 8.0])
    def test_intervals_cover_what_is_true_of_all_users_in_95_of_100_releases(
        self, noise_multiplier: float
    ) -> None:
        config = dataclasses.replace(CONFIG, noise_multiplier=noise_multiplier)
        release = Release.of(config)
        world = population(60_000)
        true = exact_means(world, config.max_difference)
        rng = np.random.default_rng(1)
        std = noise_multiplier * release.l2_sensitivity
        num = 300
        covered = {arm: np.zeros(len(METRIC_NAMES)) for arm in true}
        for _ in range(num):
            total = release.total(take(world, rng.choice(len(world.held_out), 1200)))
            found = release.comparison(total + rng.normal(0.0, std, total.shape))
            for arm, means in true.items():
                intervals = [getattr(found, arm)[name] for name in METRIC_NAMES]
                covered[arm] += [
                    i.low <= m <= i.high for i, m in zip(intervals, means, strict=True)
                ]
        shares = np.concatenate(list(covered.values())) / num
        # 95 % less four standard errors of 300 releases.
        assert shares.min() > 0.90

    def test_an_interval_without_the_noise_would_cover_far_less(self) -> None:
        config = dataclasses.replace(CONFIG, noise_multiplier=8.0)
        world, rng = population(60_000), np.random.default_rng(1)
        true = exact_means(world, config.max_difference)["difference"][0]
        noisy, blind = (
            Release.of(dataclasses.replace(config, noise_multiplier=noise)) for noise in (8.0, 0.3)
        )
        num, covered = 200, 0
        for _ in range(num):
            total = noisy.total(take(world, rng.choice(len(world.held_out), 1200)))
            noise = rng.normal(0.0, 8.0 * noisy.l2_sensitivity, total.shape)
            found = blind.comparison(total + noise).difference["ndcg10"]
            covered += found.low <= true <= found.high
        assert covered / num < 0.8

    def test_of_too_few_users_nothing_is_said(self) -> None:
        nobody = RELEASE.comparison(RELEASE.total(population(5, held_out=1.0)))
        assert all(math.isnan(nobody.difference[name].mean) for name in METRIC_NAMES)
        assert judge(nobody, GateConfig(min_holdout_users=1)).verdict == "held"


class TestGate:
    def judge(self, figures: Figures, **changes: Any) -> tuple[str, str]:
        config = dataclasses.replace(CONFIG, **changes)
        release = Release.of(config)
        comparison: Comparison = release.comparison(release.total(figures))
        decision = judge(comparison, GateConfig())
        return decision.verdict, decision.reason

    def test_what_is_no_drop_passes_on_the_noised_figures(self) -> None:
        verdict, reason = self.judge(population(12_000))
        assert verdict == "passed"
        assert "on about 2" in reason

    def test_a_drop_is_held_without_a_word_of_noise(self) -> None:
        verdict, reason = self.judge(population(12_000, loss=0.05))
        assert verdict == "held" and "noise" not in reason

    def test_too_much_noise_holds_and_says_what_to_do(self) -> None:
        verdict, reason = self.judge(population(1200), noise_multiplier=30.0)
        assert verdict == "held"
        assert "noise alone is +-0.0" in reason and "evaluate.noise_multiplier" in reason
