"""What a job says and exits with, for errors of its own process and of Ray's tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from ray.exceptions import RayTaskError

from raysys.config import Config
from raysys.entry import run_job
from raysys.errors import ConfigError, StorageUnavailableError
from tests.helpers import write_config

TASK = """\x1b[36mray::Map(_clean_partition)()\x1b[39m (pid=31660, ip=192.0.2.2)
  File "raysys/ingest/pipeline.py", line 178, in _clean_partition
    raise ConfigError("...")
raysys.errors.{name}: {message}

The above exception was the direct cause of the following exception:

\x1b[36mray::Map(_clean_partition)()\x1b[39m (pid=31660, ip=192.0.2.2)
ray.exceptions.UserCodeException: UDF failed to process a data block."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], int]:
    config = write_config(tmp_path, (tmp_path / "root").as_uri())
    monkeypatch.setattr(sys, "argv", ["job", "--config", str(config)])

    def run(error: Exception) -> int:
        def action(config: Config) -> NoReturn:
            raise error

        return run_job("A job that fails.", action)

    return run


def of_task(name: str, message: str) -> RayTaskError:
    text = TASK.format(name=name, message=message)
    return RayTaskError("_clean_partition", text, RuntimeError("UDF failed"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(ConfigError("KEY is not set"), 1, id="terminal"),
        pytest.param(StorageUnavailableError("KEY is not set"), 75, id="transient"),
        pytest.param(of_task("ConfigError", "KEY is not set"), 1, id="terminal-in-a-task"),
        pytest.param(
            of_task("StorageUnavailableError", "KEY is not set"), 75, id="transient-in-a-task"
        ),
    ],
)
def test_an_error_of_ours_is_one_line_wherever_it_was_raised(
    error: Exception,
    code: int,
    run: Callable[[Exception], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(error) == code
    assert capsys.readouterr().err == "raysys: KEY is not set\n"


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(ValueError("raysys.errors.ConfigError: made up"), id="not-of-ray"),
        pytest.param(RayTaskError("f", "ValueError: ours", ValueError()), id="bug-in-a-task"),
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception, run: Callable[[Exception], int]) -> None:
    with pytest.raises(type(error)):
        run(error)
