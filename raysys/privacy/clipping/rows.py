"""Whose row each row is, and sums over a user's rows.

    user_of_row (N,) -> UserRows -> outer(grad, x): (U, d_grad, d_x), one matrix product a user

Users whose rows stand together and are equally many, which is how batches are made, take one
batched product of views. Otherwise users are grouped by their number of rows, and each group is one
batched product of gathered rows: exact, no padding, and no gradient of a single row ever exists.

Shape suffixes: U = users, N = rows, T = all axes between row and features as one (tokens, say),
G = users of a group, K = rows of each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from raysys.errors import PrivacyError


def _allow() -> None:
    return


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UserRows:
    """The users of the rows that are fed to a module."""

    num_users: int
    num_rows: int
    groups: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None
    """Of users (G,) and their rows (G, K); None where each user has the same number of rows in a
    run, users in order."""
    before_backward: Callable[[], None] = _allow
    """Called by each backward pass through these rows; raises if it may not run."""

    @classmethod
    def of(
        cls,
        user_of_row: torch.Tensor,
        num_users: int,
        before_backward: Callable[[], None] = _allow,
    ) -> UserRows:
        """Returns the rows of `user_of_row`, (N,) int64.

        Raises:
          PrivacyError: It is not a vector of int64 in [0, num_users).
        """
        if user_of_row.dim() != 1 or user_of_row.dtype != torch.int64:
            raise PrivacyError(
                "user_of_row: expected a vector of int64, found "
                f"{user_of_row.dtype} of shape {tuple(user_of_row.shape)}"
            )
        users = user_of_row.cpu()
        if len(users) and (int(users.min()) < 0 or int(users.max()) >= num_users):
            raise PrivacyError(
                f"user_of_row: expected users in [0, {num_users}), found "
                f"{int(users.min())} to {int(users.max())}"
            )
        return cls(
            num_users=num_users,
            num_rows=len(users),
            groups=_groups(users, num_users, user_of_row.device),
            before_backward=before_backward,
        )

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Returns (U, d_left, d_right): `left.T @ right` summed over each user's rows.

        Args:
          left: (N, T, d_left).
          right: (N, T, d_right).

        The sum is accumulated and returned in float32 at least.
        """
        if self.groups is None:
            return _outer(
                left.reshape(self.num_users, -1, left.shape[-1]),
                right.reshape(self.num_users, -1, right.shape[-1]),
            )
        out = left.new_zeros(
            (self.num_users, left.shape[-1], right.shape[-1]), dtype=_wide(left.dtype)
        )
        for users, rows in self.groups:
            out[users] = _outer(left[rows].flatten(1, 2), right[rows].flatten(1, 2))
        return out

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Returns (U, ...): values (N, T, ...) summed over each user's rows, like `outer`."""
        wide = _wide(values.dtype)
        if self.groups is None:
            return values.reshape(self.num_users, -1, *values.shape[2:]).sum(1, dtype=wide)
        by_row = values.sum(1, dtype=wide)
        out = by_row.new_zeros((self.num_users, *by_row.shape[1:]))
        for users, rows in self.groups:
            out[users] = by_row[rows].sum(1)
        return out


def _groups(
    users: torch.Tensor, num_users: int, device: torch.device
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...] | None:
    counts = torch.bincount(users, minlength=num_users)
    if torch.equal(users, torch.arange(num_users).repeat_interleave(len(users) // num_users)):
        return None
    order = torch.argsort(users, stable=True)
    starts = counts.cumsum(0) - counts
    groups = []
    for count in sorted(set(counts.tolist())):
        if count:
            of_count = (counts == count).nonzero()[:, 0]
            rows = order[starts[of_count, None] + torch.arange(count)]
            groups.append((of_count.to(device), rows.to(device)))
    return tuple(groups)


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    wide = _wide(left.dtype)
    return torch.bmm(left.transpose(1, 2).to(wide), right.to(wide))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
