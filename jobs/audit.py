"""Audits the privacy claim: `ray job submit -- python jobs/audit.py --config shop.yaml`.

python jobs/audit.py --config shop.yaml --canaries 2000 --steps 40 --json

Trains on made-up users only, so it may run as often as you like: it reads no user's data, charges
nothing and writes nothing. Exits with 1 where more was lost than is claimed.
"""

import argparse
import dataclasses
import json
import sys

from raysys.audit import NUM_CANARIES, AuditReport, audit
from raysys.config import Config
from raysys.entry import run_job
from raysys.errors import PrivacyError
from raysys.privacy.audit import CONFIDENCE


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what an audit can be told."""
    parser.add_argument(
        "--canaries", type=int, metavar="M",
        help=f"canary users, each taking part with probability 1/2; {NUM_CANARIES} by default, or "
        "as many as weights are trained",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, metavar="T", help="train.num_steps by default")
    parser.add_argument(
        "--runs", type=int, default=1, metavar="N",
        help="independent runs that count together; %(default)s by default",
    )  # fmt: skip
    parser.add_argument(
        "--confidence", type=float, default=CONFIDENCE, metavar="P",
        help="of each lower bound; %(default)s by default",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(
    config: Config,
    *,
    canaries: int | None,
    steps: int | None,
    runs: int,
    confidence: float,
    json: bool,
) -> None:
    """Audits, prints, and fails where the claim is refuted."""
    report = audit(
        config, num_canaries=canaries, num_steps=steps, num_runs=runs, confidence=confidence,
        on_progress=say,
    )  # fmt: skip
    print(as_json(report) if json else "\n".join(as_lines(report)), flush=True)
    if report.refuted:
        raise PrivacyError(
            f"the engine was seen to lose epsilon {report.lower_bound:.3f} where "
            f"{report.claimed_epsilon:.3f} is claimed; commit no further version, and ask whether "
            "clip, noise or sampling were changed"
        )


def as_json(report: AuditReport) -> str:
    """Returns one line: the report's fields, and what follows from them."""
    values = dataclasses.asdict(report)
    return json.dumps({**values, "lower_bound": report.lower_bound, "refuted": report.refuted})


def as_lines(report: AuditReport) -> list[str]:
    """Returns the report for a person."""
    seen, expected, sure = (
        report.seen,
        report.expected,
        f"at {100 * report.confidence:g}% confidence",
    )
    runs = f" in {report.num_runs} runs" if report.num_runs > 1 else ""
    rows = [
        ("claimed", report.claimed_epsilon, f"by the accountant: {report.accountant}"),
        ("one run", report.one_run_epsilon, f"at least, {sure}: {report.num_correct:,} of "
         f"{report.num_guesses:,} guesses right"),
        ("gradient canary", report.threshold_epsilon, f"at least, {sure}: AUC {seen.auc:.3f}, "
         f"{expected.auc:.3f} by the claim; TPR {seen.tpr_at_1_percent_fpr:.3f} at 1% FPR, "
         f"{expected.tpr_at_1_percent_fpr:.3f} by the claim"),
        ("Gaussian noise", report.gaussian_epsilon,
         f"at least, at {100 * report.gaussian_confidence:g}% confidence, if noise is Gaussian"),
    ]  # fmt: skip
    return [
        f"audited {report.num_steps} steps of sampling probability {report.sampling_prob:g} and "
        f"noise multiplier {report.noise_multiplier:g} on {report.num_others:,} made-up users and "
        f"{report.num_included:,} of {report.num_canaries:,} canaries{runs}; nothing is charged",
        *(f"{name:<16}epsilon {value:7.3f}  {why}" for name, value, why in rows),
        f"unit: a {report.unit}; neighbours: {report.relation}; delta {report.delta:g}",
        f"seen: epsilon {report.lower_bound:.3f} of {report.claimed_epsilon:.3f} claimed, which is "
        + ("REFUTED" if report.refuted else "not refuted"),
    ]


def say(line: str) -> None:
    """Prints progress, apart from the result."""
    print(f"[audit] {line}", file=sys.stderr, flush=True)


def main() -> int:
    """Runs the job and returns its exit code."""
    return run_job("Set what a run is seen to lose beside what is claimed.", run, add_options)


if __name__ == "__main__":
    sys.exit(main())
