"""An update's delta on the encoder: PEFT's modules on the previous version's frozen weights.

    TextEncoder + previous version's matrices -> Adapter.fresh() -> build_tower() -> training
    -> Adapter.finish(alpha) -> .weights(): the new version's matrices, by name; PEFT's own files

A line of versions may adapt other modules in each update. What any of them changed is kept as a
whole matrix by the name of its module, so a version needs no chain of deltas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from raysys.config import ModelConfig
from raysys.ingest.features import FloatArray
from raysys.model.encoder import TextEncoder
from raysys.model.encoder_files import resolve_encoder
from raysys.model.targets import Cut, Layout, adapted_modules, cut_of, layout_of

NAME = "default"
"""PEFT's name of the one adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """The previous version's encoder and what this update trains in it."""

    config: ModelConfig
    encoder: TextEncoder
    """Of the previous version, with PEFT's modules inside."""
    base_weights: Mapping[str, FloatArray]
    """Module name -> matrix of the previous version, of all that its line has changed."""
    modules: tuple[str, ...]
    """What this update adapts; nothing where `model.adapter` is none."""
    peft_model: PeftModel | None

    @classmethod
    def fresh(
        cls,
        encoder: TextEncoder,
        config: ModelConfig,
        base_weights: Mapping[str, FloatArray],
        *,
        num_steps: int,
    ) -> Adapter:
        """Adds an adapter that changes nothing yet. Its random part is drawn from torch's seed.

        Raises:
          ConfigError: The encoder has no such modules.
        """
        based = encoder.with_weights(base_weights)
        modules = _configured(encoder.layout, config)
        peft_model = None
        if modules:
            peft_config = _peft_config(config, modules, num_steps)
            peft_model = get_peft_model(based.model, peft_config)
            assert isinstance(peft_model, PeftModel)
        adapter = cls(
            config=config,
            encoder=based,
            base_weights=base_weights,
            modules=modules,
            peft_model=peft_model,
        )
        if config.adapter == "lora":
            for _, layer in adapter.layers():
                layer.lora_A.requires_grad_(config.train_lora_a)
        return adapter

    @property
    def cut(self) -> Cut:
        """Below it this update trains nothing."""
        return cut_of(self.modules, self.encoder.layout.depth)

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Yields each adapted module: `.base_layer`, `.lora_A`, `.lora_B`, `.get_delta_weight`."""
        for name in self.modules:
            layer = self.encoder.model.get_submodule(name)
            assert isinstance(layer, BaseTunerLayer)
            yield name, layer

    @torch.no_grad()
    def finish(self, alpha: float) -> None:
        """Makes the delta `alpha` times what was trained, ready to be saved.

        What AdaLoRA took rank from is zero in its singular values, which say it all: PEFT would
        save its own note of that as well, and warn about it whenever it loads the files.
        """
        for _, layer in self.layers():
            factor = layer.lora_E[NAME] if hasattr(layer, "lora_E") else layer.lora_B[NAME].weight
            factor.mul_(alpha)
        if self.config.adapter == "adalora" and self.peft_model is not None:
            self.peft_model.peft_config[NAME].rank_pattern = None  # type: ignore[attr-defined]

    @torch.no_grad()
    def weights(self) -> dict[str, FloatArray]:
        """Returns the matrices of the new version: all that its line has changed, by module."""
        changed = {}
        for name, layer in self.layers():
            changed[name] = merged_weight(layer)
        return {**self.base_weights, **changed}


def activations_cut(config: ModelConfig, changed: Iterable[str] = ()) -> Cut:
    """Returns the cut at which an update needs activations, without loading the encoder.

    Args:
      changed: Modules that earlier updates of its line have changed: above the cut as well, since
        what is cached is the public encoder's.

    Raises:
      ConfigError: The encoder has no modules as configured.
    """
    layout = layout_of(resolve_encoder(config.encoder))
    return cut_of([*changed, *_configured(layout, config)], layout.depth)


def _configured(layout: Layout, config: ModelConfig) -> tuple[str, ...]:
    if config.adapter == "none":
        return ()
    return adapted_modules(layout, config.target_modules, config.num_adapted_layers)


def merged_weight(layer: Any) -> FloatArray:
    """Returns the base weight plus the delta of one of PEFT's modules, (d_out, d_in)."""
    merged = layer.base_layer.weight + layer.get_delta_weight(NAME)
    weight: FloatArray = merged.detach().cpu().float().numpy()
    return weight


def _peft_config(config: ModelConfig, modules: tuple[str, ...], num_steps: int) -> LoraConfig:
    common: dict[str, Any] = {
        "lora_alpha": config.lora_alpha,
        "target_modules": list(modules),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    if config.adapter == "lora":
        return LoraConfig(r=config.lora_rank, **common)
    return AdaLoraConfig(
        init_r=config.initial_rank,
        target_r=config.lora_rank,
        tinit=num_steps // 10,
        tfinal=num_steps // 4,
        total_step=num_steps,
        **common,
    )
