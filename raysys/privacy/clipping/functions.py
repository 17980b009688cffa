"""Layers whose backward pass sets `grad_sample` on their parameters instead of `grad`.

Each computes what PyTorch or PEFT computes, and keeps for the backward pass what they keep: the
input, and for a low-rank product its r numbers a row as well. The per-user gradient takes the place
of the batch gradient and costs as many operations.

Shape suffixes: U = users, N = rows, n = N * T rows and tokens as one axis, r = rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn.functional import linear

from raysys.errors import PrivacyError
from raysys.privacy.clipping.rows import UserRows
from raysys.privacy.clipping.samples import add_grad_sample


def per_user_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    rows: UserRows | None = None,
) -> torch.Tensor:
    """Returns `x @ weight.T + bias`; the backward pass sets `grad_sample` on weight and bias.

    Args:
      x: (N, ..., d_in).
      weight: (d_out, d_in), a leaf.
      bias: (d_out,), a leaf.
      rows: Whose each of the N rows is; by default the first axis is the user.

    A parameter used twice in one forward pass gets the sum of both uses, as it must.
    """
    rows = rows or UserRows(num_users=x.shape[0], num_rows=x.shape[0])
    out = _Linear.apply(autocast_input(x), weight, bias, rows)  # type: ignore[no-untyped-call]
    assert isinstance(out, torch.Tensor)
    return out


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """An adapter `scale * B E A` of LoRA (E is one) or AdaLoRA (E is diagonal)."""

    a: torch.Tensor
    """(r, d_in)"""
    b: torch.Tensor
    """(d_out, r)"""
    e: torch.Tensor | None = None
    """(r, 1)"""
    scale: float | torch.Tensor = 1.0


def per_user_low_rank(
    x: torch.Tensor, adapter: LowRank, rows: UserRows, base: torch.nn.Linear | None = None
) -> torch.Tensor:
    """Returns `scale * (B E A) x`, plus `base(x)` if there is a base, whose weight is frozen.

    x is (N, ..., d_in). Together they take one pass over the output, and none over the input's
    gradient more than the base alone.
    """
    weight, bias = (None, None) if base is None else (base.weight, base.bias)
    out = _LowRank.apply(  # type: ignore[no-untyped-call]
        autocast_input(x), weight, bias, adapter.a, adapter.b, adapter.e, adapter.scale, rows
    )
    assert isinstance(out, torch.Tensor)
    return out


def per_user_layer_norm(x: torch.Tensor, norm: torch.nn.LayerNorm, rows: UserRows) -> torch.Tensor:
    """Returns `norm(x)`, in float32 under autocast."""
    x = x.float() if torch.is_autocast_enabled(x.device.type) else x
    out = _LayerNorm.apply(x, norm.weight, norm.bias, norm.normalized_shape, norm.eps, rows)  # type: ignore[no-untyped-call]
    assert isinstance(out, torch.Tensor)
    return out


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """Casts as autocast would: functions of our own are not on its lists."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: UserRows,
    ) -> torch.Tensor:
        _require_rows(x, rows, 1)
        ctx.parameters, ctx.rows = (weight, bias), rows
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, saved_weight), (grad,), rows = ctx.saved_tensors, grad_outputs, ctx.rows
        rows.before_backward()
        weight, bias = ctx.parameters
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if needs_weight:
            add_grad_sample(weight, rows.outer(_by_row(grad), _by_row(x)))
        if needs_bias:
            add_grad_sample(bias, rows.sum(_by_row(grad)))
        return grad @ saved_weight.to(grad.dtype) if needs_x else None, None, None, None


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base_weight: torch.Tensor | None,
        base_bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        e: torch.Tensor | None,
        scale: float | torch.Tensor,
        rows: UserRows,
    ) -> torch.Tensor:
        _require_rows(x, rows, 1)
        flat = x.reshape(-1, x.shape[-1])  # (n, d_in)
        scale = scale.to(x.dtype) if isinstance(scale, torch.Tensor) else scale
        low = flat @ a.to(x.dtype).T  # (n, r)
        scaled = low * (scale if e is None else e.to(x.dtype).T * scale)
        if base_weight is None:
            out = scaled @ b.to(x.dtype).T
        else:
            bias = None if base_bias is None else base_bias.to(x.dtype)
            out = linear(flat, base_weight.to(x.dtype), bias)
            out.addmm_(scaled, b.to(x.dtype).T)
        needs_x, _, _, needs_a, *_ = ctx.needs_input_grad
        ctx.parameters, ctx.rows, ctx.shape = (base_bias, a, b, e), rows, x.shape
        # Of `low` and `scaled` one is a multiple of the other where E is one.
        ctx.save_for_backward(
            x if needs_a else None, scaled, low if e is not None else None,
            base_weight if needs_x else None, a, b, e,
        )  # fmt: skip
        ctx.scale = scale
        return out.view(*x.shape[:-1], b.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scaled, low, base_weight, a, b, e = ctx.saved_tensors
        base_bias, a_leaf, b_leaf, e_leaf = ctx.parameters
        rows, scale, num_rows = ctx.rows, ctx.scale, ctx.rows.num_rows
        rows.before_backward()
        needs_x, _, needs_bias, needs_a, needs_b, needs_e, *_ = ctx.needs_input_grad
        grad = grad_outputs[0].reshape(-1, b.shape[0])  # (n, d_out)
        by_row = grad.view(num_rows, -1, b.shape[0])
        grad_low = (grad @ b.to(grad.dtype)).mul_(scale)  # (n, r)
        if needs_bias:
            add_grad_sample(base_bias, rows.sum(by_row))
        if needs_b:
            add_grad_sample(b_leaf, rows.outer(by_row, scaled.view(num_rows, -1, b.shape[1])))
        if e is not None:
            if needs_e:
                along = (grad_low * low).view(num_rows, -1, len(e))
                add_grad_sample(e_leaf, rows.sum(along)[..., None])
            grad_low = grad_low * e.to(grad.dtype).T
        if needs_a:
            add_grad_sample(a_leaf, rows.outer(grad_low.view(num_rows, -1, len(a)), _by_row(x)))
        if not needs_x:
            return (None,) * 8
        if base_weight is None:
            grad_x = grad_low @ a.to(grad.dtype)
        else:
            grad_x = grad @ base_weight.to(grad.dtype)
            grad_x.addmm_(grad_low, a.to(grad.dtype))
        return grad_x.view(ctx.shape), *[None] * 7


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shape: tuple[int, ...],
        eps: float,
        rows: UserRows,
    ) -> torch.Tensor:
        _require_rows(x, rows, len(shape))
        cast = None if bias is None else bias.to(x.dtype)
        out, mean, inverse = torch.native_layer_norm(x, shape, weight.to(x.dtype), cast, eps)
        ctx.parameters, ctx.rows, ctx.shape = (weight, bias), rows, shape
        ctx.save_for_backward(x, mean, inverse, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, mean, inverse, saved_weight), (grad,) = ctx.saved_tensors, grad_outputs
        (weight, bias), rows = ctx.parameters, ctx.rows
        rows.before_backward()
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        by_row = grad.reshape(rows.num_rows, -1, *ctx.shape)
        if needs_weight:
            normed = ((x - mean) * inverse).view_as(by_row)
            add_grad_sample(weight, rows.sum(by_row * normed))
        if needs_bias:
            add_grad_sample(bias, rows.sum(by_row))
        if not needs_x:
            return (None,) * 6
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, ctx.shape, mean, inverse, saved_weight.to(x.dtype), None,
            [True, False, False],
        )  # fmt: skip
        return grad_x, *[None] * 5


def _by_row(x: torch.Tensor) -> torch.Tensor:
    """Returns (N, T, d) for (N, ..., d)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _require_rows(x: torch.Tensor, rows: UserRows, num_features: int) -> None:
    if x.dim() <= num_features or x.shape[0] != rows.num_rows:
        raise PrivacyError(
            f"a trainable layer got an input of shape {tuple(x.shape)}, expected {rows.num_rows} "
            "rows first; keep the row's axis in front, or name the user of each row"
        )
