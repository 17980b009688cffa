"""A report shows the figures it was given, and says plainly what is private and what is not."""

from __future__ import annotations

import dataclasses

import pytest

from raysys.evaluate.metrics import METRIC_NAMES, Comparison, Interval
from raysys.evaluate.report import NOT_PRIVATE, privacy_statement, render_report


def statement(*, private: bool) -> str:
    return privacy_statement(
        private=private, epsilon_spent=1.23456, epsilon_total=8.0, delta=1e-4, accountant="PLD"
    )


def intervals(start: float) -> dict[str, Interval]:
    return {
        name: Interval(mean=start + i, low=start + i - 0.25, high=start + i + 0.25)
        for i, name in enumerate(METRIC_NAMES)
    }


def report(comparison: Comparison | None = None) -> str:
    shown = comparison or Comparison(
        num_holdout_users=41,
        before=intervals(10),
        after=intervals(20),
        difference=intervals(30),
        num_prequential_users=203,
        prequential=intervals(40),
    )
    return render_report(
        title="Version v0001-aaaaaa",
        facts={"update": "u0001-aaaaaa", "steps": 15},
        metrics=dataclasses.asdict(shown),
        statement=statement(private=True),
    )


class TestPrivacyStatement:
    def test_it_says_how_much_for_whom_and_by_which_accountant(self) -> None:
        text = statement(private=True)
        assert "epsilon 1.235 of 8 at delta 0.0001 (PLD)" in text
        assert "Unit: a user; neighbours differ by adding or removing one user." in text

    @pytest.mark.parametrize(
        "uncovered", ["catalogue", "own history", "evaluation and gate", "rows and users", "canary"]
    )
    def test_it_names_what_is_not_covered(self, uncovered: str) -> None:
        _, _, limits = statement(private=True).partition("Not covered:")
        assert uncovered in limits

    def test_without_privacy_it_claims_no_figure(self) -> None:
        text = statement(private=False)
        assert text == NOT_PRIVATE
        assert text.startswith("NOT PRIVATE")
        assert not any(figure in text for figure in ("epsilon", "delta", "1.23"))


class TestReport:
    def test_title_statement_and_facts_come_first_and_in_order(self) -> None:
        lines = report().splitlines()
        assert lines[0] == "# Version v0001-aaaaaa"
        assert lines[2] == statement(private=True)
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
