"""Private steps run only once the ledger permits them, and none that ran is ever left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import PrivacyConfig
from raysys.errors import LeaseHeldError, LedgerCorruptError
from raysys.ingest.groups import cohort_group
from raysys.ledger import fold
from raysys.ledger.explain import explain
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.ledger.records import (
    Entry,
    PrivacySpend,
    Record,
    SelectionSpend,
    StepsPermitted,
    UpdateStarted,
    decode,
)
from raysys.ledger.state import State
from raysys.privacy.budget import report_budget, spent_epsilon
from raysys.storage import Root
from tests.helpers import (
    SPEND,
    FakeClock,
    abandoned,
    committed,
    entries,
    folded,
    partition,
    started,
    stored,
)

TRIALS = SelectionSpend(
    method="compose", num_steps=3, sampling_prob=0.25, noise_multiplier=4.0,
    score_noise_multiplier=10.0, num_trials=4, mean_trials=4.0, shape=0.0, delta=0.0,
)  # fmt: skip
FULL = dataclasses.replace(SPEND, num_evaluations=1, selection=TRIALS)
START = started(reserved=FULL, permits_steps=True)
DAY = PrivacySpend(
    num_steps=195, sampling_prob=1024 / 200_000, noise_multiplier=1.0,
    num_count_releases=0, count_noise_multiplier=1.0,
)  # fmt: skip
CONFIG = PrivacyConfig(epsilon_total=20.0, delta=1e-6)


def permit(num_steps: int, update_id: str = "u0001-aaaaaa") -> StepsPermitted:
    return StepsPermitted(update_id=update_id, num_steps=num_steps)


def charged(*records: Record) -> PrivacySpend:
    ((_, spend, _),) = folded(*records).spends
    return spend


class TestCharges:
    def test_a_running_update_is_charged_all_that_it_reserved(self) -> None:
        assert charged(START, permit(3)) == FULL
        assert folded(START, permit(3)).permitted_steps == 3

    @pytest.mark.parametrize(
        ("permits", "steps"), [([], 0), ([3], 3), ([3, 3, 7], 7)], ids=["none", "some", "more"]
    )
    def test_an_abandoned_one_is_charged_the_steps_that_may_have_run_and_all_releases(
        self, permits: list[int], steps: int
    ) -> None:
        found = charged(START, *map(permit, permits), abandoned())
        assert found == dataclasses.replace(FULL, num_steps=steps)

    def test_one_of_an_older_release_stays_charged_in_full(self) -> None:
        """Its ledger has no permits, and nobody knows how far it came."""
        assert charged(dataclasses.replace(START, permits_steps=False), abandoned()) == FULL

    def test_a_record_of_an_older_release_reads_as_one_without_permits(self) -> None:
        (data,) = stored([dataclasses.replace(START, permits_steps=False)]).values()
        record = decode(data, sequence=1).record
        assert isinstance(record, UpdateStarted)
        assert not record.permits_steps and record.kept_loss is None

    def test_a_commit_is_charged_what_it_spent(self) -> None:
        spent = dataclasses.replace(FULL, num_steps=7)
        assert charged(START, permit(7), committed(START, spent=spent)) == spent

    def test_an_update_after_it_starts_with_none(self) -> None:
        second = dataclasses.replace(START, update_id="u0002-aaaaaa")
        assert folded(START, permit(3), abandoned(), second).permitted_steps == 0


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        pytest.param([permit(1)], "not the active update", id="before the start"),
        pytest.param([START, permit(1, "u0002-bbbbbb")], "not the active update", id="another's"),
        pytest.param([START, abandoned(), permit(1)], "not the active update", id="after the end"),
        pytest.param([START, permit(5), permit(4)], "of which 5 were permitted", id="backwards"),
        pytest.param([START, permit(16)], "which reserved 15", id="more than reserved"),
        pytest.param([started(), permit(1)], "without permits", id="of one without permits"),
        pytest.param(
            [started(reserved=None, private=False, permits_steps=True)],
            "not private",
            id="of one without privacy",
        ),
        pytest.param(
            [START, permit(14), committed(START)], "15 steps, of which 14", id="commits more"
        ),
        pytest.param(
            [START, permit(8), committed(START, spent=dataclasses.replace(FULL, num_steps=7))],
            "7 steps, of which 8",
            id="commits less",
        ),
        pytest.param(
            [START, permit(15), committed(START, spent=dataclasses.replace(FULL, selection=None))],
            "another privacy spend",
            id="forgets the selection",
        ),
        pytest.param(
            [
                START,
                permit(15),
                committed(START, spent=dataclasses.replace(FULL, group=cohort_group(8, "key", 1))),
            ],
            "another privacy spend",
            id="moves to a group",
        ),
        pytest.param(
            [
                START,
                permit(15),
                committed(START, spent=dataclasses.replace(FULL, num_evaluations=2)),
            ],
            "another privacy spend",
            id="evaluates more",
        ),
    ],
)
def test_the_rules_refuse(records: list[Record], problem: str) -> None:
    *before, last = records
    state = folded(*before)
    (entry,) = entries([last], first=state.sequence + 1)
    with pytest.raises(LedgerCorruptError, match=problem):
        state.apply(entry)


@pytest.mark.parametrize(
    "more",
    [
        {"num_steps": 16},
        {"sampling_prob": 0.5},
        {"noise_multiplier": 3.0},
        {"num_count_releases": 2},
        {"count_noise_multiplier": 9.0},
        {"num_evaluations": 2},
        {"evaluation_noise_multiplier": 0.5},
    ],
    ids=lambda more: next(iter(more)),
)
def test_a_commit_may_not_spend_more_of_anything_than_was_reserved(more: dict[str, Any]) -> None:
    start = dataclasses.replace(START, permits_steps=False)
    state = folded(start)
    spent = dataclasses.replace(FULL, **more)
    (entry,) = entries([committed(start, spent=spent)], first=state.sequence + 1)
    with pytest.raises(LedgerCorruptError, match="another privacy spend than it reserved"):
        state.apply(entry)


def test_a_permit_explains_itself() -> None:
    assert explain(permit(5)) == "u0001-aaaaaa may run private steps up to its 5."


@pytest.mark.parametrize("renews", [False, True], ids=["dead", "alive"])
def test_workers_of_a_dead_updater_that_still_ask_do_not_keep_its_lease(
    local_root: Root, renews: bool
) -> None:
    """They notice its end late; what they were permitted meanwhile is charged."""
    clock = FakeClock()
    log = Log(local_root, clock)

    def lease(owner: str, sleep: Callable[[float], None]) -> Lease:
        return Lease(log, owner=owner, duration_s=10.0, clock=clock, monotonic=clock, sleep=sleep)

    with lease("one", clock.advance) as first:
        first.start(lambda state: START)
        asked: list[int] = []

        def sleep(seconds: float) -> None:
            clock.advance(seconds)
            if not asked:
                log.transact(lambda state: permit(5))
                asked.append(5)
                if renews:
                    first.renew()

        with lease("two", sleep) as second:
            follower = dataclasses.replace(START, update_id="u0002-aaaaaa")
            if renews:
                with pytest.raises(LeaseHeldError, match="renewed just now"):
                    second.start(lambda state: follower)
                return
            second.start(lambda state: follower)
            (_, spend, status), _ = log.refresh().spends
            assert (spend.num_steps, status) == (5, "abandoned")
            first._done.set()


class TestReferenceLife:
    def day(self, number: int, reserved: PrivacySpend = DAY) -> list[Record]:
        start = started(
            f"u{number:04}-aaaaaa", partitions=(partition(f"2017-03-{number:02}"),),
            reserved=reserved, permits_steps=True,
        )  # fmt: skip
        return [start, permit(195, start.update_id), committed(start)]

    def test_thirty_days_at_noise_one_cost_what_is_published(self) -> None:
        state = folded(*(record for day in range(1, 31) for record in self.day(day)))
        assert spent_epsilon(state, 1e-6) == pytest.approx(2.457, rel=2e-3)

    def test_disjoint_cohorts_cost_the_maximum_of_one(self) -> None:
        groups = [cohort_group(3, "key", turn) for turn in range(9)]
        records = [
            record
            for day, group in enumerate(groups, 1)
            for record in self.day(day, dataclasses.replace(DAY, group=group))
        ]
        one = folded(*(record for day in range(1, 4) for record in self.day(day)))
        assert spent_epsilon(folded(*records), 1e-6) == pytest.approx(
            spent_epsilon(one, 1e-6), rel=1e-9
        )

    def test_a_crash_stays_charged(self) -> None:
        start, allowed, _ = self.day(1)
        crashed = folded(start, allowed, abandoned())
        assert spent_epsilon(crashed, 1e-6) == pytest.approx(0.597, abs=1e-3)
        (shown,) = report_budget(crashed, CONFIG).updates
        assert (shown.status, shown.num_steps) == ("abandoned", 195)
        assert spent_epsilon(folded(start, abandoned()), 1e-6) == 0.0, "no step could have run"


Action = tuple[str, int]
"""What happens next, and a number that the action makes something of."""
actions = st.lists(
    st.tuples(
        st.sampled_from(["permit", "run", "crash", "take over", "commit"]), st.integers(1, 6)
    ),
    max_size=25,
)


class Fleet:
    """Updaters as they are: each runs steps that it was permitted, and may die at any moment.

    `ran` is a tally of its own, of the steps whose noised gradients may be out.
    """

    def __init__(self, apply: Callable[[State, Entry], State]) -> None:
        self.apply, self.state = apply, State()
        self.ran: dict[str, int] = {}
        self.done = 0

    def append(self, record: Record) -> None:
        if self.state.problem(record) is None:
            (entry,) = entries([record], first=self.state.sequence + 1)
            self.state = self.apply(self.state, entry)

    def act(self, action: str, number: int) -> None:
        if self.state.active is None:
            start = dataclasses.replace(START, update_id=f"u{len(self.ran) + 1:04}-aaaaaa")
            self.append(dataclasses.replace(start, partitions=(self._partition(),)))
            self.ran[start.update_id] = 0
            return
        active = self.state.active
        name, allowed = active.update_id, active.permitted_steps
        if action == "permit":
            self.append(permit(allowed + number, name))
        elif action == "run":
            # A retry after a worker's death repeats steps; they count again.
            self.ran[name] = min(self.ran[name] + number, allowed)
        elif action in ("crash", "take over"):
            self.append(abandoned(name, action))
        else:
            spent = dataclasses.replace(FULL, num_steps=allowed)
            self.append(committed(active.started, spent=spent, version=None))
            self.done += 1

    def _partition(self) -> object:
        return partition(f"2017-03-{self.done + 1:02}")

    def uncharged(self) -> list[str]:
        """Updates that are charged less than they ran, or not at all."""
        charges = {name: spend for name, spend, _ in self.state.spends}
        return [
            name
            for name, steps in self.ran.items()
            if name not in charges
            or charges[name].num_steps < steps
            or charges[name].num_count_releases < FULL.num_count_releases
            or charges[name].num_evaluations < FULL.num_evaluations
            or charges[name].selection != FULL.selection
        ]


def live(apply: Callable[[State, Entry], State], what: list[Action]) -> Fleet:
    fleet = Fleet(apply)
    for action, number in what:
        fleet.act(action, number)
        assert fleet.uncharged() == []
    return fleet


@given(actions)
@settings(max_examples=150, deadline=None)
def test_no_order_of_crashes_take_overs_and_retries_under_reports(what: list[Action]) -> None:
    live(State.apply, what)


CRASH = [("start", 1), ("permit", 5), ("run", 5), ("crash", 1), ("start", 1)]


def forget_the_spend(active: fold.ActiveUpdate) -> PrivacySpend:
    return dataclasses.replace(FULL, num_steps=0)


def forget_the_selection(active: fold.ActiveUpdate) -> PrivacySpend:
    return dataclasses.replace(FULL, num_steps=active.permitted_steps, selection=None)


def forget_the_last_permit(active: fold.ActiveUpdate) -> PrivacySpend:
    return dataclasses.replace(FULL, num_steps=max(active.permitted_steps - 1, 0))


@pytest.mark.parametrize("broken", [forget_the_spend, forget_the_selection, forget_the_last_permit])
def test_a_fold_that_forgets_what_an_abandoned_update_ran_is_caught(
    broken: Callable[[fold.ActiveUpdate], PrivacySpend], monkeypatch: pytest.MonkeyPatch
) -> None:
    live(State.apply, CRASH)
    monkeypatch.setattr(fold, "charge_if_abandoned", broken)
    with pytest.raises(AssertionError):
        live(State.apply, CRASH)


def test_a_process_that_ran_steps_before_their_permit_is_caught() -> None:
    fleet = live(State.apply, [("start", 1), ("permit", 5)])
    fleet.ran["u0001-aaaaaa"] = 6
    fleet.act("crash", 1)
    assert fleet.uncharged() == ["u0001-aaaaaa"]
