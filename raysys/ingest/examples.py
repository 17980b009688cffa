"""Training examples of one user shard, its evaluation cases, and its state afterwards.

    new events of a shard + ShardState before -> build_shard() -> ShardResult
        examples   what a train worker reads: requests of users who are not held out
        cases      what evaluation reads: each user's window, seen from its beginning
        state      what the next update starts from

Everything about a request is as of that request: the user's own events strictly before it, and
the item statistics that were public when its period began, also where the request is trained on in
a later update than the one that read it. A request that is read late, after a newer period was
released, is seen with the statistics that the update started from: older ones are not kept.

Shape suffix: K = candidates.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
from numpy.typing import NDArray

from raysys.config import IngestConfig, LabelConfig
from raysys.errors import PrivacyError
from raysys.ingest.bound import sample_per_group
from raysys.ingest.cases import build_cases, strongest
from raysys.ingest.example_set import NUM_ATTENDED, ExampleSet
from raysys.ingest.features import Published, UserHistory, features
from raysys.ingest.groups import in_group
from raysys.ingest.history import HISTORY_SCHEMA, Histories, merge_histories
from raysys.ingest.labels import (
    IMPRESSION_SCHEMA,
    IS_SAMPLED,
    OUTCOME_SCHEMA,
    REQUEST,
    Labelled,
    Waiting,
    label,
)
from raysys.ingest.periods import period_of
from raysys.ingest.pseudonym import HELD_OUT_SCHEMA, draw_held_out
from raysys.ingest.sample import NegativeSampler, max_candidates
from raysys.ingest.stats import Timeline
from raysys.ledger.records import UserGroup


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardState:
    """What one update leaves to the next about a shard's users."""

    histories: pl.DataFrame
    """HISTORY_SCHEMA, decayed to `as_of`, without the outcomes in `waiting.recent`."""
    waiting: Waiting
    held_out: pl.DataFrame
    """HELD_OUT_SCHEMA: every draw that was made so far."""
    as_of: float
    """UNIX seconds."""

    @classmethod
    def nothing(cls) -> ShardState:
        """The state before the first update."""
        return cls(
            histories=pl.DataFrame(schema=HISTORY_SCHEMA),
            waiting=Waiting.nothing(),
            held_out=pl.DataFrame(schema=HELD_OUT_SCHEMA),
            as_of=0.0,
        )

    @property
    def users(self) -> pl.Series:
        """Whom it is about, each any number of times."""
        waiting = self.waiting
        frames = (self.histories, waiting.impressions, waiting.recent, waiting.closed)
        return pl.concat([frame["user"] for frame in frames])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardSettings:
    """What is the same for all shards of an update."""

    timeline: Timeline
    """The item statistics public in each period of the update, and those after it."""
    window_start: float
    """UNIX seconds at which the evaluation window begins."""
    horizon: float
    """UNIX seconds up to which all is known: the end of the newest partition."""
    ingest: IngestConfig
    labels: LabelConfig
    needs_outcome: bool
    """Whether the loss learns nothing from a request without an outcome."""
    seed: int
    """Of caps and negatives. Each request draws by itself: removing a user changes nobody else's
    examples, even for whoever knows the seed."""
    user_key_id: str = ""
    """The key of the pseudonyms."""
    group: UserGroup | None = None
    """The users who are trained on: the others are not charged. None for everyone."""
    tried: UserGroup | None = None
    """The users whom a selection's trials train on and score. None: as the update does."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """What ingest makes of one user shard."""

    examples: ExampleSet
    trial_examples: ExampleSet | None
    """Of those whom trials train on, where they are others than the update trains on."""
    cases: pl.DataFrame
    state: ShardState
    num_users: int
    """Users with an outcome in this update."""
    impressions: dict[str, int]
    """Where the impressions went: `labels.IMPRESSION_FATES`."""
    outcomes: dict[str, int]
    """Where the outcomes went: `labels.OUTCOME_FATES`."""
    requests: dict[str, int]
    """Where the requests went that were ready: trained, over the user's cap, no outcome for a loss
    that needs one, held out; of another group, where the update trains on a group alone."""


def build_shard(
    outcomes: pl.DataFrame, impressions: pl.DataFrame, before: ShardState, settings: ShardSettings
) -> ShardResult:
    """Builds examples, cases and the new state of one shard.

    Args:
      outcomes: The update's own, as `outcomes.split_events` gives them.
      impressions: The same; without `popularity` and `trend`.
    """
    outcomes = outcomes.sort("user", "ts", "event_id", "item")
    shown = _publish(impressions.sort("user", "ts", "request_id", "item"), settings.timeline)
    labelled = label(
        shown,
        outcomes.select(cs.by_name(*OUTCOME_SCHEMA, IS_SAMPLED, require_all=False)),
        before.waiting,
        before.histories,
        horizon=settings.horizon,
        config=settings.labels,
    )
    seen = pl.concat([before.users, outcomes["user"], shown["user"]])
    held_out = draw_held_out(seen, before.held_out, settings.ingest.holdout_fraction)
    requests, fates = _requests(labelled, held_out, settings)
    _require_group(requests["user"], settings)
    window = _after_history(outcomes, before.histories)
    tried = _tried_requests(labelled, held_out, settings)
    users = [requests["user"], window["user"], *([] if tried is None else [tried["user"]])]
    lookup = _lookup(outcomes, before, pl.concat(users), settings)
    return ShardResult(
        examples=_examples(requests, lookup, settings),
        trial_examples=None if tried is None else _examples(tried, lookup, settings),
        cases=build_cases(
            window,
            lookup,
            settings.window_start,
            held_out.with_columns(tried=_in_group(held_out["user"], settings.tried, settings)),
            seed=settings.seed,
        ),
        state=_state_after(before, labelled, held_out, settings),
        num_users=outcomes["user"].n_unique(),
        impressions=labelled.impressions,
        outcomes=labelled.outcomes,
        requests=fates,
    )


def _publish(impressions: pl.DataFrame, timeline: Timeline) -> pl.DataFrame:
    """Adds what was public of each item when it was shown."""
    ts = impressions["ts"].to_numpy()
    period = period_of(ts, timeline.ends)
    published = timeline.published(period, impressions["item"].to_numpy(), ts)
    return impressions.with_columns(
        pl.Series("popularity", published.popularity, pl.Float32()),
        pl.Series("trend", published.trend, pl.Float32()),
    ).select(list(IMPRESSION_SCHEMA))


def _after_history(outcomes: pl.DataFrame, histories: pl.DataFrame) -> pl.DataFrame:
    """Drops late events: a history that holds what followed them would give them away."""
    last = histories.group_by("user").agg(pl.col("last_ts").max().alias("_last"))
    joined = outcomes.join(last, on="user", how="left", maintain_order="left")
    late = (pl.col("ts") <= pl.col("_last")).fill_null(False)
    return joined.filter(~late).drop("_last")


def _lookup(
    outcomes: pl.DataFrame, before: ShardState, users: pl.Series, settings: ShardSettings
) -> Histories:
    columns = ["user", "item", "ts", "weight", "event_id"]
    events = pl.concat([before.waiting.recent.select(columns), outcomes.select(columns)])
    return Histories(
        events.sort("user", "ts", "event_id", "item"),
        before.histories.join(users.unique().to_frame(), on="user", how="semi"),
        as_of=before.as_of,
        half_life_s=settings.timeline.after.half_life_s,
        max_items=settings.ingest.max_history_items,
    )


def _state_after(
    before: ShardState, labelled: Labelled, held_out: pl.DataFrame, settings: ShardSettings
) -> ShardState:
    after = settings.timeline.after
    histories = merge_histories(
        before.histories,
        labelled.settled,
        histories_as_of=before.as_of,
        as_of=after.as_of,
        half_life_s=after.half_life_s,
        max_items=settings.ingest.max_history_items,
    )
    return ShardState(
        histories=histories, waiting=labelled.waiting, held_out=held_out, as_of=after.as_of
    )


def _requests(
    labelled: Labelled, held_out: pl.DataFrame, settings: ShardSettings
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Returns what is trained on, at most `max_examples_per_user` a user, and where all went."""
    shown = labelled.mature.group_by(REQUEST, maintain_order=True).agg(
        pl.col("ts").min(),
        pl.col("query").drop_nulls().first(),
        pl.col("item", "gain", "position", "popularity", "trend"),
        shown=pl.lit(True),
    )
    # Sampled negatives show a softmax what an item is better than, whether or not others' were
    # kept. For a probability, outcomes without the impressions that had none count double.
    has_no_impression = [
        labelled.unshown,
        *([labelled.sampled_out] if settings.needs_outcome else []),
    ]
    unshown = (
        pl.concat(has_no_impression)
        .group_by(REQUEST, maintain_order=True)
        .agg(
            pl.col("ts").min(),
            pl.col("query").drop_nulls().first(),
            pl.col("item", "gain"),
            shown=pl.lit(False),
        )
    )
    requests = pl.concat([shown, unshown], how="diagonal")
    in_training = held_out.filter(~pl.col("held_out"))
    trainable = requests.join(in_training, on="user", how="semi", maintain_order="left")
    trained = trainable.filter(_in_group(trainable["user"], settings.group, settings)).with_columns(
        _positive=pl.col("gain").list.max() > 0
    )
    useful = trained.filter("_positive") if settings.needs_outcome else trained
    repeats = pl.when("_positive").then(settings.labels.positive_repeats).otherwise(1)
    drawn = useful.with_columns(copy=pl.int_ranges(repeats)).explode("copy").drop("_positive")
    most = settings.ingest.max_examples_per_user
    kept = sample_per_group(drawn, ["user"], ["request_id", "copy"], most, seed=settings.seed)
    num_trained = len(kept.select(REQUEST).unique())
    fates = {
        "trained": num_trained,
        "over_cap": len(useful) - num_trained,
        "no_outcome": len(trained) - len(useful),
        "held_out": len(requests) - len(trainable),
    }
    if settings.group is not None:
        fates["other_group"] = len(trainable) - len(trained)
    return kept.sort("user", "ts", "request_id", "copy"), fates


def _tried_requests(
    labelled: Labelled, held_out: pl.DataFrame, settings: ShardSettings
) -> pl.DataFrame | None:
    if settings.tried is None or settings.tried == settings.group:
        return None
    tried = dataclasses.replace(settings, group=settings.tried)
    requests, _ = _requests(labelled, held_out, tried)
    _require_group(requests["user"], tried)
    return requests


def _in_group(users: pl.Series, group: UserGroup | None, settings: ShardSettings) -> pl.Series:
    if group is None:
        return pl.repeat(True, len(users), eager=True)
    return pl.Series(in_group(users, group, key_id=settings.user_key_id), dtype=pl.Boolean)


def _require_group(users: pl.Series, settings: ShardSettings) -> None:
    """Refuses to train on anyone who is not charged: afterwards nobody could tell who it was."""
    num_others = int((~_in_group(users, settings.group, settings)).sum())
    if num_others:
        raise PrivacyError(
            f"{num_others} of {len(users)} examples are of users outside the group "
            f"{settings.group}, which alone is charged; nothing was trained: report this as a bug"
        )


def _examples(requests: pl.DataFrame, lookup: Histories, settings: ShardSettings) -> ExampleSet:
    timeline = settings.timeline
    out = ExampleSet.empty(len(requests), max_candidates(settings.ingest))
    out.user[:] = requests["user"].rle_id().to_numpy()
    periods = period_of(requests["ts"].to_numpy(), timeline.ends)
    samplers = {
        period: NegativeSampler.of(
            timeline.popularity[period], timeline.after.category, settings.ingest
        )
        for period in set(periods.tolist())
    }
    for row, request in enumerate(requests.iter_rows(named=True)):
        key = f"{request['user']} {request['request_id']} {request['copy'] or ''}".rstrip()
        rng = np.random.default_rng([settings.seed, *key.encode()])
        history = lookup.at(request["user"], request["ts"])
        if request["shown"]:
            _fill_shown(out, row, request, history, settings, rng)
        else:
            period = int(periods[row])
            _fill_sampled(out, row, request, history, samplers[period], period, settings, rng)
        attended, attention = history.attention(NUM_ATTENDED)
        out.attended[row, : len(attended)] = attended
        out.attention[row, : len(attention)] = attention
    return dataclasses.replace(out, queries=requests["query"].fill_null("").to_list())


def _fill_shown(
    out: ExampleSet,
    row: int,
    request: dict[str, Any],
    history: UserHistory,
    settings: ShardSettings,
    rng: np.random.Generator,
) -> None:
    """Candidates are what was shown: items with an outcome, and a share of the others."""
    gains = np.asarray(request["gain"], np.float32)
    keep, log_q = _keep_shown(gains, settings, out.candidates.shape[1], rng)
    num = len(keep)
    candidates = np.asarray(request["item"], np.int32)[keep]
    published = Published(
        popularity=np.asarray(request["popularity"], np.float32)[keep],
        trend=np.asarray(request["trend"], np.float32)[keep],
    )
    labels = settings.labels
    in_time = labels.positive_weight * labels.in_time_weight
    out.candidates[row, :num] = candidates
    out.gains[row, :num] = gains[keep]
    out.weight[row, :num] = np.where(gains[keep] > 0, in_time, 1.0)
    out.log_q[row, :num] = log_q
    positions = [position or 0 for position in request["position"]]
    out.position[row, :num] = np.asarray(positions, np.int32)[keep]
    out.features[row, :num] = features(
        history, settings.timeline.after, candidates, now=request["ts"], published=published
    )


def _keep_shown(
    gains: NDArray[np.float32], settings: ShardSettings, width: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], float]:
    """Returns which shown items become candidates, positives first, and log q of the others.

    All candidates get the same log q: given that a set was kept, each of its items is as likely to
    have been kept with the others, so a softmax needs no correction, and a probability only the
    common offset.
    """
    positives, negatives = np.flatnonzero(gains > 0), np.flatnonzero(gains == 0)
    positives = rng.permutation(positives)[: settings.ingest.max_positives]
    share = settings.labels.negative_keep_fraction
    drawn = rng.permutation(negatives[rng.random(len(negatives)) < share])
    room = width - len(positives)
    if len(drawn) > room:
        share *= room / len(drawn)
    keep = np.concatenate([np.sort(positives), np.sort(drawn[:room])])
    return keep, float(np.log(share))


def _fill_sampled(
    out: ExampleSet,
    row: int,
    request: dict[str, Any],
    history: UserHistory,
    sampler: NegativeSampler,
    period: int,
    settings: ShardSettings,
    rng: np.random.Generator,
) -> None:
    """Candidates are the items with an outcome, and sampled ones: nobody knows what was shown."""
    chosen, gains = strongest(request["item"], request["gain"])
    keep = rng.permutation(len(chosen))[: sampler.config.max_positives]
    candidates, log_q = sampler.candidates(chosen[keep], chosen, history.items, rng)
    num = len(candidates)
    out.candidates[row, :num] = candidates
    out.gains[row, : len(keep)] = gains[keep]
    out.weight[row, :num] = 1.0
    out.weight[row, : len(keep)] = settings.labels.positive_weight
    out.log_q[row, :num] = log_q
    out.features[row, :num] = features(
        history, settings.timeline.at(period), candidates, now=request["ts"]
    )
