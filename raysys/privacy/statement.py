"""What the guarantee says, covers and leaves out, and the caps that it stands on. One builder.

    State, Config -> build_statement() -> raysys budget --explain, every version's report.md,
                                          docs/privacy.md

What is covered follows from the ledger and the config: an evaluation is, for the updates that were
charged for it, a selection where one was. One update without privacy voids all.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

from raysys.config import Config
from raysys.ingest.bound import count_l2_sensitivity
from raysys.ingest.sample import max_candidates
from raysys.ledger.records import PrivacySpend, SelectionSpend
from raysys.ledger.state import State
from raysys.storage import Root

NOT_PRIVATE = "NOT PRIVATE: trained without differential privacy (privacy.enabled: false)."

_EVALUATION = (
    "figures of evaluation, verdict of the gate, and calibration, by which scores become "
    "probabilities"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cap:
    """A bound on what one user can do, or the noise that it is covered by."""

    key: str
    """Of the config."""
    value: float
    meaning: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """The privacy statement of a model so far. Of one that is not private it claims nothing."""

    private: bool
    voided_by: tuple[str, ...]
    """Updates that were made without privacy."""
    unit: str
    relation: str
    epsilon_spent: float | None
    """At `delta`, of all updates so far; running and abandoned ones are charged as well. None where
    there is no guarantee."""
    epsilon_total: float
    delta: float
    horizon: int | None
    """Updates that the total must last for; None where the config names none."""
    accountant: str
    charged: tuple[str, ...]
    """The mechanisms that the ledger charges for, over all updates."""
    covered: tuple[str, ...]
    not_covered: tuple[str, ...]
    caps: tuple[Cap, ...]
    """In force with the config at hand; an update's own stand in its `recipe.json`."""

    @property
    def summary(self) -> str:
        """The guarantee in two sentences; without one, that there is none."""
        if not self.private:
            return NOT_PRIVATE
        lasts = f", for {self.horizon} updates" if self.horizon else ""
        return (
            "User-level differential privacy of all updates so far: epsilon "
            f"{self.epsilon_spent:.3f} of {self.epsilon_total:g}{lasts} at delta {self.delta:g} "
            f"({self.accountant}). Unit: a {self.unit}; neighbours: {self.relation}, with "
            f"everything that the {self.unit} ever did."
        )

    def lines(self) -> list[str]:
        """Returns the whole statement, in Markdown that also reads as plain text."""
        if not self.private:
            return [f"{NOT_PRIVATE} Updates: {', '.join(self.voided_by) or 'none yet'}"]
        caps = [f"{cap.key} {cap.value:g}: {cap.meaning}" for cap in self.caps]
        return [
            self.summary,
            *_listed("Charged so far", self.charged or ("nothing",)),
            *_listed("Covered", self.covered),
            *_listed("Not covered", self.not_covered),
            *_listed("Caps in force", caps),
        ]


def build_statement(state: State, config: Config, root: Root | None = None) -> Statement:
    """Returns the statement after all that the ledger says, an active update included.

    Args:
      root: Where the composed loss is kept, which spares composing it anew.
    """
    # dp-accounting takes most of a second to import, and what only prints NOT_PRIVATE needs none.
    from raysys.privacy.accounting import ACCOUNTANT, RELATION, UNIT
    from raysys.privacy.budget import spent_epsilon

    voided_by = state.not_private
    private = config.privacy.enabled and not voided_by
    return Statement(
        private=private,
        voided_by=voided_by,
        unit=UNIT,
        relation=RELATION,
        epsilon_spent=spent_epsilon(state, config.privacy.delta, root) if private else None,
        epsilon_total=config.privacy.epsilon_total,
        delta=config.privacy.delta,
        horizon=config.privacy.horizon,
        accountant=ACCOUNTANT,
        charged=tuple(_charged(state)) if private else (),
        covered=tuple(_covered(state, config)) if private else (),
        not_covered=tuple(_not_covered(state, config)) if private else (),
        caps=tuple(_caps(config)) if private else (),
    )


def _charged(state: State) -> Iterable[str]:
    spends = [spend for _, spend, _ in state.spends]
    yield from _mechanism(
        "steps of the Poisson-sampled Gaussian mechanism",
        [(s.num_steps, s.noise_multiplier) for s in spends],
    )
    yield from _mechanism(
        "releases of item counts, each a Gaussian mechanism",
        [(s.num_count_releases, s.count_noise_multiplier) for s in spends],
    )
    yield from _mechanism(
        "evaluations, each a Gaussian mechanism",
        [(s.num_evaluations, s.evaluation_noise_multiplier) for s in spends],
    )
    yield from _selections([s.selection for s in spends if s.selection is not None])
    if groups := {s.group for s in spends if s.group is not None}:
        yield (
            f"steps read {len(groups)} groups of users by turns, and are charged to these alone; "
            "epsilon is that of the worst user"
        )
    abandoned = sum(status == "abandoned" for _, _, status in state.spends)
    if abandoned:
        yield f"{abandoned} of these updates were abandoned, and stay charged"


def _selections(made: Sequence[SelectionSpend]) -> Iterable[str]:
    """Yields what was charged for trials: their steps and scores are in no other line."""
    alike = collections.Counter(
        (s.method, s.mean_trials, s.num_steps, s.noise_multiplier, s.score_noise_multiplier)
        for s in made
    )
    for (method, mean, steps, noise, score), num in sorted(alike.items()):
        trials = f"{mean:g} trials" + (" on average" if method == "repeat" else "")
        yield (
            f"{num} selections ({method}), each by {trials} of {steps:,} steps, noise multiplier "
            f"{noise:g} or more, and a score of noise multiplier {score:g}"
        )


def _mechanism(what: str, ran: Sequence[tuple[int, float]]) -> Iterable[str]:
    """Yields how often a mechanism ran, and with which noise, if it did."""
    noises = sorted({noise for num, noise in ran if num})
    if noises:
        shown = f"{noises[0]:g}" if len(noises) == 1 else f"{noises[0]:g} to {noises[-1]:g}"
        yield f"{sum(num for num, _ in ran):,} {what}, noise multiplier {shown}"


def _covered(state: State, config: Config) -> Iterable[str]:
    yield (
        "the weights of every version: a user's gradients are summed and clipped once a step, and "
        "noise is added once"
    )
    yield (
        "item statistics: popularity, trend, and the negatives, cut-offs and features made of "
        "them, from counts that are bounded by user and noised"
    )
    if noised := _evaluated(state, lambda spend: spend.num_evaluations > 0):
        yield f"{_EVALUATION}, {_of(noised, state)}"
    elif config.evaluate.private:
        yield _EVALUATION
    if selected := [name for name, spend, _ in state.spends if spend.selection is not None]:
        yield f"which trial won, and its noised score, of {', '.join(selected)}"
    yield (
        "whatever is made of these alone, scores of golden requests and embeddings of items among "
        "it"
    )


def _not_covered(state: State, config: Config) -> Iterable[str]:
    yield (
        "a user's own history, which ranks for that user alone; it lies below state/ and is for "
        "replicas only"
    )
    yield "the catalogue (items/), which counts as public"
    yield (
        "which partitions and files there are, how large, when, and whether they could be read: a "
        "value that makes a file unreadable takes the file's other rows with it; also whether the "
        "shop logs impressions"
    )
    yield (
        "exact numbers of rows and users: num_rows, num_users, row_counts, column_counts and "
        "label_counts of the ledger, the report and an update's progress"
    )
    exact = _evaluated(state, lambda spend: spend.num_evaluations == 0)
    if exact or not (config.evaluate.private or state.committed):
        yield (
            f"{_EVALUATION}, which are exact"
            f"{', ' + _of(exact, state) if exact else ''}; hence also which version the next "
            "update starts from"
        )
    yield (
        "what a canary measures on live traffic, and what follows from it: which version is "
        "promoted, and that one which is rolled back is not trained on"
    )
    yield (
        "what replicas count and log of live requests, how fast they answer (a query that was "
        "asked before is faster), and the events that they write"
    )
    if any(spend.selection is not None for _, spend, _ in state.spends):
        yield (
            "number and timing of a selection's trials, for who watches the cluster meanwhile or "
            "reads from the ledger's times how long it took"
        )
    yield "how long an update takes, and what logs, dashboards, staging/ and quarantine/ show of it"
    yield _constants(config)
    yield (
        "arithmetic: the noise is floating-point Gaussian from generators that are filled with the "
        "operating system's entropy but not cryptographic, and the last digits of a sum depend on "
        "who shares a batch"
    )


def _constants(config: Config) -> str:
    late = config.labels.late_fraction
    now = f" (labels.late_fraction is {late:g})" if late else ""
    return (
        "constants that an operator sets after a look at exact figures: labels.late_fraction, "
        f"labels.decision_threshold, bounds of the gate, caps and noise{now}"
    )


def _caps(config: Config) -> Iterable[Cap]:
    from raysys.privacy.calibrate import noise_multiplier_of

    ingest = config.ingest

    def cap(key: str, meaning: str, value: float | None = None) -> Cap:
        section, _, name = key.partition(".")
        found = getattr(getattr(config, section), name) if value is None else value
        return Cap(key=key, value=float(found), meaning=meaning)

    yield cap("privacy.l2_clip_norm", "largest L2 norm of a user's summed gradient in a step")
    noise = noise_multiplier_of(config)
    yield cap("privacy.noise_multiplier", "noise of a step's sum over that norm", noise)
    yield cap("privacy.sampling_prob", "chance of each user to take part in a step")
    if config.privacy.cohorts > 1:
        yield cap("privacy.cohorts", "disjoint cohorts of users, of which an update trains on one")
    yield cap("privacy.expected_batch_users", "normaliser of a step's sum, a constant")
    yield cap(
        "ingest.max_items_per_user_period",
        "items whose count one user may raise in a period, by 1 each: L2 norm "
        f"{count_l2_sensitivity(ingest.max_items_per_user_period):.3g}",
    )
    yield cap("privacy.count_noise_multiplier", "noise of each count over that norm")
    yield cap("ingest.max_examples_per_user", "a user's requests kept an update")
    yield cap("train.requests_per_step", "of these, requests that one step reads")
    yield cap(
        "ingest.max_positives",
        f"items of a request that count as positives, of {max_candidates(ingest)} candidates at "
        "most",
    )
    yield cap("ingest.max_history_items", "items in a user's history")
    if config.tune.space:
        yield cap("tune.max_difference", "largest change of NDCG@10 in a trial's score by one user")
        yield cap("tune.score_noise_multiplier", "noise of a trial's score over that")
    if config.evaluate.private:
        yield cap(
            "evaluate.noise_multiplier", "noise of an evaluation's sums over what one user can add"
        )
        yield cap(
            "evaluate.max_difference", "largest change of NDCG@10 and AUC that one user counts with"
        )
        yield cap("evaluate.sample_fraction", "chance of each user to be evaluated")


def _evaluated(state: State, is_one: Callable[[PrivacySpend], bool]) -> list[str]:
    """Returns the updates whose figures were or will be released one way: abandoned ones' never."""
    return [name for name, spend, status in state.spends if status != "abandoned" and is_one(spend)]


def _of(updates: Sequence[str], state: State) -> str:
    evaluated = _evaluated(state, lambda spend: True)
    return "of all updates" if list(updates) == evaluated else f"of {', '.join(updates)}"


def _listed(title: str, items: Iterable[str]) -> list[str]:
    return ["", f"{title}:", "", *(f"- {item}" for item in items)]
