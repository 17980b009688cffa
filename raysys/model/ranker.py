"""The trainable ranker: an adapter in the encoder's upper layers, and the hybrid head.

    TokenActivations -> Tower (adapter) -> similarities + features -> HeadModule -> scores

Everything trainable is known to the engine (`privacy.clipping`), so one backward pass yields
per-user gradients. Candidates' texts are embedded by the adapted encoder; history and query
vectors come from the frozen previous version, which keeps their cost out of the step.

Shape suffixes: U = users, R = requests of a user, K = candidates, F = features, d = width of the
encoder, I = inputs of the head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from raysys.ingest.features import NUM_FEATURES
from raysys.model.scorer import NUM_INPUTS, Head
from raysys.model.tower import LayerTower, Tower
from raysys.privacy.clipping import PerUserGradients, per_user_linear


class HeadModule(torch.nn.Module):
    """The trainable form of `scorer.Head`."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        for name in ("first", "second", "last", "skip"):
            weight = torch.tensor(np.array(head.weights[f"{name}.weight"]))
            linear = torch.nn.Linear(
                weight.shape[1], weight.shape[0], f"{name}.bias" in head.weights
            )
            linear.weight.data = weight
            if linear.bias is not None:
                linear.bias.data = torch.tensor(np.array(head.weights[f"{name}.bias"]))
            self.add_module(name, linear)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns scores (U, ...) for inputs (U, ..., I), user first."""
        hidden = inputs
        for name in ("first", "second"):
            hidden = torch.relu(self._linear(name, hidden))
        return (self._linear("last", hidden) + self._linear("skip", inputs))[..., 0]

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        linear = self.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        return per_user_linear(x, linear.weight, linear.bias)

    def head(self) -> Head:
        """Returns a NumPy copy."""
        state = self.state_dict()
        return Head(weights={name: value.cpu().numpy().copy() for name, value in state.items()})


class RankerModule(torch.nn.Module):
    """Scores the candidates of users' requests.

    Raises:
      PrivacyError: Something is trainable that the engine does not know.
    """

    def __init__(self, tower: Tower, head: HeadModule, *, half_tower: bool = False) -> None:
        """Combines both; `half_tower` has the tower multiply matrices in bfloat16.

        The head is too small to gain by that, and its inputs are counts that need their digits.
        """
        super().__init__()
        self.tower, self.head = tower, head
        self._half_tower = half_tower
        self._engine = PerUserGradients(self, keep_factors=True)
        if isinstance(tower, LayerTower):
            tower.rows = self._rows

    def forward(
        self,
        features: torch.Tensor,
        text_index: torch.Tensor,
        history_text: torch.Tensor,
        query_text: torch.Tensor,
    ) -> torch.Tensor:
        """Returns scores (U, R, K).

        Args:
          features: (U, R, K, F).
          text_index: (U, R, K).
          history_text: (U, R, d), zero where there is no history.
          query_text: (U, R, d), zero where there is no query.
        """
        with self._precision(text_index.device):
            text = self.tower(text_index).float()
        by_history = torch.einsum("urkd,urd->urk", text, history_text)
        by_query = torch.einsum("urkd,urd->urk", text, query_text)
        has_query = (query_text.abs().sum(-1) > 0).to(features.dtype)
        inputs = torch.cat(
            [
                features,
                by_history[..., None],
                by_query[..., None],
                has_query[..., None, None].expand(*text_index.shape, 1),
            ],
            dim=-1,
        )
        assert inputs.shape[-1] == NUM_INPUTS and features.shape[-1] == NUM_FEATURES
        with self._rows(None, len(features)):
            scores: torch.Tensor = self.head(inputs)
        return scores

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if not self._half_tower:
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def backward(self, loss: torch.Tensor) -> None:
        """Sets per-user gradients, `grad_sample` (U, ...), on all that is trained.

        Args:
          loss: (U,) each user's own, of the forward pass before.

        Raises:
          PrivacyError: As `PerUserGradients.backward`.
        """
        self._engine.backward(loss)

    def require_independent_users(self, loss: torch.Tensor) -> None:
        """Checks that no user's loss depends on another user's rows, by two more backward passes.

        Args:
          loss: As `backward`, which may follow.

        Raises:
          PrivacyError: It does, so no clip bounds what one user can change.
        """
        self._engine.require_independent_users(loss)

    @contextlib.contextmanager
    def _rows(self, users: torch.Tensor | None, num_users: int) -> Iterator[None]:
        if not torch.is_grad_enabled():
            yield
            return
        with self._engine.rows(users, num_users):
            yield

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Returns the parameters that training changes, by name."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]
