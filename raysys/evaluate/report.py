"""The report of an update, in Markdown, for people.

metrics + Statement -> render_report() -> versions/<version>/report.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raysys.evaluate.calibrate import EVENT_MEANINGS
from raysys.evaluate.metrics import METRIC_NAMES
from raysys.privacy.statement import Statement


def render_report(
    *, title: str, facts: Mapping[str, object], metrics: Mapping[str, Any], statement: Statement
) -> str:
    """Returns the report of one update.

    Args:
      facts: Shown as a list, in order.
      metrics: `dataclasses.asdict` of a `Comparison`.
    """
    lines = [
        f"# {title}",
        "",
        statement.summary,
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
    ]
    about = "about " if metrics["private"] else ""
    lines += ["", f"## Held-out users ({about}{metrics['num_holdout_users']})", ""]
    if metrics["private"]:
        lines += [_noised(metrics["max_difference"]), ""]
    lines += ["| | before | after | difference |", "|---|---|---|---|"]
    for name in METRIC_NAMES:
        cells = (_cell(metrics[arm][name]) for arm in ("before", "after", "difference"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    num = metrics["num_prequential_users"]
    lines += ["", f"## Before training, all users ({about}{num})", ""]
    lines += [f"- {name}: {_cell(metrics['prequential'][name])}" for name in METRIC_NAMES]
    lines += ["", "## Probabilities", "", *_calibration(metrics["calibration"], about)]
    lines += ["", "## Privacy", "", *statement.lines()]
    return "\n".join(lines) + "\n"


def _calibration(fit: Mapping[str, Any] | None, about: str) -> list[str]:
    if fit is None:
        return ["Fitted on nobody: there were too few held-out users."]
    error = fit["expected_error"]
    shown = "not released" if error is None else f"{error:.3g}"
    return [
        f"- probability of: {EVENT_MEANINGS[fit['event']]}",
        f"- sigmoid({fit['slope']:.4g} * score {fit['intercept']:+.4g}), fitted on "
        f"{about}{fit['num_users']} held-out users",
        f"- base rate: {fit['base_rate']:.3g}",
        f"- mean predicted: {fit['mean_predicted']:.3g}",
        f"- expected calibration error, on users it was not fitted on: {shown}",
    ]


def _noised(max_difference: float) -> str:
    return (
        "Noise was added to all figures and numbers of users; the intervals allow for it. A user's "
        f"change of NDCG@10 or AUC counts as {max_difference:g} at most, either way."
    )


def _cell(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"
