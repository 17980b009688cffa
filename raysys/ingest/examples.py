"""Training examples and evaluation cases of one user shard, and its histories afterwards.

    bounded events of a shard + histories before -> build_shard() -> ShardResult
        examples   what a train worker reads: requests of users who are not held out
        cases      what evaluation reads: each user's window, seen from its beginning
        histories  the shard's state after the update

Everything about a request is as of that request: the user's own events strictly before it, and
the item statistics that were public when its period began.

Shape suffixes: E = examples, K = candidates (padded with -1), F = features, A = history items that
stand for the user's taste (padded with -1), H = distinct items of a history.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from raysys.config import IngestConfig
from raysys.ingest.bound import sample_per_group
from raysys.ingest.features import NUM_FEATURES, IndexArray, ItemTable, UserHistory, features
from raysys.ingest.pseudonym import draw_held_out
from raysys.ingest.sample import NegativeSampler, max_candidates

NUM_ATTENDED = 32
HISTORY_SCHEMA = {
    "user": pl.String(),
    "item": pl.Int32(),
    "count": pl.Float64(),
    "decayed": pl.Float64(),
    "first_ts": pl.Float64(),
    "last_ts": pl.Float64(),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExampleSet:
    """Examples sorted by user, as arrays."""

    user: IndexArray
    """(E,) 0, 1, … within the shard, ascending: who the users are does not leave ingest."""
    candidates: IndexArray
    """(E, K) item indexes."""
    gains: NDArray[np.float32]
    """(E, K)."""
    log_q: NDArray[np.float32]
    """(E, K)."""
    features: NDArray[np.float32]
    """(E, K, F)."""
    attended: IndexArray
    """(E, A) item indexes."""
    attention: NDArray[np.float32]
    """(E, A)."""
    queries: list[str]
    """(E,) empty where the request had none."""

    @property
    def num_users(self) -> int:
        """Distinct users."""
        return int(self.user[-1]) + 1 if len(self.user) else 0

    def to_bytes(self) -> bytes:
        """Returns an Arrow IPC file."""
        columns: dict[str, pa.Array] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "queries":
                columns[field.name] = pa.array(value, pa.string())
            elif value.ndim == 1:
                columns[field.name] = pa.array(value)
            else:
                width = int(np.prod(value.shape[1:]))
                columns[field.name] = pa.FixedSizeListArray.from_arrays(value.ravel(), width)
        table = pa.table(columns)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    @classmethod
    def from_bytes(cls, data: bytes) -> ExampleSet:
        """Reads what `to_bytes` wrote."""
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all().combine_chunks()
        num = table.num_rows

        def array(name: str, *shape: int) -> Any:
            column = table[name].chunk(0) if num else pa.array([], table.schema.field(name).type)
            flat = column.flatten() if shape else column
            return flat.to_numpy(zero_copy_only=False).reshape(num, *shape)

        width = table.schema.field("candidates").type.list_size
        return cls(
            user=array("user"),
            candidates=array("candidates", width),
            gains=array("gains", width),
            log_q=array("log_q", width),
            features=array("features", width, NUM_FEATURES),
            attended=array("attended", NUM_ATTENDED),
            attention=array("attention", NUM_ATTENDED),
            queries=table["queries"].to_pylist(),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One user's evaluation window, seen from its beginning."""

    held_out: bool
    history: UserHistory
    positives: IndexArray
    gains: NDArray[np.float32]
    now: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """What ingest makes of one user shard."""

    examples: ExampleSet
    cases: pl.DataFrame
    histories: pl.DataFrame
    held_out: pl.DataFrame
    """Every draw that was made so far."""
    num_users: int
    """Users with an outcome in this update."""


def build_shard(
    events: pl.DataFrame,
    histories: pl.DataFrame,
    *,
    histories_as_of: float,
    tables: Sequence[ItemTable],
    window_start: float,
    config: IngestConfig,
    seed: int,
    held_out: pl.DataFrame,
) -> ShardResult:
    """Builds examples, cases and the new histories of one shard.

    Args:
      events: Outcomes: `user`, `item` (index), `ts`, `weight` in (0, 1], `gain`, `request_id`,
        `query`, `period`.
      histories: HISTORY_SCHEMA, as of `histories_as_of`.
      tables: The item statistics public in each period, and last the ones after the update.
      window_start: UNIX seconds at which the evaluation window begins.
      seed: Of caps and negatives. Each request draws by itself: removing a user changes nobody
        else's examples, even for whoever knows the seed.
      held_out: HELD_OUT_SCHEMA, the draws of earlier updates.
    """
    seen = pl.concat([histories["user"], events["user"]])
    held_out = draw_held_out(seen, held_out, config.holdout_fraction)
    events = events.join(held_out, on="user", how="left")
    events = events.sort("user", "ts", "event_id", "item")
    lookup = _Histories(
        events,
        histories,
        as_of=histories_as_of,
        half_life_s=tables[-1].half_life_s,
        max_items=config.max_history_items,
    )
    foreseeable = _after_history(events, histories)
    return ShardResult(
        examples=_examples(foreseeable, lookup, tables, config, seed),
        cases=_cases(foreseeable, lookup, window_start),
        histories=merge_histories(
            histories,
            events,
            histories_as_of=histories_as_of,
            as_of=tables[-1].as_of,
            half_life_s=tables[-1].half_life_s,
            max_items=config.max_history_items,
        ),
        held_out=held_out,
        num_users=events["user"].n_unique(),
    )


def merge_histories(
    histories: pl.DataFrame,
    events: pl.DataFrame,
    *,
    histories_as_of: float,
    as_of: float,
    half_life_s: float,
    max_items: int,
) -> pl.DataFrame:
    """Returns every user's history after the events, at most `max_items` recent items a user."""
    old_decay = float(np.exp2(-(as_of - histories_as_of) / half_life_s)) if len(histories) else 1.0
    new_decay = (2.0 ** (-(as_of - pl.col("ts")) / half_life_s)) * pl.col("weight")
    new = events.select(
        "user",
        pl.col("item").cast(pl.Int32),
        pl.col("weight").alias("count"),
        new_decay.alias("decayed"),
        pl.col("ts").alias("first_ts"),
        pl.col("ts").alias("last_ts"),
    )
    old = histories.with_columns(pl.col("decayed") * old_decay)
    merged = (
        pl.concat([old.select(list(HISTORY_SCHEMA)), new])
        .group_by("user", "item")
        .agg(pl.col("count", "decayed").sum(), pl.col("first_ts").min(), pl.col("last_ts").max())
    )
    recent = merged.sort(["user", "last_ts", "item"], descending=[False, True, False])
    kept = recent.group_by("user", maintain_order=True).head(max_items)
    return kept.select(list(HISTORY_SCHEMA)).sort("user", "item")


def history_slices(frame: pl.DataFrame, as_of: float) -> dict[str, UserHistory]:
    """Returns the history of each user in a frame of HISTORY_SCHEMA sorted by user and item."""
    columns = {name: frame[name].to_numpy() for name in list(HISTORY_SCHEMA)[1:]}
    return {
        user: UserHistory(
            items=columns["item"][part], count=columns["count"][part],
            decayed=columns["decayed"][part], first_ts=columns["first_ts"][part],
            last_ts=columns["last_ts"][part], as_of=as_of,
        )
        for user, part in _parts(frame["user"])
    }  # fmt: skip


def _after_history(events: pl.DataFrame, histories: pl.DataFrame) -> pl.DataFrame:
    """Drops late events: a history that holds what followed them would give them away."""
    last = histories.group_by("user").agg(pl.col("last_ts").max().alias("_last"))
    joined = events.join(last, on="user", how="left", maintain_order="left")
    late = (pl.col("ts") <= pl.col("_last")).fill_null(False)
    return joined.filter(~late).drop("_last")


class _Histories:
    """Histories of a shard's users as of any moment of the update."""

    def __init__(
        self,
        events: pl.DataFrame,
        histories: pl.DataFrame,
        *,
        as_of: float,
        half_life_s: float,
        max_items: int,
    ) -> None:
        self._before = history_slices(histories.sort("user", "item"), as_of)
        self._parts = dict(_parts(events["user"]))
        self._items = events["item"].cast(pl.Int32).to_numpy()
        self._ts = events["ts"].to_numpy()
        self._weight = events["weight"].to_numpy()
        self._half_life_s = half_life_s
        self._max_items = max_items

    def at(self, user: str, now: float) -> UserHistory:
        """Returns what the user did strictly before `now`, cut as a replica's history is."""
        before = self._before.get(user) or UserHistory.empty()
        part = self._parts[user]
        num_new = int(np.searchsorted(self._ts[part], now, side="left"))
        new = slice(part.start, part.start + num_new)
        extended = before.extend(
            self._items[new], self._ts[new], self._weight[new],
            as_of=now, half_life_s=self._half_life_s,
        )  # fmt: skip
        return extended.most_recent(self._max_items)


def _examples(
    events: pl.DataFrame,
    lookup: _Histories,
    tables: Sequence[ItemTable],
    config: IngestConfig,
    seed: int,
) -> ExampleSet:
    trained = events.filter(~pl.col("held_out"))
    requests = trained.group_by("user", "request_id", maintain_order=True).agg(
        pl.col("ts", "period").min(), pl.col("query").drop_nulls().first(), pl.col("item", "gain")
    )
    most = config.max_examples_per_user
    kept = sample_per_group(requests, ["user"], ["request_id"], most, seed=seed).sort(
        "user", "ts", "request_id"
    )
    samplers = [NegativeSampler.from_popularity(t.popularity, config) for t in tables[:-1]]
    width = max_candidates(config)
    out = _empty_examples(len(kept), width)
    out.user[:] = kept["user"].rle_id().to_numpy()
    for row, request in enumerate(kept.iter_rows(named=True)):
        table, sampler = tables[request["period"]], samplers[request["period"]]
        rng = np.random.default_rng([seed, *f"{request['user']} {request['request_id']}".encode()])
        _fill_example(out, row, request, lookup, table, sampler, rng)
    return out


def _fill_example(
    out: ExampleSet,
    row: int,
    request: dict[str, Any],
    lookup: _Histories,
    table: ItemTable,
    sampler: NegativeSampler,
    rng: np.random.Generator,
) -> None:
    history = lookup.at(request["user"], request["ts"])
    chosen, gains = _strongest(request["item"], request["gain"])
    keep = rng.permutation(len(chosen))[: sampler.config.max_positives]
    candidates, log_q = sampler.candidates(chosen[keep], chosen, history.items, rng)
    num = len(candidates)
    out.candidates[row, :num] = candidates
    out.gains[row, : len(keep)] = gains[keep]
    out.log_q[row, :num] = log_q
    out.features[row, :num] = features(history, table, candidates, now=request["ts"])
    attended, attention = history.attention(NUM_ATTENDED)
    out.attended[row, : len(attended)] = attended
    out.attention[row, : len(attention)] = attention
    out.queries[row] = request["query"] or ""


def _empty_examples(num: int, width: int) -> ExampleSet:
    return ExampleSet(
        user=np.zeros(num, np.int32),
        candidates=np.full((num, width), -1, np.int32),
        gains=np.zeros((num, width), np.float32),
        log_q=np.zeros((num, width), np.float32),
        features=np.zeros((num, width, NUM_FEATURES), np.float32),
        attended=np.full((num, NUM_ATTENDED), -1, np.int32),
        attention=np.zeros((num, NUM_ATTENDED), np.float32),
        queries=[""] * num,
    )


def _strongest(
    items: Sequence[int], gains: Sequence[float]
) -> tuple[IndexArray, NDArray[np.float32]]:
    """Returns a request's distinct items, each with its largest gain."""
    distinct, place = np.unique(np.asarray(items, np.int32), return_inverse=True)
    best = np.zeros(len(distinct), np.float32)
    np.maximum.at(best, place, np.asarray(gains, np.float32))
    return distinct, best


CASE_SCHEMA = {
    "held_out": pl.Boolean(),
    "now": pl.Float64(),
    "positives": pl.List(pl.Int32()),
    "gains": pl.List(pl.Float32()),
    **{
        name: pl.List(pl.Int32() if name == "items" else pl.Float64())
        for name in ("items", "count", "decayed", "first_ts", "last_ts")
    },
}


def _cases(events: pl.DataFrame, lookup: _Histories, window_start: float) -> pl.DataFrame:
    window = events.filter(pl.col("ts") >= window_start)
    users = window.group_by("user", maintain_order=True).agg(
        pl.col("item", "gain"), pl.col("held_out").first()
    )
    rows = []
    for user in users.iter_rows(named=True):
        history = lookup.at(user["user"], window_start)
        positives, gains = _strongest(user["item"], user["gain"])
        columns = {name: getattr(history, name).tolist() for name in list(CASE_SCHEMA)[4:]}
        chosen = {"positives": positives.tolist(), "gains": gains.tolist()}
        rows.append({"held_out": user["held_out"], "now": window_start, **chosen, **columns})
    return pl.DataFrame(rows, schema=CASE_SCHEMA)


def read_cases(data: bytes) -> Iterator[Case]:
    """Reads the cases of one shard from their parquet bytes."""
    for row in pl.read_parquet(io.BytesIO(data)).iter_rows(named=True):
        history = UserHistory(
            items=np.array(row["items"], np.int32),
            as_of=row["now"],
            **{name: np.array(row[name], np.float64) for name in list(CASE_SCHEMA)[5:]},
        )
        yield Case(
            held_out=row["held_out"], history=history, now=row["now"],
            positives=np.array(row["positives"], np.int32),
            gains=np.array(row["gains"], np.float32),
        )  # fmt: skip


def _parts(users: pl.Series) -> Iterator[tuple[str, slice]]:
    """Yields each user of a sorted column with the rows that are theirs."""
    start = 0
    lengths = users.rle()
    for run in lengths.struct.unnest().iter_rows(named=True):
        yield run["value"], slice(start, start + run["len"])
        start += run["len"]
