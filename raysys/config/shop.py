"""All sections together: the config of a shop."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from raysys.config.checks import require
from raysys.config.data import (
    IngestConfig,
    LabelConfig,
    LeaseConfig,
    PartitionConfig,
    PseudonymConfig,
    SchemaConfig,
)
from raysys.config.http import HttpConfig
from raysys.config.impressions import ImpressionConfig, ShadowConfig
from raysys.config.model import (
    EvaluateConfig,
    GateConfig,
    ModelConfig,
    PrivacyConfig,
    TrainConfig,
)
from raysys.config.retrieval import AdsConfig, RetrievalConfig
from raysys.config.rollout import RolloutConfig
from raysys.config.rules import RuleConfig
from raysys.config.tune import WHY_RANDOM, TuneConfig


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
    tune: TuneConfig = dataclasses.field(default_factory=TuneConfig)
    impressions: ImpressionConfig = dataclasses.field(default_factory=ImpressionConfig)
    shadow: ShadowConfig = dataclasses.field(default_factory=ShadowConfig)
    http: HttpConfig = dataclasses.field(default_factory=HttpConfig)
    retrieval: RetrievalConfig = dataclasses.field(default_factory=RetrievalConfig)
    ads: AdsConfig = dataclasses.field(default_factory=AdsConfig)
    rules: tuple[RuleConfig, ...] = ()

    def __post_init__(self) -> None:
        require(
            self.root.startswith(("file:///", "s3://")),
            "root",
            self.root,
            "file:///folder or s3://bucket/prefix",
        )
        require(
            self.privacy.enabled or not self.evaluate.private,
            "evaluate.private",
            self.evaluate.private,
            "false where privacy.enabled is false: nothing would account for the noise",
        )
        threshold = self.labels.decision_threshold
        require(
            threshold == LabelConfig().decision_threshold or self.train.loss == "pointwise",
            "labels.decision_threshold",
            threshold,
            "the default, or train.loss: pointwise: scores of other losses are no probabilities",
        )
        if self.privacy.enabled:
            tune = self.tune
            require(tune.scheduler == "fifo", "tune.scheduler", tune.scheduler, _random("fifo"))
            require(tune.search == "random", "tune.search", tune.search, _random("random"))

    def hash(self) -> str:
        """Returns the sha256 of all values, which every ledger record of an update carries."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _random(only: str) -> str:
    return f"{only!r} ({WHY_RANDOM})"
