"""Users are split for good into disjoint groups, and an update trains on those it charges alone."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import polars as pl
import pytest

from raysys.config import Config, PrivacyConfig, PseudonymConfig
from raysys.errors import PrivacyError
from raysys.ingest import examples
from raysys.ingest.groups import cohort_group, in_group, next_in_turn, tuning_group
from raysys.ingest.pseudonym import is_held_out, user_shard
from raysys.ledger.records import UserGroup
from raysys.ledger.state import State
from raysys.privacy.plan import PrivacyPlan
from raysys.reserve import group_in_turn
from tests import tiny_shop
from tests.helpers import SPEND, abandoned, committed, folded, partition, started

KEY = "7ecd1ca3"
USERS = [hashlib.md5(str(i).encode()).hexdigest() for i in range(8000)]


class TestSplit:
    def test_every_user_is_in_one_cohort_and_cohorts_are_of_a_size(self) -> None:
        masks = [in_group(USERS, cohort_group(8, KEY, i), key_id=KEY) for i in range(8)]
        assert (np.sum(masks, axis=0) == 1).all()
        assert all(abs(mask.mean() - 1 / 8) < 0.02 for mask in masks)

    def test_a_share_of_the_users_is_kept_for_tuning(self) -> None:
        tuned, others = (
            in_group(USERS, tuning_group(0.1, KEY, tuned_on=on), key_id=KEY) for on in (True, False)
        )
        assert (tuned ^ others).all() and abs(tuned.mean() - 0.1) < 0.015

    def test_a_split_is_independent_of_shard_hold_out_and_the_other_split(self) -> None:
        frame = pl.DataFrame({"user": USERS}).select(
            shard=user_shard(2) == 0, held_out=is_held_out(0.5)
        )
        first = in_group(USERS, cohort_group(2, KEY, 0), key_id=KEY)
        tuned = in_group(USERS, tuning_group(0.5, KEY), key_id=KEY)
        splits = [frame["shard"].to_numpy(), frame["held_out"].to_numpy(), tuned]
        assert all(abs(np.corrcoef(first, other)[0, 1]) < 0.05 for other in splits)

    def test_pseudonyms_of_another_key_are_another_split(self) -> None:
        with pytest.raises(PrivacyError, match="splits pseudonyms of key 7ecd1ca3, these are of"):
            in_group(USERS, cohort_group(8, KEY, 0), key_id="9028587b")
        assert cohort_group(8, "9028587b", 0).scheme != cohort_group(8, KEY, 0).scheme
        assert cohort_group(9, KEY, 0).scheme != cohort_group(8, KEY, 0).scheme

    def test_an_unknown_scheme_is_refused(self) -> None:
        with pytest.raises(PrivacyError, match="unknown scheme"):
            in_group(USERS, UserGroup(scheme="by age", index=0), key_id=KEY)

    def test_only_cohorts_take_turns(self) -> None:
        assert next_in_turn(cohort_group(3, KEY, 2)) == cohort_group(3, KEY, 0)
        assert next_in_turn(tuning_group(0.1, KEY)) == tuning_group(0.1, KEY)
        assert next_in_turn(None) is None


class TestTurns:
    CONFIG = Config(
        root="file:///shop",
        pseudonyms=PseudonymConfig(key_file="key"),
        privacy=PrivacyConfig(cohorts=3),
    )

    def test_each_private_update_that_was_started_is_a_turn(self) -> None:
        first, second = (
            started(f"u{i:04}-aaaaaa", partitions=(partition(f"2017-03-0{i}"),)) for i in (1, 2)
        )
        states = [
            State(),
            folded(first),
            folded(first, committed(first)),
            folded(first, committed(first), second, abandoned(second.update_id)),
        ]
        found = [group_in_turn(self.CONFIG, state, KEY) for state in states]
        assert [group.index for group in found if group] == [0, 1, 1, 2]
        assert group_in_turn(self.CONFIG, states[-1], KEY, 1) == cohort_group(3, KEY, 0)

    def test_without_cohorts_or_privacy_everyone_is_trained_on(self) -> None:
        for privacy in (PrivacyConfig(), PrivacyConfig(cohorts=3, enabled=False)):
            config = dataclasses.replace(self.CONFIG, privacy=privacy)
            assert group_in_turn(config, State(), KEY) is None


class TestExamples:
    """Of a shard of 40 users, an update trains on those of the cohort whose turn it is."""

    @staticmethod
    def build(group: UserGroup | None) -> examples.ShardResult:
        return tiny_shop.shard(tiny_shop.outcomes(40), user_key_id=KEY, group=group)

    def test_only_users_of_the_group_become_examples(self) -> None:
        everyone = self.build(None)
        parts = [self.build(cohort_group(2, KEY, i)) for i in (0, 1)]
        sizes = [part.examples.num_users for part in parts]
        assert sum(sizes) == everyone.examples.num_users and all(sizes)
        for part in parts:
            assert part.requests["other_group"] > 0
            assert sum(part.requests.values()) == sum(everyone.requests.values())
        assert "other_group" not in everyone.requests

    def test_histories_and_cases_go_on_for_all(self) -> None:
        everyone, part = self.build(None), self.build(cohort_group(2, KEY, 0))
        assert part.state.histories.equals(everyone.state.histories)
        assert part.cases.equals(everyone.cases) and part.num_users == everyone.num_users

    def test_a_filter_that_lets_others_through_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound, calls = examples._in_group, list[UserGroup | None]()

        def broken(
            users: pl.Series, group: UserGroup | None, settings: examples.ShardSettings
        ) -> pl.Series:
            calls.append(group)
            if calls.count(settings.group) == 1:
                return pl.repeat(True, len(users), eager=True)
            return sound(users, group, settings)

        monkeypatch.setattr(examples, "_in_group", broken)
        with pytest.raises(PrivacyError, match="examples are of users outside the group"):
            self.build(cohort_group(2, KEY, 0))

    def test_a_plan_names_the_group_that_is_charged(self) -> None:
        group = cohort_group(3, KEY, 1)
        spend = dataclasses.replace(SPEND, group=group)
        assert PrivacyPlan.of(PrivacyConfig(cohorts=3), spend).group == group
        assert PrivacyPlan.of(PrivacyConfig(enabled=False), spend).group is None
