"""No step is run that was not permitted first, and none twice, wherever a worker dies.

A worker's death is an exception here, and the next attempt a new call: all that the two share lies
below the root. What really dies and is replaced is in `tests/cluster/test_train_resume.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from raysys.errors import LeaseLostError, StorageUnavailableError, WorkersLostError
from raysys.ledger.log import Log
from raysys.ledger.records import PrivacySpend, StepsPermitted, UpdateAbandoned
from raysys.model.encoder import TextEncoder, TokenActivations
from raysys.storage import Root
from raysys.train.blocks import NextSteps, charged, next_block, num_permitted, uncharged
from raysys.train.checkpoint import Checkpoint, Checkpoints
from raysys.train.loop import Trained, train_on_shards
from raysys.train.step import Stepper
from tests import tiny_shop
from tests.helpers import started

ADAPTED = "encoder.layer.1.output.dense"
UPDATE = "u0001-aaaaaa"
NUM_STEPS, SIZE = 8, 3
PLAN = tiny_shop.plan(num_steps=NUM_STEPS)


class Died(Exception):
    """A worker was killed."""


@dataclasses.dataclass
class Group:
    """Attempts of one update's training, with what they did in order."""

    root: Root
    encoder: str
    activations: TokenActivations
    events: list[str] = dataclasses.field(default_factory=list)
    steps: list[int] = dataclasses.field(default_factory=list)
    die_after: str = ""
    """The event after which this attempt dies."""
    plan: Any = PLAN
    next_steps: NextSteps | None = None

    def attempt(self) -> Trained:
        """Runs one attempt, to its end or its death."""
        blocks = self.next_steps or charged(self.root, UPDATE, num_steps=NUM_STEPS, size=SIZE)

        def permit(done: int) -> range:
            block = blocks(done)
            self._note(f"permit to {block.stop}" if block else "used up")
            return block

        store = Checkpoints(self.root, UPDATE)
        save = store.save

        def keep(checkpoint: Checkpoint) -> None:
            save(checkpoint)
            self._note(f"checkpoint {checkpoint.num_steps}")

        store.save = keep  # type: ignore[method-assign]
        shard = tiny_shop.shard(tiny_shop.outcomes(40)).examples
        return train_on_shards(
            tiny_shop.train_job(self.encoder, plan=self.plan), [shard], self.activations,
            num_workers=1, on_step=self._ran, next_steps=permit, checkpoints=store,
        )  # fmt: skip

    def dies(self, after: str) -> None:
        """Runs one attempt that dies after an event."""
        self.die_after = after
        with pytest.raises(Died):
            self.attempt()
        self.die_after = ""

    def _ran(self, step: int) -> None:
        self.steps.append(step)
        self._note(f"step {step}")

    def _note(self, event: str) -> None:
        self.events.append(event)
        if event == self.die_after:
            raise Died

    @property
    def permitted(self) -> list[int]:
        """What the ledger was told, in order."""
        records = (entry.record for entry in Log(self.root).entries())
        return [r.num_steps for r in records if isinstance(r, StepsPermitted)]


@pytest.fixture
def group(tiny_encoder: str, local_root: Root, world: None) -> Group:
    spend = dataclasses.replace(PLAN.spend)
    Log(local_root).transact(lambda state: _started(spend))
    texts = tiny_shop.distinct_texts()
    activations = TextEncoder(tiny_encoder, 8).activations(texts).select(texts)
    return Group(root=local_root, encoder=tiny_encoder, activations=activations)


def _started(spend: PrivacySpend) -> Any:
    return dataclasses.replace(started(UPDATE), reserved=spend, permits_steps=True)


def test_each_block_is_permitted_before_it_runs_and_kept_after_it(group: Group) -> None:
    group.attempt()
    assert group.events == [
        "permit to 3", "step 1", "step 2", "step 3", "checkpoint 3",
        "permit to 6", "step 4", "step 5", "step 6", "checkpoint 6",
        "permit to 8", "step 7", "step 8", "checkpoint 8", "used up",
    ]  # fmt: skip
    assert group.permitted == [3, 6, 8]


@pytest.mark.parametrize(
    ("after", "lost"),
    [("permit to 6", [4, 5, 6]), ("step 5", [6]), ("step 6", []), ("checkpoint 6", [])],
    ids=["before its first step", "within the block", "before the checkpoint", "after it"],
)
def test_after_a_death_the_run_goes_on_behind_all_that_was_permitted(
    group: Group, after: str, lost: list[int]
) -> None:
    group.dies(after)
    group.attempt()
    assert group.steps == [step for step in range(1, NUM_STEPS + 1) if step not in lost]
    assert group.permitted == [3, 6, 8]


@pytest.mark.parametrize("seed", range(3), ids="seed {}".format)
def test_whatever_dies_where_no_step_runs_twice_or_uncharged(group: Group, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(3):
        after = rng.choice(["step 2", "step 5", "step 7", "checkpoint 3", "permit to 6"])
        try:
            group.die_after = str(after)
            group.attempt()
        except (Died, WorkersLostError):
            continue
    group.die_after = ""
    assert len(set(group.steps)) == len(group.steps)
    assert max(group.steps) <= max(group.permitted) <= NUM_STEPS
    assert sorted(set(group.permitted)) == group.permitted


def test_a_loop_that_resumes_where_its_checkpoint_stands_runs_more_than_is_charged(
    group: Group,
) -> None:
    """The negative control: what the two tests above look at would show it."""
    group.next_steps = uncharged(num_steps=NUM_STEPS, size=SIZE)
    group.dies("step 5")
    group.attempt()
    assert len(group.steps) == NUM_STEPS + 2 > PLAN.spend.num_steps
    assert len(set(group.steps)) < len(group.steps)


def test_weights_and_moments_go_on_from_the_checkpoint(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    run = Stepper.run

    def spy(self: Stepper, step: int) -> None:
        if step == 6:
            named = self._module.trainable()
            seen.append(dict(Checkpoint.of(6, named, self._adam, {}).tensors))
        run(self, step)

    monkeypatch.setattr(Stepper, "run", spy)
    group.dies("checkpoint 6")
    group.attempt()
    kept = Checkpoints(group.root, UPDATE).load(6).tensors
    (resumed,) = seen
    assert {name.rpartition("/")[2] for name in kept if name.startswith("optimizer/")} == {
        "exp_avg", "exp_avg_sq", "step",
    }  # fmt: skip
    assert kept.keys() == resumed.keys()
    for name, value in kept.items():
        assert torch.equal(resumed[name], value), name
    assert all(float(v) == 6 for name, v in kept.items() if name.endswith("/step"))


def test_a_checkpoint_holds_what_is_trained_and_no_generator_or_user(group: Group) -> None:
    group.attempt()
    tensors = Checkpoints(group.root, UPDATE).load(NUM_STEPS).tensors
    weights = {name for name in tensors if name.startswith("weights/")}
    assert weights == {
        "weights/tower.lora_b", "weights/head.first.weight", "weights/head.first.bias",
        "weights/head.second.weight", "weights/head.second.bias", "weights/head.last.weight",
        "weights/head.skip.weight",
    }  # fmt: skip
    assert {name.split("/")[0] for name in tensors} == {"weights", "optimizer"}
    (stored, *_) = [info for info in group.root.list("staging") if "00000008" in info.path]
    trained = sum(tensors[name].numel() for name in weights)
    assert stored.size_bytes < 3 * 4 * trained + 5000


def test_a_group_of_another_size_goes_on_from_a_checkpoint(
    group: Group, two_workers: list[dict[str, Any]]
) -> None:
    """Two workers took five steps. One goes on: with all the users, and its own normaliser."""
    first, second = (
        {k.removeprefix("kept "): torch.tensor(v) for k, v in worker.items() if "kept " in k}
        for worker in two_workers
    )
    assert len(first) > 7 and all(torch.equal(first[k], second[k]) for k in first | second)
    Checkpoints(group.root, UPDATE).save(Checkpoint(num_steps=5, tensors=first))
    group.next_steps = uncharged(num_steps=NUM_STEPS, size=SIZE)
    trained = group.attempt()
    assert group.steps == [6, 7, 8]
    assert trained.num_users == tiny_shop.shard(tiny_shop.outcomes(40)).examples.num_users
    moved = trained.head.weights["skip.weight"] - first["weights/head.skip.weight"].numpy()
    assert 0 < abs(moved).max() <= 3 * 0.02


def test_what_is_run_again_draws_other_users_and_other_noise(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two attempts of one private block, as the broken loop above runs them."""
    assert _weights_after_a_death(group) != _weights_after_a_death(group)


def _weights_after_a_death(group: Group) -> bytes:
    group.root.delete_prefix("staging")
    group.next_steps = uncharged(num_steps=NUM_STEPS, size=SIZE)
    group.dies("checkpoint 3")
    (info,) = group.root.list("staging")
    return group.root.read_bytes(info.path)


def test_without_privacy_a_block_that_is_run_again_comes_out_the_same(
    tiny_encoder: str, local_root: Root, group: Group
) -> None:
    group.plan = tiny_shop.plan(enabled=False, num_steps=NUM_STEPS)
    group.next_steps = uncharged(num_steps=NUM_STEPS, size=SIZE)
    whole = group.attempt()
    local_root.delete_prefix("staging")
    group.dies("step 5")
    resumed = group.attempt()
    assert group.permitted == []
    for name, value in whole.head.weights.items():
        assert np.array_equal(value, resumed.head.weights[name])
    assert np.array_equal(*(run.adapted_weights[ADAPTED] for run in (whole, resumed)))


def test_the_size_of_blocks_changes_nothing_without_privacy(group: Group) -> None:
    group.plan = tiny_shop.plan(enabled=False, num_steps=NUM_STEPS)
    results = []
    for size in (1, NUM_STEPS):
        group.root.delete_prefix("staging")
        group.next_steps = uncharged(num_steps=NUM_STEPS, size=size)
        results.append(group.attempt().adapted_weights[ADAPTED])
    assert np.array_equal(*results)


def test_a_worker_of_an_update_that_has_ended_runs_no_step(group: Group) -> None:
    """It was given up for dead, and another update may be at work by now."""

    def given_up(step: int) -> None:
        if step == 3:
            Log(group.root).transact(lambda _: UpdateAbandoned(update_id=UPDATE, reason="silent"))

    ran, group._ran = group._ran, lambda step: (ran(step), given_up(step))  # type: ignore
    with pytest.raises(LeaseLostError, match=f"update {UPDATE} has ended"):
        group.attempt()
    assert group.steps == [1, 2, 3] and group.permitted == [3]


def test_two_groups_of_one_update_never_get_the_same_steps(local_root: Root, group: Group) -> None:
    """One that was given up by Ray Train, but lives, and the one that replaced it."""
    old, new = (charged(local_root, UPDATE, num_steps=NUM_STEPS, size=SIZE) for _ in range(2))
    blocks = [take(0) for take in (old, new, old, new, old)]
    assert blocks == [range(3), range(3, 6), range(6, 8), range(8, 8), range(8, 8)]


def test_a_permit_of_which_nobody_knows_whether_it_was_written_is_used_up(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Root.put_if_absent

    def written_but_not_told(self: Root, path: str, data: bytes) -> bool:
        put(self, path, data)
        raise StorageUnavailableError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(Root, "put_if_absent", written_but_not_told)
        with pytest.raises(StorageUnavailableError):
            group.attempt()
    group.attempt()
    assert group.steps == [4, 5, 6, 7, 8] and group.permitted == [3, 6, 8]


def test_a_run_that_lost_all_its_steps_ends_with_what_there_is(group: Group) -> None:
    group.dies("permit to 8")
    kept = group.attempt()
    assert group.steps == [1, 2, 3, 4, 5, 6]
    tensors = Checkpoints(group.root, UPDATE).load(6).tensors
    assert np.array_equal(
        kept.head.weights["skip.weight"], tensors["weights/head.skip.weight"].numpy()
    )


def test_a_run_that_lost_all_its_steps_before_any_checkpoint_is_refused(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.next_steps = charged(group.root, UPDATE, num_steps=NUM_STEPS, size=NUM_STEPS)
    group.dies("step 7")
    with pytest.raises(WorkersLostError, match="died before the first checkpoint and 8 steps are"):
        group.attempt()
    assert group.permitted == [8]


def test_the_learning_rate_falls_by_what_is_used_up(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    run = Stepper.run

    def spy(self: Stepper, step: int) -> None:
        run(self, step)
        rates.append(self._adam.param_groups[0]["lr"])

    monkeypatch.setattr(Stepper, "run", spy)
    group.dies("permit to 6")
    group.attempt()
    assert rates == [0.02 * (1 - step / NUM_STEPS) for step in (0, 1, 2, 6, 7)]


def test_only_the_active_update_has_permitted_steps(local_root: Root, group: Group) -> None:
    state = Log(local_root).refresh()
    assert num_permitted(state, UPDATE) == 0
    with pytest.raises(LeaseLostError):
        num_permitted(state, "u0002-bbbbbb")
    assert next_block(7, num_steps=8, size=3) == range(7, 8)
