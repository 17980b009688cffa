"""The report of an update, in Markdown, for people.

metrics + privacy -> render_report() -> versions/<version>/report.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raysys.evaluate.metrics import METRIC_NAMES

NOT_PRIVATE = "NOT PRIVATE: trained without differential privacy (privacy.enabled: false)."


def privacy_statement(
    *, private: bool, epsilon_spent: float, epsilon_total: float, delta: float, accountant: str
) -> str:
    """Returns what is guaranteed, to whom, and what is not covered, in plain sentences."""
    if not private:
        return NOT_PRIVATE
    return (
        f"User-level differential privacy of all updates so far: epsilon {epsilon_spent:.3f} of "
        f"{epsilon_total:g} at delta {delta:g} ({accountant}). Unit: a user; neighbours differ by "
        "adding or removing one user. Covered: the weights and the item statistics. Not covered: "
        "the catalogue, which counts as public; a user's own history, which ranks for that user "
        "alone; the exact figures of evaluation and gate, and the numbers of rows and users; what "
        "the canary measures, and that a version which it rolls back is not trained on. The noise "
        "is floating-point Gaussian from a generator that is not cryptographic."
    )


def render_report(
    *, title: str, facts: Mapping[str, object], metrics: Mapping[str, Any], statement: str
) -> str:
    """Returns the report of one update.

    Args:
      facts: Shown as a list, in order.
      metrics: `dataclasses.asdict` of a `Comparison`.
    """
    lines = [
        f"# {title}",
        "",
        statement,
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
    ]
    lines += ["", f"## Held-out users ({metrics['num_holdout_users']})", ""]
    lines += ["| | before | after | difference |", "|---|---|---|---|"]
    for name in METRIC_NAMES:
        cells = (_cell(metrics[arm][name]) for arm in ("before", "after", "difference"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"## Before training, all users ({metrics['num_prequential_users']})", ""]
    lines += [f"- {name}: {_cell(metrics['prequential'][name])}" for name in METRIC_NAMES]
    return "\n".join(lines) + "\n"


def _cell(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"
