"""Per-user gradients are those of ordinary autograd, and one user moves a step by the clip norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, normalize

from raysys.errors import PrivacyError
from raysys.model.adapter import Adapter
from raysys.model.encoder import TextEncoder, TokenActivations
from raysys.model.losses import listwise_loss
from raysys.model.ranker import HeadModule, RankerModule
from raysys.model.scorer import NUM_INPUTS
from raysys.model.text_tower import TextTower
from raysys.model.tower import build_tower
from raysys.privacy.clipping import (
    per_user_linear,
    require_per_user_gradients,
    set_empty_gradients,
)
from tests import tiny_shop
from tests.two_workers import gradients_of_users, step_gradient

USERS, REQUESTS, CANDIDATES = 5, 3, 7
CLIP = tiny_shop.plan().l2_clip_norm
QUIET = tiny_shop.plan(noise_multiplier=0.0, expected_batch_users=1)

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Batch = dict[str, torch.Tensor]
Gradients = dict[str, torch.Tensor]
LABELS = ("gains", "weight", "log_q", "valid")


class Ranker:
    """A ranker in which every weight matters, and the same function in ordinary PyTorch."""

    def __init__(self, encoder_name: str, *, train_lora_a: bool) -> None:
        encoder = TextEncoder(encoder_name, 8)
        self.activations: TokenActivations = encoder.activations(tiny_shop.distinct_texts())
        config = tiny_shop.model_config(encoder_name, train_lora_a=train_lora_a)
        adapter = Adapter.fresh(encoder, config, {}, num_steps=1)
        self.layer: Any = adapter.encoder.model.encoder.layer[-1]
        tower = build_tower(adapter, self.activations)
        assert isinstance(tower, TextTower)
        with torch.no_grad():
            tower.lora_b.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
        self.module = RankerModule(tower, HeadModule(tiny_shop.random_head()))

    def per_user_gradients(self, batch: Batch, scale: torch.Tensor) -> Gradients:
        """One backward pass of the engine: name -> (U, ...)."""
        for _, parameter in self.module.trainable():
            parameter.grad_sample = None  # type: ignore[attr-defined]
        inputs = {k: v for k, v in batch.items() if k not in LABELS}
        loss = listwise_loss(self.module(**inputs), **{k: batch[k] for k in LABELS})
        self.module.backward(loss * scale)
        return {name: p.grad_sample for name, p in self.module.trainable()}  # type: ignore[attr-defined]

    def gradients_one_by_one(self, batch: Batch, scale: torch.Tensor) -> Gradients:
        """One ordinary backward pass for each user, through PEFT's own layers."""
        names, parameters = zip(*self.module.trainable(), strict=True)
        rows = []
        for user in range(len(scale)):
            one = {name: value[user : user + 1] for name, value in batch.items()}
            loss = listwise_loss(self._scores(one), **{name: one[name] for name in LABELS})
            rows.append(torch.autograd.grad((loss * scale[user]).sum(), parameters))
        return {
            name: torch.stack(g) for name, g in zip(names, zip(*rows, strict=True), strict=True)
        }

    def _scores(self, batch: Batch) -> torch.Tensor:
        text = self._text()[batch["text_index"]]
        sides = [batch["history_text"], batch["query_text"]]
        cosines = [(text * side[:, :, None]).sum(-1, keepdim=True) for side in sides]
        has_query = (
            torch.ones_like(cosines[0]) * (batch["query_text"] != 0).any(-1)[..., None, None]
        )
        inputs = torch.cat([batch["features"], *cosines, has_query], -1)
        head = self.module.head
        hidden = inputs
        for name in ("first", "second"):
            hidden = torch.relu(_ordinary(head, name, hidden))
        return (_ordinary(head, "last", hidden) + _ordinary(head, "skip", inputs))[..., 0]

    def _text(self) -> torch.Tensor:
        hidden = torch.from_numpy(self.activations.hidden).float()
        mask = torch.arange(hidden.shape[1]) < torch.from_numpy(self.activations.lengths)[:, None]
        out = self.layer.output(self.layer.intermediate(hidden), hidden)
        return normalize((out * mask[..., None]).sum(1), dim=-1)


def _ordinary(head: HeadModule, name: str, x: torch.Tensor) -> torch.Tensor:
    layer = head.get_submodule(name)
    assert isinstance(layer, torch.nn.Linear)
    return linear(x, layer.weight, layer.bias)


def make_batch(num_texts: int, *, seed: int = 0) -> Batch:
    """Users with padded candidates; the last one has a padded request, and no query."""
    generator = torch.Generator().manual_seed(seed)
    shape = (USERS, REQUESTS, CANDIDATES)
    texts = normalize(torch.randn(USERS, REQUESTS, 2, 16, generator=generator), dim=-1)
    gains = torch.zeros(shape)
    gains[..., :2] = torch.tensor([3.0, 1.0])
    valid = torch.ones(shape, dtype=torch.bool)
    valid[1:, :, -2:] = False
    gains[-1, -1] = 0.0
    texts[-1, :, 1] = 0.0
    return {
        "features": torch.randn(*shape, NUM_INPUTS - 3, generator=generator),
        "text_index": torch.randint(num_texts, shape, generator=generator),
        "history_text": texts[:, :, 0],
        "query_text": texts[:, :, 1],
        "gains": gains,
        "weight": torch.rand(shape, generator=generator) + 0.5,
        "log_q": torch.randn(shape, generator=generator) - 3,
        "valid": valid,
    }


def worst_error(found: Gradients, expected: Gradients) -> float:
    """Largest relative error over parameters and users."""
    assert found.keys() == expected.keys()
    return max(
        float(((found[k] - e).flatten(1).norm(dim=1) / e.flatten(1).norm(dim=1)).max())
        for k, e in expected.items()
    )


@pytest.fixture(
    params=[False, True], ids=["head and LoRA B in closed form", "head and LoRA A and B"]
)
def ranker(request: pytest.FixtureRequest, tiny_encoder: str) -> Ranker:
    return Ranker(tiny_encoder, train_lora_a=request.param)


def test_per_user_gradients_are_those_of_one_backward_pass_a_user(ranker: Ranker) -> None:
    batch, ones = make_batch(len(ranker.activations.texts)), torch.ones(USERS)
    found = ranker.per_user_gradients(batch, ones)
    expected = ranker.gradients_one_by_one(batch, ones)
    trained_lora = {"tower.lora_b"} | (
        {"tower.lora_a"} if ranker.module.tower.lora_a.requires_grad else set()
    )
    assert {name for name in found if name.startswith("tower")} == trained_lora
    assert len(found) == len(trained_lora) + 6
    assert all(float(e.flatten(1).norm(dim=1).min()) > 0 for e in expected.values())
    assert worst_error(found, expected) < 1e-5


def _first_row_only(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    keep = torch.zeros(x.shape[1], *[1] * (x.dim() - 2))
    keep[0] = 1
    return per_user_linear(x * keep + (x * (1 - keep)).detach(), weight, bias)


def _mean_over_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    out = per_user_linear(x, weight, bias)
    num_rows = x[0, ..., 0].numel()
    return out / num_rows + (out * (1 - 1 / num_rows)).detach()


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(_first_row_only, id="input gradients of a user's first request only"),
        pytest.param(_mean_over_rows, id="the mean of a user's rows instead of their sum"),
    ],
)
def test_the_comparison_notices_a_broken_engine(
    ranker: Ranker, broken: Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysys.model.ranker.per_user_linear", broken)
    batch, ones = make_batch(len(ranker.activations.texts)), torch.ones(USERS)
    found = ranker.per_user_gradients(batch, ones)
    assert worst_error(found, ranker.gradients_one_by_one(batch, ones)) > 1e-2


def test_a_user_whose_requests_are_all_padding_has_no_gradient(ranker: Ranker) -> None:
    batch = make_batch(len(ranker.activations.texts))
    batch["gains"][2] = 0.0
    batch["valid"][2] = False
    found = ranker.per_user_gradients(batch, torch.ones(USERS))
    assert all(not gradient[2].any() and gradient[1].any() for gradient in found.values())


def test_a_parameter_used_twice_gets_the_sum_of_both_uses() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 6, generator=generator) / 3)
    x = torch.randn(4, 5, 6, generator=generator)
    hidden = torch.tanh(per_user_linear(x, weight))
    per_user_linear(hidden, weight).square().sum().backward()
    expected = []
    for user in x:
        (gradient,) = torch.autograd.grad(
            linear(torch.tanh(linear(user, weight)), weight).square().sum(), weight
        )
        expected.append(gradient)
    found: torch.Tensor = weight.grad_sample  # type: ignore[attr-defined]
    assert worst_error({"w": found}, {"w": torch.stack(expected)}) < 1e-5

    last_use_only = torch.bmm((2 * linear(hidden, weight)).transpose(1, 2), hidden)
    assert worst_error({"w": last_use_only.detach()}, {"w": torch.stack(expected)}) > 1e-2


def _flat(gradients: Gradients) -> torch.Tensor:
    """Per-user gradients of all parameters side by side, (U, n)."""
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1).detach()


def _without(rows: torch.Tensor, user: int) -> torch.Tensor:
    return torch.cat([rows[:user], rows[user + 1 :]])


def _clipped_sum(rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(step_gradient(QUIET, rows, num_workers=1))


def test_an_outlier_user_moves_the_step_by_no_more_than_the_clip_norm(
    ranker: Ranker, world: None
) -> None:
    scale = torch.ones(USERS)
    scale[3] = 1e4
    batch = make_batch(len(ranker.activations.texts))
    rows = _flat(ranker.per_user_gradients(batch, scale))
    assert float(rows[3].norm()) > 1e3, "the outlier would dominate the step"
    total = _clipped_sum(rows)
    assert float(total.norm()) <= USERS * CLIP
    for user in range(USERS):
        moved = float((total - _clipped_sum(_without(rows, user))).norm())
        assert moved <= CLIP * (1 + 1e-6)

    unclipped = rows.sum(0)
    assert float(unclipped.norm()) > USERS * CLIP


def test_clipping_rows_instead_of_users_breaks_the_bound_and_is_refused(
    ranker: Ranker, world: None
) -> None:
    """The trap: whole users are sampled, so a user of several clipped rows is not bounded."""
    batch = make_batch(len(ranker.activations.texts))
    batch["features"][0, 1:] = batch["features"][0, :1]
    batch["text_index"][0, 1:] = batch["text_index"][0, :1]
    by_row = {name: value.flatten(0, 1)[:, None].contiguous() for name, value in batch.items()}
    rows = _flat(ranker.per_user_gradients(by_row, torch.full((USERS * REQUESTS,), 1e4)))
    without_user_0 = rows[REQUESTS:]
    moved = float((_clipped_sum(rows) - _clipped_sum(without_user_0)).norm())
    assert moved > 1.5 * CLIP
    with pytest.raises(PrivacyError, match="expected per-user gradients of shape"):
        require_per_user_gradients(ranker.module.trainable(), USERS)


@settings(max_examples=40, deadline=None)
@given(
    num_users=st.integers(1, 6),
    exponents=st.lists(st.floats(-6, 8), min_size=6, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_no_user_of_any_scale_moves_a_step_by_more_than_the_clip_norm(
    world: None, num_users: int, exponents: list[float], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.tensor(exponents[:num_users])
    rows = torch.randn(num_users, 30, generator=generator) * scale[:, None]
    total = _clipped_sum(rows)
    for user in range(num_users):
        moved = float((total - _clipped_sum(_without(rows, user))).norm())
        assert moved <= CLIP * (1 + 1e-6)


def test_microbatches_of_users_give_the_same_sum_as_one_batch(world: None) -> None:
    rows = gradients_of_users()
    parameter = torch.nn.Parameter(torch.zeros(rows.shape[1]))
    optimizer = QUIET.optimizer(torch.optim.SGD([parameter], lr=1.0), num_workers=1)
    for start in (0, 3, 6, 9):
        optimizer.zero_grad(set_to_none=True)
        parameter.grad_sample = rows[start : start + 3].clone()  # type: ignore[attr-defined]
        optimizer.signal_skip_step(do_skip=start < 9)
        optimizer.step()
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, _clipped_sum(rows), rtol=0, atol=1e-6)
    only_the_last = _clipped_sum(rows[9:])
    assert not torch.allclose(parameter.grad, only_the_last, rtol=0, atol=1e-3)


def _beside_the_engine(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear(x, weight)


def _both_ways(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear(per_user_linear(x, weight), weight)


def _summed_over_users(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return per_user_linear(x.flatten(0, 1)[None], weight)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        pytest.param(_beside_the_engine, "odd.weight: .* found none", id="ordinary layer"),
        pytest.param(_both_ways, "odd.weight: has a gradient that no clip bounds", id="both ways"),
        pytest.param(_summed_over_users, r"odd.weight: .* found \(1, 4, 4\)", id="users mixed"),
    ],
)
def test_a_parameter_that_bypasses_the_engine_is_refused(
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], message: str
) -> None:
    weight = torch.nn.Parameter(torch.eye(4))
    forward(torch.ones(3, 2, 4), weight).sum().backward()
    with pytest.raises(PrivacyError, match=message):
        require_per_user_gradients([("odd.weight", weight)], 3)


def test_a_parameter_that_the_loss_never_reaches_is_refused() -> None:
    with pytest.raises(PrivacyError, match="found none; train it through per_user_linear"):
        require_per_user_gradients([("unused", torch.nn.Parameter(torch.ones(2)))], 3)


def test_a_frozen_parameter_gets_no_gradient_of_any_kind() -> None:
    weight = torch.nn.Parameter(torch.eye(4), requires_grad=False)
    bias = torch.nn.Parameter(torch.zeros(4))
    per_user_linear(torch.ones(3, 2, 4), weight, bias).sum().backward()
    assert not hasattr(weight, "grad_sample") and weight.grad is None
    assert bias.grad_sample.tolist() == [[2.0] * 4] * 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "shape", [(3, 4), (3, 2, 4), (3, 2, 5, 4), (3, 1, 2, 1, 4)], ids=lambda shape: f"{len(shape)}-D"
)
def test_rows_of_any_number_of_axes_are_summed_by_user(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(5, 4, generator=generator))
    x = torch.randn(shape, generator=generator)
    out = per_user_linear(x, weight)
    torch.testing.assert_close(out, linear(x, weight))
    out.square().sum().backward()
    for user, found in enumerate(weight.grad_sample):  # type: ignore[attr-defined]
        (expected,) = torch.autograd.grad(linear(x[user], weight).square().sum(), weight)
        torch.testing.assert_close(found, expected)


def test_a_step_of_no_user_has_gradients_of_no_user() -> None:
    weight = torch.nn.Parameter(torch.eye(4))
    set_empty_gradients([weight])
    require_per_user_gradients([("w", weight)], 0)
    assert weight.grad_sample.shape == (0, 4, 4)  # type: ignore[attr-defined]
