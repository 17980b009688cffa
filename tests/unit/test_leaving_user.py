"""A user who leaves changes nobody else's examples, cases or state: not by one byte.

The whole ingest of two updates runs with and without one user, on the same released counts, which
are noised and charged for. The user does what can be done against it: uses the ids of others, shows
up in the same requests, and outdoes every cap. Draws that look at other users' rows are caught.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from raysys.config import Config, EvaluateConfig, IngestConfig, LabelConfig, PseudonymConfig
from raysys.ingest import examples as building
from raysys.ingest import pipeline
from raysys.ingest.bound import count_l2_sensitivity
from raysys.ingest.example_set import ExampleSet
from raysys.ingest.examples import ShardResult, ShardSettings
from raysys.ingest.pipeline import Ingested, IngestJob, cases_path, examples_path
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.sample import NegativeSampler
from raysys.ingest.shard_state import SHARD_FILES
from raysys.ingest.stats import Timeline
from raysys.partitions.discover import discover
from raysys.partitions.layout import state_folder
from raysys.partitions.schema import EVENT_SCHEMA
from raysys.storage import Root
from raysys.storage.parquet import to_parquet
from tests import tiny_shop
from tests.stub_steps import ingest_in_a_row
from tests.update_shop import write_catalogue

KEY = b"0123456789abcdef"
LEAVES = "leaves"
UPDATES = ("u0001-aaaaaa", "u0002-bbbbbb")
DAYS = (("2017-03-01", "2017-03-02"), ("2017-03-03", "2017-03-04"))
NUM_USERS, NUM_ITEMS, NUM_SHARDS = 30, tiny_shop.NUM_ITEMS, 2
MAX_ITEMS = 4
CONFIG = {
    "ingest": IngestConfig(
        num_shards=NUM_SHARDS, max_examples_per_user=2, max_positives=2, period_days=2,
        num_history_negatives=3, num_popularity_negatives=6, num_category_negatives=2,
        num_uniform_negatives=4, max_items_per_user_period=MAX_ITEMS, max_history_items=6,
    ),
    "labels": LabelConfig(attribution_window_s=43_200.0, negative_keep_fraction=0.6),
    "evaluate": EvaluateConfig(window_days=1),
}  # fmt: skip
COUNTS = np.random.default_rng(4).normal(20.0, 8.0, (1, NUM_ITEMS))


def event(who: str, item: int, when: datetime.datetime, request: str, kind: str) -> dict[str, Any]:
    # One event_id and one request_id for all users: an id tells nothing without its user.
    return {"event_id": f"{request}-{item}-{kind}", "event_type": kind, "user_id": who,
            "item_id": f"i{item:02}", "ts": when, "request_id": request, "query": "w1",
            "position": item}  # fmt: skip


def events_of(day: str) -> list[dict[str, Any]]:
    """Pages and purchases of everyone; the user who leaves is shown and buys everything."""
    midnight = datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC)
    rng = np.random.default_rng(midnight.toordinal())
    rows = []
    for who in [*(f"user-{number}" for number in range(NUM_USERS)), LEAVES]:
        is_greedy = who == LEAVES
        for hour in range(24) if is_greedy else rng.permutation(24)[:3]:
            at = midnight + datetime.timedelta(hours=int(hour))
            shown = np.arange(NUM_ITEMS) if is_greedy else rng.permutation(NUM_ITEMS)[:8]
            rows += [event(who, int(item), at, f"{day}-{hour}", "impression") for item in shown]
            later = at + datetime.timedelta(seconds=60)
            bought = shown if is_greedy else shown[:2]
            rows += [event(who, int(item), later, f"{day}-{hour}", "purchase") for item in bought]
            rows += [event(who, int(item), later, f"own-{day}-{hour}", "cart") for item in bought]
    return rows


@dataclasses.dataclass(frozen=True)
class World:
    """What two updates made of the events."""

    groups: list[Counter[bytes]]
    """Of each update, the examples of each user who has any, as bytes."""
    cases: list[Counter[str]]
    states: dict[str, pl.DataFrame]
    """Of the last update, without the user who leaves."""
    counts: list[NDArray[np.float64]]
    """Of each update, (P, N) before noise."""
    published: list[bytes]
    """Of each update, the item statistics."""


def run(folder: Path, released: NDArray[np.float64] | None, *, with_user: bool) -> World:
    root = Root(folder.as_uri())
    (folder / "key").write_bytes(KEY)
    write_catalogue(root)
    config = Config(
        root=root.uri, pseudonyms=PseudonymConfig(key_file=str(folder / "key")), **CONFIG
    )  # type: ignore[arg-type]
    keys = Pseudonymizer(KEY)
    for day in (day for days in DAYS for day in days):
        rows = [row for row in events_of(day) if with_user or row["user_id"] != LEAVES]
        frame = pl.DataFrame(rows, schema={name: EVENT_SCHEMA[name] for name in rows[0]})
        root.put(f"events/dt={day}/a.parquet", to_parquet(frame))
    found = discover(root)
    groups, cases, counts, published = [], [], [], []
    for i, (update_id, days) in enumerate(zip(UPDATES, DAYS, strict=True)):
        job = IngestJob(
            root=root, work=root, config=config, update_id=update_id,
            base_state=UPDATES[0] if i else None,
            partitions=tuple(p for p in found.partitions if p.key.endswith(days)),
            read_before=UPDATES[:i], user_key_id=keys.key_id,
            key_ids={UPDATES[0]: keys.key_id}, seed=i,
        )  # fmt: skip
        assert job.num_shards == NUM_SHARDS
        ingested = pipeline.ingest(job, found.item_files if not i else (), released=released)
        groups.append(Counter(of_users(root, update_id)))
        cases.append(Counter(cases_of(root, update_id)))
        counts.append(bounded(root, job))
        published.append(statistics(ingested))
    states = {kind: state_of(root, kind, keys.pseudonym(LEAVES)) for kind in SHARD_FILES}
    return World(groups=groups, cases=cases, states=states, counts=counts, published=published)


def of_users(root: Root, update_id: str) -> list[bytes]:
    found = []
    for shard in range(NUM_SHARDS):
        part = ExampleSet.from_bytes(root.read_bytes(examples_path(update_id, shard)))
        for number in range(part.num_users):
            rows = np.flatnonzero(part.user == number)
            queries = "|".join(part.queries[row] for row in rows)
            arrays = [
                getattr(part, field.name)[rows].tobytes()
                for field in dataclasses.fields(ExampleSet)
                if field.name not in ("user", "queries")
            ]
            found.append(b"".join([*arrays, queries.encode()]))
    return found


def cases_of(root: Root, update_id: str) -> list[str]:
    data = [root.read_bytes(cases_path(update_id, shard)) for shard in range(NUM_SHARDS)]
    return [repr(row) for part in data for row in pl.read_parquet(io.BytesIO(part)).iter_rows()]


def bounded(root: Root, job: IngestJob) -> NDArray[np.float64]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "noise_counts", lambda counts, std: counts)
        return pipeline._release(job, NUM_ITEMS)


def statistics(ingested: Ingested) -> bytes:
    tables = (ingested.items, ingested.items_before)
    return b"".join(table.popularity.tobytes() + table.trend.tobytes() for table in tables)


def state_of(root: Root, kind: str, leaves: str) -> pl.DataFrame:
    files = root.list(f"{state_folder(UPDATES[-1])}/{kind}")
    frame = pl.concat(pl.read_parquet(io.BytesIO(root.read_bytes(file.path))) for file in files)
    return frame.filter(pl.col("user") != leaves).sort(frame.columns)


def changed(with_user: World, without: World) -> list[str]:
    """What of the other users is not the same in both worlds."""
    found = []
    for i, update_id in enumerate(UPDATES):
        for kind in ("groups", "cases"):
            among, alone = getattr(with_user, kind)[i], getattr(without, kind)[i]
            gone, own = alone - among, among - alone
            if gone or own.total() > 1:
                found.append(f"{kind} of {update_id}: {gone.total()} changed, {own.total()} new")
        if with_user.published[i] != without.published[i]:
            found.append(f"item statistics of {update_id}")
    return found + [
        f"state {kind}"
        for kind, frame in with_user.states.items()
        if not frame.equals(without.states[kind])
    ]


@pytest.fixture
def worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[World, World]]:
    ingest_in_a_row(monkeypatch)

    def both(released: NDArray[np.float64] | None = COUNTS) -> tuple[World, World]:
        pair = []
        for name, with_user in (("with", True), ("without", False)):
            (tmp_path / name).mkdir()
            pair.append(run(tmp_path / name, released, with_user=with_user))
        return pair[0], pair[1]

    return both


Worlds = Callable[..., tuple[World, World]]


def test_nobody_elses_examples_cases_or_state_change_by_one_byte(worlds: Worlds) -> None:
    with_user, without = worlds()
    assert changed(with_user, without) == []
    # There was something to compare, and the user who left had been there.
    assert all(groups.total() > NUM_USERS / 2 for groups in without.groups)
    assert any(a.total() > b.total() for a, b in zip(with_user.groups, without.groups, strict=True))
    assert all(len(frame) for kind, frame in without.states.items() if kind != "impressions")


def test_counts_move_by_no_more_than_is_noised(worlds: Worlds) -> None:
    with_user, without = worlds()
    for among, alone in zip(with_user.counts, without.counts, strict=True):
        moved = np.linalg.norm(among - alone, axis=1)
        assert (moved <= count_l2_sensitivity(MAX_ITEMS) + 1e-9).all()
        assert moved.max() == pytest.approx(count_l2_sensitivity(MAX_ITEMS)), "the cap is reached"


def raw_popularity(patch: pytest.MonkeyPatch) -> None:
    """Negatives by how often items were bought, without noise."""
    build = pipeline.build_shard

    def build_shard(
        outcomes: pl.DataFrame, impressions: pl.DataFrame, before: Any, settings: ShardSettings
    ) -> ShardResult:
        raw = np.bincount(outcomes["item"].to_numpy(), minlength=NUM_ITEMS).astype(np.float32)
        popularity = np.tile(raw, (len(settings.timeline.ends), 1))
        timeline: Timeline = dataclasses.replace(settings.timeline, popularity=popularity)
        return build(
            outcomes, impressions, before, dataclasses.replace(settings, timeline=timeline)
        )

    patch.setattr(pipeline, "build_shard", build_shard)


def in_batch(patch: pytest.MonkeyPatch) -> None:
    """Negatives are what others of the shard bought."""
    make, pools = building._examples, list[Any]()

    def examples(requests: pl.DataFrame, *rest: Any) -> ExampleSet:
        pools.append(np.unique(np.concatenate([*requests["item"].to_list(), np.zeros(0, int)])))
        return make(requests, *rest)

    def candidates(
        sampler: NegativeSampler, positives: Any, also_chosen: Any, history: Any, rng: Any
    ) -> Any:
        pool = np.setdiff1d(pools[-1], also_chosen)
        drawn = rng.permutation(pool)[:8]
        found = np.concatenate([positives, drawn]).astype(np.int32)
        return found, np.zeros(len(found), np.float32)

    patch.setattr(building, "_examples", examples)
    patch.setattr(NegativeSampler, "candidates", candidates)


def one_generator(patch: pytest.MonkeyPatch) -> None:
    """All users draw from one seeded stream, one after the other."""
    stream = np.random.default_rng(0)
    patch.setattr(building.np.random, "default_rng", lambda *_: stream)


def ids_alone(patch: pytest.MonkeyPatch) -> None:
    """An event is told by its id and day, whoever's it is."""
    split = pipeline.split_events

    def by_id(rows: pl.DataFrame, **rest: Any) -> Any:
        distinct = rows.sort("user").unique(["event_id"], keep="first", maintain_order=True)
        return split(distinct, **rest)

    patch.setattr(pipeline, "split_events", by_id)


@pytest.mark.parametrize("broken", [raw_popularity, in_batch, one_generator, ids_alone])
def test_what_looks_at_other_users_is_caught(
    worlds: Worlds, monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None]
) -> None:
    broken(monkeypatch)
    assert any(what.startswith("groups") for what in changed(*worlds()))


def test_item_cut_offs_come_from_noised_counts_alone(worlds: Worlds) -> None:
    """Other users' rows reach the item statistics by the released counts and by no other way."""
    with_user, without = worlds()
    assert not np.array_equal(with_user.counts[0], without.counts[0])
    assert with_user.published == without.published


def test_cut_offs_of_counts_without_noise_are_caught(
    worlds: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_count_noise_std", lambda job: 0.0)
    assert any(what.startswith("item statistics") for what in changed(*worlds(None)))
