"""Shadow scoring: right about how alike two versions rank, and invisible to whoever is answered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from raysys.config import ShadowConfig
from raysys.errors import ConfigError
from raysys.ledger.records import Record
from raysys.rollout.counters import VersionCounters
from raysys.rollout.reports import ReplicaReport, RolloutCounts
from raysys.rollout.shadow import ShadowCounts
from raysys.serve import service
from raysys.serve.shadow import (
    MAX_LAG_S,
    Comparison,
    Outcome,
    Ranked,
    Shadow,
    ShadowRequest,
    compare,
    kendall_tau,
)
from raysys.storage import Root
from tests.fakes import ITEMS, FakeReplica, FakeVersion
from tests.helpers import committed, rollout, started

STABLE, CANARY = "v0001-aaaaaa", "v0002-bbbbbb"
ALL = ShadowConfig(sample_fraction=1.0, k=2)


class TestCompare:
    def test_identical_rankings(self) -> None:
        ranked = Ranked("abcd", [4, 3, 2, 1])
        assert compare(ranked, ranked, k=2) == Comparison(overlap=1.0, tau=1.0)

    def test_reversed_rankings(self) -> None:
        assert compare(Ranked("abcd", [4, 3, 2, 1]), Ranked("dcba", [4, 3, 2, 1]), k=2) == (
            Comparison(overlap=0.0, tau=-1.0)
        )

    def test_only_common_items_have_a_tau_and_missing_ones_no_overlap(self) -> None:
        found = compare(Ranked("abc", [3, 2, 1]), Ranked("axy", [3, 2, 1]), k=3)
        assert found == Comparison(overlap=1 / 3, tau=None)

    def test_a_ranking_shorter_than_k_can_overlap_whole(self) -> None:
        found = compare(Ranked("ab", [2, 1]), Ranked("ab", [2, 1]), k=10)
        assert found is not None and found.overlap == 1.0

    def test_nothing_is_not_compared(self) -> None:
        assert compare(Ranked("", []), Ranked("a", [1]), k=1) is None

    @given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=30))
    @settings(max_examples=200, deadline=None)
    def test_tau_is_scipys_tau_b_also_with_ties(self, pairs: list[tuple[int, int]]) -> None:
        a, b = (np.array(column, float) for column in zip(*pairs, strict=True))
        ours, theirs = kendall_tau(a, b), kendalltau(a, b).statistic
        assert ours is None if np.isnan(theirs) else ours == pytest.approx(theirs)


class FakeTime:
    def __init__(self, lag_s: float = 0.0) -> None:
        self.now, self.lag_s = 0.0, lag_s

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds + self.lag_s
        await asyncio.sleep(0)


def shadowed(
    num: int,
    rank: Callable[[Any], Ranked],
    config: ShadowConfig = ALL,
    lag_s: float = 0.0,
) -> tuple[list[Outcome], ShadowCounts]:
    """What becomes of so many requests that are offered at once."""
    outcomes: list[Outcome] = []
    fake = FakeTime(lag_s)

    async def body() -> ShadowCounts:
        shadow = Shadow(
            config, lambda _, outcome: outcomes.append(outcome), clock=fake.clock, sleep=fake.sleep
        )
        task = asyncio.create_task(shadow.run())
        for _ in range(num):
            shadow.offer(
                ShadowRequest(
                    analysis_id="r0001",
                    stable=FakeVersion(STABLE),
                    canary=FakeVersion(CANARY),
                    rank=rank,
                )
            )
        while len(outcomes) < num:
            await asyncio.sleep(0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert shadow.counts("r0002") == ShadowCounts()
        return shadow.counts("r0001")

    return outcomes, asyncio.run(body())


def alike(version: Any) -> Ranked:
    return Ranked("abc", [3, 2, 1])


def fails_for(name: str) -> Callable[[Any], Ranked]:
    def rank(version: Any) -> Ranked:
        if version.name == name:
            raise ValueError("planted")
        return alike(version)

    return rank


class TestQueue:
    def test_means_are_over_what_was_compared(self) -> None:
        outcomes, counts = shadowed(3, alike)
        assert outcomes == ["compared"] * 3
        assert (counts.num_compared, counts.overlap, counts.tau) == (3, 1.0, 1.0)

    def test_a_full_queue_leaves_out_what_does_not_fit(self) -> None:
        config = ShadowConfig(sample_fraction=1.0, max_waiting=2)
        outcomes, counts = shadowed(5, alike, config)
        assert sorted(outcomes) == ["compared"] * 2 + ["dropped"] * 3
        assert counts.num_compared == 2

    def test_a_busy_replica_compares_nothing(self) -> None:
        outcomes, counts = shadowed(3, alike, lag_s=MAX_LAG_S * 1.1)
        assert (outcomes, counts) == (["dropped"] * 3, ShadowCounts())
        # The negative control: an event loop that is only a little late is not busy.
        assert shadowed(3, alike, lag_s=MAX_LAG_S * 0.9)[0] == ["compared"] * 3

    def test_a_failing_canary_is_counted(self) -> None:
        outcomes, counts = shadowed(2, fails_for(CANARY))
        assert outcomes == ["canary_failed"] * 2
        assert (counts.num_compared, counts.num_failed, counts.overlap) == (0, 2, None)

    def test_a_failing_stable_is_not_the_canarys_fault(self) -> None:
        assert shadowed(2, fails_for(STABLE)) == (["stable_failed"] * 2, ShadowCounts())

    def test_the_sample_is_about_its_share(self) -> None:
        shadow = Shadow(ShadowConfig(sample_fraction=0.2))
        drawn = sum(shadow.draws(f"{n:016x}") for n in range(5000))
        assert abs(drawn / 5000 - 0.2) < 4 * (0.2 * 0.8 / 5000) ** 0.5
        assert not any(Shadow(ShadowConfig()).draws(f"{n:016x}") for n in range(100))


def test_the_controller_adds_up_replicas_and_takes_the_newest_of_each() -> None:
    counts = RolloutCounts("r0001")

    def report(replica: str, shadow: ShadowCounts) -> None:
        zeros = VersionCounters.zeros()
        counts.take(
            ReplicaReport(
                replica_id=replica,
                rollout_id="r0001",
                canary=zeros,
                stable=zeros,
                conversions=(),
                first_conversion=0,
                refusal=None,
                shadow=shadow,
            )
        )

    old = ShadowCounts(num_compared=1, sum_overlap=1.0, num_tau=1, sum_tau=1.0)
    new = old + ShadowCounts(num_compared=1, sum_overlap=0.5, num_tau=1, sum_tau=-1.0)
    for replica, shadow in (("a", new), ("a", old), ("b", ShadowCounts(num_failed=3))):
        report(replica, shadow)
    assert counts.shadow.to_json() == {
        "num_compared": 2, "num_failed": 3, "overlap": 0.75, "tau": 0.0
    }  # fmt: skip


def on_trial(weight_fraction: float) -> list[Record]:
    records: list[Record] = []
    for update_id, version in (("u0001-aaaaaa", STABLE), ("u0002-bbbbbb", CANARY)):
        start = started(update_id, partitions=())
        records += [start, committed(start, version=version)]
    return [*records, rollout(weight_fraction=weight_fraction)]


def replica_of(
    root: Root,
    canary: FakeVersion | None = None,
    *,
    shadow: ShadowConfig | None = ALL,
    weight_fraction: float = 0.0,
) -> FakeReplica:
    versions = {STABLE: FakeVersion(STABLE), CANARY: canary or FakeVersion(CANARY)}
    return FakeReplica(root, versions, on_trial(weight_fraction), shadow=shadow)


def ask(client: TestClient, users: Sequence[str], **body: Any) -> list[dict[str, Any]]:
    answers = []
    for user in users:
        sent = {"user_id": user, "candidates": list(ITEMS), **body}
        response = client.post("/v1/rank", json=sent)
        assert response.status_code == 200, response.text
        answers.append(response.json())
    return answers


def all_compared(replica: FakeReplica, num: int) -> ShadowCounts:
    deadline = time.monotonic() + 20
    while len(replica.metrics.shadowed_by) < num:
        assert time.monotonic() < deadline, replica.metrics.shadowed_by
        time.sleep(0.01)
    return replica.metrics.shadow


USERS = [f"user-{n}" for n in range(8)]


class TestReplica:
    def test_an_identical_canary_at_weight_0_is_compared_and_answers_nobody(
        self, local_root: Root
    ) -> None:
        replica = replica_of(local_root)
        with replica.client() as client:
            answers = ask(client, USERS, k=1)
            counts = all_compared(replica, len(USERS))
        assert {answer["version"] for answer in answers} == {STABLE}
        assert (counts.num_compared, counts.overlap, counts.tau) == (len(USERS), 1.0, 1.0)
        assert set(replica.metrics.shadowed_by) == {(CANARY, "compared")}

    def test_a_reversed_canary_is_told_and_still_answers_nobody(self, local_root: Root) -> None:
        replica = replica_of(local_root, FakeVersion(CANARY, score=lambda scores: -scores))
        with replica.client() as client:
            (answer,) = ask(client, ["alice"])
            counts = all_compared(replica, 1)
        assert [item["item_id"] for item in answer["ranking"]] == list(ITEMS)
        assert (counts.overlap, counts.tau) == (0.0, -1.0)

    def test_the_controller_is_told_each_second(self, local_root: Root) -> None:
        replica = replica_of(local_root)
        with replica.client() as client:
            ask(client, USERS)
            all_compared(replica, len(USERS))
            deadline = time.monotonic() + 20
            while not any(
                report.shadow.num_compared == len(USERS) for report in replica.controller.reports
            ):
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def test_a_canary_that_raises_changes_nothing_for_users_and_is_counted(
        self, local_root: Root
    ) -> None:
        replica = replica_of(local_root, FakeVersion(CANARY, score=fails_off_its_check))
        with replica.client() as client:
            answers = ask(client, USERS, candidates=["dates", "apple"])
            counts = all_compared(replica, len(USERS))
        assert {answer["version"] for answer in answers} == {STABLE}
        assert counts.num_failed == len(USERS)
        assert {outcome for _, outcome in replica.metrics.outcomes} == {"ok"}
        assert replica.service.tally is not None
        assert replica.service.tally.report(time.time()).canary.num_requests.sum() == 0

    def test_without_a_canary_nothing_is_compared(self, local_root: Root) -> None:
        records = on_trial(0.0)[:-1]
        versions = {STABLE: FakeVersion(STABLE), CANARY: FakeVersion(CANARY)}
        replica = FakeReplica(local_root, versions, records, shadow=ALL)
        with replica.client() as client:
            ask(client, USERS)
        assert replica.metrics.shadowed_by == []

    @pytest.mark.parametrize("path", ["/v1/rank", "/v1/search", "/v1/recommend", "/v1/ads"])
    def test_answers_are_the_same_bytes_with_and_without_it(
        self, local_root: Root, monkeypatch: pytest.MonkeyPatch, path: str
    ) -> None:
        found: dict[bool, list[bytes]] = {}
        for on in (False, True):
            nonces = iter(f"{n:016x}" for n in range(100))
            monkeypatch.setattr(service, "new_nonce", lambda nonces=nonces: next(nonces))
            replica = replica_of(
                Root(f"{local_root.uri}/{on}"),
                FakeVersion(CANARY, score=lambda scores: -scores),
                shadow=ALL if on else None,
                weight_fraction=0.5,
            )
            monkeypatch.setattr(replica.service, "_clock", lambda: 1_500_000_000.0)
            with replica.client() as client:
                found[on] = [client.post(path, json=body(path, user)).content for user in USERS]
                if on:
                    assert all_compared(replica, len(USERS)).num_compared == len(USERS)
        assert found[True] == found[False]
        versions = {json.loads(answer)["version"] for answer in found[True]}
        assert versions == {STABLE, CANARY}


def body(path: str, user: str) -> dict[str, Any]:
    if path == "/v1/ads":
        return {"user_id": user, "candidates": [{"item_id": i, "bid": 1.0} for i in ITEMS]}
    own: dict[str, Any] = {"/v1/rank": {"candidates": list(ITEMS)}, "/v1/search": {"query": "x"}}
    return {"user_id": user, **own.get(path, {})}


def fails_off_its_check(scores: np.ndarray) -> np.ndarray:
    if len(scores) < len(ITEMS):
        raise ValueError("planted")
    return scores


@pytest.mark.parametrize(
    ("key", "value"), [("sample_fraction", 1.5), ("sample_fraction", -0.1), ("k", 0)]
)
def test_the_config_is_bounded(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"shadow\.{key}: expected"):
        ShadowConfig(**{key: value})
