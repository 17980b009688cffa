"""The fold: what the records say, and the records that it refuses."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.errors import LedgerCorruptError
from raysys.ledger.records import Record
from raysys.ledger.state import State, fold
from raysys.partitions.changes import set_aside
from tests.helpers import (
    SPEND,
    abandoned,
    committed,
    entries,
    file_uses,
    folded,
    item_file,
    partition,
    renewed,
    rollout,
    started,
)

FIRST = started("u0001-aaaaaa", user_key_id="key")
SECOND = started("u0002-bbbbbb", partitions=(partition("2017-03-02"),))
THIRD = started("u0003-cccccc", partitions=(partition("2017-03-03"),))
ANEW = started("u0002-bbbbbb", partitions=(partition("2017-03-01", etag="2"),))
ASIDE = dataclasses.replace(
    FIRST, set_aside=(set_aside("rewritten", ANEW.partitions[0].files[0], State()),)
)
LESS = dataclasses.replace(SPEND, num_steps=3)


class TestUpdates:
    def test_an_empty_ledger_has_nothing(self) -> None:
        state = fold([])
        assert state.sequence == 0 and state.active is None and state.versions == {}
        assert state.head_version is state.head_state is state.stable is state.watermark is None
        assert state.weight_fraction == 0.0

    def test_a_started_update_is_active_and_consumes_nothing_yet(self) -> None:
        state = folded(FIRST)
        assert state.active is not None and state.active.started == FIRST
        assert state.active.lease_expires_at == FIRST.lease_expires_at
        assert state.num_started == 1 and state.consumed_files == {}

    def test_a_renewal_moves_the_expiry(self) -> None:
        state = folded(FIRST, renewed(lease_expires_at=99.0))
        assert state.active is not None
        assert state.active.lease_expires_at == 99.0 and state.active.renewed_at == 1.0

    def test_a_commit_consumes_its_partitions_and_ends_the_update(self) -> None:
        state = folded(FIRST, committed(FIRST, item_files=(item_file(),)))
        assert state.active is None
        assert state.consumed_files == {f.path: f for f in FIRST.partitions[0].files}
        assert state.consumed_partitions == {"events/dt=2017-03-01": "u0001-aaaaaa"}
        assert state.consumed_item_files == {"items/items.parquet": item_file()}
        assert state.watermark == "2017-03-01" and state.user_key_id == "key"

    def test_an_abandoned_update_frees_its_partitions(self) -> None:
        again = dataclasses.replace(FIRST, update_id="u0002-bbbbbb")
        state = folded(FIRST, abandoned(), again, committed(again))
        assert state.num_started == 2 and [a.update_id for a in state.abandoned] == ["u0001-aaaaaa"]
        assert state.consumed_partitions == {"events/dt=2017-03-01": "u0002-bbbbbb"}

    def test_an_abandoned_update_does_not_fix_the_pseudonym_key(self) -> None:
        assert folded(FIRST, abandoned()).user_key_id is None

    def test_versions_come_in_order_and_a_held_update_makes_none(self) -> None:
        state = folded(
            FIRST,
            committed(FIRST),
            SECOND,
            committed(SECOND),
            THIRD,
            committed(THIRD, version=None),
        )
        assert list(state.versions) == ["v0001-aaaaaa", "v0002-bbbbbb"]
        assert state.head_version == "v0002-bbbbbb"

    def test_the_state_of_a_held_update_is_the_next_ones_start(self) -> None:
        state = folded(FIRST, committed(FIRST, version=None))
        assert state.head_state == "u0001-aaaaaa" and state.head_version is None
        assert state.consumed_files and state.watermark == "2017-03-01"

    def test_a_partition_of_two_updates_names_the_last(self) -> None:
        late = started("u0002-bbbbbb", partitions=(partition("2017-03-01", "late.parquet"),))
        state = folded(FIRST, committed(FIRST), late, committed(late))
        assert state.consumed_partitions == {"events/dt=2017-03-01": "u0002-bbbbbb"}
        assert len(state.consumed_files) == 2

    def test_a_rewritten_file_replaces_what_was_consumed_of_it(self) -> None:
        state = folded(FIRST, committed(FIRST), ANEW, committed(ANEW))
        (old,), (new,) = FIRST.partitions[0].files, ANEW.partitions[0].files
        assert state.consumed_files == {new.path: new}
        assert state.settled_files == {old.content: "replaced"}

    def test_what_is_set_aside_is_settled_and_an_empty_partition_is_consumed(self) -> None:
        (late,) = partition("2017-03-01", "late").files
        (folder,) = partition("2017-03-02", etag="").files
        empty = dataclasses.replace(folder, path="events/dt=2017-03-02")
        asides = (set_aside("late", late, State()), set_aside("empty", empty, State()))
        start = dataclasses.replace(FIRST, set_aside=asides)
        state = folded(start, committed(start))
        assert state.settled_files == {late.content: "late", empty.content: "empty"}
        assert state.consumed_partitions.keys() == {"events/dt=2017-03-01", "events/dt=2017-03-02"}
        assert folded(start, abandoned()).settled_files == {}

    def test_an_unreadable_file_is_known_until_it_is_read(self) -> None:
        (file,) = FIRST.partitions[0].files
        state = folded(FIRST, committed(FIRST, quarantined_files={file.path: "not parquet"}))
        assert state.unreadable_files == {file.path: "u0001-aaaaaa"}
        for record in (ANEW, committed(ANEW)):
            state = state.apply(*entries([record], first=state.sequence + 1))
        assert state.unreadable_files == {}

    def test_ids_count_what_was_started_and_are_never_the_same(self) -> None:
        state = folded(FIRST, abandoned())
        ids = {state.next_update_id() for _ in range(20)}
        assert len(ids) == 20 and all(i.startswith("u0002-") and len(i) == 12 for i in ids)

    def test_a_version_is_named_by_its_number_and_its_update(self) -> None:
        state = folded(FIRST, committed(FIRST), SECOND)
        assert state.next_version("u0002-bbbbbb") == "v0002-bbbbbb"

    def test_an_older_state_does_not_change(self) -> None:
        before = folded(FIRST)
        after = before.apply(entries([committed(FIRST)], first=2)[0])
        assert before.active is not None and before.consumed_files == {}
        assert before.spends[0][2] == "reserved" and after.spends[0][2] == "committed"


class TestSpends:
    def test_a_started_update_is_charged_its_reservation(self) -> None:
        assert folded(FIRST).spends == (("u0001-aaaaaa", SPEND, "reserved"),)

    def test_a_commit_is_charged_what_it_spent(self) -> None:
        state = folded(FIRST, committed(FIRST, spent=LESS))
        assert state.spends == (("u0001-aaaaaa", LESS, "committed"),)

    def test_an_abandoned_update_stays_charged_in_full(self) -> None:
        state = folded(FIRST, abandoned(), SECOND, committed(SECOND, spent=LESS))
        assert state.spends == (
            ("u0001-aaaaaa", SPEND, "abandoned"),
            ("u0002-bbbbbb", LESS, "committed"),
        )

    def test_an_update_without_privacy_is_charged_nothing(self) -> None:
        public = started(private=False, reserved=None)
        assert folded(public, committed(public)).spends == ()


class TestRollouts:
    def test_without_a_rollout_the_first_version_is_stable(self) -> None:
        state = folded(FIRST, committed(FIRST), SECOND, committed(SECOND))
        assert state.stable == "v0001-aaaaaa" and state.canary is state.previous is None

    def test_the_last_transition_counts(self) -> None:
        done = rollout("promoted", stable="v0002-bbbbbb", previous="v0001-aaaaaa")
        state = folded(rollout(), done)
        assert (state.stable, state.canary, state.previous) == (
            "v0002-bbbbbb",
            None,
            "v0001-aaaaaa",
        )

    def test_transitions_of_one_rollout_count_once(self) -> None:
        state = folded(
            rollout(),
            rollout(weight_fraction=0.5),
            rollout("promoted"),
            rollout(rollout_id="r0002"),
        )
        assert state.num_rollouts == 2 and state.canary == "v0002-bbbbbb"

    def test_a_rollout_may_change_while_an_update_runs(self) -> None:
        state = folded(FIRST, rollout(), committed(FIRST))
        assert state.active is None and state.canary is not None


class TestRolledBack:
    """`head_version` is what the next update trains on."""

    OTHER = dataclasses.replace(SECOND, base_version="v0001-aaaaaa")
    BAD = rollout("rolled_back", stable="v0001-aaaaaa")

    def test_a_rolled_back_version_is_not_trained_on(self) -> None:
        state = folded(FIRST, committed(FIRST), self.OTHER, committed(self.OTHER), rollout())
        assert state.head_version == "v0002-bbbbbb"
        state = state.apply(entries([self.BAD], first=state.sequence + 1)[0])
        assert state.head_version == "v0001-aaaaaa"
        assert state.head_state == "u0002-bbbbbb" and len(state.consumed_partitions) == 2

    def test_nor_is_what_was_trained_on_it_meanwhile(self) -> None:
        child = dataclasses.replace(THIRD, base_version="v0002-bbbbbb")
        updates = (FIRST, committed(FIRST), self.OTHER, committed(self.OTHER))
        state = folded(*updates, rollout(), child, committed(child), self.BAD)
        assert state.head_version == "v0001-aaaaaa" and "v0003-cccccc" in state.versions

    def test_a_promoted_version_is_trained_on(self) -> None:
        done = rollout("promoted", stable="v0002-bbbbbb", previous="v0001-aaaaaa")
        updates = (FIRST, committed(FIRST), self.OTHER, committed(self.OTHER))
        assert folded(*updates, rollout(), done).head_version == "v0002-bbbbbb"

    def test_an_undone_promotion_is_not_trained_on(self) -> None:
        """The operator's way back from a bad promotion is a rollout of the version before."""
        updates = (FIRST, committed(FIRST), self.OTHER, committed(self.OTHER))
        done = rollout("promoted", stable="v0002-bbbbbb", previous="v0001-aaaaaa")
        back = rollout("promoted", stable="v0001-aaaaaa", previous="v0002-bbbbbb")
        state = folded(*updates, rollout(), done, back)
        assert (state.stable, state.head_version) == ("v0001-aaaaaa", "v0001-aaaaaa")

    def test_a_version_that_passes_a_second_trial_is_trained_on_again(self) -> None:
        updates = (FIRST, committed(FIRST), self.OTHER, committed(self.OTHER))
        done = rollout("promoted", stable="v0002-bbbbbb", previous="v0001-aaaaaa")
        state = folded(*updates, rollout(), self.BAD, rollout(), done)
        assert (state.stable, state.head_version) == ("v0002-bbbbbb", "v0002-bbbbbb")


ILLEGAL: dict[str, list[Record]] = {
    "commit-without-start": [committed(FIRST)],
    "renewal-without-start": [renewed()],
    "abandoned-without-start": [abandoned()],
    "two-active": [FIRST, SECOND],
    "commit-of-another": [FIRST, committed(SECOND)],
    "commit-twice": [FIRST, committed(FIRST), committed(FIRST)],
    "commit-after-abandoned": [FIRST, abandoned(), committed(FIRST)],
    "started-again-after-commit": [FIRST, committed(FIRST), FIRST],
    "started-again-after-abandoned": [FIRST, abandoned(), FIRST],
    "consumed-partition-started": [
        FIRST,
        committed(FIRST),
        dataclasses.replace(FIRST, update_id="u0002-bbbbbb"),
    ],
    "file-listed-twice": [started(partitions=(partition("2017-03-01"), partition("2017-03-01")))],
    "commits-what-it-did-not-reserve": [FIRST, committed(FIRST, partitions=SECOND.partitions)],
    "commits-another-content-than-it-reserved": [
        FIRST,
        committed(FIRST, partitions=ANEW.partitions),
    ],
    "replaced-content-started-again": [
        FIRST,
        committed(FIRST),
        ANEW,
        committed(ANEW),
        dataclasses.replace(FIRST, update_id="u0003-cccccc"),
    ],
    "content-that-was-set-aside": [ASIDE, committed(ASIDE), ANEW],
    "sets-aside-what-it-did-not-plan": [FIRST, committed(FIRST, set_aside=ASIDE.set_aside)],
    "sets-aside-a-partition-that-it-did-not-reserve": [
        FIRST,
        committed(
            FIRST,
            set_aside=(dataclasses.replace(ASIDE.set_aside[0], kind="empty", path="events/x"),),
        ),
    ],
    "same-version-twice": [
        FIRST,
        committed(FIRST),
        SECOND,
        committed(SECOND, version="v0001-aaaaaa"),
    ],
    "held-with-a-version": [FIRST, committed(FIRST, verdict="held")],
    "passed-without-a-version": [FIRST, committed(FIRST, version=None, verdict="passed")],
    "private-without-reservation": [started(reserved=None)],
    "reservation-without-private": [started(private=False)],
    "private-commit-without-spend": [FIRST, committed(FIRST, spent=None)],
    "spend-without-reservation": [
        started(private=False, reserved=None),
        committed(FIRST, spent=SPEND),
    ],
    **{
        f"spends-more-{key}": [
            FIRST,
            committed(FIRST, spent=dataclasses.replace(SPEND, **{key: value})),
        ]
        for key, value in {
            "num_steps": 16,
            "sampling_prob": 0.26,
            "noise_multiplier": 3.9,
            "num_count_releases": 2,
            "count_noise_multiplier": 9.9,
        }.items()
    },
}


@pytest.mark.parametrize("records", ILLEGAL.values(), ids=ILLEGAL)
def test_a_record_that_breaks_a_promise_is_corrupt(records: list[Record]) -> None:
    log = entries(records)
    before = fold(log[:-1])
    assert before.problem(records[-1]) is not None
    with pytest.raises(LedgerCorruptError, match=f"ledger record {len(log)} ") as caught:
        fold(log)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sequence", [1, 3], ids=["again", "after-a-gap"])
def test_entries_must_come_one_after_the_other(sequence: int) -> None:
    (second,) = entries([abandoned()], first=sequence)
    with pytest.raises(LedgerCorruptError, match="follows record 1"):
        folded(FIRST).apply(second)


@given(st.data())
def test_any_legal_order_of_records_consumes_each_file_once_and_never_frees_privacy(
    data: st.DataObject,
) -> None:
    """Draws records at random and appends those that the state lets pass, as the log does."""
    state, record = State(), started()
    for step in range(data.draw(st.integers(1, 25))):
        ids = st.sampled_from(["u0001-aaaaaa", "u0002-bbbbbb", f"u{step:04d}-dddddd"])
        days = st.lists(st.sampled_from(["2017-03-01", "2017-03-02", "2017-03-03"]), max_size=2)
        parts = tuple(partition(day) for day in data.draw(days))
        kind = data.draw(st.sampled_from([started, renewed, abandoned, committed]))
        if kind is started:
            record = started(data.draw(ids), partitions=parts)
        start = state.active.started if state.active else record
        drawn: Record = (
            record
            if kind is started
            else committed(
                start, version=f"v{step}", spent=data.draw(st.sampled_from([SPEND, LESS]))
            )
            if kind is committed
            else kind(data.draw(ids))
        )
        if state.problem(drawn) is None:
            charged = [spend.num_steps for _, spend, _ in state.spends]
            state = state.apply(entries([drawn], first=state.sequence + 1)[0])
            assert len(state.spends) >= len(charged)
    uses = file_uses(state.committed)
    assert all(len(updates) == 1 for updates in uses.values())
    assert uses.keys() == state.consumed_files.keys()
    assert {name for name, _, status in state.spends if status == "abandoned"} == {
        update.update_id for update in state.abandoned
    }
    assert len(state.spends) == state.num_started
