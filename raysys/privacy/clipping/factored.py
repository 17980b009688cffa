"""Per-user gradients of short inputs, kept as the two factors of their product.

    left (U, n, d_out), right (U, n, d_in) -> FactoredGradients for (U, d_out, d_in)

A gradient of LoRA's A or B is a product over a user's n tokens. With fewer tokens than ranks it
has more numbers than its factors, which exist anyway; and the clipped sum over users is one product
of the factors, as in training without privacy. The norm is that of the product itself, computed
once and let go: Gram matrices would lose digits where terms cancel, and with them the bound.

Source of the idea: book-keeping, Bu et al. 2023, arXiv 2210.00038.
"""

from __future__ import annotations

import torch


class FactoredGradients:
    """Per-user gradients that take part in a step without being there."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Takes left (U, n, d_left) and right (U, n, d_right), in float32 at least."""
        self.left, self.right = left.detach(), right.detach()  # an input holds its whole graph
        self.norms = torch.linalg.vector_norm(self.dense(), dim=(1, 2))
        """(U,)"""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(U, d_left, d_right)."""
        return (len(self.left), self.left.shape[-1], self.right.shape[-1])

    def __len__(self) -> int:
        return len(self.left)

    def dense(self) -> torch.Tensor:
        """Returns the gradients themselves, (U, d_left, d_right)."""
        return torch.bmm(self.left.transpose(1, 2), self.right)

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Returns the sum over users, (d_left, d_right), by weights (U,)."""
        left, right = self.left, self.right
        by_user = weights.to(left.dtype)[:, None, None]
        if left.shape[-1] < right.shape[-1]:
            left = left * by_user
        else:
            right = right * by_user
        return left.flatten(0, 1).T @ right.flatten(0, 1)

    def without_users(self, kept: torch.Tensor) -> FactoredGradients:
        """Returns the same with zeros for users not `kept`, (U,)."""
        by_user = kept[:, None, None]
        return FactoredGradients(
            *(torch.where(by_user, factor, 0.0) for factor in (self.left, self.right))
        )


def is_shorter(num_tokens: int, d_left: int, d_right: int) -> bool:
    """Returns whether the factors of a user's gradient are smaller than the gradient."""
    return num_tokens * (d_left + d_right) < d_left * d_right
