"""Lost, repeated and reordered reports, and dead replicas and controllers, lose no count."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.config import RolloutConfig
from raysys.rollout.counters import NUM_BUCKETS, OutcomeKind, VersionCounters, latency_bin
from raysys.rollout.reports import ReplicaReport, RolloutCounts
from raysys.serve.request_id import RequestTag
from raysys.serve.tally import Tally


def tag(number: int, at: float = 0.0) -> RequestTag:
    return RequestTag(
        nonce=f"{number:016x}",
        answered_at=at,
        version="v1",
        surface="recommend",
        pseudonym="p",
        has_user=True,
        rollout_id="r0001",
        arm="canary" if number % 3 == 0 else "stable",
        bucket=number % NUM_BUCKETS,
    )


def tallies(count: int, delay_s: float = 0.0) -> list[Tally]:
    config = RolloutConfig(feedback_delay_s=delay_s)
    return [Tally(f"replica-{i}", "r0001", config) for i in range(count)]


def totals(counts: RolloutCounts) -> tuple[int, ...]:
    canary, stable = counts.totals()
    return tuple(
        int(array.sum())
        for arm in (canary, stable)
        for array in (arm.num_requests, arm.num_bad, arm.num_matured, arm.num_clicked)
    )


def test_requests_and_conversions_arrive_on_their_side() -> None:
    (tally,) = tallies(1)
    counts = RolloutCounts("r0001")
    for number in range(9):
        tally.answered(tag(number), bad=number == 0)
    for number in range(4):
        tally.converted(tag(number))
    tally.acknowledge(counts.take(tally.report(now=10.0)))
    assert totals(counts) == (3, 1, 3, 2, 6, 0, 6, 2)
    assert counts.totals()[0].num_bad[1, 0] == 1


@given(st.integers(0, 10**6), st.integers(0, 60))
def test_any_loss_and_repetition_of_reports_ends_with_the_same_sum(seed: int, steps: int) -> None:
    rng = random.Random(seed)
    replicas = tallies(3)
    counts = RolloutCounts("r0001")
    converted = set()
    kept: list[ReplicaReport] = []
    for number in range(steps):
        rng.choice(replicas).answered(tag(number), bad=rng.random() < 0.2)
        for _ in range(rng.randrange(3)):  # feedback may be sent again, and to other replicas
            which = rng.randrange(number + 1)
            rng.choice(replicas).converted(tag(which))
            converted.add(which)
        replica = rng.choice(replicas)
        kept.append(replica.report(now=10.0))
        fate = rng.random()
        if fate < 0.3:
            continue  # lost on the way
        held = counts.take(kept[-1])
        if fate < 0.6:
            replica.acknowledge(held)  # otherwise the answer got lost
        if fate > 0.8:
            counts.take(rng.choice(kept))  # an old one arrives late, or twice
        if fate > 0.95:
            counts = RolloutCounts("r0001")  # the controller died
    for _ in range(2):
        for replica in replicas:
            replica.acknowledge(counts.take(replica.report(now=10.0)))
    canary, stable = counts.totals()
    assert canary.num_requests.sum() + stable.num_requests.sum() == steps
    assert canary.num_matured.sum() + stable.num_matured.sum() == steps
    assert canary.num_clicked.sum() == sum(n % 3 == 0 for n in converted)
    assert stable.num_clicked.sum() == sum(n % 3 != 0 for n in converted)


def test_adding_up_reports_instead_would_count_repeated_ones_twice() -> None:
    # The negative control: reports are cumulative, and a sum over them is not idempotent.
    (tally,) = tallies(1)
    tally.answered(tag(0), bad=False)
    report = tally.report(now=10.0)
    naive = VersionCounters.zeros()
    counts = RolloutCounts("r0001")
    for _ in range(2):
        naive = naive + report.canary
        counts.take(report)
    assert naive.num_requests.sum() == 2
    assert counts.totals()[0].num_requests.sum() == 1


def test_a_dead_replicas_counts_stay_and_its_successor_counts_beside_it() -> None:
    old, new = tallies(2)
    counts = RolloutCounts("r0001")
    old.answered(tag(1), bad=False)
    counts.take(old.report(now=10.0))
    new.answered(tag(2), bad=False)
    counts.take(new.report(now=10.0))
    assert totals(counts) == (0, 0, 0, 0, 2, 0, 2, 0)


def test_a_new_controller_has_all_conversions_sent_again() -> None:
    (tally,) = tallies(1)
    first, second = RolloutCounts("r0001"), RolloutCounts("r0001")
    for number in range(5):
        tally.converted(tag(number))
        tally.acknowledge(first.take(tally.report(now=10.0)))
    tally.converted(tag(5))
    held = second.take(tally.report(now=10.0))
    assert held == 0
    tally.acknowledge(held)
    tally.acknowledge(second.take(tally.report(now=10.0)))
    assert totals(second)[3] + totals(second)[7] == 6


@pytest.mark.parametrize("delay_s", [0.0, 60.0, 3600.0])
def test_neither_a_request_nor_its_conversion_counts_before_it_has_matured(delay_s: float) -> None:
    (tally,) = tallies(1, delay_s)
    tally.answered(tag(1, at=1000.0), bad=False)
    tally.converted(tag(1, at=1000.0))
    for now, expected in ((1000.0 + delay_s * 0.99, 0), (1002.0 + delay_s * 1.02, 1)):
        report = tally.report(now)
        assert report.stable.num_requests.sum() == 1
        assert report.stable.num_matured.sum() == len(report.conversions) == expected


def test_a_late_conversion_of_a_matured_request_counts() -> None:
    (tally,) = tallies(1, 60.0)
    tally.answered(tag(1, at=0.0), bad=False)
    assert len(tally.report(100.0).conversions) == 0
    tally.converted(tag(1, at=0.0))
    assert len(tally.report(101.0).conversions) == 1


def test_outcomes_stop_to_count_at_the_bound_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysys.serve.tally.MAX_CONVERSIONS", 2)
    (tally,) = tallies(1)
    for number in (1, 2, 4, 5):
        tally.answered(tag(number), bad=False)
        tally.converted(tag(number))
    report = tally.report(10.0)
    assert (report.stable.num_requests.sum(), report.stable.num_matured.sum()) == (4, 2)
    assert len(report.conversions) == 2


def outcomes(*events: tuple[int, OutcomeKind, int | None]) -> VersionCounters:
    """Stable's counts after feedback of these (request, kind, rank)."""
    (tally,) = tallies(1)
    counts = RolloutCounts("r0001")
    for number, kind, rank in events:
        tally.converted(tag(number), kind, rank)
    counts.take(tally.report(now=10.0))
    return counts.totals()[1]


def test_a_purchase_is_a_click_as_well_and_each_counts_once_a_request() -> None:
    found = outcomes((1, "click", 1), (1, "purchase", 1), (1, "purchase", 3), (2, "cart", None))
    assert (found.num_clicked.sum(), found.num_converted.sum()) == (2, 1)
    assert found.num_clicked[1, 1] == found.num_clicked[1, 2] == 1


def test_ndcg_is_that_of_the_gains_at_their_ranks() -> None:
    first = outcomes((1, "purchase", 1))
    assert (first.num_ranked.sum(), first.sum_ndcg.sum()) == (1, 1.0)
    low = outcomes((1, "click", 3))
    assert low.sum_ndcg[1] == pytest.approx(1 / math.log2(4))
    both = outcomes((1, "click", 1), (1, "purchase", 2))
    ideal = 3 + 1 / math.log2(3)
    assert both.sum_ndcg.sum() == pytest.approx((1 + 3 / math.log2(3)) / ideal)
    assert outcomes((1, "click", None)).num_ranked.sum() == 0


@given(st.permutations([(1, "click", 2), (1, "purchase", 2), (1, "cart", 5), (2, "click", 9)]))
def test_outcomes_in_any_order_and_sent_twice_give_the_same_ndcg(
    events: list[tuple[int, OutcomeKind, int | None]],
) -> None:
    once, again = outcomes(*sorted(events)), outcomes(*events, *events)
    assert again.sum_ndcg.sum() == pytest.approx(once.sum_ndcg.sum())
    assert again.num_clicked.sum() == once.num_clicked.sum() == 2


def test_latencies_and_invalid_answers_are_counted_by_user_and_surface() -> None:
    (tally,) = tallies(1)
    tally.answered(tag(1), bad=False, latency_ms=4.0)
    tally.answered(tag(2), bad=True, invalid=True)
    found = tally.report(10.0).stable
    assert found.num_by_latency[1, latency_bin(4.0)] == found.num_by_latency.sum() == 1
    assert found.num_invalid[1, 2] == found.num_invalid.sum() == 1
