"""Labels: which outcome belongs to which impression, and when an impression may be trained on.

    new impressions + those that wait ┐
    new outcomes + recent ones        ┴ label() -> requests to train on now, and what waits on

A request is what one user was shown at once. It is mature when its attribution window has closed
before the horizon, the end of the newest partition: then it is trained on, once, with the outcomes
that came in time. Outcomes that no impression explains are requests of their own; sampled negatives
stand in for what was shown. Every impression and every outcome is counted where it went.

Where a replica keeps the impressions of a share of requests only (`impressions.sample_fraction`),
an outcome without impressions says nothing about what was shown. Whoever estimates a probability
has to leave it out: the requests that were kept are then a simple random sample of all.

Pure Polars: the shard's task calls it. Source: EasyRec's sample join (positives wait, late ones are
emitted on their own), and Databricks' watermarks. Here what waits is state of the last commit, so
nothing is joined twice or lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import polars as pl

from raysys.config import LabelConfig

REQUEST = ["user", "request_id"]
SHOWN_ITEM = [*REQUEST, "item"]

OUTCOME_SCHEMA = {
    "user": pl.String(),
    "event_id": pl.String(),
    "item": pl.Int32(),
    "ts": pl.Float64(),
    "request_id": pl.String(),
    "query": pl.String(),
    "gain": pl.Float64(),
    "weight": pl.Float64(),
}
"""`weight` is the gain over the largest gain; it is what histories add up."""
IS_SAMPLED = "is_sampled"
"""Column of an update's own outcomes: whether the impressions of some such requests are not kept.
None has it that comes from a shop's own files, or from replicas that keep all."""

IMPRESSION_SCHEMA = {
    "user": pl.String(),
    "item": pl.Int32(),
    "ts": pl.Float64(),
    "request_id": pl.String(),
    "query": pl.String(),
    "position": pl.Int32(),
    "popularity": pl.Float32(),
    "trend": pl.Float32(),
}
"""`popularity` and `trend` are what was public of the item when it was shown."""

CLOSED_SCHEMA = {
    "user": pl.String(),
    "request_id": pl.String(),
    "ts": pl.Float64(),
    "shown": pl.Boolean(),
}
"""Requests that were trained on or passed by, `ts` is up to when all was known then; `shown` if by
their impressions."""

_IN_TIME = pl.col("ts").is_between(pl.col("_shown_ts"), pl.col("closes_at"))

OUTCOME_FATES = (
    "attributed",
    "waiting",
    "late_outcome",
    "before_impression",
    "not_shown",
    "without_impression",
    "sampled_out",
    "late_event",
)
IMPRESSION_FATES = ("with_outcome", "without_outcome", "waiting", "repeated", "late_impression")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """What one update leaves to the next: state of a shard."""

    impressions: pl.DataFrame
    """IMPRESSION_SCHEMA: of requests that are not mature."""
    recent: pl.DataFrame
    """OUTCOME_SCHEMA: of the last attribution window; histories do not hold them yet."""
    closed: pl.DataFrame
    """CLOSED_SCHEMA: those passed in the last `late_window_s`."""

    @classmethod
    def nothing(cls) -> Waiting:
        """What waits before the first update."""
        return cls(
            impressions=pl.DataFrame(schema=IMPRESSION_SCHEMA),
            recent=pl.DataFrame(schema=OUTCOME_SCHEMA),
            closed=pl.DataFrame(schema=CLOSED_SCHEMA),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """A shard's requests, labelled or waiting."""

    mature: pl.DataFrame
    """IMPRESSION_SCHEMA plus `gain`, 0 without an outcome: of requests to train on now."""
    unshown: pl.DataFrame
    """OUTCOME_SCHEMA: outcomes that no impression explains, though all impressions are kept."""
    sampled_out: pl.DataFrame
    """OUTCOME_SCHEMA: outcomes that no impression explains, since not all are kept."""
    waiting: Waiting
    settled: pl.DataFrame
    """OUTCOME_SCHEMA: outcomes that go into the histories now; those in `waiting.recent` do not."""
    impressions: dict[str, int]
    """IMPRESSION_FATES of the rows that waited and the new ones together."""
    outcomes: dict[str, int]
    """OUTCOME_FATES of the new rows."""


def attribute(
    shown: pl.DataFrame, outcomes: pl.DataFrame, on: Sequence[str] = SHOWN_ITEM
) -> pl.DataFrame:
    """Returns `shown` with the largest `gain` among each row's outcomes in time, 0 without one.

    Args:
      shown: The columns `on`, `ts` and `closes_at`.
      outcomes: The columns `on`, `ts` and `gain`. One counts if it came at or after the impression
        and at or before `closes_at`.
      on: What outcomes and impressions have in common.
    """
    rows = shown.select(*on, "closes_at", pl.col("ts").alias("_shown_ts")).with_row_index("_row")
    # The few are looked up among the many, and only what was found is grouped.
    pairs = rows.join(outcomes.select(*on, "ts", "gain"), on=list(on), how="inner")
    best = pairs.filter(_IN_TIME).group_by("_row").agg(pl.col("gain").max())
    gain = np.zeros(len(shown))
    gain[best["_row"].to_numpy()] = best["gain"].to_numpy()
    return shown.with_columns(pl.Series("gain", gain))


def label(
    impressions: pl.DataFrame,
    outcomes: pl.DataFrame,
    before: Waiting,
    histories: pl.DataFrame,
    *,
    horizon: float,
    config: LabelConfig,
) -> Labelled:
    """Labels what is mature.

    Args:
      impressions: IMPRESSION_SCHEMA: the update's own.
      outcomes: OUTCOME_SCHEMA, and IS_SAMPLED if there are any: the update's own, each event once.
      histories: The settled ones: `user`, `last_ts`. What is older than a user's cannot be trained
        on, since the history that it would be seen with already holds what followed.
      horizon: UNIX seconds up to which all is known: the end of the newest partition.
    """
    shown, rejected = _open_requests(impressions, before, histories)
    closes_at = pl.col("ts").min().over(REQUEST) + config.attribution_window_s
    shown = shown.with_columns(closes_at=closes_at)
    known = pl.concat([before.recent, outcomes.select(list(OUTCOME_SCHEMA))])
    is_mature = pl.col("closes_at") <= horizon
    labelled = attribute(shown, known)
    mature, waits = labelled.filter(is_mature), labelled.filter(~is_mature)
    fates = _fates(outcomes, shown, before.closed, histories, horizon)
    unshown, sampled_out = (
        outcomes.filter(fates == fate).select(list(OUTCOME_SCHEMA))
        for fate in ("without_impression", "sampled_out")
    )
    is_recent = pl.col("ts") > horizon - config.attribution_window_s
    with_outcome = pl.col("gain").max().over(REQUEST) > 0
    num_with_outcome = len(mature.filter(with_outcome)) if len(mature) else 0
    return Labelled(
        mature=mature.drop("closes_at"),
        unshown=unshown,
        sampled_out=sampled_out,
        waiting=Waiting(
            impressions=waits.select(list(IMPRESSION_SCHEMA)),
            recent=known.filter(is_recent),
            closed=_closed(
                before.closed,
                mature,
                pl.concat([unshown, sampled_out]),
                horizon,
                config.late_window_s,
            ),
        ),
        settled=known.filter(~is_recent),
        impressions={
            "with_outcome": num_with_outcome,
            "without_outcome": len(mature) - num_with_outcome,
            "waiting": len(waits),
            **rejected,
        },
        outcomes={fate: int((fates == fate).sum()) for fate in OUTCOME_FATES},
    )


def _open_requests(
    impressions: pl.DataFrame, before: Waiting, histories: pl.DataFrame
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Returns the impressions of requests that were not trained on, each item of a request once."""
    in_time = impressions.filter(~_is_too_old(impressions, histories))
    fresh = in_time.join(before.closed, on=REQUEST, how="anti", maintain_order="left")
    rows = pl.concat([before.impressions, fresh])
    distinct = rows.unique(SHOWN_ITEM, keep="first", maintain_order=True)
    return distinct, {
        "repeated": len(rows) - len(distinct),
        "late_impression": len(impressions) - len(fresh),
    }


def _fates(
    outcomes: pl.DataFrame,
    shown: pl.DataFrame,
    closed: pl.DataFrame,
    histories: pl.DataFrame,
    horizon: float,
) -> pl.Series:
    """Returns which of OUTCOME_FATES each outcome has."""
    items = shown.select(*SHOWN_ITEM, pl.col("ts").alias("_shown_ts"), "closes_at")
    requests = shown.select(REQUEST).unique().with_columns(_open=pl.lit(True))
    passed = closed.filter("shown").select(REQUEST).unique().with_columns(_passed=pl.lit(True))
    joined = outcomes
    for other, key in ((items, SHOWN_ITEM), (requests, REQUEST), (passed, REQUEST)):
        joined = joined.join(other, on=key, how="left", maintain_order="left")
    is_sampled = pl.col(IS_SAMPLED) if IS_SAMPLED in outcomes.columns else pl.lit(False)
    was_shown = pl.col("_shown_ts").is_not_null()
    fate = (
        pl.when(was_shown & _IN_TIME & (pl.col("closes_at") <= horizon))
        .then(pl.lit("attributed"))
        .when(was_shown & _IN_TIME).then(pl.lit("waiting"))
        .when(was_shown & (pl.col("ts") < pl.col("_shown_ts"))).then(pl.lit("before_impression"))
        .when(was_shown | pl.col("_passed").is_not_null()).then(pl.lit("late_outcome"))
        .when(pl.col("_open").is_not_null()).then(pl.lit("not_shown"))
        .when(pl.Series(_is_too_old(outcomes, histories))).then(pl.lit("late_event"))
        .when(is_sampled).then(pl.lit("sampled_out"))
        .otherwise(pl.lit("without_impression"))
    )  # fmt: skip
    return joined.select(fate.alias("fate"))["fate"]


def _is_too_old(rows: pl.DataFrame, histories: pl.DataFrame) -> pl.Series:
    last = histories.group_by("user").agg(pl.col("last_ts").max())
    joined = rows.select("user", "ts").join(last, on="user", how="left", maintain_order="left")
    return joined.select(_old=(pl.col("ts") <= pl.col("last_ts")).fill_null(False))["_old"]


def _closed(
    before: pl.DataFrame,
    mature: pl.DataFrame,
    unshown: pl.DataFrame,
    horizon: float,
    late_window_s: float,
) -> pl.DataFrame:
    """Remembers requests from when they were passed, however old they were then."""
    parts = [before.filter(pl.col("ts") > horizon - late_window_s)] + [
        rows.select(REQUEST)
        .unique(maintain_order=True)
        .with_columns(ts=pl.lit(horizon), shown=pl.lit(was_shown))
        for rows, was_shown in ((mature, True), (unshown, False))
    ]
    return pl.concat(parts)
