"""What may be tried, and by which search: refused in one line where it would void the guarantee."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysys.config import Config, load_config, parse_config, with_values
from raysys.config.tune import TUNABLE
from raysys.entry import run_job
from raysys.errors import ConfigError
from tests.helpers import write_config


def parse(tune: dict[str, Any], **sections: Any) -> Config:
    body = {"root": "file:///shop", "pseudonyms": {"key_file": "key"}, "tune": tune}
    return parse_config({**body, **sections})


def test_every_key_that_may_be_tried_is_one_of_the_config() -> None:
    config = parse({})
    for key in TUNABLE:
        section, _, name = key.partition(".")
        assert hasattr(getattr(config, section), name), key


@pytest.mark.parametrize(
    ("tune", "told"),
    [
        pytest.param({"scheduler": "asha"}, "tune.scheduler: expected 'fifo' (under", id="asha"),
        pytest.param({"scheduler": "pbt"}, "tune.scheduler: expected 'fifo' (under", id="pbt"),
        pytest.param(
            {"search": "bayesian"}, "tune.search: expected 'random' (under", id="bayesian"
        ),
    ],
)
def test_under_privacy_only_independent_draws_are_admitted(tune: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(tune)
    message = str(refused.value)
    assert message.startswith(told) and "\n" not in message
    assert "by the scores of other trials, which nothing accounts for" in message
    assert parse(tune, privacy={"enabled": False}).tune is not None


@pytest.mark.parametrize(
    ("tune", "told"),
    [
        pytest.param(
            {"space": {"train.num_steps": [5]}}, "tune.space.train.num_steps: expected a key of",
            id="steps",
        ),
        pytest.param(
            {"space": {"privacy.epsilon_total": [8.0]}},
            "tune.space.privacy.epsilon_total: expected a key of", id="budget",
        ),
        pytest.param(
            {"space": {"model.lora_rank": []}}, "tune.space.model.lora_rank: expected at least one",
            id="nothing",
        ),
        pytest.param(
            {"space": {"model.lora_rank": [2, 0]}},
            "tune.space.model.lora_rank: model.lora_rank: expected >= 1, got 0", id="bound",
        ),
        pytest.param(
            {"space": {"train.learning_rate": ["1e-3"]}},
            "tune.space.train.learning_rate: train.learning_rate: expected a number (YAML reads",
            id="type",
        ),
        pytest.param(
            {"space": {"model.lora_rank": 4}}, "tune.space.model.lora_rank: expected a list",
            id="no list",
        ),
        pytest.param(
            {"method": "repeat", "mean_trials": 1.0}, "tune.mean_trials: expected more than 1",
            id="mean",
        ),
        pytest.param({"shape": -0.5}, "tune.shape: expected >= 0, got -0.5", id="shape"),
        pytest.param({"method": "grid"}, "tune.method: expected 'auto' or", id="method"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_in_one_line(tune: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(tune)
    assert str(refused.value).startswith(told) and "\n" not in str(refused.value)


def test_population_based_training_changes_only_what_can_change_within_a_trial() -> None:
    tune = {"scheduler": "pbt", "space": {"model.lora_rank": [2, 4]}}
    with pytest.raises(
        ConfigError, match=r"tune\.space\.model\.lora_rank: expected with tune\.scheduler: pbt"
    ):
        parse(tune, privacy={"enabled": False})
    rates = {"scheduler": "pbt", "space": {"train.learning_rate": [1e-3, 1e-4]}}
    parse(rates, privacy={"enabled": False})


def test_a_trials_config_is_the_shops_with_its_own_values() -> None:
    config = parse({"space": {"model.target_modules": [["query", "value"], ["output.dense"]]}})
    values = {"model.target_modules": ["query"], "privacy.noise_multiplier": 6, "train.alpha": 0.5}
    changed = with_values(config, values)
    assert changed.model.target_modules == ("query",)
    assert (changed.privacy.noise_multiplier, changed.train.alpha) == (6.0, 0.5)
    assert with_values(config, {}) == config
    with pytest.raises(ConfigError, match=r"train\.alpha: expected a fraction"):
        with_values(config, {"train.alpha": 2.0})


def test_the_job_ends_as_it_does_with_any_bad_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, (tmp_path / "root").as_uri(), "tune: {scheduler: asha}\n")
    monkeypatch.setattr("sys.argv", ["tune.py", "--config", str(path)])
    assert run_job("", lambda config: None) == 1
    assert capsys.readouterr().err.startswith("raysys: tune.scheduler: expected 'fifo'")


def test_a_space_reads_from_yaml(tmp_path: Path) -> None:
    body = "tune:\n  space:\n    model.lora_rank: [2, 4]\n    privacy.l2_clip_norm: [0.5, 1]\n"
    config = load_config(write_config(tmp_path, (tmp_path / "root").as_uri(), body))
    assert dict(config.tune.space) == {
        "model.lora_rank": (2, 4), "privacy.l2_clip_norm": (0.5, 1),
    }  # fmt: skip
