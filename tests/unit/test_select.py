"""An update by selection: what it reserves, commits and says. Its trials run in tests/cluster."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raysys import select, update
from raysys.cli import app
from raysys.config import load_config
from raysys.errors import ConfigError, TrialError
from raysys.ingest.pipeline import IngestJob
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted
from raysys.registry.recipe import Recipe
from raysys.registry.version import Manifest, version_path
from raysys.storage import Root
from raysys.train.loop import TrainJob
from raysys.train.trial import Trials
from raysys.train.tune import Winner
from tests.stub_steps import Steps
from tests.update_shop import DAYS, contents, find_problems, write_catalogue, write_day, write_shop

SPACE = "space: {model.lora_rank: [2, 3], privacy.noise_multiplier: [6.0, 4.0]}"
JOB = Path(__file__).parents[2] / "jobs" / "tune.py"
BEST = {"model.lora_rank": 3, "privacy.noise_multiplier": 6.0}


class Shop:
    """A shop in which every heavy step is replaced, the trials among them."""

    def __init__(self, folder: Path, encoder: str, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.encoder = folder, encoder
        self.root = Root((folder / "root").as_uri())
        self.steps = Steps(patch)
        self.seen: list[Trials] = []
        self.failure: Exception | None = None
        self.lines: list[str] = []
        patch.setattr(select, "select", self.select)
        patch.setattr(select, "encode_new_texts", self.steps.encode_new_texts)
        write_catalogue(self.root)
        write_day(self.root, DAYS[0])
        self.configure()

    def configure(self, tune: str = SPACE, **changes: Any) -> None:
        self.path = write_shop(self.folder, self.root, self.encoder, **changes)
        self.path.write_text(f"{self.path.read_text()}tune: {{{tune}}}\n")

    def select(self, trials: Trials) -> Winner:
        self.seen.append(trials)
        if self.failure:
            raise self.failure
        output = self.steps.output(trials.job(BEST))
        return Winner(values=BEST, output=output, score=12.5)

    def update(self) -> UpdateCommitted:
        return select.run_selection(load_config(self.path), self.lines.append)


@pytest.fixture
def shop(tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, tiny_encoder, monkeypatch)


def test_the_trials_are_reserved_before_the_data_is_read(shop: Shop) -> None:
    commit = shop.update()
    spent = commit.spent
    assert spent is not None and spent.selection is not None and find_problems(shop.root) == []
    assert (spent.num_steps, spent.selection.num_steps) == (0, 6)
    assert spent.selection.noise_multiplier == 4.0, "the least that may be drawn"
    ((name, charged, status),) = Log(shop.root).refresh().spends
    assert (name, charged, status) == (commit.update_id, spent, "committed")
    # The trials are handed what the ledger has.
    (trials,) = shop.seen
    assert trials.selection == spent.selection and not trials.own_users
    assert trials.job(BEST).plan.spend.num_steps == spent.selection.num_steps
    assert trials.job(BEST).plan.spend.noise_multiplier == 6.0
    with pytest.raises(AssertionError, match="the least noise"):
        trials.job({"privacy.noise_multiplier": 3.0})


def test_what_was_chosen_stands_with_the_version(shop: Shop) -> None:
    commit = shop.update()
    assert commit.selected == BEST and commit.metrics["selection"] == {
        "holdout_ndcg10_gain_sum": 1.25, "noise_std": 1.0,
    }  # fmt: skip
    version = str(commit.version)
    manifest = Manifest.from_bytes(shop.root.read_bytes(version_path(version, "manifest.json")))
    assert manifest.lora_rank == 3 and manifest.selected == BEST
    report = shop.root.read_bytes(version_path(version, "report.md")).decode()
    assert "- selected: {'model.lora_rank': 3, 'privacy.noise_multiplier': 6.0}" in report
    told = "\n".join(shop.lines)
    assert "model: {lora_rank: 3}\nprivacy: {noise_multiplier: 6.0}" in told
    assert Recipe.load(shop.root, commit).config["model"]["lora_rank"] == 2, "the shop's own"


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            "model.target_modules: [[output.dense], [q_proj]]",
            r"model\.target_modules: no module q_",
        ),
        (
            "model.num_adapted_layers: [1, 99]",
            r"model\.num_adapted_layers: the encoder has 2 layers",
        ),
    ],
    ids=["unknown module", "too many layers"],
)
def test_layers_that_a_trial_could_not_adapt_are_refused_before_anything_is_charged(
    shop: Shop, space: str, message: str
) -> None:
    shop.configure(f"space: {{{space}}}")
    before = contents(shop.root)
    with pytest.raises(ConfigError, match=rf"^tune\.space: {message}"):
        shop.update()
    assert contents(shop.root) == before
    result = CliRunner().invoke(app, ["plan", "--tune", "--config", str(shop.path)])
    assert result.exit_code == 1 and "raysys: tune.space: model." in result.stderr
    assert CliRunner().invoke(app, ["plan", "--config", str(shop.path)]).exit_code == 0


def test_trials_that_would_all_be_the_same_are_refused(shop: Shop) -> None:
    """The first update learns by another rate than those after it."""
    first, later = "train.bootstrap_learning_rate", "train.learning_rate"
    for idle, read in ((later, first), (first, later)):
        shop.configure(f"space: {{{idle}: [0.1, 0.2], {read}: [0.1]}}")
        before = contents(shop.root)
        with pytest.raises(ConfigError, match=r"^tune\.space: expected two values of a key that"):
            shop.update()
        assert contents(shop.root) == before
        shop.configure()
        assert shop.update().version is not None
        write_day(shop.root, DAYS[1])


def test_who_chose_the_winner_does_not_judge_it(shop: Shop) -> None:
    shop.update()
    assert shop.steps.judged_after_trials
    write_day(shop.root, DAYS[1])
    update.run_update(load_config(shop.path))
    assert not shop.steps.judged_after_trials


def test_a_repetition_does_not_tell_how_long_it_took(shop: Shop) -> None:
    shop.configure(f"{SPACE}, method: repeat")
    commit = shop.update()
    assert commit.seconds == 0
    assert any("a random number of trials, 10 on average" in line for line in shop.lines)


def test_a_composition_may_tell(shop: Shop) -> None:
    shop.configure(f"{SPACE}, method: compose")
    assert shop.update().seconds > 0
    assert any("runs 10 trials (method compose)" in line for line in shop.lines)


def test_a_shard_trains_again_on_the_others_with_what_was_chosen(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.configure(f"{SPACE}, method: shard")
    jobs: list[TrainJob] = []
    train = update.train

    def recording(job: TrainJob, *rest: Any, **named: Any) -> Any:
        jobs.append(job)
        return train(job, *rest, **named)

    ingested: list[IngestJob] = []

    def ingest(job: IngestJob, item_files: Any) -> Any:
        ingested.append(job)
        return shop.steps.ingest(job, item_files)

    monkeypatch.setattr(update, "train", recording)
    monkeypatch.setattr(update, "ingest", ingest)
    commit = shop.update()
    (trials,) = shop.seen
    assert trials.selection is not None and commit.spent is not None
    read = [(job.tried, job.group) for job in ingested]
    assert read == [(trials.selection.group, commit.spent.group)]
    assert trials.own_users and trials.selection is not None
    of_trial, (final,) = trials.job(BEST).plan.spend, [job.plan.spend for job in jobs]
    assert of_trial.group is not None and final.group is not None
    assert of_trial.group == trials.selection.group and of_trial.group.index == 0
    assert final.group.index == 1 and final.group.scheme == of_trial.group.scheme
    assert final.num_steps == 6 and final.noise_multiplier == 6.0
    assert commit.spent is not None and commit.spent.noise_multiplier == 4.0


def test_a_failed_selection_commits_nothing_and_stays_charged(shop: Shop) -> None:
    shop.failure = TrialError("a trial failed")
    with pytest.raises(TrialError):
        shop.update()
    state = Log(shop.root).refresh()
    ((_, spend, status),) = state.spends
    assert status == "abandoned" and spend.selection is not None and state.versions == {}


def test_without_privacy_nothing_is_charged(shop: Shop) -> None:
    shop.configure(private="false")
    commit = shop.update()
    assert commit.spent is None and commit.selected == BEST
    assert shop.seen[0].selection is None
    assert any("NOT PRIVATE" in line for line in shop.lines)


def test_an_empty_space_is_refused_before_anything_is_read(shop: Shop) -> None:
    shop.configure("method: auto")
    with pytest.raises(ConfigError, match=r"tune\.space: expected values"):
        shop.update()
    assert Log(shop.root).refresh().spends == ()


@pytest.mark.parametrize(
    ("tune", "told"),
    [
        pytest.param("method: auto", "tune.space: expected values", id="no space"),
        pytest.param(f"{SPACE}, search: bayesian", "tune.search: expected 'random'", id="search"),
        pytest.param(
            f"{SPACE}, score_noise_multiplier: 0.01",
            "tune.score_noise_multiplier: expected >= 0.5",
            id="noise",
        ),
    ],
)
def test_the_job_refuses_in_one_line_without_ray(
    shop: Shop,
    tune: str,
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shop.configure(tune)
    monkeypatch.setattr(sys, "argv", [str(JOB), "--config", str(shop.path)])
    before = contents(shop.root)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(JOB), run_name="__main__")
    printed, error = capsys.readouterr()
    assert ended.value.code == 1 and printed == "" and contents(shop.root) == before
    assert error.startswith(f"raysys: {told}") and error.count("\n") == 1


class TestPlan:
    def show(self, shop: Shop, *options: str) -> str:
        result = CliRunner().invoke(app, ["plan", "--config", str(shop.path), *options])
        assert result.exit_code == 0, result.output
        return result.output

    def test_it_shows_trials_method_and_what_it_is_about(self, shop: Shop) -> None:
        told = self.show(shop, "--tune")
        assert "spends     trials and 1 releases of item counts" in told
        assert "trials     10 of 6 steps" in told or "trials     a random number, 10 on" in told
        assert "epsilon after the update by method: repeat" in told and "compose" in told
        for named in ("unit: a user", "add or remove one user", "delta 0.0001", "accountant: PLD"):
            assert named in told

    def test_without_the_option_it_is_a_plain_update(self, shop: Shop) -> None:
        told = self.show(shop)
        assert "spends     6 steps" in told and "trials" not in told

    def test_as_json(self, shop: Shop) -> None:
        body = json.loads(self.show(shop, "--tune", "--json"))
        assert set(body["epsilon_by_method"]) == {"repeat", "compose"}
        assert body["spend"]["selection"]["num_steps"] == 6
