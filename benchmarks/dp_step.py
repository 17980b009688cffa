"""Measures one private step against one without privacy: this engine, Opacus' hooks and ghost.

    python benchmarks/dp_step.py           # eight minutes; the last line is one JSON object
    python benchmarks/dp_step.py --quick   # two short cases, to see that it runs
    python benchmarks/dp_step.py --cpu-time   # seconds of one thread, on a machine that is busy

A step is forward, backward, optimizer and zero_grad of LoRA on the bundled encoder (MiniLM), for 16
users. Arms take turns within a case, so that the machine's moods hit all alike: a ratio is the
median over turns of an arm's seconds through those of the step without privacy next to it.

Opacus knows rows, not users: with 4 rows a user its arms clip 64 rows, which is no user-level
privacy. They are timed as they are.

Memory is what PyTorch's allocator holds at the peak of a step, by its own records
(`torch.profiler`): weights and optimizer state, which are there before, and whatever the step adds.
Buffers inside of MKL are not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from peft import LoraConfig, get_peft_model

from raysys.model.encoder import load_encoder
from raysys.model.encoder_files import BUNDLED, resolve_encoder
from raysys.privacy.clipping import PerUserGradients
from raysys.privacy.optimizer import PerUserOptimizer

NUM_USERS = 16
TARGETS = {
    "q/v": r".*\.(query|value)",
    "all linear": r".*encoder\.layer.*\.(query|key|value|dense)",
}
PRIVATE = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": NUM_USERS}
SECONDS_A_CASE = 4.0
MIN_TURNS, MAX_TURNS = 3, 25

Step = Callable[[torch.Tensor, int], None]
Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to take a step; `run(ids, rows_a_user)`."""

    run: Step
    static_bytes: int
    """Weights and AdamW's two moments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    tokens: int
    lora_rank: int
    targets: str
    rows_a_user: int

    def ids(self) -> torch.Tensor:
        return torch.randint(1000, 9000, (NUM_USERS * self.rows_a_user, self.tokens))


def main() -> None:
    """Runs all cases, prints each as it is done and the summary as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Two short cases.")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds of one thread, for a busy machine."
    )
    args = parser.parse_args()
    clock = time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
        clock = time.process_time
    quick = args.quick
    warnings.simplefilter("ignore")
    cases = []
    for targets, rank in itertools.product(TARGETS, (8,) if quick else (2, 8, 32)):
        arms = _arms(targets, rank)
        _warm_up(arms)
        for rows, tokens in itertools.product(
            (1,) if quick else (1, 4), (16,) if quick else (16, 64, 128)
        ):
            case = Case(tokens=tokens, lora_rank=rank, targets=targets, rows_a_user=rows)
            cases.append(_measure(case, arms, clock))
            print(json.dumps(cases[-1]), flush=True)
    print(json.dumps(_summary(cases)))


def _summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    def worst(ranks: tuple[int, ...]) -> float | None:
        found = [case["time_ratio"] for case in cases if case["lora_rank"] in ranks]
        return max(found, default=None)

    return {
        "worst_ratio": worst((2, 8)),
        "worst_ratio_rank32": worst((32,)),
        "memory_ratio": max(case["memory_ratio"] for case in cases),
        "hooks_ratio": statistics.median(case["hooks_ratio"] for case in cases),
        "ghost_ratio": statistics.median(case["ghost_ratio"] for case in cases),
        "median_ratio": statistics.median(case["time_ratio"] for case in cases),
        "cases": cases,
    }


def _measure(case: Case, arms: dict[str, Arm], clock: Clock) -> dict[str, Any]:
    ids = case.ids()
    # Profiling comes first: it also warms up this shape.
    measured = list(arms) if case.rows_a_user == 1 else ["plain", "engine"]
    peaks = {name: _peak_bytes(arms[name], ids, case.rows_a_user) for name in measured}
    ratios: dict[str, list[float]] = {name: [] for name in arms if name != "plain"}
    plain: list[float] = []
    start = time.perf_counter()
    for turn in range(MAX_TURNS):
        if turn >= MIN_TURNS and time.perf_counter() - start > SECONDS_A_CASE:
            break
        # Opacus' arms need fewer turns: their distance is not a matter of percents.
        others = [name for name in ratios if name == "engine" or turn % 3 == 0]
        order = ["plain", *others]
        seconds = {
            name: _seconds(arms[name], ids, case.rows_a_user, clock)
            for name in (order if turn % 2 else reversed(order))
        }
        plain.append(seconds["plain"])
        for name in others:
            ratios[name].append(seconds[name] / seconds["plain"])
    return {
        **dataclasses.asdict(case),
        "time_ratio": round(statistics.median(ratios["engine"]), 4),
        "memory_ratio": round(peaks["engine"] / peaks["plain"], 4),
        "hooks_ratio": round(statistics.median(ratios["hooks"]), 4),
        "ghost_ratio": round(statistics.median(ratios["ghost"]), 4),
        **{
            f"{name}_memory_ratio": round(peaks[name] / peaks["plain"], 4)
            for name in ("hooks", "ghost")
            if name in peaks
        },
        "plain_s": round(statistics.median(plain), 4),
        "plain_bytes": peaks["plain"],
        "turns": len(plain),
    }


def _seconds(arm: Arm, ids: torch.Tensor, rows_a_user: int, clock: Clock) -> float:
    start = clock()
    arm.run(ids, rows_a_user)
    return clock() - start


def _peak_bytes(arm: Arm, ids: torch.Tensor, rows_a_user: int) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        arm.run(ids, rows_a_user)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    running = itertools.accumulate(event.nbytes() for event in events)
    return arm.static_bytes + max(running)


def _warm_up(arms: dict[str, Arm]) -> None:
    case = Case(tokens=16, lora_rank=0, targets="", rows_a_user=1)
    for arm in arms.values():
        for _ in range(2):
            arm.run(case.ids(), 1)


def _arms(targets: str, rank: int) -> dict[str, Arm]:
    return {
        name: make(_model(targets, rank))
        for name, make in (
            ("plain", _plain), ("engine", _engine), ("hooks", _hooks), ("ghost", _ghost),
        )
    }  # fmt: skip


def _model(targets: str, rank: int) -> Any:
    torch.manual_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=16, target_modules=TARGETS[targets])
    model = get_peft_model(load_encoder(resolve_encoder(BUNDLED)), lora).train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return model


def _row_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    out: torch.Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return out.mean(1).square().sum(1)


def _adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def _arm(model: Any, run: Step) -> Arm:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return Arm(run=run, static_bytes=weights + 2 * trained)


def _plain(model: Any) -> Arm:
    optimizer = _adam(model)

    def run(ids: torch.Tensor, rows_a_user: int) -> None:
        _row_losses(model, ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _arm(model, run)


def _engine(model: Any) -> Arm:
    engine = PerUserGradients(model, keep_factors=True)
    optimizer = PerUserOptimizer(_adam(model), **PRIVATE)

    def run(ids: torch.Tensor, rows_a_user: int) -> None:
        with engine.rows(torch.arange(NUM_USERS).repeat_interleave(rows_a_user), NUM_USERS):
            losses = _row_losses(model, ids)
        engine.backward(losses.view(NUM_USERS, rows_a_user).sum(1))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _arm(model, run)


def _hooks(model: Any) -> Arm:
    module = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(_adam(model), **PRIVATE)

    def run(ids: torch.Tensor, rows_a_user: int) -> None:
        _row_losses(module, ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _arm(model, run)


def _ghost(model: Any) -> Arm:
    module = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum"
    )
    optimizer = DPOptimizerFastGradientClipping(_adam(model), **PRIVATE)

    def run(ids: torch.Tensor, rows_a_user: int) -> None:
        losses = _row_losses(module, ids)
        DPTensorFastGradientClipping(module, optimizer, losses, "sum").backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _arm(model, run)


if __name__ == "__main__":
    main()
