"""Measures private training at one and at two workers: bytes that cross between them, and time.

    python benchmarks/train_scaling.py             # two minutes; the last line is one JSON object
    python benchmarks/train_scaling.py --steps 3   # to see that it runs

Workers are processes of one gloo group, with one thread each, and run the loop that Ray Train's
workers run, on made-up users of the demo shop's shape. Both sizes sample the same users' share of
the same shop, so the global batch is the same: two workers hold half of the users each. Step times
are medians over steps, by the clock and by the processor's count for one worker, which other work
on the machine disturbs less; the two sizes take turns. Bytes are what a worker hands to
`torch.distributed`, by every function of it that moves tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysys.config import ModelConfig, TrainConfig
from raysys.ingest.example_set import NUM_ATTENDED, ExampleSet
from raysys.ingest.features import NUM_FEATURES
from raysys.ledger.records import PrivacySpend
from raysys.model.encoder import TextEncoder, TokenActivations
from raysys.model.scorer import Head
from raysys.privacy.plan import PrivacyPlan
from raysys.train.blocks import uncharged
from raysys.train.loop import TrainJob, train_on_shards

NUM_USERS, EXAMPLES_PER_USER, NUM_CANDIDATES = 2048, 2, 54
SAMPLING_PROB = 0.125
NUM_ITEMS, NUM_TOKENS = 2000, 16
NUM_ROUNDS = 3
MOVES_TENSORS = (
    "all_reduce", "reduce", "broadcast", "all_gather", "gather", "scatter", "reduce_scatter",
    "all_to_all", "send", "isend",
)  # fmt: skip
"""Those of `torch.distributed` whose first argument is sent, or a list of what is."""


@contextmanager
def counted_bytes() -> Iterator[dict[str, list[int]]]:
    """Counts the bytes of each tensor that this process hands to `torch.distributed`.

    Yields:
      Function -> size of each tensor, in order.
    """
    sizes: dict[str, list[int]] = {}
    own = {name: getattr(torch.distributed, name) for name in MOVES_TENSORS}

    def counting(name: str) -> Any:
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = tensor if isinstance(tensor, list) else [tensor]
            sizes.setdefault(name, []).extend(t.numel() * t.element_size() for t in tensors)
            return own[name](tensor, *args, **kwargs)

        return call

    try:
        for name in MOVES_TENSORS:
            setattr(torch.distributed, name, counting(name))
        yield sizes
    finally:
        for name, function in own.items():
            setattr(torch.distributed, name, function)


def main() -> None:
    """Measures, and prints a line for each figure, then all as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--worker", nargs=3, metavar=("RANK", "SIZE", "FOLDER"), help="internal")
    args = parser.parse_args()
    if args.worker:
        rank, size, folder = args.worker
        _work(int(rank), int(size), Path(folder), args.steps)
        return
    rounds = [{size: _measure(size, args.steps) for size in (1, 2)} for _ in range(NUM_ROUNDS)]
    print(json.dumps(_figures(rounds)))


def _measure(size: int, steps: int) -> dict[str, Any]:
    """Runs a group of `size` workers; returns what rank 0 measured."""
    command = [sys.executable, __file__, "--steps", str(steps), "--worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                   "PYTHONWARNINGS": "ignore"}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            subprocess.Popen([*command, str(rank), str(size), folder], env=environment)
            for rank in range(size)
        ]
        if any(worker.wait() for worker in workers):
            raise SystemExit("a worker failed; its error is above")
        measured: dict[str, Any] = json.loads((Path(folder) / "measured.json").read_text())
    print(
        f"{size} worker(s): {1e3 * measured['step_s']:.0f} ms a step, "
        f"{measured['bytes_per_step']:,} bytes", flush=True,
    )  # fmt: skip
    return measured


def _figures(rounds: list[dict[int, dict[str, Any]]]) -> dict[str, Any]:
    seconds = {n: statistics.median(r[n]["step_s"] for r in rounds) for n in (1, 2)}
    two = rounds[0][2]
    ratios = [r[2]["step_s"] / r[1]["step_s"] for r in rounds]
    cpu_ratios = [r[2]["step_cpu_s"] / r[1]["step_cpu_s"] for r in rounds]
    return {
        "bytes_per_step": two["bytes_per_step"],
        "adapter_bytes": two["adapter_bytes"],
        "bytes_over_adapter": two["bytes_per_step"] / two["adapter_bytes"],
        "bytes_besides": two["bytes_besides"],
        "encoder_bytes": two["encoder_bytes"],
        "batch_users": SAMPLING_PROB * NUM_USERS,
        "step_ms_1": round(1e3 * seconds[1], 1),
        "step_ms_2": round(1e3 * seconds[2], 1),
        "step_ratio_2_over_1": round(statistics.median(ratios), 3),
        "step_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "step_cpu_ratio_2_over_1": round(statistics.median(cpu_ratios), 3),
        "step_cpu_ratio_range": [round(min(cpu_ratios), 3), round(max(cpu_ratios), 3)],
    }


def _work(rank: int, size: int, folder: Path, steps: int) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    job, times = _job(size, steps), list[tuple[float, float]]()
    users = np.array_split(np.arange(NUM_USERS), size)[rank]
    with counted_bytes() as sizes:
        trained = train_on_shards(
            job, [_examples(len(users), seed=rank)], _activations(job.model), num_workers=size,
            on_step=lambda step: times.append((time.perf_counter(), time.process_time())),
            next_steps=uncharged(num_steps=steps, size=steps),
        )  # fmt: skip
    torch.distributed.destroy_process_group()
    if rank == 0:
        reduced = sum(sizes.get("all_reduce", []))
        # From the end of the first step on.
        clock, cpu = (np.diff(values) for values in zip(*times, strict=True))
        measured = {
            "step_s": statistics.median(clock),
            "step_cpu_s": statistics.median(cpu),
            "bytes_per_step": reduced // steps,
            "bytes_besides": sum(map(sum, sizes.values())) - reduced,
            "adapter_bytes": trained_bytes(job),
            "encoder_bytes": _encoder_bytes(trained.peft_model),
        }
        (folder / "measured.json").write_text(json.dumps(measured))


def trained_bytes(job: TrainJob) -> int:
    """Returns the bytes of what is trained: LoRA's B on one projection, and the head."""
    assert job.model.adapter == "lora" and not job.model.train_lora_a
    width = TextEncoder(job.model.encoder, job.model.max_tokens).width
    head = sum(value.nbytes for value in job.head.weights.values())
    return 4 * width * job.model.lora_rank + head


def _encoder_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)


def _job(num_workers: int, steps: int) -> TrainJob:
    spend = PrivacySpend(
        num_steps=steps, sampling_prob=SAMPLING_PROB, noise_multiplier=1.0,
        num_count_releases=0, count_noise_multiplier=1.0,
    )  # fmt: skip
    batch = int(SAMPLING_PROB * NUM_USERS)
    model = ModelConfig()
    return TrainJob(
        model=model,
        train=TrainConfig(num_workers=num_workers),
        plan=PrivacyPlan(enabled=True, spend=spend, l2_clip_norm=1.0, expected_batch_users=batch),
        learning_rate=1e-3,
        head=Head.decayed_frequency(model.hidden_units),
        adapted_weights=None,
        text_of_item=np.arange(NUM_ITEMS, dtype=np.int32),
        seed=0,
    )


def _activations(model: ModelConfig) -> TokenActivations:
    """Made-up ones: what they are does not change what a step costs."""
    width = TextEncoder(model.encoder, model.max_tokens).width
    rng = np.random.default_rng(0)
    return TokenActivations(
        texts=[f"item {i}" for i in range(NUM_ITEMS)],
        hidden=rng.normal(size=(NUM_ITEMS, NUM_TOKENS, width)).astype(np.float16),
        lengths=np.full(NUM_ITEMS, NUM_TOKENS, np.int32),
    )


def _examples(num_users: int, *, seed: int) -> ExampleSet:
    rng = np.random.default_rng(seed)
    num = num_users * EXAMPLES_PER_USER
    examples = ExampleSet.empty(num, NUM_CANDIDATES)
    examples.user[:] = np.repeat(np.arange(num_users), EXAMPLES_PER_USER)
    examples.candidates[:] = rng.integers(NUM_ITEMS, size=(num, NUM_CANDIDATES))
    examples.gains[:, :6] = 3.0
    examples.weight[:] = 1.0
    examples.features[:] = rng.random((num, NUM_CANDIDATES, NUM_FEATURES))
    examples.attended[:] = rng.integers(NUM_ITEMS, size=(num, NUM_ATTENDED))
    examples.attention[:] = 1 / NUM_ATTENDED
    return examples


if __name__ == "__main__":
    main()
