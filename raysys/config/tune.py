"""Choosing hyperparameters by trials: `jobs/tune.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from raysys.config.checks import AT_LEAST_1, FRACTION, NOT_NEGATIVE, POSITIVE, check, require

TUNABLE = (
    "model.adapter",
    "model.lora_alpha",
    "model.lora_rank",
    "model.num_adapted_layers",
    "model.target_modules",
    "model.train_lora_a",
    "privacy.l2_clip_norm",
    "privacy.noise_multiplier",
    "train.alpha",
    "train.bootstrap_learning_rate",
    "train.learning_rate",
    "train.requests_per_step",
)
"""Keys that a trial may set. Not among them is what all trials must share for their charge to be
known: the number of steps, the chance to take part in one, the normaliser."""

_WHILE_TRAINING = (
    "train.alpha",
    "train.bootstrap_learning_rate",
    "train.learning_rate",
    "train.requests_per_step",
)
"""Of them, those that may change within a trial."""

WHY_RANDOM = (
    "under privacy.enabled trials are charged as independent random draws; ASHA, PBT and Bayesian "
    "search choose what to try, or stop, by the scores of other trials, which nothing accounts for"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """What is tried, how often, and how it is charged."""

    space: Mapping[str, tuple[object, ...]] = dataclasses.field(default_factory=dict)
    """Dotted config key -> values, for example `model.lora_rank: [2, 4, 8]`. Each trial draws one
    of each, uniformly and independent of all else."""
    method: Literal["auto", "repeat", "compose", "shard"] = "auto"
    """`repeat`: a random number of trials, never told; the best is the release (Papernot and
    Steinke, arXiv 2110.03620). `compose`: a fixed number, each charged in full; the best is the
    release. `auto`: the cheaper of both. `shard`: trials read a share of the users, the release is
    trained on the others with what the best trial chose."""
    mean_trials: float = 10.0
    """Mean number of trials. A fixed number of trials is this, rounded up."""
    shape: float = 0.0
    """Of the random number's distribution, a truncated negative binomial: 0 logarithmic, 1
    geometric. The lower, the cheaper, and the more often there are only one or two trials."""
    score_noise_multiplier: float = 10.0
    """Standard deviation of the noise in a trial's score over what one user can move. With 10 and
    `max_difference` 0.1, the better of two trials that differ by 0.004 in NDCG@10 is chosen 9 times
    in 10 among about 500 held-out users; by 0.001, among about 2,000."""
    max_difference: float = 0.1
    """A user's change of NDCG@10, of which the sum is the score, is clipped to plus and minus
    this."""
    delta_fraction: float = 0.1
    """Share of `privacy.delta` at which the Renyi bound of `repeat` is turned into epsilon."""
    shard_fraction: float = 0.25
    """Share of the users that `shard` tries on. Another share is another split of the users, which
    is charged beside the first, not in parallel with it."""
    scheduler: Literal["fifo", "asha", "pbt"] = "fifo"
    """Ray Tune's. Under privacy every trial runs to its end."""
    search: Literal["random", "bayesian"] = "random"
    """`bayesian` is Optuna's, of the extra `raysys[bayesian]`. Not under privacy."""
    max_concurrent: int = 2
    """Trials at work at once."""
    cpus_per_trial: float = 0.5

    def __post_init__(self) -> None:
        check(self, "tune", AT_LEAST_1, "mean_trials", "max_concurrent")
        check(self, "tune", NOT_NEGATIVE, "shape")
        check(self, "tune", POSITIVE, "cpus_per_trial")
        noise = self.score_noise_multiplier
        require(
            noise >= 0.5,
            "tune.score_noise_multiplier",
            noise,
            ">= 0.5: with less, scores alone would spend any budget",
        )
        check(self, "tune", FRACTION, "delta_fraction", "shard_fraction")
        most = self.max_difference
        require(0 < most <= 1, "tune.max_difference", most, "a fraction in (0, 1]")
        require(
            self.method != "repeat" or self.mean_trials > 1,
            "tune.mean_trials",
            self.mean_trials,
            "more than 1, or tune.method: compose",
        )
        for key, values in self.space.items():
            require(key in TUNABLE, f"tune.space.{key}", values, f"a key of {', '.join(TUNABLE)}")
            require(len(values) > 0, f"tune.space.{key}", list(values), "at least one value")
            require(
                self.scheduler != "pbt" or key in _WHILE_TRAINING,
                f"tune.space.{key}",
                list(values),
                f"with tune.scheduler: pbt a key of {', '.join(_WHILE_TRAINING)}: others cannot "
                "change within a trial",
            )
