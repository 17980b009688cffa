"""What an update adapts in the encoder, by name, and hence what is computed once a text.

    ModelConfig -> adapted_modules() -> ("encoder.layer.5.attention.self.query", …)
    those and what earlier updates changed -> cut_of() -> Cut: below it the public encoder is cached

Names are those of BERT's modules, which MiniLM and RoBERTa share. A configured name is the whole
name within a layer, or an end that one module alone has: `output.dense` is the feed-forward block's
projection, though `attention.output.dense` ends likewise.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from raysys.errors import ConfigError

ALL_LINEAR = "all-linear"
FEED_FORWARD = ("intermediate.dense", "output.dense")
_LAYER_NAME = re.compile(r"encoder\.layer\.(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Up to where the encoder is the public one, and its activations are cached."""

    num_layers: int = 1
    """Upper layers that are computed from the cache."""
    keeps_attention: bool = True
    """Whether the lowest of them is cached up to its feed-forward block."""

    @property
    def suffix(self) -> str:
        """End of the cache folder's name; none for the oldest kind of cache."""
        if self == DEFAULT_CUT:
            return ""
        return f"-top{self.num_layers}{'-feed-forward' if self.keeps_attention else ''}"

    def first_layer(self, depth: int) -> int:
        """Returns the index of the lowest layer that is computed, in an encoder of `depth`."""
        return depth - self.num_layers


DEFAULT_CUT = Cut()
"""The input of the last feed-forward block."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Names of an encoder's parts."""

    depth: int
    """Number of layers."""
    linear: tuple[str, ...]
    """Linear modules within each layer, in the order in which they are computed."""


@functools.cache
def layout_of(folder: Path) -> Layout:
    """Returns the layout of the encoder in a folder, without loading its weights.

    Raises:
      ConfigError: Its layers are not BERT's.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        skeleton = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    return layout(skeleton)


def layout(encoder: torch.nn.Module) -> Layout:
    """Returns the layout of a loaded encoder.

    Raises:
      ConfigError: Its layers are not BERT's.
    """
    try:
        layers: Any = encoder.encoder.layer  # type: ignore[union-attr]
        last = layers[-1]
        _ = last.attention, last.intermediate, last.output.dense, last.output.LayerNorm
    except AttributeError as error:
        raise ConfigError(
            f"model.encoder: {type(encoder).__name__} has no BERT-like last layer (missing "
            f"{error.name}); use a BERT, MiniLM or RoBERTa encoder"
        ) from error
    linear = tuple(
        name for name, module in last.named_modules() if isinstance(module, torch.nn.Linear)
    )
    return Layout(depth=len(layers), linear=linear)


def adapted_modules(
    layout: Layout, target_modules: Sequence[str], num_adapted_layers: int
) -> tuple[str, ...]:
    """Returns the full names of the configured modules, lowest first.

    Raises:
      ConfigError: The encoder has no such module, more than one, or fewer layers.
    """
    if num_adapted_layers > layout.depth:
        raise ConfigError(
            f"model.num_adapted_layers: the encoder has {layout.depth} layers, got "
            f"{num_adapted_layers}"
        )
    wanted = {name for target in target_modules for name in _matches(layout, target)}
    upper = range(layout.depth - num_adapted_layers, layout.depth)
    return tuple(
        f"encoder.layer.{i}.{name}" for i in upper for name in layout.linear if name in wanted
    )


def _matches(layout: Layout, target: str) -> tuple[str, ...]:
    if target == ALL_LINEAR:
        return layout.linear
    if target in layout.linear:
        return (target,)
    found = tuple(name for name in layout.linear if name.endswith(f".{target}"))
    if len(found) != 1:
        several = f"{target} may be {' or '.join(found)}" if found else f"no module {target}"
        raise ConfigError(
            f"model.target_modules: {several}; a layer of the encoder has "
            f"{', '.join(layout.linear)}; or name {ALL_LINEAR}"
        )
    return found


def cut_of(modules: Iterable[str], depth: int) -> Cut:
    """Returns the highest cut below all of these modules; of none, the highest there is."""
    places = [_place(name) for name in modules]
    lowest = min((layer for layer, _ in places), default=depth - 1)
    if lowest == depth - 1 and all(name in FEED_FORWARD for _, name in places):
        return DEFAULT_CUT
    return Cut(num_layers=depth - lowest, keeps_attention=False)


def _place(name: str) -> tuple[int, str]:
    match = _LAYER_NAME.fullmatch(name)
    assert match is not None, f"{name} is not in a layer"
    return int(match[1]), match[2]
