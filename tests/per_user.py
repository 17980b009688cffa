"""A tiny text scorer for tests of per-user gradients, and the loop that they must agree with.

make_scorer("LoRA") -> Scorer, make_batch() -> by_engine(…) == one_by_one(…)
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from raysys.privacy.clipping import PerUserGradients
from raysys.privacy.optimizer import PerUserOptimizer

Gradients = dict[str, torch.Tensor]
USERS = 5
USER_OF_ROW = torch.tensor([3, 0, 0, 1, 3, 4, 3, 0, 2])
"""Nine rows in no order: users 0 and 3 have three, the others one."""
LINEAR = r".*layer.*(query|key|value|dense)"


class Scorer(torch.nn.Module):
    """An encoder of width 16 with a trainable part, and a linear head, (N, T) ids -> (N,)."""

    def __init__(self, encoder: torch.nn.Module, *, train_head: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(16, 1).requires_grad_(train_head)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.encoder(input_ids=ids).last_hidden_state
        return self.head(hidden.tanh().mean(1))[:, 0]  # type: ignore[no-any-return]


class Halved(torch.nn.Module):
    """In place of a dropout, which no second pass can repeat."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x


def _bert() -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16, initializer_range=0.2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


def _lora(**changes: Any) -> torch.nn.Module:
    options: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["query", "value"]}
    return get_peft_model(_bert(), LoraConfig(**(options | changes)))


def _ffa() -> torch.nn.Module:
    model = _lora(target_modules=LINEAR)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def _dropout() -> torch.nn.Module:
    model = _lora(lora_dropout=0.5)
    for layer in model.modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"] = Halved()
    return model


def _adalora(**changes: Any) -> torch.nn.Module:
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=20, tinit=2, tfinal=4, deltaT=2, lora_alpha=8,
        target_modules=["query", "value"], **changes,
    )  # fmt: skip
    return get_peft_model(_bert(), config)


def _all_biases() -> torch.nn.Module:
    model = _lora(bias="all")
    for name, parameter in model.named_parameters():
        if "key.bias" in name:  # softmax does not see it: its gradient is rounding errors
            parameter.requires_grad_(False)
    return model


def _only(part: str) -> torch.nn.Module:
    model = _bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    return model


ADAPTERS: dict[str, Callable[[], torch.nn.Module]] = {
    "LoRA": _lora,
    "LoRA on all, rank-stabilised": lambda: _lora(target_modules=LINEAR, use_rslora=True, r=4),
    "LoRA of rank 1": lambda: _lora(r=1),
    "LoRA of rank 12": lambda: _lora(r=12),
    "LoRA with dropout": _dropout,
    "LoRA with a bias of its own": lambda: _lora(lora_bias=True),
    "LoRA and all biases": _all_biases,
    "LoRA and its layers' biases": lambda: _lora(bias="lora_only"),
    "FFA-LoRA": _ffa,
    "AdaLoRA": _adalora,
    "AdaLoRA and biases": lambda: _adalora(bias="lora_only"),
    "LayerNorm": lambda: _only("LayerNorm"),
    "Linear": lambda: _only("intermediate.dense"),
    "bias": lambda: _only("dense.bias"),
    "nothing but the head": lambda: _only("nothing"),
}


def make_scorer(adapter: str, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Scorer:
    """Returns a scorer in which every trained weight has a gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Scorer(ADAPTERS[adapter](), train_head=True)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def make_batch(num_rows: int = len(USER_OF_ROW), *, seed: int = 1) -> torch.Tensor:
    """Returns token ids (N, 6)."""
    return torch.randint(40, (num_rows, 6), generator=torch.Generator().manual_seed(seed))


def listwise(scores: torch.Tensor, user_of_row: torch.Tensor, num_users: int) -> torch.Tensor:
    """Returns losses (U,): a user's rows compete with each other, and with a score of zero."""
    rows = [scores[user_of_row == user] for user in range(num_users)]
    zero = scores.new_zeros(1)
    return torch.stack([torch.cat([row, zero]).logsumexp(0) - 0.3 * row.sum() for row in rows])


def by_engine(
    module: Scorer,
    ids: torch.Tensor,
    user_of_row: torch.Tensor = USER_OF_ROW,
    num_users: int = USERS,
    scale: torch.Tensor | float = 1.0,
    *,
    keep_factors: bool = False,
) -> Gradients:
    """Returns the engine's per-user gradients (U, ...), and leaves them on the parameters."""
    with PerUserGradients(module, keep_factors=keep_factors) as engine:
        with engine.rows(user_of_row, num_users):
            scores = module(ids)
        engine.backward(listwise(scores, user_of_row, num_users) * scale)
    return samples(module)


def samples(module: torch.nn.Module) -> Gradients:
    return {n: p.grad_sample for n, p in module.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]


def one_by_one(
    module: Scorer,
    ids: torch.Tensor,
    user_of_row: torch.Tensor = USER_OF_ROW,
    num_users: int = USERS,
    scale: torch.Tensor | float = 1.0,
) -> Gradients:
    """One ordinary backward pass for each user's rows, through an unmodified copy."""
    scales = torch.as_tensor(scale).expand(num_users)

    def loss(model: Scorer, user: int) -> torch.Tensor:
        scores = model(ids[user_of_row == user])
        return scales[user] * listwise(scores, torch.zeros(len(scores), dtype=torch.int64), 1)[0]

    return loop_over_users(module, loss, num_users)


def loop_over_users(
    module: Any, loss: Callable[[Any, int], torch.Tensor], num_users: int
) -> Gradients:
    """Returns (U, ...) of `loss(copy of the module, user)`, by ordinary autograd."""
    plain = copy.deepcopy(module)
    assert not any("forward" in layer.__dict__ for layer in plain.modules())
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    rows = []
    for user in range(num_users):
        found = torch.autograd.grad(loss(plain, user), list(trained.values()), allow_unused=True)
        pairs = zip(found, trained.values(), strict=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in pairs])
    return {n: torch.stack(g) for n, g in zip(trained, zip(*rows, strict=True), strict=True)}


def worst_error(found: Gradients, expected: Gradients) -> float:
    """Largest relative error over parameters and users; infinite where nothing was expected."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        want, got = want.flatten(1).double(), found[name].flatten(1).double()
        off, size = (got - want).norm(dim=1), want.norm(dim=1)
        worst = max(worst, float(torch.where(off == 0, 0, off / size).max()))
    return worst


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """One step without noise: what the inner optimizer is given."""

    norm: float

    def total(self, module: torch.nn.Module) -> torch.Tensor:
        """Returns the clipped sum of the `grad_sample` that is there, as one vector."""
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = PerUserOptimizer(
            torch.optim.SGD(trained, lr=0.0), noise_multiplier=0.0, max_grad_norm=self.norm,
            expected_batch_size=1,
        )  # fmt: skip
        optimizer.step()
        total = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        optimizer.zero_grad(set_to_none=True)
        return total
