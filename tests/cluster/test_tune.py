"""Selections on a real Ray Tune: what is released, and that nothing else is left or told."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.state import list_actors, list_tasks

from raysys.config import load_config
from raysys.errors import TrialError
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted
from raysys.registry.store import load_version
from raysys.registry.version import version_path
from raysys.replay import replay
from raysys.select import run_selection
from raysys.storage import Root
from raysys.train import tune
from raysys.train.hush import Silence
from raysys.train.trial import Look, Trials
from raysys.train.vault import Result, Vault
from tests.update_shop import DAYS, contents, find_problems, write_catalogue, write_day, write_shop

pytestmark = pytest.mark.usefixtures("ray_cluster")
RATE = "train.bootstrap_learning_rate"
NUM_TRIALS = 3
PRIVATE = f"""
tune:
  space: {{{RATE}: [0.001, 0.003], privacy.noise_multiplier: [4.5, 6.0]}}
  method: repeat
  mean_trials: 2.5
  shape: 1
"""


def shop_of(folder: Path, root: Root, encoder: str, tune_section: str, **changes: Any) -> Path:
    path = write_shop(folder, root, encoder, **changes)
    path.write_text(path.read_text() + tune_section)
    write_catalogue(root)
    write_day(root, DAYS[0])
    return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What a spy in the vault saw of one."""

    rate: float
    noised: float
    weights: bytes


class Spy:
    """Draws hyperparameters that stand in no file, and looks over the vault's shoulder."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.path = folder / "spied.jsonl"
        self.rates = [0.001234543217, 0.002345676543, 0.003456787654]
        drawn = iter(self.rates)
        patch.setattr(tune, "draw_num_trials", lambda selection, rng: NUM_TRIALS)
        patch.setattr(tune, "draw_values", lambda space, rng: {RATE: next(drawn)})
        patch.setattr(tune, "Vault", spying(str(self.path)))

    @property
    def trials(self) -> list[Trial]:
        return [
            Trial(rate=rate, noised=score, weights=bytes.fromhex(weights))
            for rate, score, weights in map(json.loads, self.path.read_text().splitlines())
        ]


def spying(path: str) -> type[Vault]:
    class SpiedVault(Vault):
        def offer(self, result: Result) -> None:
            import pickle

            weights = pickle.loads(result.output).head.weights
            last = weights[sorted(weights)[-1]].tobytes()[-16:]
            with open(path, "a") as file:
                seen = [result.values["train.bootstrap_learning_rate"], result.score, last.hex()]
                file.write(json.dumps(seen) + "\n")
            super().offer(result)

    return SpiedVault


def marks(losers: list[Trial]) -> list[bytes]:
    """How a loser's score, learning rate and weights would look, wherever they were written."""
    found = [trial.weights for trial in losers]
    for number in [x for trial in losers for x in (trial.rate, trial.noised)]:
        found += [repr(number)[:10].encode(), struct.pack("<d", number), struct.pack("<f", number)]
    return found


def traces(root: Root, told: str, losers: list[Trial]) -> list[str]:
    """Where anything of the losers is: below the root, in Ray's own folder and state, on screen."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    places = contents(root) | {"screen": told.encode()}
    for path in session.rglob("*"):
        if path.is_file():
            places[str(path.relative_to(session))] = path.read_bytes()
    places["state of Ray"] = f"{list_actors(detail=True)} {list_tasks(detail=True)}".encode()
    return [name for name, data in places.items() for mark in marks(losers) if mark in data]


def leftovers() -> list[str]:
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    return [str(path) for path in session.glob("artifacts/*/selection-*")]


def losers_of(commit: UpdateCommitted, spy: Spy) -> list[Trial]:
    assert len(spy.trials) == NUM_TRIALS
    return [trial for trial in spy.trials if trial.rate != commit.selected[RATE]]


@pytest.fixture
def spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(tmp_path, monkeypatch)


class TestPrivately:
    @pytest.fixture
    def told(self, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
        lines: list[str] = []

        def all_told() -> str:
            out, error = capfd.readouterr()
            lines.extend((out, error))
            return "\n".join(lines)

        all_told.line = lines.append  # type: ignore[attr-defined]
        yield all_told

    def test_only_the_best_trial_leaves_anything(
        self, local_root: Root, tmp_path: Path, tiny_encoder: str, spy: Spy, told: Any
    ) -> None:
        path = shop_of(tmp_path, local_root, tiny_encoder, PRIVATE)
        commit = run_selection(load_config(path), told.line)
        assert find_problems(local_root) == []
        best = max(spy.trials, key=lambda trial: trial.noised)
        assert commit.selected == {RATE: best.rate}
        told_score = commit.metrics["selection"]["holdout_ndcg10_gain_sum"]
        assert told_score == pytest.approx(best.noised * 0.1)
        load_version(local_root, commit).check_golden()
        told_of_it = told()
        assert traces(local_root, told_of_it, losers_of(commit, spy)) == []
        released = dataclasses.replace(best, noised=told_score)
        assert traces(local_root, told_of_it, [released]) != [], "the search finds what there is"
        assert leftovers() == []

        # Nor how many there were.
        spent = commit.spent
        assert spent is not None and spent.selection is not None and spent.num_steps == 0
        assert (spent.selection.method, spent.selection.num_trials) == ("repeat", 0)
        assert commit.seconds == 0 and "a random number of trials, 2.5 on average" in told_of_it
        assert "3 trials" not in told_of_it and "Number of trials" not in told_of_it
        report = local_root.read_bytes(version_path(str(commit.version), "report.md")).decode()
        assert f"{{'{RATE}': {best.rate}}}" in report
        assert f"train: {{bootstrap_learning_rate: {best.rate}}}" in told_of_it

    def test_a_reporter_that_leaks_would_be_found(
        self,
        local_root: Root,
        tmp_path: Path,
        tiny_encoder: str,
        spy: Spy,
        told: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        honest = tune._offer

        def leaking(end: Look, values: Mapping[str, object], vault: Any) -> None:
            honest(end, values, vault)
            ray.tune.report({"score": end.score})

        def leaking_trial(config: dict[str, Any], trials: Trials, vault: Any) -> None:
            tune._offer = leaking
            tune._private_trial(config, trials, vault)

        monkeypatch.setattr(tune, "_private_trial", leaking_trial)
        monkeypatch.setattr(Silence, "forget", lambda self: None)
        config = load_config(shop_of(tmp_path, local_root, tiny_encoder, PRIVATE))
        commit = run_selection(config, told.line)
        found = traces(local_root, told(), losers_of(commit, spy))
        for path in leftovers():
            shutil.rmtree(path)
        assert any("driver_artifacts/experiment_state" in name for name in found)

    def test_a_trial_that_fails_fails_the_selection_which_stays_charged(
        self, local_root: Root, tmp_path: Path, tiny_encoder: str, spy: Spy
    ) -> None:
        spy.rates[1] = 1e30
        path = shop_of(tmp_path, local_root, tiny_encoder, PRIVATE)
        with pytest.raises(TrialError, match=rf"selection: {RATE}=1e\+30: "):
            run_selection(load_config(path))
        state = Log(local_root).refresh()
        ((_, spend, status),) = state.spends
        assert status == "abandoned" and spend.selection is not None
        assert state.versions == {} and leftovers() == []


@pytest.mark.parametrize(
    "how",
    ["scheduler: asha", "scheduler: pbt", "search: bayesian"],
    ids=["asha", "pbt", "bayesian"],
)
def test_without_privacy_ray_tune_may_choose(
    how: str, local_root: Root, tmp_path: Path, tiny_encoder: str
) -> None:
    section = f"tune: {{space: {{{RATE}: [0.001, 0.003, 0.01]}}, mean_trials: 3, {how}}}\n"
    path = shop_of(tmp_path, local_root, tiny_encoder, section, private="false")
    commit = run_selection(load_config(path))
    assert find_problems(local_root) == [] and commit.spent is None
    assert commit.selected[RATE] in (0.001, 0.003, 0.01) and commit.seconds > 0
    assert commit.metrics["selection"]["noise_std"] == 0
    load_version(local_root, commit).check_golden()
    # The trial that was chosen can be trained again, unless it copied from others on the way.
    lines: list[str] = []
    again = replay(load_config(path), str(commit.version), lines.append)
    assert again.weights == ("pbt" not in how)
    assert any("tune.scheduler: pbt" in line for line in lines) == ("pbt" in how)


def test_on_a_shard_trials_and_release_read_different_users(
    local_root: Root, tmp_path: Path, tiny_encoder: str
) -> None:
    section = (
        f"tune: {{space: {{{RATE}: [0.001, 0.003], model.target_modules: [[query, value], "
        "[output.dense]], model.num_adapted_layers: [1, 2]}, method: shard, mean_trials: 2}\n"
    )
    path = shop_of(tmp_path, local_root, tiny_encoder, section)
    commit = run_selection(load_config(path))
    assert find_problems(local_root) == []
    spent, state = commit.spent, Log(local_root).refresh()
    assert spent is not None and spent.selection is not None and state.active is None
    assert spent.num_steps == spent.selection.num_steps == 6
    assert spent.group is not None and spent.selection.group is not None
    assert spent.group.scheme == spent.selection.group.scheme
    assert commit.label_counts["requests"]["other_group"] > 0
    load_version(local_root, commit).check_golden()
