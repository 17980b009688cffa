"""Impressions and their outcomes over several updates, with the real ingest and the real ledger."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from raysys import update
from raysys.config import Config, load_config
from raysys.errors import EmptyPlanError, PartitionChangedError
from raysys.ingest.example_set import ExampleSet
from raysys.ingest.pipeline import cases_path, examples_path, released_path
from raysys.ingest.shard_state import load_histories
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted
from raysys.partitions.schema import EVENT_SCHEMA
from raysys.storage import Root
from raysys.storage.parquet import to_parquet
from tests.stub_steps import Steps, ingest_in_a_row
from tests.update_shop import DAYS, raw_id, write_catalogue, write_shop

NUM_USERS = 40
PAGE = ["i00", "i01", "i02"]
WINDOW = """
labels: {attribution_window_s: 43200.0}
"""


def at(day: str, hour: float) -> datetime.datetime:
    midnight = datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC)
    return midnight + datetime.timedelta(hours=hour)


def page(number: int, when: datetime.datetime, request: str) -> list[dict[str, Any]]:
    return [
        event(number, item, when, request, "impression", position=place + 1)
        for place, item in enumerate(PAGE)
    ]


def event(
    number: int, item: str, when: datetime.datetime, request: str, kind: str, **more: Any
) -> dict[str, Any]:
    return {
        "event_id": f"{request}-{number}-{item}-{kind}", "event_type": kind,
        "user_id": raw_id(number), "item_id": item, "ts": when,
        "request_id": f"{request}-{number}", **more,
    }  # fmt: skip


class Shop:
    """Writes files of events and updates; keeps what each update trained on."""

    def __init__(self, root: Root, config: Config, steps: Steps) -> None:
        self.root, self.config, self.steps = root, config, steps
        self.commits: list[UpdateCommitted] = []
        self.trained: list[ExampleSet] = []
        self.cases: list[pl.DataFrame] = []

    def write(self, folder: str, rows: list[dict[str, Any]], name: str = "a.parquet") -> None:
        frame = pl.DataFrame(rows, schema={k: EVENT_SCHEMA[k] for k in rows[0]})
        self.root.put(f"events/dt={folder}/{name}", to_parquet(frame))

    def update(self) -> UpdateCommitted:
        kept: list[ExampleSet] = []
        train = self.steps.train

        def look(job: Any, texts: Any, *, update_id: str, num_shards: int, **rest: Any) -> Any:
            for shard in range(num_shards):
                data = self.root.read_bytes(examples_path(update_id, shard))
                kept.append(ExampleSet.from_bytes(data))
                cases = self.root.read_bytes(cases_path(update_id, shard))
                self.cases.append(pl.read_parquet(io.BytesIO(cases)))
            return train(job, texts, update_id=update_id, **rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(update, "train", look)
            self.commits.append(self.steps.update(self.config))
        self.trained += kept
        return self.commits[-1]

    @property
    def shown_examples(self) -> int:
        """Examples of what was shown, of all updates together."""
        return sum(int((part.position > 0).any(1).sum()) for part in self.trained)


@pytest.fixture
def shop(tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> Shop:
    root = Root((tmp_path / "root").as_uri())
    file = write_shop(tmp_path, root, tiny_encoder)
    file.write_text(file.read_text() + WINDOW)
    steps = Steps(monkeypatch)
    ingest_in_a_row(monkeypatch)
    write_catalogue(root)
    return Shop(root, load_config(file), steps)


def test_a_request_of_the_evening_is_trained_on_the_day_after_once_and_for_all(shop: Shop) -> None:
    morning = [row for n in range(NUM_USERS) for row in page(n, at(DAYS[0], 6), "m")]
    evening = [row for n in range(NUM_USERS) for row in page(n, at(DAYS[0], 20), "e")]
    clicks = [
        event(n, "i01", at(DAYS[0], hour), request, "click", position=None)
        for n in range(NUM_USERS)
        for request, hour in (("m", 7), ("e", 21))
    ]
    shop.write(DAYS[0], [*morning, *evening, *clicks])
    first = shop.update()
    assert first.label_counts["impressions"] == {
        "with_outcome": 3 * NUM_USERS, "waiting": 3 * NUM_USERS, "without_outcome": 0,
        "repeated": 0, "late_impression": 0,
    }  # fmt: skip
    trained = shop.shown_examples
    assert 0 < trained <= NUM_USERS

    # The exporter sends all of it again, beside a click that comes too late for the evening.
    late = [event(n, "i02", at(DAYS[1], 12), "e", "click", position=None) for n in range(NUM_USERS)]
    shop.write(DAYS[1], [*morning, *evening, *clicks], name="again.parquet")
    shop.write(DAYS[1], late)
    second = shop.update()
    # The morning's are too old for the partition that they came in, the evening's are known.
    assert second.row_counts["quarantined: ts outside its partition"] == 4 * NUM_USERS
    assert second.row_counts["seen_before"] == 4 * NUM_USERS
    assert second.label_counts["impressions"]["with_outcome"] == 3 * NUM_USERS
    assert second.label_counts["impressions"]["late_impression"] == 0
    assert second.label_counts["outcomes"]["late_outcome"] == NUM_USERS
    assert shop.shown_examples == 2 * trained

    shop.write(DAYS[2], [event(0, "i05", at(DAYS[2], 1), "z", "click", position=None)])
    shop.update()
    assert shop.shown_examples == 2 * trained
    for commit in shop.commits:
        assert sum(commit.row_counts.values()) == commit.num_rows
        requests = commit.label_counts["requests"]
        assert requests["held_out"] > 0 or sum(requests.values()) == 1
    assert sum(c.label_counts["requests"]["trained"] for c in shop.commits) == sum(
        len(part.user) for part in shop.trained
    )


def test_an_event_in_a_days_and_an_hours_partition_is_one_event(shop: Shop) -> None:
    rows = [event(n, "i01", at(DAYS[0], 15.5), "r", "purchase") for n in range(NUM_USERS)]
    shop.write(DAYS[0], rows)
    shop.write(f"{DAYS[0]}/hour=15", rows[: NUM_USERS // 2])
    assert shop.update().row_counts["duplicate"] == NUM_USERS // 2
    shop.write(f"{DAYS[1]}/hour=00", rows)
    second = shop.update()
    assert second.row_counts["seen_before"] == NUM_USERS
    counted = load_histories(shop.root, second.update_id)
    assert set(counted["count"]) == {1.0}


def test_a_reprocessed_file_adds_only_what_it_did_not_hold_before(shop: Shop) -> None:
    rows = [event(n, "i01", at(DAYS[0], 5), "r", "purchase") for n in range(NUM_USERS)]
    shop.write(DAYS[0], rows[:-5])
    shop.update()
    shop.write(DAYS[0], rows)
    shop.config = _replaced(shop.config, rewritten_files="reprocess")
    second = shop.update()
    assert second.row_counts["seen_before"] == NUM_USERS - 5
    assert second.row_counts["outcome"] == 5
    histories = load_histories(shop.root, second.update_id)
    assert Counter(histories["count"]) == {1.0: NUM_USERS}


def _replaced(config: Config, **partitions: Any) -> Config:
    changed = dataclasses.replace(config.partitions, **partitions)
    return dataclasses.replace(config, partitions=changed)


def test_the_examples_of_an_update_are_those_whose_hashes_it_committed(shop: Shop) -> None:
    rows = [event(n, "i01", at(DAYS[0], 5), "r", "purchase") for n in range(NUM_USERS)]
    shop.write(DAYS[0], rows)
    commit = shop.update()
    found = [hashlib.sha256(part.to_bytes()).hexdigest() for part in shop.trained]
    assert list(commit.example_hashes.values()) == found
    assert len(found) == 2


class TestPrivacyOfCounts:
    """That the caps and the noise that are charged are those that the graph applies."""

    def released(self, shop: Shop, **changes: Any) -> np.ndarray[Any, Any]:
        rows = [
            event(n, f"i{item:02}", at(DAYS[0], 5), f"r{item}", "purchase")
            for n in range(NUM_USERS)
            for item in range(8)
        ]
        shop.write(DAYS[0], rows)
        shop.config = dataclasses.replace(shop.config, **changes)
        commit = shop.update()
        data = shop.root.read_bytes(released_path(commit.update_id))
        counts: np.ndarray[Any, Any] = np.load(io.BytesIO(data))
        return counts

    def test_noise_of_the_charged_size_is_on_every_count(self, shop: Shop) -> None:
        counts = self.released(shop)
        true = np.zeros(counts.shape[1])
        true[:8] = NUM_USERS
        privacy, cap = shop.config.privacy, shop.config.ingest.max_items_per_user_period
        std = privacy.count_noise_multiplier * np.sqrt(cap)
        noise = counts[0] - true
        assert len(noise) == 40
        # 40 draws: their deviation is off by more than half once in a million runs.
        assert 0.5 * std < noise.std() < 1.5 * std

    def test_a_user_moves_no_more_counts_than_the_cap(self, shop: Shop) -> None:
        ingest = dataclasses.replace(shop.config.ingest, max_items_per_user_period=3)
        public = dataclasses.replace(shop.config.privacy, enabled=False)
        counts = self.released(shop, ingest=ingest, privacy=public)
        assert counts.sum() == 3 * NUM_USERS and counts.max() <= NUM_USERS


def test_before_and_after_are_compared_on_the_newest_day(shop: Shop) -> None:
    for day in DAYS[:2]:
        rows = [event(n, "i01", at(day, 5), f"r{day}", "purchase") for n in range(NUM_USERS)]
        shop.write(day, rows)
    assert shop.config.evaluate.window_days == 1
    shop.update()
    cases = pl.concat(shop.cases)
    assert set(cases["now"]) == {at(DAYS[1], 0).timestamp()}
    assert set(cases["items"].list.len()) == {1}


def test_a_file_without_rows_costs_nothing(shop: Shop) -> None:
    shop.write(DAYS[0], [event(0, "i01", at(DAYS[0], 5), "r", "purchase")])
    frame = pl.DataFrame(schema={k: EVENT_SCHEMA[k] for k in EVENT_SCHEMA})
    shop.root.put(f"events/dt={DAYS[1]}/a.parquet", to_parquet(frame))
    with pytest.raises(PartitionChangedError, match=f"events/dt={DAYS[1]} holds no data"):
        shop.update()
    assert Log(shop.root).refresh().sequence == 0
    shop.config = _replaced(shop.config, empty_partitions="reprocess")
    first = shop.update()
    assert [p.key for p in first.partitions] == [f"events/dt={DAYS[0]}"]
    assert first.watermark == DAYS[0]
    for outcome in ("reprocess", "quarantine"):
        shop.config = _replaced(shop.config, empty_partitions=outcome)
        with pytest.raises(EmptyPlanError, match="holds no rows, and nothing else is new"):
            shop.update()
    assert len(Log(shop.root).refresh().spends) == 1
    shop.write(DAYS[2], [event(0, "i02", at(DAYS[2], 5), "s", "purchase")])
    second = shop.update()
    assert [(aside.kind, aside.path) for aside in second.set_aside] == [
        ("empty", f"events/dt={DAYS[1]}")
    ]
