"""The one configuration of a shop: a YAML file becomes frozen, validated dataclasses.

    config = load_config("shop.yaml")
    config.privacy.epsilon_total

Every job takes `--config FILE`, and the Serve application reads the same file, so that an update
and the replicas that serve it cannot disagree. Unknown keys are errors, units are in the names.

shop.py     all sections together
data.py     what an update reads and makes of it
model.py    how the ranker is trained, kept private, judged and rolled out
replica.py  what a replica may take: threads, memory, time
tune.py     which hyperparameters are tried, and how that is charged
load.py     YAML -> Config
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
from raysys.config.load import load_config, parse_config, with_values
from raysys.config.model import (
    DEFAULT_NOISE_MULTIPLIER,
    EvaluateConfig,
    GateConfig,
    ModelConfig,
    PrivacyConfig,
    RolloutConfig,
    TrainConfig,
)
from raysys.config.replica import ReplicaConfig
from raysys.config.shop import Config
from raysys.config.tune import TuneConfig

__all__ = [
    "DEFAULT_NOISE_MULTIPLIER",
    "ChangeOutcome",
    "Config",
    "EvaluateConfig",
    "GateConfig",
    "IngestConfig",
    "LabelConfig",
    "LeaseConfig",
    "ModelConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "PseudonymConfig",
    "ReplicaConfig",
    "RolloutConfig",
    "SchemaConfig",
    "TrainConfig",
    "TuneConfig",
    "load_config",
    "parse_config",
    "with_values",
]
