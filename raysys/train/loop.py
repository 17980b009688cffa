"""What one train worker does: private steps over the users of its own shards.

    examples of its shards + previous version -> train_on_shards() -> Trained

The result is the same on all ranks. A step: sample users (Poisson), one request of each at random,
forward, backward (per-user gradients), clip each user, sum over workers, noise once, AdamW. Empty
steps are taken like all others, so ranks stay in step and every step is charged as planned.

Shape suffixes: U = users of a microbatch, R = requests of a user, K = candidates, A = attended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from peft import PeftModel
from torch.nn.functional import normalize

from raysys.config import Config, ModelConfig, TrainConfig
from raysys.errors import PrivacyError
from raysys.ingest.example_set import ExampleSet
from raysys.ingest.features import FloatArray, IndexArray
from raysys.model.encoder import TextEncoder, TokenActivations
from raysys.model.losses import LOSSES
from raysys.model.merge import interpolate, merge_lora
from raysys.model.ranker import HeadModule, RankerModule
from raysys.model.scorer import Head
from raysys.model.text_tower import TextTower, add_lora, lora_layer
from raysys.privacy.clipping import require_per_user_gradients, set_empty_gradients
from raysys.privacy.plan import PrivacyPlan


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """What a worker needs besides its examples."""

    model: ModelConfig
    train: TrainConfig
    plan: PrivacyPlan
    learning_rate: float
    head: Head
    """Of the previous version."""
    adapted_weight: FloatArray | None
    """The previous version's output projection, (d, h); None before the first version."""
    text_of_item: IndexArray
    """(N,) index of each item's text."""
    seed: int
    """Of LoRA's A. Another one for each update, so that deltas are not all in one subspace. Without
    privacy also of sampling, so that an update can be replayed."""

    @classmethod
    def of(
        cls,
        config: Config,
        plan: PrivacyPlan,
        *,
        head: Head,
        adapted_weight: FloatArray | None,
        text_of_item: IndexArray,
        seed: int,
    ) -> TrainJob:
        """Returns the job of an update; the first one, without `adapted_weight`, learns faster."""
        train = config.train
        first = adapted_weight is None
        return cls(
            model=config.model,
            train=train,
            plan=plan,
            learning_rate=train.bootstrap_learning_rate if first else train.learning_rate,
            head=head,
            adapted_weight=adapted_weight,
            text_of_item=text_of_item,
            seed=seed,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The new version's weights, alpha already applied."""

    head: Head
    peft_model: PeftModel
    """The delta: `base_layer` is the previous version's, LoRA's B is scaled by alpha."""
    merged_weight: FloatArray
    """(d, h) the new output projection."""
    text_before: FloatArray
    """(M, d) embeddings of all texts by the previous version."""
    text_after: FloatArray
    num_users: int
    """On this worker."""
    mean_loss: float
    """Of this worker's sampled users. Sensitive: for tests, never reported."""


class Probe(Protocol):
    """What an audit does within each step: `train.canaries`."""

    def before_clip(
        self, users: NDArray[np.int64], parameters: Sequence[torch.nn.Parameter]
    ) -> None:
        """Sees, and may replace, the gradients `grad_sample` (U, ...) of these users (U,)."""

    def after_noise(self, optimizer: DPOptimizer) -> None:
        """Sees what one step releases: `grad` of the optimizer's parameters."""


def train_on_shards(
    job: TrainJob,
    shards: list[ExampleSet],
    activations: TokenActivations,
    *,
    num_workers: int,
    on_step: Callable[[int], None],
    probe: Probe | None = None,
) -> Trained:
    """Runs all steps on this worker's users. Needs a `torch.distributed` group of `num_workers`.

    Args:
      probe: Of an audit, which has made-up users only.

    Raises:
      PrivacyError: A trainable weight has no per-user gradient, or training changed nothing.
    """
    torch.manual_seed(job.seed)  # LoRA's A must be the same on all ranks
    encoder = TextEncoder(job.model.encoder, job.model.max_tokens)
    query_text = _embed_queries(encoder, shards, job.adapted_weight)
    peft_model = add_lora(encoder, job.model)
    dense = lora_layer(peft_model)
    if job.adapted_weight is not None:
        dense.base_layer.weight.data = torch.from_numpy(job.adapted_weight.copy())
    torch.seed()  # whatever is drawn from here on differs by rank and by run
    rng = job.plan.rng(job.seed, torch.distributed.get_rank())
    tower = TextTower(peft_model, activations, train_lora_a=job.model.train_lora_a)
    module = RankerModule(tower, HeadModule(job.head))
    text_before = tower.embed_all()
    batches = _Batches(shards, job, text_before, query_text, rng)
    losses = _run_steps(
        job, module, batches, rng, num_workers=num_workers, on_step=on_step, probe=probe
    )

    with torch.no_grad():
        tower.lora_b.mul_(job.train.alpha)
    return Trained(
        head=interpolate(job.head, module.head.head(), job.train.alpha),
        peft_model=peft_model,
        merged_weight=merge_lora(
            dense.base_layer.weight, tower.lora_a, tower.lora_b, tower.scaling
        ),
        text_before=text_before.numpy(),
        text_after=tower.embed_all().numpy(),
        num_users=batches.num_users,
        mean_loss=float(np.mean(losses)) if losses else float("nan"),
    )


def _run_steps(
    job: TrainJob,
    module: RankerModule,
    batches: _Batches,
    rng: np.random.Generator,
    *,
    num_workers: int,
    on_step: Callable[[int], None],
    probe: Probe | None,
) -> list[float]:
    names, parameters = zip(*module.trainable(), strict=True)
    before = [parameter.detach().clone() for parameter in parameters]
    adam = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0)
    num_steps = job.plan.spend.num_steps
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: max(1 - step / num_steps, 0))
    optimizer = job.plan.optimizer(adam, num_workers=num_workers)
    if probe is not None:
        optimizer.attach_step_hook(probe.after_noise)
    losses: list[float] = []
    for step, users in enumerate(job.plan.sampler(batches.num_users, rng)):
        parts = np.array_split(users, max(-(-len(users) // job.train.microbatch_users), 1))
        for i, part in enumerate(parts):
            optimizer.zero_grad(set_to_none=True)
            if len(part):
                losses.extend(_backward(module, batches.take(part), job.train.loss))
                if probe is not None:
                    probe.before_clip(part, parameters)
                require_per_user_gradients(zip(names, parameters, strict=True), len(part))
            else:
                set_empty_gradients(parameters)
            # Opacus clips and sums every part, and adds noise and steps with the last one only.
            optimizer.signal_skip_step(do_skip=i < len(parts) - 1)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay.step()
        on_step(step + 1)
    _require_moved(module, before, adam)
    return losses


def _backward(module: RankerModule, batch: dict[str, torch.Tensor], loss_name: str) -> list[float]:
    labels = {name: batch.pop(name) for name in ("gains", "weight", "log_q", "valid")}
    loss = LOSSES[loss_name](module(**batch), **labels)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    return list(loss.detach().tolist())


def _require_moved(
    module: RankerModule, before: list[torch.Tensor], adam: torch.optim.Optimizer
) -> None:
    """Some stacks report loss and epsilon while nothing is trained (opacus #820).

    What nothing ever pulled at may stay as it was. Noise pulls at everything; without it LoRA has
    no gradient where no user has a history yet.
    """
    moved = {}
    for (name, parameter), old in zip(module.trainable(), before, strict=True):
        pulled = adam.state[parameter]["exp_avg_sq"].any() if parameter in adam.state else True
        moved[name] = not torch.equal(parameter, old)
        if not torch.isfinite(parameter).all() or (pulled and not moved[name]):
            raise PrivacyError(
                f"training left {name} unchanged, or not finite: the optimizer does not hold the "
                "weights that the model computes with, or the learning rate is out of bounds"
            )
    if not any(moved.values()):
        raise PrivacyError("training changed nothing: no sampled user had a loss")


class _Batches:
    """Random access to a worker's examples by user."""

    def __init__(
        self,
        shards: list[ExampleSet],
        job: TrainJob,
        text_before: torch.Tensor,
        query_text: dict[str, torch.Tensor],
        rng: np.random.Generator,
    ) -> None:
        self._shards, self._text = shards, text_before
        self._text_of_item = job.text_of_item
        self._requests_per_step = job.train.requests_per_step
        self._rows = list(_rows_of_users(shards))
        self._rng = rng
        self._query_text = query_text

    @property
    def num_users(self) -> int:
        return len(self._rows)

    def take(self, users: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Returns one random choice of requests for each user: the arguments of a forward pass."""
        rows = [self._choose(user) for user in users]  # (U,) of (shard, rows)
        num_requests = max(len(chosen) for _, chosen in rows)
        fields = {
            name: np.stack(
                [_padded(getattr(self._shards[s], name)[r], num_requests) for s, r in rows]
            )
            for name in (
                "candidates", "gains", "weight", "log_q", "features", "attended", "attention",
            )
        }  # fmt: skip
        # A padded request repeats the first one, with no candidate and hence no loss or gradient.
        for user, (_, chosen) in enumerate(rows):
            fields["candidates"][user, len(chosen) :] = -1
            fields["gains"][user, len(chosen) :] = 0.0
        candidates = fields["candidates"]
        text_index = torch.from_numpy(self._text_of_item[candidates].astype(np.int64))
        return {
            "features": torch.from_numpy(fields["features"]),
            "text_index": text_index,
            "history_text": self._history_text(fields["attended"], fields["attention"]),
            "query_text": self._query_texts(rows, num_requests),
            "gains": torch.from_numpy(fields["gains"]),
            "weight": torch.from_numpy(fields["weight"]),
            "log_q": torch.from_numpy(fields["log_q"]),
            "valid": torch.from_numpy(candidates >= 0),
        }

    def _choose(self, user: np.int64) -> tuple[int, NDArray[np.int64]]:
        shard, rows = self._rows[user]
        return shard, self._rng.permutation(rows)[: self._requests_per_step]

    def _history_text(self, attended: IndexArray, attention: FloatArray) -> torch.Tensor:
        index = torch.from_numpy(self._text_of_item[attended].astype(np.int64))
        pooled = torch.einsum("ura,urad->urd", torch.from_numpy(attention), self._text[index])
        return normalize(pooled, dim=-1)

    def _query_texts(
        self, rows: list[tuple[int, NDArray[np.int64]]], num_requests: int
    ) -> torch.Tensor:
        out = torch.zeros(len(rows), num_requests, self._text.shape[1])
        for user, (shard, chosen) in enumerate(rows):
            for place, row in enumerate(chosen):
                query = self._shards[shard].queries[row]
                if query:
                    out[user, place] = self._query_text[query]
        return out


def _embed_queries(
    encoder: TextEncoder, shards: list[ExampleSet], adapted_weight: FloatArray | None
) -> dict[str, torch.Tensor]:
    queries = sorted({query for shard in shards for query in shard.queries if query})
    if not queries:
        return {}
    return dict(zip(queries, torch.from_numpy(encoder.embed(queries, adapted_weight)), strict=True))


def _rows_of_users(shards: list[ExampleSet]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    for index, shard in enumerate(shards):
        starts = np.flatnonzero(np.diff(shard.user, prepend=-1))
        for rows in np.split(np.arange(len(shard.user)), starts[1:]) if len(starts) else []:
            yield index, rows


def _padded(rows: NDArray[Any], num: int) -> NDArray[Any]:
    return (
        rows
        if len(rows) == num
        else np.concatenate([rows, np.repeat(rows[:1], num - len(rows), 0)])
    )
