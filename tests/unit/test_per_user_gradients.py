"""The engine's per-user gradients are those of a loop of single-user backward passes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from raysys.privacy.clipping import PerUserGradients, UserRows, per_user_linear
from tests.per_user import (
    ADAPTERS,
    USER_OF_ROW,
    USERS,
    Scorer,
    by_engine,
    listwise,
    loop_over_users,
    make_batch,
    make_scorer,
    one_by_one,
    samples,
    worst_error,
)
from tests.two_workers import ENGINE_ADAPTERS, rows_of_rank

TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 0.1
"""Activations have 8 bits, and rounding differs with the number of rows in a product."""


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_per_user_gradients_are_those_of_one_backward_pass_a_user(
    adapter: str, dtype: torch.dtype
) -> None:
    module, ids = make_scorer(adapter, dtype), make_batch()
    expected = one_by_one(module, ids)
    assert all(float(e.flatten(1).norm(dim=1).min()) > 0 for e in expected.values())
    found = by_engine(module, ids)
    assert {found[name].dtype for name in found} == {dtype}
    assert worst_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("adapter", ["LoRA", "FFA-LoRA", "AdaLoRA", "LayerNorm", "Linear", "bias"])
def test_in_bfloat16_they_are_summed_in_float32_and_as_good_as_autograds(adapter: str) -> None:
    module, ids = make_scorer(adapter, torch.bfloat16), make_batch()
    exact = one_by_one(copy.deepcopy(module).double(), ids)
    found = by_engine(module, ids)
    assert {sample.dtype for sample in found.values()} == {torch.float32}
    error = worst_error(_joined(found), _joined(exact))
    assert error < BFLOAT16_TOLERANCE
    assert error < 2 * worst_error(_joined(one_by_one(module, ids)), _joined(exact))


def _joined(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"all": torch.cat([g.flatten(1).double() for g in gradients.values()], 1)}


def test_a_float32_adapter_on_a_bfloat16_base_works_as_peft_computes_it() -> None:
    module, ids = make_scorer("LoRA", torch.bfloat16), make_batch()
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dim() == 2 and parameter.shape[0] != 1:
            parameter.data = parameter.data.float()
    expected = one_by_one(module, ids)
    found = by_engine(module, ids)
    assert worst_error(_joined(found), _joined(expected)) < BFLOAT16_TOLERANCE


def test_under_autocast_gradients_are_per_user_and_in_float32() -> None:
    module, ids = make_scorer("LoRA"), make_batch()
    expected = one_by_one(module, ids)
    with PerUserGradients(module) as engine:
        with torch.autocast("cpu", torch.bfloat16), engine.rows(USER_OF_ROW, USERS):
            scores = module(ids)
        engine.backward(listwise(scores.float(), USER_OF_ROW, USERS))
    found = samples(module)
    assert {sample.dtype for sample in found.values()} == {torch.float32}
    error = worst_error(_joined(found), _joined(expected))
    assert TOLERANCE < error < BFLOAT16_TOLERANCE, "autocast must have been in force"


def _mix_two_users(monkeypatch: pytest.MonkeyPatch) -> None:
    outer = UserRows.outer

    def mixed(self: UserRows, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        out = outer(self, left, right)
        out[[0, 1]] = out[[0, 1]].mean(0)
        return out

    monkeypatch.setattr(UserRows, "outer", mixed)


def _one_row_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    outer = UserRows.outer

    def first_rows(self: UserRows, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        keep = torch.zeros(len(left))
        keep[[int((user == USER_OF_ROW).nonzero()[0]) for user in range(USERS)]] = 1
        return outer(self, left * keep[:, None, None], right)

    monkeypatch.setattr(UserRows, "outer", first_rows)


@pytest.mark.parametrize("broken", [_mix_two_users, _one_row_a_user])
def test_an_engine_that_mixes_users_or_forgets_rows_fails_the_same_check(
    broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ids = make_scorer("LoRA"), make_batch()
    expected = one_by_one(module, ids)
    broken(monkeypatch)
    assert worst_error(by_engine(module, ids), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("adapter", ENGINE_ADAPTERS)
def test_two_workers_have_the_gradients_of_their_own_users(
    two_workers: list[dict[str, Any]], adapter: str, rank: int
) -> None:
    ids, user_of_row = rows_of_rank(rank)
    expected = one_by_one(make_scorer(adapter), ids, user_of_row)
    found = {n: torch.from_numpy(two_workers[rank][f"{adapter}/{n}"]) for n in expected}
    assert worst_error(found, expected) < TOLERANCE

    ids, user_of_row = rows_of_rank(1 - rank)
    of_the_other = one_by_one(make_scorer(adapter), ids, user_of_row)
    assert worst_error(found, of_the_other) > 100 * TOLERANCE


@pytest.mark.parametrize("adapter", ENGINE_ADAPTERS)
def test_a_step_of_two_workers_is_the_sum_over_the_users_of_both(
    two_workers: list[dict[str, Any]], adapter: str
) -> None:
    parts = [one_by_one(make_scorer(adapter), *rows_of_rank(rank)) for rank in (0, 1)]
    rows = torch.cat([torch.cat([g.flatten(1) for g in part.values()], 1) for part in parts])
    expected = (rows * (1.0 / (rows.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)).sum(0).numpy()
    for worker in two_workers:
        found = worker[f"{adapter} step"]
        assert np.linalg.norm(found - expected) < TOLERANCE * np.linalg.norm(expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 3), num_users=st.integers(1, 5))
def test_any_assignment_of_rows_to_users_is_summed_exactly(
    data: st.DataObject, tokens: int, num_users: int
) -> None:
    users = data.draw(st.lists(st.integers(0, num_users - 1), min_size=1, max_size=9))
    user_of_row = torch.tensor(users)
    generator = torch.Generator().manual_seed(len(users))
    left, right = (
        torch.randn(len(users), tokens, d, generator=generator, dtype=torch.float64) for d in (2, 3)
    )
    rows = UserRows.of(user_of_row, num_users)
    by_row = torch.einsum("ntl,ntr->nlr", left, right)
    for user in range(num_users):
        own = user_of_row == user
        torch.testing.assert_close(rows.outer(left, right)[user], by_row[own].sum(0))
        torch.testing.assert_close(rows.sum(left)[user], left[own].sum((0, 1)))


def test_users_whose_rows_stand_together_in_equal_number_take_one_product() -> None:
    assert UserRows.of(torch.tensor([0, 0, 1, 1, 2, 2]), 3).groups is None
    unequal = UserRows.of(torch.tensor([0, 0, 1, 1, 1, 3]), 4).groups
    assert unequal is not None and len(unequal) == 3


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 3, 2, 5)], ids=lambda s: f"{len(s)}-D")
@pytest.mark.parametrize("users", [None, [1, 0, 1, 1]], ids=["user first", "rows of users"])
def test_inputs_of_two_to_four_axes(shape: tuple[int, ...], users: list[int] | None) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3), torch.nn.Tanh())
    x = torch.randn(shape, dtype=torch.float64)
    module.double()
    user_of_row = torch.arange(4) if users is None else torch.tensor(users)
    num_users = int(user_of_row.max()) + 1

    def losses(model: torch.nn.Module) -> torch.Tensor:
        by_row = model(x).square().flatten(1).sum(1)
        return torch.stack([by_row[user_of_row == user].sum() for user in range(num_users)])

    expected = loop_over_users(module, lambda model, user: losses(model)[user], num_users)
    with PerUserGradients(module) as engine:
        with engine.rows(None if users is None else user_of_row, num_users):
            out = losses(module)
        engine.backward(out)
    assert worst_error(samples(module), expected) < TOLERANCE


def two_towers(module: Scorer, queries: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Scores (N,) of N items against their rows' queries, both by the same encoder."""
    embed = [module.encoder(input_ids=ids).last_hidden_state.mean(1) for ids in (queries, items)]
    return (embed[0] * embed[1]).sum(1)


@pytest.mark.parametrize("adapter", ["LoRA", "AdaLoRA", "LayerNorm"])
def test_an_encoder_used_for_query_and_item_has_the_sum_of_both(adapter: str) -> None:
    module = make_scorer(adapter)
    module.head.requires_grad_(False)
    queries, items = make_batch(USERS, seed=5), make_batch(seed=6)

    def loss(model: Scorer, user: int) -> torch.Tensor:
        own = items[user == USER_OF_ROW]
        return two_towers(model, queries[user : user + 1], own).square().sum()

    expected = loop_over_users(module, loss, USERS)
    with PerUserGradients(module) as engine:
        with engine.rows(None, USERS):
            query = module.encoder(input_ids=queries).last_hidden_state.mean(1)
        with engine.rows(USER_OF_ROW, USERS):
            item = module.encoder(input_ids=items).last_hidden_state.mean(1)
        by_row = (query[USER_OF_ROW] * item).sum(1).square()
        engine.backward(torch.zeros(USERS).index_add(0, USER_OF_ROW, by_row))
    assert worst_error(samples(module), expected) < TOLERANCE


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_counts_nothing_twice(use_reentrant: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    x = torch.randn(6, 4, requires_grad=True)
    user_of_row = torch.tensor([0, 1, 1, 2, 2, 2])

    def losses(out: torch.Tensor) -> torch.Tensor:
        return torch.zeros(3).index_add(0, user_of_row, out[:, 0].square())

    expected = loop_over_users(module, lambda model, user: losses(model(x))[user], 3)
    with PerUserGradients(module) as engine:
        with engine.rows(user_of_row, 3):
            out = checkpoint(module, x, use_reentrant=use_reentrant)
        engine.backward(losses(out))
    assert worst_error(samples(module), expected) < TOLERANCE


def test_transformers_own_checkpointing_counts_nothing_twice() -> None:
    module, ids = make_scorer("LoRA"), make_batch()
    expected = one_by_one(module, ids)
    module.encoder.get_base_model().activation_checkpointing_enable()
    module.train()
    assert worst_error(by_engine(module, ids), expected) < TOLERANCE


def test_a_forward_pass_whose_output_is_not_used_counts_nothing() -> None:
    module, ids = make_scorer("LoRA"), make_batch()
    expected = one_by_one(module, ids)
    with PerUserGradients(module) as engine:
        with engine.rows(USER_OF_ROW, USERS):
            module(ids)
            scores = module(ids)
        engine.backward(listwise(scores, USER_OF_ROW, USERS))
    assert worst_error(samples(module), expected) < TOLERANCE


def test_a_weight_that_two_layers_share_has_the_sum_of_both() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    module[2].weight = module[0].weight
    x = torch.randn(3, 4)
    expected = loop_over_users(
        module, lambda model, user: model(x[user : user + 1]).square().sum(), 3
    )
    with PerUserGradients(module) as engine:
        with engine.rows(None, 3):
            out = module(x)
        engine.backward(out.square().sum(1))
    assert worst_error(samples(module), expected) < TOLERANCE


def test_the_forward_pass_is_unchanged_and_detach_gives_the_modules_own_back() -> None:
    for adapter in ADAPTERS:
        module, ids = make_scorer(adapter), make_batch()
        before = module(ids)
        with PerUserGradients(module) as engine:
            with engine.rows(USER_OF_ROW, USERS):
                torch.testing.assert_close(module(ids), before)
            with torch.no_grad():
                torch.testing.assert_close(module(ids), before)
        assert not any("forward" in layer.__dict__ for layer in module.modules())
        module(ids).sum().backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_disabled_and_merged_adapters_have_gradients_of_zero() -> None:
    module, ids = make_scorer("LoRA and its layers' biases"), make_batch()
    module.encoder.merge_adapter()
    expected = one_by_one(module, ids)
    found = by_engine(module, ids)
    assert worst_error(found, expected) < TOLERANCE
    assert all(bool(found[n].any()) == ("lora_" not in n) for n in found)


def test_per_user_linear_takes_rows_of_users() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    x = torch.randn(5, 2, 4)
    rows = UserRows.of(torch.tensor([1, 0, 1, 1, 0]), 2)
    per_user_linear(x, weight, rows=rows).sum().backward()
    expected = torch.stack([x[[1, 4]].sum((0, 1)), x[[0, 2, 3]].sum((0, 1))])
    torch.testing.assert_close(weight.grad_sample, expected[:, None].expand(2, 3, 4))  # type: ignore[attr-defined]
