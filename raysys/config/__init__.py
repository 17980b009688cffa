"""The one configuration of a shop: a YAML file becomes frozen, validated dataclasses.

    config = load_config("shop.yaml")
    config.privacy.epsilon_total

Every job takes `--config FILE`, and the Serve application reads the same file, so that an update
and the replicas that serve it cannot disagree. Unknown keys are errors, units are in the names.

shop.py       all sections together
data.py       what an update reads and makes of it
model.py      how the ranker is trained, kept private and judged
rollout.py    how a canary is put on trial on live traffic
impressions.py  what replicas keep of what they show, and compare in the shadow
http.py       what a replica takes from callers, and who may steer a rollout
tune.py       which hyperparameters are tried, and how that is charged
retrieval.py  how candidates are found, and what an ad has to be worth
rules.py      what the shop wants of rankings whatever the model says
load.py       YAML -> Config
"""

from raysys.config.data import (
    ChangeOutcome,
    IngestConfig,
    LabelConfig,
    LeaseConfig,
    PartitionConfig,
    PseudonymConfig,
    SchemaConfig,
)
from raysys.config.http import HttpConfig
from raysys.config.impressions import ImpressionConfig, ShadowConfig
from raysys.config.load import load_config, parse_config, parse_rollout, with_values
from raysys.config.model import (
    DEFAULT_NOISE_MULTIPLIER,
    EvaluateConfig,
    GateConfig,
    ModelConfig,
    PrivacyConfig,
    TrainConfig,
)
from raysys.config.retrieval import AdsConfig, RetrievalConfig
from raysys.config.rollout import Analysis, Pause, RolloutConfig, Step
from raysys.config.rules import (
    BlockRule,
    BoostRule,
    CategoryCapRule,
    PinRule,
    RuleConfig,
)
from raysys.config.shop import Config
from raysys.config.tune import TuneConfig

__all__ = [
    "DEFAULT_NOISE_MULTIPLIER",
    "AdsConfig",
    "Analysis",
    "BlockRule",
    "BoostRule",
    "CategoryCapRule",
    "ChangeOutcome",
    "Config",
    "EvaluateConfig",
    "GateConfig",
    "HttpConfig",
    "ImpressionConfig",
    "IngestConfig",
    "LabelConfig",
    "LeaseConfig",
    "ModelConfig",
    "PartitionConfig",
    "Pause",
    "PinRule",
    "PrivacyConfig",
    "PseudonymConfig",
    "RetrievalConfig",
    "RolloutConfig",
    "RuleConfig",
    "SchemaConfig",
    "ShadowConfig",
    "Step",
    "TrainConfig",
    "TuneConfig",
    "load_config",
    "parse_config",
    "parse_rollout",
    "with_values",
]
