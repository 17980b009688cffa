"""Which layers the engine knows, and what takes the place of their `forward`.

A parameter is known if the layer that owns it is: Linear, LayerNorm, or AdaLoRA's layer. LoRA's A
and B are Linear layers of PEFT's layer, so any LoRA works through them; for plain LoRA the layer
as a whole is replaced too, which saves passes over its output.

Wherever the replacement does not hold (merged or disabled adapters, several active ones, variants),
the layer's own forward runs: what it does to known parameters in another way than by their layers
gives an ordinary gradient, which the engine refuses after the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.adalora import SVDLinear
from peft.tuners.lora import Linear as LoraLinear

from raysys.errors import PrivacyError
from raysys.privacy.clipping.functions import (
    LowRank,
    per_user_layer_norm,
    per_user_linear,
    per_user_low_rank,
)
from raysys.privacy.clipping.rows import UserRows

# PEFT keeps a layer's parts in containers that are not typed, hence `Any` for its layers.
Forward = Callable[..., torch.Tensor]
CurrentRows = Callable[[], UserRows]


def replacement(layer: torch.nn.Module, rows: CurrentRows) -> Forward | None:
    """Returns the forward that gives per-user gradients, or None if nothing is to be replaced."""
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    if type(layer) is torch.nn.Linear:
        return lambda x: per_user_linear(x, layer.weight, layer.bias, rows())
    if type(layer) is torch.nn.LayerNorm:
        return lambda x: per_user_layer_norm(x, layer, rows())
    if type(layer) is SVDLinear:
        return _adalora(layer, rows)
    if type(layer) is LoraLinear:
        return _lora(layer, rows)
    return None


def known_parameters(layer: torch.nn.Module) -> list[str]:
    """Returns the names, below this layer, of parameters that its replacement covers.

    A module that computes with parameters of its own by `per_user_linear` or `add_grad_sample`
    names them in `per_user_parameters`; it is held to that after each backward pass.
    """
    if declared := getattr(layer, "per_user_parameters", ()):
        return list(declared)
    if type(layer) in (torch.nn.Linear, torch.nn.LayerNorm):
        return ["weight", "bias"]
    if type(layer) is SVDLinear:
        parts = ("lora_A", "lora_B", "lora_E")
        return [n for n, _ in layer.named_parameters() if n.split(".")[0] in parts]
    return []


def _lora(layer: Any, rows: CurrentRows) -> Forward:
    own: Forward = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = _only_adapter(layer)
        if args or kwargs or adapter is None or layer.lora_variant or layer.lora_bias[adapter]:
            return own(x, *args, **kwargs)
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        if _has_hooks(a) or _has_hooks(b):
            return own(x)
        low_rank = LowRank(a=a.weight, b=b.weight, scale=layer.scaling[adapter])
        return _with_base(layer, x, layer.lora_dropout[adapter], low_rank, rows())

    return forward


def _adalora(layer: Any, rows: CurrentRows) -> Forward:
    own: Forward = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if layer.disable_adapters or layer.merged:
            return own(x, *args, **kwargs)
        adapter = _only_adapter(layer)
        if args or kwargs or adapter is None:
            raise PrivacyError(
                f"AdaLoRA with active adapters {layer.active_adapters} and further arguments "
                f"{[*args, *kwargs]}: expected one adapter and none; activate one"
            )
        low_rank = LowRank(
            a=layer.lora_A[adapter], b=layer.lora_B[adapter], e=layer.lora_E[adapter],
            scale=layer.scaling[adapter] / (layer.ranknum[adapter] + 1e-5),
        )  # fmt: skip
        return _with_base(layer, x, layer.lora_dropout[adapter], low_rank, rows())

    return forward


def _with_base(
    layer: Any,
    x: torch.Tensor,
    dropout: torch.nn.Module,
    low_rank: LowRank,
    rows: UserRows,
) -> torch.Tensor:
    base = layer.base_layer
    same_input = isinstance(dropout, torch.nn.Identity) or not dropout.training
    if same_input and _is_plain(base) and x.dtype == low_rank.a.dtype == base.weight.dtype:
        return per_user_low_rank(x, low_rank, rows, base)
    result: torch.Tensor = base(x)
    delta = per_user_low_rank(dropout(x.to(low_rank.a.dtype)), low_rank, rows)
    return (result + delta).to(result.dtype)


def _only_adapter(layer: Any) -> str | None:
    """Returns the one adapter that takes part in the layer's forward pass."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    usable = len(active) == 1 and not layer.disable_adapters and not layer.merged
    return active[0] if usable else None


def _is_plain(base: torch.nn.Module) -> bool:
    return type(base) is torch.nn.Linear and not base.weight.requires_grad and not _has_hooks(base)


def _has_hooks(layer: torch.nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )
