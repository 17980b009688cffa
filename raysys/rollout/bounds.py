"""Bounds that hold over all looks together: one may look at any time, and stop at any look.

    cluster_variance   variance of a rate whose requests are correlated by user
    design_effect      what that correlation costs
    rate_upper_bound   of a rate of rare events, exact for independent requests
    is_rate_below      whether that bound is, which is faster to tell
    drift_margin       of a difference that is roughly normal

A fixed-sample interval covers at one look; a canary that is looked at every two seconds would
leave it sooner or later although nothing is wrong. Both bounds here come from Ville's inequality:
a mixture of likelihood ratios is a non-negative martingale that starts at 1, and so it ever reaches
1 / error_probability with at most that probability (Robbins 1970; Howard et al. 2021,
arXiv 1810.08240; Waudby-Smith et al. 2021, arXiv 2103.06476).

Shape suffix: B = buckets of users.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc, betaln

_PRIOR = 0.5
"""Both parameters of the beta mixture: Krichevsky and Trofimov's, near the best for every rate."""
_TINY = 1e-12


def cluster_variance(events_b: NDArray[Any], requests_b: NDArray[Any]) -> float:
    """Returns the variance of the rate `sum(events) / sum(requests)`, users being independent.

    The delete-one jackknife over buckets of users, which are the clusters. At least two of them
    must have requests.

    >>> cluster_variance(np.array([3, 1, 2]), np.array([10, 10, 10])).__round__(6)
    0.003333
    """
    used = requests_b > 0
    events, requests = events_b[used], requests_b[used]
    num_clusters = len(requests)
    assert num_clusters >= 2
    without_one = (events.sum() - events) / (requests.sum() - requests)
    spread = np.square(without_one - without_one.mean()).sum()
    return float(spread * (num_clusters - 1) / num_clusters)


def design_effect(events_b: NDArray[Any], requests_b: NDArray[Any]) -> float:
    """Returns how many correlated requests are worth one independent request, at least 1.

    >>> rounded = round(design_effect(np.array([9, 0, 0]), np.array([10, 10, 10])), 1)
    >>> rounded  # one user fails nine times: that is one failure of three users
    12.9
    """
    events, requests = float(events_b.sum()), float(requests_b.sum())
    if not 0 < events < requests or (requests_b > 0).sum() < 2:
        return 1.0
    rate = events / requests
    return max(1.0, cluster_variance(events_b, requests_b) * requests / (rate * (1 - rate)))


def rate_upper_bound(num_events: float, num_requests: float, error_probability: float) -> float:
    """Returns a bound that the true rate exceeds at no look, but with `error_probability`.

    Tests every rate p by the mixture, over rates q < p, of the likelihood ratio of q to p: under p
    a martingale, exactly and from the first request on. The mixing law is the beta law, cut off
    at p. The counts need not be whole, so that correlated requests can be counted as fewer
    independent ones (Korn and Graubard 1998).

    >>> round(rate_upper_bound(0, 200, 0.05), 4)  # Clopper-Pearson, for one look only: 0.0149
    0.0188
    >>> rate_upper_bound(0, 0, 0.05)
    1.0
    """
    if num_events >= num_requests:
        return 1.0
    threshold = -math.log(error_probability)

    def excess(p: float) -> float:
        return _log_mixture(num_events, num_requests, p) - threshold

    if excess(1 - _TINY) <= 0:
        return 1.0
    return float(brentq(excess, max(num_events / num_requests, _TINY), 1 - _TINY))


def rate_lower_bound(num_events: float, num_requests: float, error_probability: float) -> float:
    """Returns a bound that the true rate is below at no look, but with `error_probability`."""
    return 1 - rate_upper_bound(num_requests - num_events, num_requests, error_probability)


def is_rate_below(
    num_events: float, num_requests: float, rate: float, error_probability: float
) -> bool:
    """Returns whether `rate_upper_bound` is at most `rate`, without looking for it.

    >>> is_rate_below(0, 200, 0.0189, 0.05), is_rate_below(0, 200, 0.0187, 0.05)
    (True, False)
    """
    if num_events >= rate * num_requests:
        return False
    return _log_mixture(num_events, num_requests, rate) >= -math.log(error_probability)


def _log_mixture(num_events: float, num_requests: float, p: float) -> float:
    a, b = _PRIOR + num_events, _PRIOR + num_requests - num_events
    log_posterior = betaln(a, b) + math.log(betainc(a, b, p))
    log_prior = betaln(_PRIOR, _PRIOR) + math.log(betainc(_PRIOR, _PRIOR, p))
    log_likelihood = num_events * math.log(p) + (num_requests - num_events) * math.log1p(-p)
    return float(log_posterior - log_prior - log_likelihood)


def drift_margin(variance: float, error_probability: float, *, scale: float) -> float:
    """Returns how far an estimate strays from the truth to one side at any look, from now on.

    The estimate times its information `1 / variance` is nearly a Brownian motion whose drift is
    the truth. The margin is that of the mixture over drifts with the positive half of a normal
    law of standard deviation `scale`, simplified by `1 - Phi(x) <= exp(-x**2 / 2) / 2`: a one-sided
    asymptotic confidence sequence as in Waudby-Smith et al. It is tightest, within 1 %, when the
    margin itself has the size of `scale`. Asymptotic: at the first look the estimate must be about
    normal already.

    >>> round(drift_margin(0.018**2, 0.05, scale=0.05), 3)  # 1.645 * 0.018 = 0.030 for one look
    0.05
    """
    ratio = scale**2 / variance
    log_term = math.log(0.5 + math.sqrt(1 + ratio) / (2 * error_probability))
    return math.sqrt(2 * variance * (1 + ratio) / ratio * log_term)
