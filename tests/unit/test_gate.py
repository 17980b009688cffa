"""The gate lets nothing through that may be worse, or that too few users can tell about."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raysys.config import GateConfig
from raysys.evaluate.gate import judge
from raysys.evaluate.metrics import Comparison, Interval, bootstrap_mean

CONFIG = GateConfig(min_holdout_users=30, max_ndcg10_drop=0.01)


def comparison(change: Interval, num_users: int = 100) -> Comparison:
    flat = Interval(mean=0.3, low=0.2, high=0.4)
    others = {"conversion10": flat, "auc": flat}
    return Comparison(
        num_holdout_users=num_users,
        before={"ndcg10": flat, **others},
        after={"ndcg10": flat, **others},
        difference={"ndcg10": change, **others},
        num_prequential_users=num_users,
        prequential={"ndcg10": flat, **others},
    )


def interval(mean: float, half: float = 0.0) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        pytest.param(interval(0.0), "passed", id="equal"),
        pytest.param(interval(0.05, 0.02), "passed", id="clearly better"),
        pytest.param(interval(0.0, 0.009), "passed", id="surely within tolerance"),
        pytest.param(interval(-0.01), "passed", id="exactly the tolerance"),
        pytest.param(interval(-0.02, 0.005), "held", id="a drop"),
        pytest.param(interval(0.0, 0.02), "held", id="perhaps a drop"),
        pytest.param(interval(0.02, 0.04), "held", id="better on average but perhaps a drop"),
        pytest.param(interval(math.nan), "held", id="nan"),
        pytest.param(Interval(mean=0.1, low=math.nan, high=0.2), "held", id="nan bound"),
        pytest.param(interval(-math.inf), "held", id="minus infinity"),
    ],
)
def test_a_change_passes_only_if_it_surely_is_no_drop(change: Interval, verdict: str) -> None:
    decision = judge(comparison(change), CONFIG)
    assert decision.verdict == verdict
    assert "on 100 users" in decision.reason


@pytest.mark.parametrize(("num", "verdict"), [(0, "held"), (29, "held"), (30, "passed")])
def test_few_users_hold_back_whatever_they_say(num: int, verdict: str) -> None:
    decision = judge(comparison(interval(0.5), num), CONFIG)
    assert decision.verdict == verdict
    if verdict == "held":
        assert decision.reason == (
            f"only {num} held-out users in the window, gate.min_holdout_users is 30"
        )


def test_a_held_version_is_told_the_figures_and_the_bound() -> None:
    decision = judge(comparison(interval(-0.05, 0.01)), CONFIG)
    assert decision.reason == (
        "NDCG@10 -0.0500 [-0.0600, -0.0400] on 100 users may fall by more than "
        "gate.max_ndcg10_drop 0.01"
    )


@pytest.mark.parametrize(
    ("loss", "verdict"), [(0.0, "passed"), (0.05, "held")], ids=["same weights", "worse weights"]
)
def test_measured_differences_are_judged_as_they_should_be(loss: float, verdict: str) -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, 400)
    change = bootstrap_mean(noise - loss, num_resamples=200)
    assert judge(comparison(change, 400), CONFIG).verdict == verdict
