"""The ledger benchmark: what it measures is what it says, here with little work."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from raysys.ledger import snapshots
from raysys.ledger.log import Log
from raysys.ledger.state import fold
from raysys.ledger.verify import verify
from raysys.storage import Root
from tests.helpers import OverwritingRoot

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("ledger")


def test_appends_are_appended(benchmark: ModuleType, root: Root) -> None:
    assert len(benchmark.append_times(root, 25)) == 25
    assert Log(root).refresh().sequence == 25


def test_a_loaded_ledger_is_a_sound_one_with_a_snapshot(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "NUM_REPEATS", 1)
    removed: list[int] = []
    root = Root((tmp_path / "root").as_uri())

    def delete_prefix(self: Root, prefix: str) -> None:
        assert prefix == "ledger/snapshots"
        removed.extend(verify(root).snapshots)

    monkeypatch.setattr(Root, "delete_prefix", delete_prefix)
    benchmark._load(tmp_path / "root", 600)
    assert removed == [600 - snapshots.INTERVAL // 2]
    state = Log(root).refresh()
    assert state.sequence == 600 and len(state.committed) > 20 and state.rollout is not None
    assert state == fold(Log(root).entries())


def test_a_race_has_one_winner_each_round(benchmark: ModuleType, root: Root) -> None:
    assert benchmark.race(root.uri, 3) == 1.0


def test_a_store_without_conditional_writes_has_many(
    benchmark: ModuleType, local_root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    monkeypatch.setattr(benchmark, "Root", OverwritingRoot)
    assert benchmark.race(local_root.uri, 3) == 0.0


def test_it_plans_what_is_new(benchmark: ModuleType) -> None:
    assert benchmark.plan(100) > 0


def test_the_last_line_has_the_figures(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    figures: dict[str, float] = {}
    benchmark._report(figures, {"append_local_p50_ms": 1.23456})
    assert json.loads(json.dumps(figures)) == {"append_local_p50_ms": 1.2346}
    assert "append_local_p50_ms" in capsys.readouterr().out
