"""Whom a selection's trials read: those who are charged for them, and each by no more than that."""

from __future__ import annotations

import dataclasses
import io
import math
import threading
import time
import unittest.mock
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from raysys.config import EvaluateConfig, parse_config
from raysys.errors import PrivacyError
from raysys.evaluate import compare, holdout
from raysys.evaluate.compare import Weights, chosen
from raysys.evaluate.holdout import HoldoutScore
from raysys.evaluate.metrics import ranking_metrics
from raysys.evaluate.private import Release
from raysys.ingest import examples
from raysys.ingest.example_set import ExampleSet
from raysys.ingest.examples import ShardResult
from raysys.ingest.groups import in_group, tuning_group
from raysys.ingest.pipeline import cases_path, examples_path, trial_examples_path
from raysys.ledger.records import SelectionSpend, UserGroup
from raysys.model.scorer import Head
from raysys.storage import Root
from raysys.train import trial
from raysys.train.checkpoint import Checkpoint, Checkpoints
from raysys.train.group import group_of_one
from raysys.train.output import TrainOutput
from raysys.train.trial import Look, Trials, run_trial
from tests import tiny_shop

KEY = "key"
TRIED, TRAINED = (tuning_group(0.5, KEY, tuned_on=tuned_on) for tuned_on in (True, False))
NUM_USERS = 60
EVENTS = tiny_shop.outcomes(NUM_USERS)
ITEMS = tiny_shop.item_states()[0].table()


@pytest.fixture(scope="module")
def sharded() -> ShardResult:
    return tiny_shop.shard(EVENTS, user_key_id=KEY, group=TRAINED, tried=TRIED)


class TestShard:
    def test_trials_and_release_train_on_different_users_and_together_on_all(
        self, sharded: ShardResult
    ) -> None:
        assert sharded.trial_examples is not None
        parts = (sharded.trial_examples, sharded.examples)
        everyone = tiny_shop.shard(EVENTS).examples
        assert [part.num_users > 0 for part in parts] == [True, True]
        assert sum(len(part.user) for part in parts) == len(everyone.user)
        found = np.concatenate([part.features for part in parts])
        assert _sorted(found) == _sorted(everyone.features)

    def test_each_part_is_that_of_an_update_on_its_group_alone(self, sharded: ShardResult) -> None:
        for group, part in ((TRIED, sharded.trial_examples), (TRAINED, sharded.examples)):
            alone = tiny_shop.shard(EVENTS, user_key_id=KEY, group=group).examples
            assert isinstance(part, ExampleSet) and part.to_bytes() == alone.to_bytes()

    def test_a_filter_that_lets_others_into_trials_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound, calls = examples._in_group, list[UserGroup | None]()

        def broken(
            users: pl.Series, group: UserGroup | None, settings: examples.ShardSettings
        ) -> pl.Series:
            calls.append(group)
            if group == TRIED and calls.count(TRIED) == 1:
                return pl.repeat(True, len(users), eager=True)
            return sound(users, group, settings)

        monkeypatch.setattr(examples, "_in_group", broken)
        with pytest.raises(PrivacyError, match=r"users outside the group .*index=0"):
            tiny_shop.shard(EVENTS, user_key_id=KEY, group=TRAINED, tried=TRIED)

    def test_a_case_says_whether_trials_may_score_it(self, sharded: ShardResult) -> None:
        users = sorted(EVENTS["user"].unique())
        expected = in_group(users, TRIED, key_id=KEY)
        assert 0 < expected.sum() < len(users)
        assert sharded.cases["tried"].to_list() == expected.tolist()

    def test_without_a_shard_trials_read_what_the_update_trains_on(self) -> None:
        for group in (None, TRAINED):
            result = tiny_shop.shard(EVENTS, user_key_id=KEY, group=group, tried=group)
            assert result.trial_examples is None
        assert tiny_shop.shard(EVENTS).cases["tried"].all()


def _sorted(rows: np.ndarray) -> list[bytes]:
    return sorted(row.tobytes() for row in rows)


class TestScore:
    @pytest.fixture
    def cases(self) -> pl.DataFrame:
        return tiny_shop.shard(EVENTS).cases.with_columns(held_out=pl.lit(True))

    @pytest.fixture
    def trained(self) -> TrainOutput:
        rng = np.random.default_rng(0)
        text = rng.normal(size=(len(tiny_shop.distinct_texts()), 12)).astype(np.float32)
        text /= np.linalg.norm(text, axis=1, keepdims=True)
        return TrainOutput(
            head=tiny_shop.random_head(), adapter={}, adapted_weights={}, adapted_modules=(),
            text_before=text, text_after=text,
        )  # fmt: skip

    def score(
        self, root: Root, cases: pl.DataFrame, trained: TrainOutput, max_difference: float = 0.1
    ) -> float:
        buffer = io.BytesIO()
        cases.write_parquet(buffer)
        root.put(cases_path("u", 0), buffer.getvalue())
        return HoldoutScore(
            root=root, update_id="u", num_shards=1, items=ITEMS,
            text_of_item=tiny_shop.text_of_item(), head=Head.decayed_frequency(8),
            max_difference=max_difference,
        )(trained)  # fmt: skip

    def most_moved(self, root: Root, cases: pl.DataFrame, trained: TrainOutput) -> float:
        """By how much a user who leaves moves it, at the most."""
        whole = self.score(root, cases, trained, 0.01)
        rest = (cases.filter(np.arange(len(cases)) != user) for user in range(12))
        return max(abs(whole - self.score(root, left, trained, 0.01)) for left in rest)

    def test_no_user_moves_it_by_more_than_1(
        self,
        local_root: Root,
        cases: pl.DataFrame,
        trained: TrainOutput,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        assert 0.9 < self.most_moved(local_root, cases, trained) <= 1 + 1e-9
        monkeypatch.setattr(holdout.np, "clip", lambda value, low, high: value)
        assert self.most_moved(local_root, cases, trained) > 5, "without the clip one would"

    def test_it_is_the_sum_of_changes_of_ndcg(
        self, local_root: Root, cases: pl.DataFrame, trained: TrainOutput
    ) -> None:
        before = Weights(head=Head.decayed_frequency(8), text=trained.text_before)
        after = Weights(head=trained.head, text=trained.text_after)
        expected = sum(
            _ndcg(case, after) - _ndcg(case, before)
            for case in holdout.read_cases(_bytes(cases))
            if case.scores_trials
        )
        assert self.score(local_root, cases, trained, 1.0) == pytest.approx(expected)

    def test_nobody_else_is_in_it(
        self, local_root: Root, cases: pl.DataFrame, trained: TrainOutput
    ) -> None:
        assert self.score(local_root, cases, trained) != 0
        for name in ("held_out", "tried"):
            others = cases.with_columns(pl.lit(False).alias(name))
            assert self.score(local_root, others, trained) == 0

    def test_the_previous_version_scores_nothing(
        self, local_root: Root, cases: pl.DataFrame, trained: TrainOutput
    ) -> None:
        same = dataclasses.replace(trained, head=Head.decayed_frequency(8))
        assert self.score(local_root, cases, same) == 0


EXACT = EvaluateConfig(max_users=100_000)


class TestSplit:
    """Whoever scores trials does not judge their winner: the best of several is so by luck too."""

    @pytest.mark.parametrize("config", [EXACT, EvaluateConfig(private=True)])
    def test_nobody_both_chooses_and_judges_and_nobody_is_left_out(
        self, config: EvaluateConfig
    ) -> None:
        cases = _many_cases()
        choosing = [case.draw for case in cases if case.scores_trials]
        judging = [case.draw for case in chosen(cases, config, 1, after_trials=True)]
        assert set(choosing).isdisjoint(judging) and len(choosing) + len(judging) == len(cases)

    def test_an_update_without_trials_is_judged_by_all(self) -> None:
        cases = _many_cases()
        assert len(chosen(cases, EXACT, 1)) == len(cases)

    @pytest.mark.parametrize("config", [EXACT, EvaluateConfig(private=True, noise_multiplier=0.5)])
    def test_the_comparison_after_trials_is_of_those_who_did_not_choose(
        self, local_root: Root, monkeypatch: pytest.MonkeyPatch, config: EvaluateConfig
    ) -> None:
        monkeypatch.setattr(compare.ray, "put", lambda value: value)
        monkeypatch.setattr(compare.ray, "get", lambda value: value)
        monkeypatch.setattr(
            compare, "run_tasks", lambda task, shards, num_cpus: list(map(task, shards))
        )
        monkeypatch.setattr(Release, "noise", lambda self, total: total)
        cases = tiny_shop.shard(EVENTS).cases.with_columns(held_out=pl.lit(True))
        local_root.put(cases_path("u", 0), _bytes(cases))
        rng = np.random.default_rng(0)
        text = rng.normal(size=(len(tiny_shop.distinct_texts()), 12)).astype(np.float32)
        weights = Weights(head=Head.decayed_frequency(8), text=text)

        def num_judges(after_trials: bool) -> int:
            return compare.compare(
                local_root, "u", items=ITEMS, text_of_item=tiny_shop.text_of_item(),
                before=weights, after=weights, config=config, num_shards=1,
                after_trials=after_trials,
            ).num_holdout_users  # fmt: skip

        num_choosing = sum(case.scores_trials for case in holdout.read_cases(_bytes(cases)))
        assert 0 < num_choosing < len(cases)
        assert num_judges(True) == len(cases) - num_choosing
        assert num_judges(False) == len(cases)

    def test_it_halves_those_held_out_users_whom_trials_may_read(self) -> None:
        cases = _many_cases()
        assert all(case.held_out and case.tried for case in cases if case.scores_trials)
        for below in (1.0, 0.1):
            read = [c.scores_trials for c in cases if c.held_out and c.tried and c.draw < below]
            # Five standard errors of a fair coin.
            assert np.mean(read) == pytest.approx(0.5, abs=2.5 / math.sqrt(len(read)))

    def test_a_user_keeps_its_side_whoever_else_is_there(self) -> None:
        users = EVENTS["user"].unique().sort()[:20]
        rest = tiny_shop.shard(EVENTS.filter(pl.col("user").is_in(users.implode()))).cases
        sides = {_bytes(row): s for row, s in _sides(tiny_shop.shard(EVENTS).cases)}
        assert len(rest) > 10
        assert all(sides[_bytes(row)] == side for row, side in _sides(rest))


def _many_cases() -> list[holdout.Case]:
    rng = np.random.default_rng(0)
    template = next(iter(holdout.read_cases(_bytes(tiny_shop.shard(EVENTS).cases))))
    return [
        dataclasses.replace(template, held_out=bool(held), tried=bool(tried), draw=float(draw))
        for held, tried, draw in zip(
            rng.random(40_000) < 0.5, rng.random(40_000) < 0.5, rng.random(40_000), strict=True
        )
    ]


def _sides(cases: pl.DataFrame) -> list[tuple[pl.DataFrame, bool]]:
    """What names a user (its draw) and on which side it is."""
    held_out = cases.with_columns(held_out=pl.lit(True))
    return [
        (row.select("draw"), case.scores_trials)
        for row, case in zip(
            held_out.iter_slices(1), holdout.read_cases(_bytes(held_out)), strict=True
        )
    ]


class TestRun:
    """What a trial reads and what leaves it; its training and its files are replaced."""

    @pytest.fixture
    def read(
        self, local_root: Root, sharded: ShardResult, monkeypatch: pytest.MonkeyPatch
    ) -> list[bytes]:
        """The shards that trials trained on."""
        assert sharded.trial_examples is not None
        local_root.put(examples_path("u", 0), sharded.examples.to_bytes())
        local_root.put(trial_examples_path("u", 0), sharded.trial_examples.to_bytes())
        read: list[bytes] = []

        def train(job: Any, shards: Any, activations: Any, held: Checkpoints, until: int) -> None:
            read.extend(shard.to_bytes() for shard in shards)
            held.save(Checkpoint(num_steps=until, tensors={}))

        monkeypatch.setattr(trial, "_train", train)
        for name in ("load_cached", "cache_folder", "write_output", "require_reloads"):
            monkeypatch.setattr(trial, name, unittest.mock.Mock())
        monkeypatch.setattr(trial, "read_output", lambda folder: None)
        return read

    @pytest.fixture
    def look(self, local_root: Root, tiny_encoder: str, read: list[bytes]) -> Callable[..., Look]:
        """Runs a trial whose score is 5."""

        def look(*, is_private: bool = True, own_users: bool = False) -> Look:
            spend = tiny_shop.plan(noise_multiplier=4.0).spend
            selection = SelectionSpend(
                method="compose", num_steps=spend.num_steps, sampling_prob=spend.sampling_prob,
                noise_multiplier=4.0, score_noise_multiplier=10.0, num_trials=2, mean_trials=2.0,
                shape=0.0, delta=0.0, group=TRIED if own_users else None,
            )  # fmt: skip
            trials = Trials(
                config=parse_config(
                    {
                        "root": local_root.uri, "pseudonyms": {"key_file": "key"},
                        "model": {"encoder": tiny_encoder},
                    }
                ),
                selection=selection if is_private else None, spend=spend,
                head=Head.decayed_frequency(8), adapted_weights=None, texts=[],
                text_of_item=tiny_shop.text_of_item(), seed=0, root=local_root, update_id="u",
                num_shards=1, own_users=own_users, score=lambda output: 5.0,
            )  # fmt: skip
            (end,) = run_trial(trials, {})
            return end

        return look

    def test_its_score_leaves_with_the_noise_that_is_charged(
        self, look: Callable[..., Look]
    ) -> None:
        scores = np.array([look().score for _ in range(200)])
        # Five standard errors of 200 scores: the noise has no seed.
        assert scores.std() == pytest.approx(10.0, rel=0.25)
        assert scores.mean() == pytest.approx(5.0, abs=3.6)
        assert look(is_private=False).score == 5.0

    def test_it_reads_the_users_who_are_charged_for_it(
        self, look: Callable[..., Look], read: list[bytes], sharded: ShardResult
    ) -> None:
        assert sharded.trial_examples is not None
        look(own_users=True)
        look(own_users=False)
        assert read == [sharded.trial_examples.to_bytes(), sharded.examples.to_bytes()]


def _bytes(cases: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    cases.write_parquet(buffer)
    return buffer.getvalue()


def _ndcg(case: holdout.Case, weights: Weights) -> float:
    everything = np.arange(len(ITEMS), dtype=np.int32)
    shared = holdout.features(case.history, ITEMS, everything, now=case.now)
    scores = holdout._score_all(case, tiny_shop.text_of_item(), weights, shared)
    return ranking_metrics(scores, case.positives, case.gains)[0]


def test_two_trials_of_one_process_take_turns_at_its_group() -> None:
    """Ray Tune may start a trial beside the last block of one that it has stopped."""
    at_once, most = [0], [0]
    was_open = torch.distributed.is_initialized()  # by a fixture of the session

    def block() -> None:
        for _ in range(5):
            with group_of_one():
                at_once[0] += 1
                most[0] = max(most[0], at_once[0])
                time.sleep(0.002)
                at_once[0] -= 1

    threads = [threading.Thread(target=block) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] and torch.distributed.is_initialized() == was_open
    with group_of_one(), pytest.raises(ValueError, match="twice"):
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )


def test_a_group_that_is_open_is_used_and_left_open(world: None) -> None:
    with group_of_one():
        pass
    assert torch.distributed.is_initialized()
