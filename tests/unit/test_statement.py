"""The privacy statement follows from ledger and config: it covers what was charged, and no more."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raysys.cli import app
from raysys.config import Config, EvaluateConfig, PrivacyConfig, PseudonymConfig, load_config
from raysys.ledger.log import Log
from raysys.ledger.records import PrivacySpend, SelectionSpend, UpdateStarted, UserGroup
from raysys.ledger.state import State
from raysys.privacy.statement import NOT_PRIVATE, Statement, build_statement
from raysys.storage import Root
from tests.helpers import (
    SPEND,
    abandoned,
    committed,
    folded,
    partition,
    started,
    write_config,
    write_records,
)

NOISED = dataclasses.replace(SPEND, num_evaluations=1, evaluation_noise_multiplier=5.0)
SELECTED = dataclasses.replace(
    SPEND,
    selection=SelectionSpend(
        method="repeat", num_steps=5, sampling_prob=0.25, noise_multiplier=4.0,
        score_noise_multiplier=10.0, num_trials=0, mean_trials=4.0, shape=1.0, delta=1e-6,
    ),
)  # fmt: skip
PAGE = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
FIGURES = (
    "figures of evaluation, verdict of the gate, and calibration, by which scores become "
    "probabilities"
)


@pytest.fixture(autouse=True)
def _no_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under test is what is said, not how epsilon is found."""
    monkeypatch.setattr("raysys.privacy.budget.spent_epsilon", lambda state, delta, root: 1.23456)


def config(**sections: object) -> Config:
    return Config(root="s3://b", pseudonyms=PseudonymConfig(key_file="key"), **sections)  # type: ignore[arg-type]


PRIVATELY = config(evaluate=EvaluateConfig(private=True))


def update(number: int, reserved: PrivacySpend | None) -> UpdateStarted:
    return started(
        f"u{number:04}-aaaaaa", partitions=(partition(f"2017-03-{number:02}"),),
        reserved=reserved, private=reserved is not None,
    )  # fmt: skip


def life(*spends: PrivacySpend | None) -> State:
    """A committed update of each spend; None for one without privacy."""
    updates = [update(number, spend) for number, spend in enumerate(spends, 1)]
    return folded(*(record for start in updates for record in (start, committed(start))))


def texts(found: Statement) -> tuple[str, str]:
    return "\n".join(found.covered), "\n".join(found.not_covered)


class TestFigures:
    def test_it_says_how_much_for_whom_and_by_which_accountant(self) -> None:
        summary = build_statement(life(SPEND), config()).summary
        assert "epsilon 1.235 of 8 at delta 0.0001 (PLD" in summary
        assert "Unit: a user; neighbours: add or remove one user" in summary

    def test_what_was_charged_is_added_up_over_updates_abandoned_ones_included(self) -> None:
        noisier = dataclasses.replace(NOISED, noise_multiplier=6.0)
        last = update(3, SPEND)
        first = [update(1, noisier), update(2, SPEND)]
        records = [r for start in first for r in (start, committed(start))]
        charged = build_statement(
            folded(*records, last, abandoned(last.update_id)), config()
        ).charged
        assert charged[0].startswith("45 steps") and charged[0].endswith("noise multiplier 4 to 6")
        assert charged[1].startswith("3 releases") and charged[1].endswith("noise multiplier 10")
        assert charged[2].startswith("1 evaluations") and charged[2].endswith("multiplier 5")
        assert charged[3] == "1 of these updates were abandoned, and stay charged"

    def test_caps_and_noise_are_those_of_the_config(self) -> None:
        changed = config(privacy=PrivacyConfig(l2_clip_norm=0.5, count_noise_multiplier=7.0))
        caps = {cap.key: cap.value for cap in build_statement(State(), changed).caps}
        assert caps["privacy.l2_clip_norm"] == 0.5
        assert caps["privacy.count_noise_multiplier"] == 7.0
        assert caps["ingest.max_items_per_user_period"] == 32
        assert {"train.requests_per_step", "ingest.max_positives", "privacy.sampling_prob",
                "privacy.expected_batch_users"} <= caps.keys()  # fmt: skip
        assert "evaluate.max_difference" not in caps
        private = {cap.key for cap in build_statement(State(), PRIVATELY).caps}
        assert "evaluate.max_difference" in private

    def test_a_horizon_and_cohorts_are_named_where_there_are_any(self) -> None:
        plain = build_statement(life(SPEND), config())
        assert " updates at delta" not in plain.summary
        assert "privacy.cohorts" not in {cap.key for cap in plain.caps}
        assert not any("by turns" in line for line in plain.charged)
        group = UserGroup(scheme="cohorts/8/key", index=1)
        turns = config(privacy=PrivacyConfig(horizon=30, cohorts=8, noise_multiplier=6.0))
        found = build_statement(life(dataclasses.replace(SPEND, group=group), SPEND), turns)
        assert "of 8, for 30 updates at delta" in found.summary
        caps = {cap.key: cap.value for cap in found.caps}
        assert (caps["privacy.cohorts"], caps["privacy.noise_multiplier"]) == (8, 6)
        assert any("1 groups of users by turns" in line for line in found.charged)


class TestCovered:
    @pytest.mark.parametrize(
        "uncovered",
        ["catalogue", "own history", "rows and users", "canary", "partitions and files",
         "floating-point", "late_fraction", "how long an update takes", "live requests"],
    )  # fmt: skip
    def test_what_never_is_stands_under_not_covered(self, uncovered: str) -> None:
        for shop in (config(), PRIVATELY):
            covered, not_covered = texts(build_statement(life(NOISED), shop))
            assert uncovered in not_covered and uncovered not in covered

    def test_exact_figures_and_the_verdict_are_not(self) -> None:
        covered, not_covered = texts(build_statement(life(SPEND, SPEND), config()))
        assert FIGURES not in covered
        assert f"{FIGURES}, which are exact, of all updates" in not_covered

    def test_noised_ones_are(self) -> None:
        covered, not_covered = texts(build_statement(life(NOISED, NOISED), PRIVATELY))
        assert f"{FIGURES}, of all updates" in covered
        assert FIGURES not in not_covered

    def test_of_some_updates_each_stands_where_it_belongs(self) -> None:
        """The config says what is next; what was charged says what was."""
        covered, not_covered = texts(build_statement(life(SPEND, NOISED), PRIVATELY))
        assert f"{FIGURES}, of u0002-aaaaaa" in covered
        assert f"{FIGURES}, which are exact, of u0001-aaaaaa" in not_covered

    def test_before_the_first_update_the_config_decides(self) -> None:
        for shop, place in ((config(), 1), (PRIVATELY, 0)):
            found = texts(build_statement(State(), shop))
            assert FIGURES in found[place] and FIGURES not in found[1 - place]

    def test_an_abandoned_update_has_no_figures(self) -> None:
        start = update(1, SPEND)
        covered, not_covered = texts(
            build_statement(folded(start, abandoned(start.update_id)), PRIVATELY)
        )
        assert "u0001" not in covered + not_covered

    def test_a_selection_is_named_where_there_was_one(self) -> None:
        covered, not_covered = texts(build_statement(life(SPEND, SELECTED), config()))
        assert "which trial won, and its noised score, of u0002-aaaaaa" in covered
        assert "number and timing of a selection's trials" in not_covered
        covered, not_covered = texts(build_statement(life(SPEND), config()))
        assert "trial" not in covered + not_covered

    def test_a_selections_trials_are_charged_by_steps_noise_and_score(self) -> None:
        once = dataclasses.replace(SELECTED, num_steps=0)
        charged = build_statement(life(SPEND, once, once), config()).charged
        assert any(line.startswith(f"{SPEND.num_steps} steps of") for line in charged)
        assert (
            "2 selections (repeat), each by 4 trials on average of 5 steps, noise multiplier 4 or "
            "more, and a score of noise multiplier 10"
        ) in charged


class TestVoid:
    def test_one_update_without_privacy_voids_all_and_no_figure_is_claimed(self) -> None:
        found = build_statement(life(SPEND, None, SPEND), config())
        assert not found.private and found.epsilon_spent is None
        assert found.lines() == [f"{NOT_PRIVATE} Updates: u0002-aaaaaa"]
        assert not (found.charged or found.covered or found.not_covered or found.caps)

    def test_one_that_runs_does_too(self) -> None:
        assert not build_statement(folded(update(1, None)), config()).private

    def test_one_that_was_abandoned_does_too_as_its_weights_may_have_been_seen(self) -> None:
        without = update(1, None)
        found = build_statement(folded(without, abandoned()), config())
        assert found.lines() == [f"{NOT_PRIVATE} Updates: u0001-aaaaaa"]

    def test_a_rotation_of_keys_does_not(self) -> None:
        first = update(1, SPEND)
        rotation = started("u0002-aaaaaa", partitions=(), reserved=None, private=False,
                           user_key_id="other", base_state=first.update_id)  # fmt: skip
        assert build_statement(folded(first, committed(first), rotation), config()).private

    def test_a_config_without_privacy_claims_nothing(self) -> None:
        off = config(privacy=PrivacyConfig(enabled=False))
        assert build_statement(State(), off).lines() == [f"{NOT_PRIVATE} Updates: none yet"]


class TestCommand:
    def run(self, path: Path, *flags: str) -> str:
        result = CliRunner().invoke(app, ["budget", "--config", str(path), "--explain", *flags])
        assert result.exit_code == 0, result.output
        return result.output

    def shop(self, folder: Path, root: Root, *records: Any) -> Path:
        write_records(root, records)
        return write_config(folder, root.uri, "evaluate: {private: true}\n")

    def test_it_prints_the_statement(self, tmp_path: Path, local_root: Root) -> None:
        start = update(1, NOISED)
        path = self.shop(tmp_path, local_root, start, committed(start))
        expected = build_statement(Log(local_root).refresh(), load_config(path))
        assert self.run(path).splitlines() == expected.lines()

    def test_as_one_object_with_json(self, tmp_path: Path, local_root: Root) -> None:
        start = update(1, NOISED)
        path = self.shop(tmp_path, local_root, start, committed(start))
        found = json.loads(self.run(path, "--json"))
        expected = build_statement(Log(local_root).refresh(), load_config(path))
        assert found["summary"] == expected.summary
        assert found["covered"] == list(expected.covered)
        assert found["caps"][0] == dataclasses.asdict(expected.caps[0])

    def test_of_a_model_that_is_not_private_it_claims_nothing(
        self, tmp_path: Path, local_root: Root
    ) -> None:
        start = update(1, None)
        path = self.shop(tmp_path, local_root, start, committed(start))
        assert self.run(path) == f"{NOT_PRIVATE} Updates: u0001-aaaaaa\n"
        assert json.loads(self.run(path, "--json"))["epsilon_spent"] is None


def test_the_page_about_privacy_has_the_statement_of_a_shop_with_default_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raysys.privacy.budget.spent_epsilon", lambda state, delta, root: 0.0)
    _, _, rest = PAGE.partition("<!-- statement -->\n")
    shown, _, _ = rest.partition("<!-- /statement -->")
    expected = build_statement(State(), config()).lines()
    assert shown.splitlines() == expected, "put what `raysys budget --explain` prints there"


@pytest.mark.parametrize("path", re.findall(r"`(?:tests/unit/)?(test_\w+\.py)`", PAGE))
def test_every_test_that_the_page_names_is_there(path: str) -> None:
    assert (Path(__file__).parent / path).exists()
