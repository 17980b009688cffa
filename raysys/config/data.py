"""What an update reads and what it makes of it: partitions, schema, examples, labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from raysys.config.checks import AT_LEAST_1, FRACTION, NOT_NEGATIVE, POSITIVE, check, require
from raysys.errors import ConfigError

_OUTCOMES = frozenset({"click", "cart", "purchase"})
_DEFAULTS = {
    "event_type": ("impression", "click", "cart", "purchase"),
    "surface": ("search", "recommend", "ads"),
}


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
        check(self, "partitions", NOT_NEGATIVE, "closed_after_s", "max_partitions")
        check(self, "partitions", NOT_NEGATIVE, "check_back_days")
        require(
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
        check(self, "lease", AT_LEAST_1, "duration_s")


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
            require(
                known is not None,
                "schema.defaults",
                name,
                f"a column out of {', '.join(_DEFAULTS)}",
            )
            assert known is not None
            require(value in known, f"schema.defaults.{name}", value, " or ".join(known))
        require(
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
    num_category_negatives: int = 0
    """Negatives uniform over the items in the categories of the positives: harder ones."""
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
        check(self, "ingest", AT_LEAST_1, "num_shards", "max_examples_per_user", "max_positives")
        check(self, "ingest", AT_LEAST_1, "max_history_items", "max_items_per_user_period")
        check(self, "ingest", AT_LEAST_1, "period_days", "num_uniform_negatives")
        check(self, "ingest", AT_LEAST_1, "task_bytes", "shard_bytes")
        check(self, "ingest", POSITIVE, "cpus_per_task")
        check(self, "ingest", NOT_NEGATIVE, "num_history_negatives", "num_popularity_negatives")
        check(self, "ingest", NOT_NEGATIVE, "num_category_negatives")
        check(self, "ingest", FRACTION, "holdout_fraction")
        check(self, "ingest", POSITIVE, "half_life_days")
        gains = dict(self.gains)
        require(
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
    the request began. Its impressions are trained on once this has passed (label maturity)."""
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
    """Probability from which a candidate is flagged, where a version decides (risk alerts). Needs
    `train.loss: pointwise`."""

    def __post_init__(self) -> None:
        check(self, "labels", POSITIVE, "attribution_window_s", "positive_weight")
        check(self, "labels", NOT_NEGATIVE, "late_window_s")
        check(self, "labels", AT_LEAST_1, "positive_repeats")
        check(self, "labels", FRACTION, "decision_threshold")
        kept, late = self.negative_keep_fraction, self.late_fraction
        require(0 < kept <= 1, "labels.negative_keep_fraction", kept, "a fraction in (0, 1]")
        require(0 <= late < 1, "labels.late_fraction", late, "a fraction in [0, 1)")
        require(
            late == 0 or self.late_outcomes == "weight",
            "labels.late_fraction",
            late,
            "0, or labels.late_outcomes: weight",
        )

    @property
    def in_time_weight(self) -> float:
        """Weight of an outcome that came in time."""
        return 1 / (1 - self.late_fraction)
