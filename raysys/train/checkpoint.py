"""What a restarted group of workers goes on from: the trained weights and the optimizer's moments.

    after a block: Checkpoint.of(…) -> Checkpoints.save() -> staging/<update>/checkpoints/…
    after a restart: Checkpoints.latest() -> Checkpoint.restore(…)

Only what is trained, some ten to hundreds of KB; the encoder is not in it. All of it was computed
from noised gradients, so it costs no privacy. No generator's state is in it: whoever goes on draws
its own masks and noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import load, save

from raysys.partitions.layout import staging
from raysys.storage import Root

Named = Iterable[tuple[str, torch.nn.Parameter]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Where training stood after a block."""

    num_steps: int
    """Used up by then, lost ones included. It places the run on the learning rate's schedule."""
    tensors: Mapping[str, torch.Tensor]
    """`weights/<name>` and, for each of them, `optimizer/<name>/<moment>`; `ranks/<name>` with
    AdaLoRA. On the CPU."""

    @classmethod
    def of(
        cls,
        num_steps: int,
        parameters: Named,
        adam: torch.optim.Optimizer,
        ranks: Mapping[str, torch.Tensor],
    ) -> Checkpoint:
        """Copies the parameters and their moments, and holds `Ranks.state()`."""
        tensors = {f"ranks/{name}": value for name, value in ranks.items()}
        for name, parameter in parameters:
            tensors[f"weights/{name}"] = parameter.detach().cpu().clone()
            for moment, value in adam.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{moment}"] = torch.as_tensor(value).cpu().clone()
        return cls(num_steps=num_steps, tensors=tensors)

    def restore(self, parameters: Named, adam: torch.optim.Optimizer) -> None:
        """Sets parameters and moments, in place: tower and optimizer hold the same objects."""
        for name, parameter in parameters:
            with torch.no_grad():
                parameter.copy_(self.tensors[f"weights/{name}"])
            mark = f"optimizer/{name}/"
            moments: dict[str, Any] = {
                key.removeprefix(mark): value.clone()
                for key, value in self.tensors.items()
                if key.startswith(mark)
            }
            # AdamW keeps its count of steps, a scalar, on the CPU.
            adam.state[parameter] = {
                key: value.to(parameter.device) if value.ndim else value
                for key, value in moments.items()
            }

    def ranks(self) -> dict[str, torch.Tensor]:
        """Returns what `Ranks.restore` takes."""
        return {
            key.removeprefix("ranks/"): value
            for key, value in self.tensors.items()
            if key.startswith("ranks/")
        }


class Checkpoints:
    """The checkpoints of one update, an object each.

    Not Ray Train's own: what it was told counts only once its controller has polled it, up to two
    seconds later, and that is what a block would wait for. An object is there when `put` returns.
    """

    def __init__(self, root: Root, update_id: str) -> None:
        self._root = root
        self._folder = f"{staging(update_id)}/checkpoints"

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes it under its number of steps, and so beside those of earlier blocks."""
        self._root.put(self._path(checkpoint.num_steps), save(dict(checkpoint.tensors)))

    def latest(self) -> int:
        """Returns the number of steps of the newest one, 0 if there is none."""
        names = [info.path.rpartition("/")[2] for info in self._root.list(self._folder)]
        return max((int(name.partition(".")[0]) for name in names), default=0)

    def load(self, num_steps: int) -> Checkpoint:
        """Reads the one after `num_steps` steps."""
        tensors = load(self._root.read_bytes(self._path(num_steps)))
        return Checkpoint(num_steps=num_steps, tensors=tensors)

    def _path(self, num_steps: int) -> str:
        return f"{self._folder}/{num_steps:08d}.safetensors"
