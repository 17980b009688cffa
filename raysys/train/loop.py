"""What one train worker does: private steps over the users of its own shards.

    examples of its shards + previous version -> train_on_shards() -> Trained

The result is the same on all ranks. Steps run in blocks: rank 0 asks which ones, all run them, and
rank 0 keeps a checkpoint. `blocks.py` has why nothing is spent twice, `step.py` what a step is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
from peft import PeftModel

from raysys.config import Config, ModelConfig, TrainConfig
from raysys.errors import WorkersLostError
from raysys.ingest.example_set import ExampleSet
from raysys.ingest.features import FloatArray, IndexArray
from raysys.model.adapter import Adapter
from raysys.model.encoder import TextEncoder, TokenActivations
from raysys.model.merge import interpolate
from raysys.model.ranker import HeadModule, RankerModule
from raysys.model.ranks import Ranks
from raysys.model.scorer import Head
from raysys.model.tower import build_tower
from raysys.privacy.plan import PrivacyPlan
from raysys.train.batches import Batches
from raysys.train.blocks import NextSteps, uncharged
from raysys.train.checkpoint import Checkpoint, Checkpoints
from raysys.train.health import frozen_digests, require_frozen, require_moved
from raysys.train.step import Probe, Stepper

_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """What a worker needs besides its examples."""

    model: ModelConfig
    train: TrainConfig
    plan: PrivacyPlan
    learning_rate: float
    head: Head
    """Of the previous version."""
    adapted_weights: Mapping[str, FloatArray] | None
    """The previous version's matrices by module, of all that its line has changed; None before the
    first version."""
    text_of_item: IndexArray
    """(N,) index of each item's text."""
    seed: int
    """Of the adapter's random part. Another one for each update, so that deltas are not all in one
    subspace. Without privacy also of sampling, so that an update can be replayed."""

    @classmethod
    def of(
        cls,
        config: Config,
        plan: PrivacyPlan,
        *,
        head: Head,
        adapted_weights: Mapping[str, FloatArray] | None,
        text_of_item: IndexArray,
        seed: int,
    ) -> TrainJob:
        """Returns the job of an update; the first one, without `adapted_weights`, learns faster."""
        train = config.train
        first = adapted_weights is None
        return cls(
            model=config.model,
            train=train,
            plan=plan,
            learning_rate=train.bootstrap_learning_rate if first else train.learning_rate,
            head=head,
            adapted_weights=adapted_weights,
            text_of_item=text_of_item,
            seed=seed,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The new version's weights, alpha already applied."""

    head: Head
    peft_model: PeftModel | None
    """The delta on the previous version's weights, scaled by alpha; None if only the head was
    trained."""
    adapted_weights: Mapping[str, FloatArray]
    """The new version's matrices by module, of all that its line has changed."""
    adapted_modules: tuple[str, ...]
    """Names of the modules that the delta belongs to."""
    text_before: FloatArray
    """(M, d) embeddings of all texts by the previous version."""
    text_after: FloatArray
    num_users: int
    """On this worker."""
    mean_loss: float
    """Of this worker's sampled users. Sensitive: for tests, never reported."""


def train_on_shards(
    job: TrainJob,
    shards: list[ExampleSet],
    activations: TokenActivations,
    *,
    num_workers: int,
    on_step: Callable[[int], None],
    next_steps: NextSteps | None = None,
    checkpoints: Checkpoints | None = None,
    device: torch.device = _CPU,
    probe: Probe | None = None,
) -> Trained:
    """Runs all steps on this worker's users. Needs a `torch.distributed` group of `num_workers`.

    Args:
      on_step: Told how many steps are used up, after each one.
      next_steps: Says on rank 0 which steps to run next; by default all of them in one block.
      checkpoints: Where to go on from, and what is kept after each block; by default nothing is.
      device: Where steps are computed. What comes back is on the CPU.
      probe: Of an audit, which has made-up users only.

    Raises:
      PrivacyError: A trainable weight has no per-user gradient, or the loss is not by user.
      HealthError: Training changed nothing, or a weight that is frozen.
      WorkersLostError: All steps are used up and no checkpoint was kept.
    """
    torch.manual_seed(job.seed)  # the adapter's random part must be the same on all ranks
    encoder = TextEncoder(job.model.encoder, job.model.max_tokens)
    base_weights = job.adapted_weights or {}
    query_text = _embed_queries(encoder.with_weights(base_weights), shards)
    adapter = Adapter.fresh(encoder, job.model, base_weights, num_steps=job.plan.spend.num_steps)
    torch.seed()  # whatever is drawn from here on differs by rank and by run
    tower = build_tower(adapter, activations)
    # In place: the weights stay the objects that PEFT's model saves (opacus #820).
    half_tower = _is_half(job.train, device)
    module = RankerModule(tower, HeadModule(job.head), half_tower=half_tower).to(device)
    text_before = tower.embed_all().cpu()
    batches = Batches(
        shards,
        text_of_item=job.text_of_item,
        text_before=text_before,
        query_text=query_text,
        requests_per_step=job.train.requests_per_step,
        device=device,
    )
    frozen = frozen_digests([adapter.encoder.model, module])
    losses = _run_steps(
        job, module, batches, Ranks.of(adapter), num_workers=num_workers, on_step=on_step,
        next_steps=next_steps or _all_at_once(job), checkpoints=checkpoints, device=device,
        probe=probe,
    )  # fmt: skip
    require_frozen(frozen, frozen_digests([adapter.encoder.model, module]))

    adapter.finish(job.train.alpha)
    text_after = tower.embed_all().cpu().numpy()
    module.to("cpu")
    return Trained(
        head=interpolate(job.head, module.head.head(), job.train.alpha),
        peft_model=adapter.peft_model,
        adapted_weights=adapter.weights(),
        adapted_modules=adapter.modules,
        text_before=text_before.numpy(),
        text_after=text_after,
        num_users=batches.num_users,
        mean_loss=float(np.mean(losses)) if losses else float("nan"),
    )


def _run_steps(
    job: TrainJob,
    module: RankerModule,
    batches: Batches,
    ranks: Ranks,
    *,
    num_workers: int,
    on_step: Callable[[int], None],
    next_steps: NextSteps,
    checkpoints: Checkpoints | None,
    device: torch.device,
    probe: Probe | None,
) -> list[float]:
    parameters = [parameter for _, parameter in module.trainable()]
    before = [parameter.detach().clone() for parameter in parameters]
    adam = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0)
    stepper = Stepper(
        module, batches, adam, train=job.train, plan=job.plan, learning_rate=job.learning_rate,
        seed=job.seed, num_workers=num_workers, ranks=ranks, probe=probe,
    )  # fmt: skip
    is_first = torch.distributed.get_rank() == 0
    done = 0
    if checkpoints is not None:
        (done,) = _from_rank_0([checkpoints.latest() if is_first else 0], device)
        if done:
            checkpoint = checkpoints.load(done)
            checkpoint.restore(module.trainable(), adam)
            ranks.restore(checkpoint.ranks())
    while True:
        block = next_steps(done) if is_first else range(0)
        start, stop = _from_rank_0([block.start, block.stop], device)
        if start >= stop:
            break
        for step in range(start, stop):
            stepper.run(step)
            on_step(step + 1)
        done = stop
        if checkpoints is not None and is_first:
            checkpoints.save(Checkpoint.of(done, module.trainable(), adam, ranks.state()))
    if done == 0:
        raise WorkersLostError(
            f"train workers died before the first checkpoint and {job.plan.spend.num_steps} steps "
            "are used up, so nothing was learned; submit again with a smaller "
            f"train.checkpoint_steps (now {job.train.checkpoint_steps})"
        )
    require_moved(module.trainable(), before, adam, emptied=ranks.emptied())
    return stepper.losses


def _all_at_once(job: TrainJob) -> NextSteps:
    num_steps = job.plan.spend.num_steps
    return uncharged(num_steps=num_steps, size=num_steps)


def _from_rank_0(values: list[int], device: torch.device) -> list[int]:
    """Returns what rank 0 says; if it fails, Ray Train ends those that wait for it."""
    told = torch.tensor(values, dtype=torch.int64, device=device)
    torch.distributed.broadcast(told, src=0)
    return [int(value) for value in told.tolist()]


def _is_half(train: TrainConfig, device: torch.device) -> bool:
    return train.precision == "bf16" or (train.precision == "auto" and device.type == "cuda")


def _embed_queries(encoder: TextEncoder, shards: list[ExampleSet]) -> dict[str, torch.Tensor]:
    queries = sorted({query for shard in shards for query in shard.queries if query})
    if not queries:
        return {}
    return dict(zip(queries, torch.from_numpy(encoder.embed(queries)), strict=True))
