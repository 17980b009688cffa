"""The Ray Data graph of one update: partitions in, user shards of examples out.

    partitions --map--> clean rows split by user shard            (one task a partition)
    shards ----map--> deduplicated outcomes, bounded item counts  (one task a shard)
    sum over shards + noise -> released item statistics           (driver)
    shards ----map--> examples, evaluation cases, new histories   (one task a shard)

Work is laid out by partition, then by user shard, and Polars computes inside the tasks: Ray
spreads and streams it and shuffles nothing (measured 25 times faster than a shuffle join). The
split by shard goes through `staging/<update_id>/`. A retried task writes the same objects again.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl
import ray
from numpy.typing import NDArray

from raysys.config import Config
from raysys.errors import DataError
from raysys.ingest.bound import bounded_counts, count_l2_sensitivity, noise_counts
from raysys.ingest.clean import (
    CLEAN_COLUMNS,
    clean_events,
    conform,
    name_columns,
    read_parquet_file,
    select_as,
)
from raysys.ingest.examples import HISTORY_SCHEMA, build_shard
from raysys.ingest.features import DAY_S, ItemTable
from raysys.ingest.outcomes import find_outcomes, period_of
from raysys.ingest.pseudonym import (
    HELD_OUT_SCHEMA,
    Pseudonymizer,
    no_values_in_errors,
    user_shard,
)
from raysys.ingest.stats import ItemState, load_item_state, release, save_item_state, upsert
from raysys.ledger.records import FileRef, PartitionRef
from raysys.partitions.layout import HELD_OUT, partition_date, quarantine, staging, state_folder
from raysys.partitions.schema import ITEM_SCHEMA
from raysys.storage import Root
from raysys.storage.parquet import to_parquet


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IngestJob:
    """What the tasks of one update need to know. Travels into every task."""

    root: Root
    config: Config
    update_id: str
    base_state: str | None
    user_key_id: str
    """The key of the pseudonyms to be made: a later one may be given while the update runs."""
    partitions: tuple[PartitionRef, ...]
    seed: int
    """Of caps and negatives, so that a retried task makes the same."""

    @property
    def period_ends(self) -> list[float]:
        """UNIX seconds at which the periods end whose item counts are released."""
        return period_ends(self.partitions, self.config.ingest.period_days)

    @property
    def window_start(self) -> float:
        """UNIX seconds at which the evaluation window begins."""
        dates = [partition_date(p.key) for p in self.partitions]
        window = datetime.timedelta(days=self.config.evaluate.window_days - 1)
        first = max(min(dates), max(dates) - window)
        return _midnight(first)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ingested:
    """What ingest left below `staging/`, `state/` and `quarantine/`, in numbers."""

    num_rows: int
    num_users: int
    num_examples: int
    row_counts: dict[str, int]
    """Where every row went; the values add up to `num_rows`."""
    quarantined_files: dict[str, str]
    items: ItemTable
    """The item statistics after the update."""
    items_before: ItemTable
    """What was public when the evaluation window began."""


def ingest(job: IngestJob, item_files: Iterable[FileRef]) -> Ingested:
    """Runs the graph.

    Raises:
      DataError: The catalogue is empty.
    """
    upserts, bad_items = read_items(job.root, item_files)
    before = upsert(_base_items(job), upserts)
    if before.catalogue.is_empty():
        raise DataError("the catalogue is empty: write item rows below items/dt=YYYY-MM-DD/ first")
    item_ids = ray.put(before.catalogue["item_id"].to_list())
    shards = [{"shard": shard} for shard in range(job.config.ingest.num_shards)]

    cleaned = _map(job, _clean_partition, [{"index": i} for i in range(len(job.partitions))])
    bounded = _map(job, functools.partial(_bound_shard, item_ids=item_ids), shards)
    states = _release(job, before, sum(row["counts"] for row in bounded))
    tables = [state.table() for state in states]
    save_item_state(job.root, job.update_id, states[-1])
    built = _map(job, functools.partial(_build_shard, tables=ray.put(tables)), shards)

    bad_files = bad_items | {k: v for row in cleaned for k, v in row["bad_files"].items()}
    if bad_files:
        listed = json.dumps(bad_files, indent=1, sort_keys=True).encode()
        job.root.put(f"{quarantine(job.update_id)}/files.json", listed)
    row_counts = sum((Counter(row["row_counts"]) for row in [*cleaned, *bounded]), Counter[str]())
    return Ingested(
        num_rows=sum(row["num_rows"] for row in cleaned),
        num_users=sum(row["num_users"] for row in built),
        num_examples=sum(row["num_examples"] for row in built),
        row_counts=dict(sorted(row_counts.items())),
        quarantined_files=bad_files,
        items=tables[-1],
        items_before=tables[period_of(np.array([job.window_start]), job.period_ends)[0]],
    )


def read_items(root: Root, item_files: Iterable[FileRef]) -> tuple[pl.DataFrame, dict[str, str]]:
    """Reads catalogue upserts.

    Returns:
      Their rows, and path -> reason of the files that cannot be used.
    """
    frames, bad_files = [pl.DataFrame(schema=ITEM_SCHEMA)], {}
    for file in item_files:
        try:
            frames.append(_read_item_file(root, file.path))
        except DataError as error:
            bad_files[file.path] = str(error)
    epoch = pl.lit(datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC), ITEM_SCHEMA["updated_at"])
    rows = pl.concat(frames).filter(pl.col("item_id").fill_null("") != "")
    return rows.with_columns(pl.col("updated_at").fill_null(epoch)), bad_files


def _read_item_file(root: Root, path: str) -> pl.DataFrame:
    frame = read_parquet_file(root.read_bytes(path), path)
    if "item_id" not in frame.columns:
        raise DataError(f"{path} has no column item_id; it has {name_columns(frame, ITEM_SCHEMA)}")
    return select_as(frame, ITEM_SCHEMA, path)


def period_ends(partitions: Iterable[PartitionRef], period_days: int) -> list[float]:
    """Returns where the periods end into which the partitions fall, at most `period_days` long.

    Days without a partition make no period: a stray old one must not be charged for the years
    between.

    >>> days = [PartitionRef(key=f"events/dt=2017-03-{d:02}", files=()) for d in (1, 2, 29)]
    >>> [end / 86400 for end in period_ends(days, 7)]
    [17228.0, 17255.0]
    """
    starts: list[datetime.date] = []
    ends: list[float] = []
    for date in sorted(partition_date(p.key) for p in partitions):
        if not starts or (date - starts[-1]).days >= period_days:
            starts.append(date)
            ends.append(0.0)
        ends[-1] = _midnight(date) + DAY_S
    return ends


def _map(
    job: IngestJob, task: Callable[..., dict[str, Any]], rows: list[Any]
) -> list[dict[str, Any]]:
    """Runs `task` on each row as a Ray Data task of its own."""
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    return list(dataset.map(functools.partial(task, job=job), num_cpus=0.5).take_all())


def _clean_partition(row: dict[str, Any], job: IngestJob) -> dict[str, Any]:
    partition = job.partitions[row["index"]]
    date = partition_date(partition.key)
    keys = Pseudonymizer.from_config(job.config.pseudonyms)
    pseudonymizer = keys.until(job.user_key_id)
    usable, refused, bad_files = [], [], {}
    for file in partition.files:
        data = job.root.read_bytes(file.path)
        try:
            with no_values_in_errors(file.path):
                frame = conform(read_parquet_file(data, file.path), file.path)
                good, bad = clean_events(frame, pseudonymizer, date=date)
        except DataError as error:
            bad_files[file.path] = str(error)
            continue
        usable.append(good)
        refused.append(bad.with_columns(path=pl.lit(file.path)))
    num_refused = sum(map(len, refused))
    if num_refused:
        path = f"{quarantine(job.update_id)}/rows-{date.isoformat()}.parquet"
        job.root.put(path, to_parquet(pl.concat(refused)))
    if usable:
        _write_shards(job, pl.concat(usable), row["index"])
    return {
        "num_rows": num_refused + sum(map(len, usable)),
        "row_counts": {"quarantined": num_refused},
        "bad_files": bad_files,
    }


def _write_shards(job: IngestJob, rows: pl.DataFrame, index: int) -> None:
    sharded = rows.with_columns(_shard=user_shard(job.config.ingest.num_shards))
    for (shard,), part in sharded.group_by("_shard"):
        path = f"{_shard_folder(job, int(str(shard)), 'clean')}/{index:06}.parquet"
        job.root.put(path, to_parquet(part.drop("_shard")))


def _bound_shard(
    row: dict[str, Any], job: IngestJob, item_ids: ray.ObjectRef[list[str]]
) -> dict[str, Any]:
    shard, ends, ids = row["shard"], job.period_ends, ray.get(item_ids)
    rows = _read_frames(job.root, _shard_folder(job, shard, "clean"), _CLEAN_SCHEMA)
    outcomes, row_counts = find_outcomes(
        rows, item_ids=ids, gains=job.config.ingest.gains, ends=ends
    )
    job.root.put(f"{_shard_folder(job, shard, 'outcomes')}/all.parquet", to_parquet(outcomes))
    counts = bounded_counts(
        outcomes,
        num_periods=len(ends),
        num_items=len(ids),
        max_items=job.config.ingest.max_items_per_user_period,
        seed=job.seed,
    )
    return {"counts": counts, "row_counts": row_counts}


def _release(job: IngestJob, before: ItemState, counts: NDArray[np.float64]) -> list[ItemState]:
    """Noises the counts once and folds them into the item statistics."""
    std, privacy = 0.0, job.config.privacy
    if privacy.enabled:
        sensitivity = count_l2_sensitivity(job.config.ingest.max_items_per_user_period)
        std = privacy.count_noise_multiplier * sensitivity
        counts = noise_counts(counts, std)
    return release(before, counts, job.period_ends, noise_std=std)


def _build_shard(
    row: dict[str, Any], job: IngestJob, tables: ray.ObjectRef[list[ItemTable]]
) -> dict[str, Any]:
    shard, num_shards = row["shard"], job.config.ingest.num_shards
    outcomes = _read_frames(job.root, _shard_folder(job, shard, "outcomes"), {})
    histories, held_out = pl.DataFrame(schema=HISTORY_SCHEMA), pl.DataFrame(schema=HELD_OUT_SCHEMA)
    as_of = 0.0
    if job.base_state is not None:
        histories = load_histories(job.root, job.base_state).filter(user_shard(num_shards) == shard)
        held_out = load_held_out(job.root, job.base_state).filter(user_shard(num_shards) == shard)
        as_of = load_item_state(job.root, job.base_state).as_of
    held: list[ItemTable] = ray.get(tables)
    result = build_shard(
        outcomes,
        histories,
        histories_as_of=as_of,
        held_out=held_out,
        tables=held,
        window_start=job.window_start,
        config=job.config.ingest,
        seed=job.seed,
    )
    job.root.put(examples_path(job.update_id, shard), result.examples.to_bytes())
    job.root.put(cases_path(job.update_id, shard), to_parquet(result.cases))
    job.root.put(histories_path(job.update_id, shard), to_parquet(result.histories))
    job.root.put(held_out_path(job.update_id, shard), to_parquet(result.held_out))
    return {"num_users": result.num_users, "num_examples": len(result.examples.user)}


def examples_path(update_id: str, shard: int) -> str:
    """Where a shard's training examples are while the update is at work."""
    return f"{staging(update_id)}/examples/{shard:04}.arrow"


def cases_path(update_id: str, shard: int) -> str:
    """Where a shard's evaluation cases are while the update is at work."""
    return f"{staging(update_id)}/cases/{shard:04}.parquet"


def histories_path(update_id: str, shard: int) -> str:
    """Where a shard's user histories are kept after the update."""
    return f"{state_folder(update_id)}/histories/{shard:04}.parquet"


def held_out_path(update_id: str, shard: int) -> str:
    """Where a shard's draws of who is held out are kept after the update."""
    return f"{state_folder(update_id)}/{HELD_OUT}/{shard:04}.parquet"


def load_held_out(root: Root, update_id: str) -> pl.DataFrame:
    """Reads who is held out, HELD_OUT_SCHEMA; of a state that kept no draws yet, nobody."""
    return _read_frames(root, f"{state_folder(update_id)}/{HELD_OUT}", HELD_OUT_SCHEMA)


def load_histories(root: Root, update_id: str) -> pl.DataFrame:
    """Reads the histories of all users, HISTORY_SCHEMA, sorted by user and item."""
    folder = f"{state_folder(update_id)}/histories"
    return _read_frames(root, folder, HISTORY_SCHEMA).sort("user", "item")


_CLEAN_SCHEMA = {name: pl.Float64() if name == "ts" else pl.String() for name in CLEAN_COLUMNS}


def _base_items(job: IngestJob) -> ItemState:
    if job.base_state is None:
        return ItemState.empty(job.config.ingest.half_life_days * DAY_S)
    return load_item_state(job.root, job.base_state)


def _shard_folder(job: IngestJob, shard: int, stage: str) -> str:
    return f"{staging(job.update_id)}/{stage}/{shard:04}"


def _read_frames(root: Root, folder: str, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    files = root.list(folder)
    frames = [pl.read_parquet(io.BytesIO(root.read_bytes(file.path))) for file in files]
    return pl.concat([pl.DataFrame(schema=schema), *frames] if schema else frames)


def _midnight(date: datetime.date) -> float:
    return datetime.datetime.combine(date, datetime.time(), datetime.UTC).timestamp()
