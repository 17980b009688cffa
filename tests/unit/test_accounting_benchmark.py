"""The accounting benchmark, here with few updates: it lives a life, and says what that cost."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_its_last_line_is_one_object_with_both_epsilons(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["accounting.py", "--scale", "0.022"])
    importlib.import_module("accounting").main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["compose_365_s"] > 0 and found["kept_bytes"] > 0
    exact = found["epsilon_365_recomputed"]
    assert found["epsilon_365"] == pytest.approx(1.283, rel=3e-3), "of 8 updates"
    assert exact <= found["epsilon_365"] <= exact * 1.003
    assert found["epsilon_365_cold"] == found["epsilon_365"]
    assert found["epsilon_365_distinct"] < found["epsilon_365"]
    assert found["epsilon_365_cohorts_46"] == pytest.approx(0.597, abs=1e-3)
