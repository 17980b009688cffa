"""A report shows the figures it was given, and stands on the privacy statement."""

from __future__ import annotations

import dataclasses

from raysys.evaluate.calibrate import EVENT_MEANINGS, Fit
from raysys.evaluate.metrics import METRIC_NAMES, Comparison, Interval
from raysys.evaluate.report import render_report
from raysys.privacy.statement import Statement

STATEMENT = Statement(
    private=True,
    voided_by=(),
    unit="user",
    relation="add or remove one user",
    epsilon_spent=1.23456,
    epsilon_total=8.0,
    delta=1e-4,
    horizon=None,
    accountant="PLD",
    charged=("15 steps",),
    covered=("the weights",),
    not_covered=("the catalogue",),
    caps=(),
)


def intervals(start: float) -> dict[str, Interval]:
    return {
        name: Interval(mean=start + i, low=start + i - 0.25, high=start + i + 0.25)
        for i, name in enumerate(METRIC_NAMES)
    }


COMPARISON = Comparison(
    num_holdout_users=41,
    before=intervals(10),
    after=intervals(20),
    difference=intervals(30),
    num_prequential_users=203,
    prequential=intervals(40),
)


def report(shown: Comparison = COMPARISON) -> str:
    return render_report(
        title="Version v0001-aaaaaa",
        facts={"update": "u0001-aaaaaa", "steps": 15},
        metrics=dataclasses.asdict(shown),
        statement=STATEMENT,
    )


class TestReport:
    def test_title_statement_and_facts_come_first_and_in_order(self) -> None:
        lines = report().splitlines()
        assert lines[0] == "# Version v0001-aaaaaa"
        assert lines[2] == STATEMENT.summary
        assert lines[4:6] == ["- update: u0001-aaaaaa", "- steps: 15"]

    def test_every_metric_stands_with_its_interval_under_its_arm(self) -> None:
        text = report()
        assert "## Held-out users (41)" in text
        for i, name in enumerate(METRIC_NAMES):
            arms = [
                f"{arm + i:.4f} [{arm + i - 0.25:.4f}, {arm + i + 0.25:.4f}]"
                for arm in (10, 20, 30)
            ]
            assert f"| {name} | {arms[0]} | {arms[1]} | {arms[2]} |" in text

    def test_the_prequential_figures_name_their_users(self) -> None:
        _, _, last = report().partition("## Before training, all users (203)")
        assert "- ndcg10: 40.0000 [39.7500, 40.2500]" in last

    def test_a_comparison_of_nobody_still_has_a_report(self) -> None:
        nothing = dict.fromkeys(
            METRIC_NAMES, Interval(mean=float("nan"), low=float("nan"), high=float("nan"))
        )
        text = report(
            Comparison(
                num_holdout_users=0,
                before=nothing,
                after=nothing,
                difference=nothing,
                num_prequential_users=0,
                prequential=nothing,
            )
        )
        assert "| ndcg10 | nan [nan, nan] |" in text

    def test_the_whole_privacy_statement_stands_at_its_end(self) -> None:
        assert report().endswith("\n".join(["## Privacy", "", *STATEMENT.lines(), ""]))

    def test_noised_figures_are_called_so_and_their_numbers_of_users_too(self) -> None:
        exact = report()
        assert "oise was added" not in exact and "about" not in exact
        noised = report(
            Comparison(
                num_holdout_users=41,
                before=intervals(10),
                after=intervals(20),
                difference=intervals(30),
                num_prequential_users=203,
                prequential=intervals(40),
                private=True,
                max_difference=0.1,
            )
        )
        assert "## Held-out users (about 41)" in noised
        assert "## Before training, all users (about 203)" in noised
        assert "Noise was added to all figures" in noised and "counts as 0.1 at most" in noised

    def test_probabilities_stand_with_what_they_are_of_and_how_good_they_are(self) -> None:
        fitted = Fit(
            slope=0.75, intercept=-6.5, event="taken", num_users=41, base_rate=0.00123,
            mean_predicted=0.00122, expected_error=0.0000456,
        )  # fmt: skip
        _, _, text = report(dataclasses.replace(COMPARISON, calibration=fitted)).partition(
            "## Probabilities"
        )
        assert f"- probability of: {EVENT_MEANINGS['taken']}" in text
        assert "- sigmoid(0.75 * score -6.5), fitted on 41 held-out users" in text
        assert "- base rate: 0.00123\n- mean predicted: 0.00122" in text
        assert "expected calibration error, on users it was not fitted on: 4.56e-05" in text
        noised = dataclasses.replace(fitted, expected_error=None)
        text = report(dataclasses.replace(COMPARISON, private=True, max_difference=0.1,
                                          calibration=noised))  # fmt: skip
        assert "on about 41 held-out users" in text and "fitted on: not released" in text

    def test_where_nobody_was_held_out_they_are_said_to_be_fitted_on_nobody(self) -> None:
        assert "Fitted on nobody" in report()
