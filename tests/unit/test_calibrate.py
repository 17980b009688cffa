"""With a horizon, the noise is what makes the budget last for it, and no more."""

from __future__ import annotations

import dataclasses

import pytest

from raysys.config import (
    Config,
    EvaluateConfig,
    PrivacyConfig,
    PseudonymConfig,
    TrainConfig,
    parse_config,
)
from raysys.errors import ConfigError
from raysys.ledger.records import PrivacySpend
from raysys.privacy.calibrate import describe, noise_multiplier_of, updates_paid
from raysys.privacy.composed import Composed
from raysys.privacy.spend import life, update_spend

TRAIN = TrainConfig(num_steps=3, bootstrap_num_steps=9)


def config_of(**privacy: object) -> Config:
    return Config(
        root="file:///shop",
        pseudonyms=PseudonymConfig(key_file="key"),
        privacy=PrivacyConfig(**privacy),  # type: ignore[arg-type]
        train=TRAIN,
    )


def spends(config: Config, num: int, noise: float) -> list[PrivacySpend]:
    first, later = (
        update_spend(config, first=is_first, num_count_releases=1, noise_multiplier=noise)
        for is_first in (True, False)
    )
    return life(first, later, num, config.privacy.cohorts)


def spent(config: Config, num: int, noise: float) -> float:
    """As the ledger composes them: one by one."""
    composed = Composed.nothing()
    for spend in spends(config, num, noise):
        composed = composed.plus(spend)
    return composed.epsilon(config.privacy.delta)


@pytest.mark.parametrize(
    "privacy",
    [
        pytest.param({"horizon": 20}, id="everyone"),
        pytest.param({"horizon": 20, "cohorts": 5}, id="cohorts"),
        pytest.param({"horizon": 1, "epsilon_total": 2.0}, id="one update"),
    ],
)
def test_the_budget_lasts_for_the_horizon_and_hardly_longer(privacy: dict[str, object]) -> None:
    config = config_of(**privacy)
    noise, horizon = noise_multiplier_of(config), config.privacy.horizon
    assert horizon is not None
    # A hundredth of a percent is how much composing one by one may differ from all at once.
    assert spent(config, horizon, noise) <= config.privacy.epsilon_total * (1 + 1e-4)
    assert spent(config, horizon, noise * 0.99) > config.privacy.epsilon_total
    assert updates_paid(config) >= horizon


def test_cohorts_and_fewer_updates_need_less_noise_an_evaluation_more() -> None:
    plain = config_of(horizon=20)
    evaluated = dataclasses.replace(plain, evaluate=EvaluateConfig(private=True))
    cohorts, shorter = config_of(horizon=20, cohorts=5), config_of(horizon=10)
    found = [noise_multiplier_of(c) for c in (cohorts, shorter, plain, evaluated)]
    assert found == sorted(found) and len(set(found)) == 4


def test_a_noise_that_is_given_stands_and_without_a_horizon_it_is_the_default() -> None:
    assert noise_multiplier_of(config_of(horizon=20, noise_multiplier=2.0)) == 2.0
    assert noise_multiplier_of(config_of()) == 4.5
    assert noise_multiplier_of(config_of(horizon=20, enabled=False)) == 4.5


def test_it_is_told_how_long_the_budget_really_lasts() -> None:
    config = config_of(horizon=200, noise_multiplier=2.0)
    paid = updates_paid(config)
    assert 1 < paid < 200
    assert Composed.at_once(spends(config, paid, 2.0)).epsilon(1e-4) <= 8.0
    assert Composed.at_once(spends(config, paid + 1, 2.0)).epsilon(1e-4) > 8.0
    told = describe(config, 2.0)
    assert told.startswith(f"2, as configured: epsilon_total 8 pays for {paid} updates")
    assert "privacy.horizon is 200" in told and "unit: a user; neighbours: add or remove" in told


def test_a_horizon_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.horizon: no noise makes epsilon_total 1 "):
        noise_multiplier_of(config_of(horizon=1000, epsilon_total=1.0))


def test_the_file_may_leave_noise_and_horizon_out_or_say_null() -> None:
    raw = {"root": "file:///shop", "pseudonyms": {"key_file": "k"}}
    plain = parse_config(raw)
    assert plain.privacy.noise_multiplier is plain.privacy.horizon is None
    null = {"noise_multiplier": None, "horizon": None}
    assert parse_config({**raw, "privacy": null}).hash() == plain.hash(), "as a recipe has it"
    given = parse_config({**raw, "privacy": {"noise_multiplier": 3, "horizon": 12}})
    assert (given.privacy.noise_multiplier, given.privacy.horizon) == (3.0, 12)
    assert given.hash() != plain.hash()
    for bad in ({"horizon": 0}, {"horizon": 1.5}, {"noise_multiplier": 0}, {"cohorts": 0}):
        with pytest.raises(ConfigError, match=f"privacy.{next(iter(bad))}: expected"):
            parse_config({**raw, "privacy": bad})
