"""A replica without Ray: small versions whose scores are known, and a controller in memory."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from raysys.config import HttpConfig, RetrievalConfig, RolloutConfig, RuleConfig, ShadowConfig
from raysys.ingest.features import ItemTable, UserHistory
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ledger.log import Log
from raysys.ledger.records import Record, UpdateCommitted
from raysys.rollout.reports import ReplicaReport
from raysys.rollout.shadow import ShadowCounts
from raysys.rollout.view import RolloutView
from raysys.serve.api import create_api
from raysys.serve.feedback import EventWriter
from raysys.serve.follower import Follower
from raysys.serve.keys import Keys
from raysys.serve.metrics import Outcome
from raysys.serve.ranker import ResidentVersions
from raysys.serve.replica import Replica
from raysys.serve.service import RankService
from raysys.serve.shadow import Outcome as ShadowOutcome
from raysys.serve.shelf import Shelves
from raysys.serve.steering import Steering
from raysys.storage import Root

ITEMS = ("apple", "bread", "cheese", "dates")


CATEGORY_OF = {"apple": "fruit", "bread": "bakery", "cheese": "dairy", "dates": "fruit"}
BRANDS = ("acme", "umbra")
HALF_LIFE_S = 28 * 86_400.0


def item_table(ids: Sequence[str], **changes: Any) -> ItemTable:
    """Items of 1, 2, 3 ... in price, of two brands in turn; the last is the most popular."""
    category_of = [CATEGORY_OF.get(i, "other") for i in ids]
    categories = list(dict.fromkeys(category_of))
    num = len(ids)
    values: dict[str, Any] = {
        "ids": list(ids),
        "texts": list(map(", ".join, zip(ids, category_of, strict=True))),
        "category": np.array(
            [categories.index(CATEGORY_OF.get(i, "other")) for i in ids], np.int32
        ),
        "category_names": tuple(categories),
        "brand": np.arange(num, dtype=np.int32) % 2,
        "brand_names": BRANDS,
        "price": np.arange(1, num + 1, dtype=np.float32),
        "popularity": np.arange(num, dtype=np.float32),
        "trend": np.zeros(num, np.float32),
        "as_of": 0.0,
        "half_life_s": HALF_LIFE_S,
    }
    return ItemTable(**{**values, **changes})


class FakeVersion:
    """Scores an item by its place in the catalogue; what the user knows goes first."""

    def __init__(
        self,
        name: str,
        items: Sequence[str] | ItemTable = ITEMS,
        *,
        score: Callable[[np.ndarray], np.ndarray] | None = None,
        golden: Exception | None = None,
        user_key_id: str | None = None,
    ) -> None:
        self.name = name
        self.user_key_id = user_key_id
        self.items = items if isinstance(items, ItemTable) else item_table(items)
        self.text_of_item = np.arange(len(self.items), dtype=np.int32)
        # On a quarter of a circle: the further apart in the catalogue, the less similar.
        angle = np.linspace(0, np.pi / 2, len(self.items))
        self.text_vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
        self._score = score
        self._golden = golden
        self.users: list[str] = []
        self.queries: list[str | None] = []
        self.times: list[float] = []

    def history(self, user: str) -> UserHistory:
        self.users.append(user)
        return UserHistory.empty()

    def history_of(self, item_ids: Sequence[str], now: float) -> UserHistory:
        items = self.items.indexes_of(item_ids)
        ones = np.ones(len(items))
        return UserHistory.empty().extend(
            items, now * ones, ones, as_of=now, half_life_s=HALF_LIFE_S
        )

    def knows_query(self, query: str) -> bool:
        return query in self.queries

    def embed_query(self, query: str) -> np.ndarray:
        """Nearest to the item that the query names, then to its neighbours in the catalogue."""
        place = self.items.index_of(query.split()[0].lower()) or 0
        return self.text_vectors[place] if len(self.items) else np.zeros(2, np.float32)

    def score(
        self, history: UserHistory, candidates: np.ndarray, *, now: float, query: str | None
    ) -> np.ndarray:
        self.queries.append(query)
        self.times.append(now)
        scores = -candidates.astype(np.float32)
        scores += 100 * np.isin(candidates, history.items)
        return self._score(scores) if self._score else scores

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        return (0.5 * (1 + np.tanh(0.5 * scores.astype(np.float64)))).astype(np.float32)

    def explain(
        self, history: UserHistory, candidates: np.ndarray, *, now: float, query: str | None
    ) -> dict[str, np.ndarray]:
        """What the user knows is `repeat`, the rest is the place in the catalogue."""
        scores = self.score(history, candidates, now=now, query=query)
        place = -candidates.astype(np.float32)
        return {"base": np.zeros_like(scores), "place": place, "repeat": scores - place}

    def check_golden(self) -> None:
        if self._golden is not None:
            raise self._golden


def load_fake(root: Root, record: UpdateCommitted) -> FakeVersion:
    """Stands for `registry.store.load_version`, in other processes too."""
    assert record.version is not None
    return FakeVersion(record.version)


class FakeMetrics:
    def __init__(self) -> None:
        self.outcomes: list[tuple[str, Outcome]] = []
        self.num_feedback = 0
        self.num_dropped = 0
        self.num_written = 0
        self.num_shown = 0
        self.rejections: list[str] = []
        self.resident: set[str] = set()
        self.failing: set[str] = set()
        self.shadowed_by: list[tuple[str, ShadowOutcome]] = []
        self.shadow = ShadowCounts()

    def ranked(self, *, version: str, surface: str, outcome: Outcome, latency_ms: float) -> None:
        self.outcomes.append((version, outcome))

    def shown(self, *, version: str, surface: str, num_items: int) -> None:
        self.num_shown += num_items

    def feedback(self, *, version: str, surface: str, kinds: Iterable[str]) -> None:
        self.num_feedback += len(list(kinds))

    def rejected(self, endpoint: str) -> None:
        self.rejections.append(endpoint)

    def written(self, file: str, num_events: int) -> None:
        self.num_written += num_events

    def dropped(self, file: str, num_events: int) -> None:
        self.num_dropped += num_events

    def state(
        self, *, weight_fraction: float, resident: Iterable[str], failing: Iterable[str]
    ) -> None:
        self.resident, self.failing = set(resident), set(failing)

    def shadowed(self, *, version: str, outcome: ShadowOutcome, counts: ShadowCounts) -> None:
        self.shadowed_by.append((version, outcome))
        self.shadow = counts


class FakeController:
    """Gives the views that it is told to give, and keeps reports."""

    def __init__(self) -> None:
        self.views: asyncio.Queue[RolloutView] = asyncio.Queue()
        self.reports: list[ReplicaReport] = []
        self.num_held = 0
        self.is_away = False

    async def wait_for_change(self, known_sequence: int, timeout_s: float) -> RolloutView | None:
        self._check()
        return await self.views.get()

    async def report(self, report: ReplicaReport) -> int:
        self._check()
        self.reports.append(report)
        self.num_held = report.first_conversion + len(report.conversions)
        return self.num_held

    async def measurement(self) -> dict[str, Any] | None:
        self._check()
        return {"phase": "inconclusive"}

    def _check(self) -> None:
        if self.is_away:
            raise ConnectionError("the actor died")


class FakeReplica:
    """A replica over a real ledger, with fake versions."""

    def __init__(
        self,
        root: Root,
        versions: Mapping[str, FakeVersion | Exception],
        records: Iterable[Record] = (),
        config: RolloutConfig | None = None,
        item_ids: Sequence[str] = (),
        max_ts_age_s: float = math.inf,
        keys: Sequence[bytes] = (b"0123456789abcdef",),
        impressions_interval_s: float = 0.01,
        sample_fraction: float = 1.0,
        shadow: ShadowConfig | None = None,
        rules: Sequence[RuleConfig] = (),
        retrieval: RetrievalConfig | None = None,
        reserve: float = 0.0,
    ) -> None:
        self.root = root
        self.log = Log(root)
        self.available = dict(versions)
        self.controller = FakeController()
        self.metrics = FakeMetrics()
        self.pseudonymizer = Pseudonymizer(*keys)
        for record in records:
            self.append(record)
        impressions = EventWriter(
            root, "impressions", interval_s=impressions_interval_s, metrics=self.metrics
        )
        feedback = EventWriter(root, "feedback", interval_s=0.01, metrics=self.metrics)
        self.service = RankService(
            replica_id="replica-1",
            config=config or RolloutConfig(),
            versions=ResidentVersions(self._load, lambda update_id: frozenset(item_ids)),
            keys=Keys(lambda: self.pseudonymizer),
            impressions=impressions,
            feedback=feedback,
            metrics=self.metrics,
            sample_fraction=sample_fraction,
            shadow=shadow,
            shelves=Shelves(retrieval or RetrievalConfig(), rules),
            reserve=reserve,
            max_ts_age_s=max_ts_age_s,
        )
        follower = Follower(self.service, self.log, self.controller, interval_s=0.01)
        steering = Steering(self.log, config or RolloutConfig(), follower.adopt)
        self.replica = Replica(self.service, follower, impressions, feedback, steering)

    def append(self, record: Record) -> None:
        self.log.transact(lambda state: record)

    @contextmanager
    def client(self, http: HttpConfig | None = None) -> Iterator[TestClient]:
        """The HTTP API, from its start to its end."""
        api = create_api(self.replica, http or HttpConfig())
        with TestClient(api, raise_server_exceptions=False) as client:
            yield client

    def _load(self, name: str) -> Any:
        version = self.available[name]
        if isinstance(version, Exception):
            raise version
        return version


@contextmanager
def serving(api: FastAPI) -> Iterator[int]:
    """An API on a real server, which parses requests as production's does; yields its port."""
    options: Any = {"log_level": "error", "lifespan": "on"}
    running = uvicorn.Server(uvicorn.Config(api, **options))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not running.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join(10)
