"""How a canary is put on trial, judged, promoted or rolled back.

    rollout:
      steps:
        - set_weight: 0.05
        - pause: {duration_s: 600}
        - analysis: {}
        - set_weight: 0.2
        - analysis: {}
        - pause: {}               # until somebody resumes
      max_ctr_drop: 0.01

The words are Argo Rollouts'. Without `steps` there is one weight, one analysis, and promotion. What
judges a rollout is written into the ledger when it starts, so a file that changes meanwhile changes
nothing for it.
"""

from __future__ import annotations

import dataclasses
import urllib.parse
from typing import Any, Literal

from raysys.config.checks import AT_LEAST_1, FRACTION, NOT_NEGATIVE, POSITIVE, check, require

_NOT_RULES = ("interval_s", "webhook_url", "webhook_timeout_s")
"""Keys that judge nothing. A webhook's URL often is a secret, and the ledger keeps none."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pause:
    """Waits: for a time, or until somebody resumes. Bad answers roll back meanwhile as always."""

    duration_s: float | None = None
    """Seconds; none waits for a person."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """Waits until the traffic since the last `set_weight` proves the canary to be within bounds."""

    min_requests: int | None = None
    """For this step, instead of `rollout.min_requests`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of a rollout: exactly one of these."""

    set_weight: float | None = None
    """Share of users that the canary answers from now on, in (0, 1). 0 before a first pause: nobody
    is answered by it, and `shadow` shows how it would rank."""
    pause: Pause | None = None
    analysis: Analysis | None = None

    def describe(self) -> str:
        """Returns the step in a few words.

        >>> Step(pause=Pause(duration_s=600)).describe()
        'pause of 600 s'
        """
        if self.set_weight is not None:
            return f"weight {self.set_weight:.2%}"
        if self.pause is None:
            return "analysis"
        seconds = self.pause.duration_s
        return "pause until resumed" if seconds is None else f"pause of {seconds:g} s"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """How a canary is judged on live traffic."""

    weight_fraction: float = 0.2
    """Share of users that a new canary answers, where there are no `steps`."""
    steps: tuple[Step, ...] = ()
    """What a rollout does, in order; after the last it promotes. It starts with `set_weight`,
    weights only grow, and each is followed by a pause or an analysis. Without steps:
    `weight_fraction`, one analysis."""
    require_approval: bool = False
    """Whether a rollout whose steps are done waits for `raysys rollout resume` to be promoted."""
    min_requests: int = 200
    """Answered requests of each version below which a look is inconclusive."""
    interval_s: float = 2.0
    """Seconds between two looks at the counters."""
    latency_slo_ms: float = 200.0
    """A slower answer counts as bad, as a failed one does. Measured at the replica."""
    max_bad_rate_increase: float = 0.02
    """Tolerated canary minus stable rate of bad answers."""
    max_invalid: int = 0
    """Answers of the canary whose scores are not finite, or of another number than the candidates;
    one more fails it at once."""
    max_p99_ms: float | None = None
    """The canary's p99 latency must not exceed this. Rounded up to a histogram boundary."""
    max_p99_ratio: float | None = 3.0
    """Nor this many times stable's p99, where that is more than 10 ms."""
    max_ctr_drop: float | None = None
    """Tolerated stable minus canary share of answers with any feedback. None: as
    `max_conversion_drop`. Set it well below the rate itself, or any loss is tolerated."""
    max_conversion_drop: float = 0.05
    """Tolerated stable minus canary share of answers that a purchase came of."""
    max_ndcg_drop: float = 0.05
    """Tolerated stable minus canary NDCG of the answers that something was chosen from: how high
    the chosen items stood. Counted where feedback tells their `rank`."""
    error_probability: float = 0.05
    """Chance that any look of one rollout ever errs, however often one looks."""
    deadline_s: float = 86_400.0
    """An analysis that is still inconclusive after this is ended. Pauses do not count."""
    on_deadline: Literal["rollback", "pause"] = "rollback"
    """What then happens: the canary is taken off, or keeps its weight until somebody decides."""
    feedback_delay_s: float = 0.0
    """A request counts for CTR, conversion and NDCG only once it is this old (label maturity)."""
    webhook_url: str | None = None
    """Every transition is sent there as JSON, by POST."""
    webhook_timeout_s: float = 5.0
    """For one try."""

    def __post_init__(self) -> None:
        check(self, "rollout", FRACTION, "weight_fraction", "max_bad_rate_increase")
        check(self, "rollout", FRACTION, "max_conversion_drop", "max_ndcg_drop")
        check(self, "rollout", FRACTION, "error_probability")
        check(self, "rollout", AT_LEAST_1, "min_requests")
        check(self, "rollout", POSITIVE, "interval_s", "latency_slo_ms", "deadline_s")
        check(self, "rollout", POSITIVE, "webhook_timeout_s")
        check(self, "rollout", NOT_NEGATIVE, "feedback_delay_s", "max_invalid")
        if self.max_ctr_drop is not None:
            check(self, "rollout", FRACTION, "max_ctr_drop")
        if self.max_p99_ms is not None:
            check(self, "rollout", POSITIVE, "max_p99_ms")
        ratio = self.max_p99_ratio
        require(ratio is None or ratio >= 1, "rollout.max_p99_ratio", ratio, ">= 1, or null")
        self._check_webhook()
        self._check_steps()

    @property
    def plan(self) -> tuple[Step, ...]:
        """The steps, also where the file has none."""
        return self.steps or (Step(set_weight=self.weight_fraction), Step(analysis=Analysis()))

    @property
    def num_stages(self) -> int:
        """Weights that the plan goes through; the traffic of each is judged by itself."""
        return sum(step.set_weight is not None for step in self.plan)

    @property
    def tolerated_ctr_drop(self) -> float:
        """`max_ctr_drop`, also where the file has none."""
        return self.max_conversion_drop if self.max_ctr_drop is None else self.max_ctr_drop

    def with_first_weight(self, weight_fraction: float) -> RolloutConfig:
        """Returns the same rules, whose canary starts with another weight.

        Raises:
          ConfigError: It is no share, or not below the weights that follow.
        """
        if not self.steps:
            return dataclasses.replace(self, weight_fraction=weight_fraction)
        first = Step(set_weight=weight_fraction)
        return dataclasses.replace(self, steps=(first, *self.steps[1:]))

    def rules(self) -> dict[str, Any]:
        """Returns what the ledger keeps of it, as plain JSON; `load.parse_rollout` reads it."""
        found = dataclasses.asdict(self)
        found["steps"] = [dataclasses.asdict(step) for step in self.steps]
        return {key: value for key, value in found.items() if key not in _NOT_RULES}

    def _check_webhook(self) -> None:
        if self.webhook_url is None:
            return
        parts = urllib.parse.urlsplit(self.webhook_url)
        # The value is not shown: whoever has such a URL may post to it.
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname),
            "rollout.webhook_url",
            f"{parts.scheme or 'no scheme'}://…",
            "http://host/… or https://host/…",
        )

    def _check_steps(self) -> None:
        highest = 0.0
        for i, step in enumerate(self.steps):
            key = f"rollout.steps[{i}]"
            named = [n for n in ("set_weight", "pause", "analysis") if getattr(step, n) is not None]
            expected = "exactly one of set_weight: 0.1, pause: {duration_s: 600}, analysis: {}"
            require(len(named) == 1, key, named or "none of them", expected)
            weight = step.set_weight
            require(i > 0 or weight is not None, key, named[0], "set_weight as the first step")
            if weight is not None:
                follows = self.steps[i + 1 : i + 2]
                require(
                    bool(follows) and follows[0].set_weight is None,
                    key,
                    "set_weight",
                    "a pause or an analysis after it: nobody would wait for what it does",
                )
                more = f" that is more than {highest:g}" if highest else ""
                expected = f"a fraction in (0, 1){more}"
                only_shadowed = weight == 0 and i == 0 and follows[0].pause is not None
                require(
                    highest < weight < 1 or only_shadowed, f"{key}.set_weight", weight, expected
                )
                highest = weight
            _check_waits(step, key)


def _check_waits(step: Step, key: str) -> None:
    if step.pause is not None and step.pause.duration_s is not None:
        seconds = step.pause.duration_s
        require(seconds > 0, f"{key}.pause.duration_s", seconds, "> 0, or pause: {} for approval")
    if step.analysis is not None and step.analysis.min_requests is not None:
        least = step.analysis.min_requests
        require(least >= 1, f"{key}.analysis.min_requests", least, ">= 1")
