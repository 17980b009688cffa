"""What decided about a canary, in one sentence with the figures.

Look, Difference -> describe_*() -> Measurement.reason -> ledger
"""

from __future__ import annotations

from raysys.rollout.counters import SURFACES
from raysys.rollout.look import Look
from raysys.rollout.questions import P99, Difference


def _on(surface: int | slice) -> str:
    return f"on surface {SURFACES[surface]}, " if isinstance(surface, int) else ""


def describe_bad(look: Look, bad: Difference, surface: int | slice = slice(None)) -> str:
    """Says how many answers were bad."""
    canary, stable = look.totals(surface)
    return (
        f"{_on(surface)}{canary.num_bad} of {canary.num_requests} canary answers and "
        f"{stable.num_bad} of {stable.num_requests} stable answers were bad: {_range(bad)}, "
        f"tolerated up to {look.config.max_bad_rate_increase:+.2%}"
    )


def describe_outcome(
    look: Look, difference: Difference, name: str, surface: int | slice = slice(None)
) -> str:
    """Says how many answers were clicked, or converted."""
    canary, stable = look.totals(surface)
    clicked = name == "num_clicked"
    drop = look.config.tolerated_ctr_drop if clicked else look.config.max_conversion_drop
    return (
        f"{_on(surface)}{getattr(canary, name)} of {canary.num_matured} canary answers and "
        f"{getattr(stable, name)} of {stable.num_matured} stable answers "
        f"{'were clicked' if clicked else 'converted'}: {_range(difference)}, tolerated down to "
        f"{-drop:+.2%}"
    )


def describe_ndcg(look: Look, ndcg: Difference) -> str:
    """Says how high the chosen items stood."""
    return (
        f"NDCG by outcome, of {look.canary.num_ranked.sum()} canary answers and "
        f"{look.stable.num_ranked.sum()} stable answers: {ndcg.estimate:+.4f}, between "
        f"{ndcg.low:+.4f} and {ndcg.high:+.4f}, tolerated down to {-look.config.max_ndcg_drop:+.4f}"
    )


def describe_p99(p99: P99) -> str:
    """Says how slow the canary is."""
    proven = "proven" if p99.is_exceeded else "not proven yet"
    return (
        f"p99 of the canary is {p99.canary_ms:g} ms, of stable {p99.stable_ms:g} ms: over the "
        f"limit of {p99.limit_ms:g} ms, {proven}"
    )


def _range(difference: Difference) -> str:
    return f"{difference.estimate:+.2%}, between {difference.low:+.2%} and {difference.high:+.2%}"
