"""AdaLoRA's ranks fall to what is configured, also where workers died on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from raysys.model.adapter import NAME, Adapter
from raysys.model.encoder import TextEncoder
from raysys.model.ranks import Ranks
from raysys.privacy.optimizer import PerUserOptimizer
from tests import tiny_shop

NUM_STEPS, LAST_DECISION = 12, 9
INITIAL, TARGET, NUM_MODULES = 12, 2, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """An adapter in training; what a step pulls at depends on its number alone."""

    adapter: Adapter
    ranks: Ranks
    optimizer: PerUserOptimizer

    def steps(self, numbers: Iterable[int]) -> None:
        for step in numbers:
            generator = torch.Generator().manual_seed(step)
            for parameter in self.weights():
                shape = (5, *parameter.shape)
                parameter.grad_sample = torch.randn(shape, generator=generator)  # type: ignore[attr-defined]
            self.optimizer.step()
            self.ranks.after_step(self.optimizer, step)
            self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> list[torch.nn.Parameter]:
        return [p for p in self.adapter.encoder.model.parameters() if p.requires_grad]

    def kept(self) -> list[int]:
        """Number of singular values of each module."""
        return [int((layer.lora_E[NAME] != 0).sum()) for _, layer in self.adapter.layers()]

    @torch.no_grad()
    def resumed(self, *, with_ranks: bool = True) -> Run:
        """A new process that goes on from a checkpoint of this one."""
        other = begin(self.adapter.config.encoder)
        for mine, theirs in zip(self.weights(), other.weights(), strict=True):
            theirs.copy_(mine)
        if with_ranks:
            other.ranks.restore(self.ranks.state())
        return other


def begin(name: str, **changes: Any) -> Run:
    values = {
        "adapter": "adalora", "lora_rank": TARGET, "adalora_initial_rank": INITIAL,
        "target_modules": ("query", "value", "output.dense"), **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    config = tiny_shop.model_config(name, **values)
    adapter = Adapter.fresh(TextEncoder(name, 8), config, {}, num_steps=NUM_STEPS)
    weights = [p for p in adapter.encoder.model.parameters() if p.requires_grad]
    optimizer = PerUserOptimizer(
        torch.optim.SGD(weights, lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0,
        expected_batch_size=1,
    )  # fmt: skip
    ranks = Ranks.of(adapter)
    ranks.attach(optimizer)
    return Run(adapter=adapter, ranks=ranks, optimizer=optimizer)


@pytest.fixture
def run(tiny_encoder: str) -> Run:
    return begin(tiny_encoder)


def test_ranks_fall_to_a_mean_of_what_is_configured_and_stay_there(run: Run) -> None:
    run.steps([1])
    assert run.kept() == [INITIAL] * NUM_MODULES
    run.steps(range(2, 6))
    halfway = sum(run.kept())
    assert TARGET * NUM_MODULES < halfway < INITIAL * NUM_MODULES
    run.steps(range(6, LAST_DECISION + 1))
    decided = run.kept()
    assert sum(decided) == TARGET * NUM_MODULES
    run.steps(range(LAST_DECISION + 1, NUM_STEPS + 1))
    assert run.kept() == decided


@pytest.mark.parametrize("after", [1, 5, LAST_DECISION], ids="after step {}".format)
def test_a_run_that_goes_on_from_a_checkpoint_decides_as_if_nothing_had_been(
    run: Run, after: int
) -> None:
    run.steps(range(1, after + 1))
    resumed, forgetful = run.resumed(), run.resumed(with_ranks=False)
    for each in (run, resumed, forgetful):
        each.steps(range(after + 1, NUM_STEPS + 1))
    assert all(map(torch.equal, resumed.weights(), run.weights()))
    if after > 1:
        assert not all(map(torch.equal, forgetful.weights(), run.weights()))


@pytest.mark.parametrize("lost", [range(6, 10), range(6, 12)], ids=["steps 6 to 9", "6 to 11"])
def test_a_last_decision_that_was_lost_with_a_worker_is_made_up_for(run: Run, lost: range) -> None:
    run.steps(range(1, lost.start))
    assert sum(run.kept()) > TARGET * NUM_MODULES
    resumed = run.resumed()
    resumed.steps(range(lost.stop, NUM_STEPS + 1))
    assert 0 < sum(resumed.kept()) <= TARGET * NUM_MODULES


def test_the_first_step_counts(run: Run) -> None:
    """PEFT smooths importances from zero on: a step that is left out would change all of them."""
    run.steps([1])
    state = run.ranks.state()
    importances = [x for name, x in state.items() if "exp_avg_ipt" in name and "lora_E" in name]
    assert len(importances) == NUM_MODULES
    assert all((importance > 0).all() for importance in importances)


def test_a_run_that_saw_too_little_to_decide_keeps_what_it_has(run: Run) -> None:
    run.steps([LAST_DECISION, NUM_STEPS])
    assert run.kept() == [INITIAL] * NUM_MODULES


def test_modules_without_any_rank_are_named(run: Run) -> None:
    run.steps(range(1, NUM_STEPS + 1))
    assert run.ranks.emptied() == []
    config: Any = run.ranks.peft_model.peft_config[NAME]  # type: ignore[union-attr]
    name = next(iter(config.rank_pattern))
    config.rank_pattern[name] = [False] * INITIAL
    (emptied,) = run.ranks.emptied()
    assert any(emptied is layer.lora_E[NAME] for _, layer in run.adapter.layers())


def test_lora_has_nothing_to_decide(tiny_encoder: str) -> None:
    run = begin(tiny_encoder, adapter="lora")
    run.steps(range(1, NUM_STEPS + 1))
    assert run.ranks.state() == {} and run.ranks.emptied() == []
    run.ranks.restore({})
