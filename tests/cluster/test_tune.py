"""Selections on a real Ray Tune: what is released, and that nothing else is left or told."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysys.config import load_config
from raysys.select import run_selection
from raysys.storage import Root
from tests.update_shop import DAYS, find_problems, write_catalogue, write_day, write_shop

pytestmark = pytest.mark.usefixtures("ray_cluster")
TUNE = """
tune:
  space:
    train.bootstrap_learning_rate: [0.00123454321, 0.00345676543, 0.00567898765]
    privacy.noise_multiplier: [4.5, 6.7891]
  method: compose
  mean_trials: 3
"""


def test_x(local_root: Root, tmp_path: Path, tiny_encoder: str, capsys) -> None:
    path = write_shop(tmp_path, local_root, tiny_encoder)
    path.write_text(path.read_text() + TUNE)
    write_catalogue(local_root)
    write_day(local_root, DAYS[0])
    lines = []
    commit = run_selection(load_config(path), lines.append)
    print("\n".join(lines)); print(commit.selected, commit.metrics["selection"], commit.spent)
    print(local_root.read_bytes(f"versions/{commit.version}/report.md").decode())
    assert find_problems(local_root) == []
