"""The trainable text side: LoRA on the encoder's last output projection, from cached activations.

    TokenActivations + LoRA -> TextTower -> normalised embeddings of the candidates' texts

Equal to the whole PEFT model up to the cache's half precision. A text's embedding does not depend
on who is shown it, but its gradient does. So where only LoRA's B is trained, the forward pass runs
once over the distinct texts and the backward pass goes from each (user, text) pair to the user's
gradient in closed form: nothing of size (pairs, tokens, d) is kept, only one such gather is read.

Shape suffixes: U = users, P = texts of a user, M = distinct texts, T = tokens, d = width of the
encoder, h = its feed-forward width, r = LoRA rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import layer_norm, normalize

from raysys.model.encoder import TokenActivations
from raysys.model.targets import DEFAULT_CUT
from raysys.privacy.clipping import add_grad_sample, per_user_linear


class TextTower(torch.nn.Module):
    """Embeds the catalogue's texts; its trainable weights are those of PEFT's modules."""

    per_user_parameters = ("lora_a", "lora_b")

    base: torch.Tensor
    """(M, T, d) the encoder's own hidden states before the last norm."""
    lora_input: torch.Tensor
    """(M, T, h), or (M, T, r) where A is frozen."""
    mask: torch.Tensor
    """(M, T, 1)."""

    def __init__(self, encoder: Any, activations: TokenActivations) -> None:
        super().__init__()
        assert activations.cut == DEFAULT_CUT, (
            "it starts from the input of the last feed-forward block"
        )
        layer = encoder.encoder.layer[-1]
        dense = layer.output.dense
        self.lora_a = dense.lora_A["default"].weight
        self.lora_b = dense.lora_B["default"].weight
        self.scaling = float(dense.scaling["default"])
        self.norm = layer.output.LayerNorm.requires_grad_(False)
        with torch.no_grad():
            hidden = torch.from_numpy(activations.hidden).float()
            projected = layer.intermediate(hidden)
            self._keep("base", dense.base_layer(projected) + hidden)  # (M, T, d)
            # With A frozen, its output is a constant of the update: r numbers a token, not h.
            self._keep(
                "lora_input", projected if self.lora_a.requires_grad else projected @ self.lora_a.T
            )
        lengths = torch.from_numpy(activations.lengths)
        mask = torch.arange(hidden.shape[1]) < lengths[:, None]
        self._keep("mask", (mask / lengths[:, None])[..., None].float())  # sums to 1 over T

    def _keep(self, name: str, constant: torch.Tensor) -> None:
        """Makes it an attribute that moves to other devices with the tower."""
        self.register_buffer(name, constant, persistent=False)

    def forward(self, text_index: torch.Tensor) -> torch.Tensor:
        """Returns normalised embeddings (U, ..., d) of the texts (U, ...), user first."""
        if not self.lora_a.requires_grad:
            out = _PerUserTextEmbedding.apply(text_index, self.lora_b, self)  # type: ignore[no-untyped-call]
            assert isinstance(out, torch.Tensor)
            return out
        lora = per_user_linear(self.lora_input[text_index], self.lora_a)
        delta = per_user_linear(lora, self.lora_b)
        hidden = self.base[text_index] + self.scaling * delta
        normed = layer_norm(
            hidden, (hidden.shape[-1],), self.norm.weight, self.norm.bias, self.norm.eps
        )
        return normalize((normed * self.mask[text_index]).sum(-2), dim=-1)

    @torch.no_grad()
    def embed_all(self) -> torch.Tensor:
        """Returns the embeddings of all texts, (M, d)."""
        rows = torch.split(torch.arange(len(self.base)), 512)
        return torch.cat([self.forward(some[None])[0] for some in rows])


class _PerUserTextEmbedding(torch.autograd.Function):
    """Embeddings of texts whose backward pass sets `grad_sample` (U, d, r) on LoRA's B.

    With h_t = base_t + s B a_t, n_t = (h_t - mean) / sigma_t, v = sum_t m_t (gamma n_t + beta) and
    e = v / |v|, a gradient g of e gives, for g' = gamma (g - e (e.g)) / |v|, w_t = m_t / sigma_t,

        dB = s [ (g' - mean(g')) (sum_t w_t a_t)^T - sum_t n_t (w_t (g'.n_t / d) a_t)^T ]
    """

    @staticmethod
    def forward(
        ctx: Any, text_index: torch.Tensor, lora_b: torch.Tensor, tower: TextTower
    ) -> torch.Tensor:
        lora = tower.lora_input
        if tower.lora_a.requires_grad or lora.shape[-1] != lora_b.shape[1]:
            raise AssertionError("the closed form holds for a frozen A only")
        hidden = tower.base + tower.scaling * (lora @ lora_b.T)
        mean = hidden.mean(-1, keepdim=True)
        sigma = (hidden.var(-1, keepdim=True, unbiased=False) + tower.norm.eps).sqrt()
        normed = (hidden - mean) / sigma
        pooled = ((normed * tower.norm.weight + tower.norm.bias) * tower.mask).sum(1)
        length = pooled.norm(dim=-1, keepdim=True)
        embedding = pooled / length
        weighted = tower.mask / sigma * lora  # (M, T, r): w_t a_t
        ctx.save_for_backward(text_index, embedding, length, normed, weighted)
        ctx.lora_b, ctx.tower = lora_b, tower
        out: torch.Tensor = embedding[text_index]
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, None, None]:
        text_index, embedding, length, normed, weighted = ctx.saved_tensors
        num_users, width = len(text_index), embedding.shape[-1]
        index = text_index.reshape(num_users, -1)  # (U, P)
        grad = grad_outputs[0].reshape(num_users, -1, width)
        unit = embedding[index]
        grad = (grad - unit * (grad * unit).sum(-1, keepdim=True)) / length[index]
        grad = grad * ctx.tower.norm.weight  # g', (U, P, d)
        tokens, lora = normed[index], weighted[index]  # (U, P, T, d), (U, P, T, r)
        centred = grad - grad.mean(-1, keepdim=True)
        sample = centred.transpose(1, 2) @ lora.sum(2)
        along = (tokens @ grad[..., None]) / width  # (U, P, T, 1)
        sample = sample - tokens.flatten(1, 2).transpose(1, 2) @ (along * lora).flatten(1, 2)
        add_grad_sample(ctx.lora_b, ctx.tower.scaling * sample)
        return None, None, None
