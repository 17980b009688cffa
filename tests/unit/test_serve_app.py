"""What a Serve config imports: the application is built, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve import Application

from raysys.errors import ConfigError
from raysys.serve.app import RankerArgs, build
from tests.helpers import write_config

RANKER_YAML = Path(__file__).parents[2] / "serve_configs" / "ranker.yaml"


def test_the_application_is_built_from_a_shops_config(tmp_path: Path) -> None:
    config = write_config(tmp_path, (tmp_path / "root").as_uri())
    assert isinstance(build({"config": str(config), "feedback_interval_s": 0.5}), Application)


def test_a_config_that_is_not_valid_refuses_the_application(tmp_path: Path) -> None:
    config = write_config(tmp_path, (tmp_path / "root").as_uri(), "rollouts: {}\n")
    with pytest.raises(ConfigError, match="rollouts: unknown key"):
        build({"config": str(config)})


@pytest.mark.parametrize(
    "args", [{}, {"config": "shop.yaml", "konfig": 1}, {"config": "x", "feedback_interval_s": 0}]
)
def test_unknown_and_missing_arguments_are_refused(args: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        build(args)


def test_the_shipped_config_names_this_application() -> None:
    (application,) = yaml.safe_load(RANKER_YAML.read_text())["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    RankerArgs.model_validate(application["args"])
    names = {deployment["name"] for deployment in application["deployments"]}
    assert names == {"Ranker", "RolloutController"}
