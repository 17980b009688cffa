"""Fits Platt scaling to what held-out users' scores and outcomes add up to.

    Odds of each user -> sums over users -> Tally -> fit() | fit_noised() -> Fit

The sums are all that the likelihood of `sigmoid(slope * score + intercept)` needs: how probable
a positive is, how high positives score, and where all candidates score. With few users a made-up
one and a prior keep the fit sane: slope 1, since both losses train scores to be log odds or logits.

With `evaluate.private` the sums have noise of a known deviation. The slope then leaves the prior
only as far as the noise allows, and so does the intercept: its prior takes the public scores for
those of all users.

Source: Platt (1999), Probabilistic outputs for support vector machines; Guo et al. (2017),
arXiv:1706.04599, for the calibration error.

Shape suffixes: B = bins, M = nodes, A = slopes tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from raysys.evaluate.calibrate import Calibration, Event, Fit, sigmoid
from raysys.evaluate.estimate import Array
from raysys.evaluate.odds import EVENTS, FINE, Bins

PRIOR_SLOPE_STD = 0.5
PRIOR_INTERCEPT_STD = 1.0
_SLOPES = np.sinh(np.linspace(0.0, np.arcsinh(20.0), 120))
"""(A,) tried, closer together where they are small."""
_LEAST_RATE = 1e-9
NUM_ERROR_BINS = 10
PRIOR_SHOWN_RATE = 0.05
MIN_SHOWN_USERS = 20
"""With fewer held-out users who were shown something, probabilities are of what is taken."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Sums over held-out users, divided by their number."""

    bins: Bins
    num_users: float
    rate: float
    """Share of positives, each user weighing the same."""
    lift: float
    """The same of positives, each by its offset: mean of a positive's times `rate`."""
    candidates: Array
    """(B,) share of the candidates in each bin."""
    num_pairs: float = 0.0
    """Candidates of all users; 0 where not released."""
    positives: Array | None = None
    """(B,) share of the candidates that are positives in each bin; None where not released."""

    @classmethod
    def of(cls, totals: Array) -> Tally:
        """From exact sums of one event, (4 + 2 B,): see `Odds.totals`."""
        num_users, num_pairs = float(totals[0]), float(totals[1])
        means = totals[2:] / max(num_users, 1.0)
        candidates, positives = np.split(means[2:], 2)
        return cls(
            bins=FINE, num_users=num_users, num_pairs=num_pairs, rate=float(means[0]),
            lift=float(means[1]), candidates=candidates, positives=positives,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """Standard deviations of the noise in a tally."""

    rate: float
    lift: float
    candidates: Array
    """(B,) of each bin."""


def fit(tally: Tally, event: Event, center: float, prior_rate: float) -> Fit | None:
    """Returns the most probable calibration, None without a user.

    Args:
      center: The score at offset 0.
      prior_rate: Base rate of one made-up user.
    """
    if tally.num_users < 1:
        return None
    rate = (tally.rate * tally.num_users + prior_rate) / (tally.num_users + 1)
    rate = min(max(rate, _LEAST_RATE), 1 - _LEAST_RATE)
    # The made-up user's positives score as the real ones do.
    lift = tally.lift * (rate / tally.rate if tally.rate > 0 else 0.0)
    nodes, masses = _occupied(tally.bins, tally.candidates)

    def log_posterior(slopes: Array) -> Array:
        intercepts = _intercepts(slopes, nodes, masses, rate)
        surprise = np.logaddexp(0, slopes[:, None] * nodes + intercepts[:, None]) @ masses
        likelihood = slopes * lift + intercepts * rate - surprise
        out: Array = tally.num_pairs * likelihood - _prior(slopes)
        return out

    slope = _best(log_posterior)
    (offset,) = _intercepts(np.array([slope]), nodes, masses, rate)
    return _fit_of(tally, event, slope, float(offset), center)


def fit_noised(tally: Tally, noise: Noise, event: Event, center: float, reference: Array) -> Fit:
    """Returns the most probable calibration from noised sums.

    Args:
      tally: Its rate lies in (0, 1), its candidates are shares.
      reference: (B,) share of the items in each bin for a user of whom nothing is known. Public.
    """
    bins, rate = tally.bins, tally.rate
    nodes, masses = bins.nodes, bins.spread(tally.candidates)
    shares = bins.spread(np.ones_like(tally.candidates))

    def by_bin(values: Array) -> Array:
        parts: Array = (values * shares).reshape(-1, len(bins), bins.num_nodes).sum(axis=2)
        return parts

    def log_posterior(slopes: Array) -> Array:
        intercepts = _intercepts(slopes, nodes, masses, rate)
        chances = sigmoid(slopes[:, None] * nodes + intercepts[:, None])
        mean = (chances * nodes) @ masses / rate
        moved = by_bin(chances * (nodes - mean[:, None])) * noise.candidates
        std = np.sqrt(noise.lift**2 + (noise.rate * mean) ** 2 + (moved**2).sum(axis=1))
        likelihood: Array = -0.5 * ((tally.lift - rate * mean) / std) ** 2 - np.log(std)
        return likelihood - _prior(slopes)

    slope = _best(log_posterior)
    slopes = np.array([slope])
    (found,) = _intercepts(slopes, nodes, masses, rate)
    (public,) = _intercepts(slopes, nodes, bins.spread(reference), rate)
    chances = sigmoid(slope * nodes + found)
    moved = float(np.linalg.norm(by_bin(chances[None]) * noise.candidates))
    variance = (moved / ((chances * (1 - chances)) @ masses)) ** 2
    weight = PRIOR_INTERCEPT_STD**2 / (PRIOR_INTERCEPT_STD**2 + variance)
    return _fit_of(tally, event, slope, float(weight * found + (1 - weight) * public), center)


def fit_halves(halves: Array, center: float, num_items: int) -> Fit | None:
    """Returns the fit on all users, with the error of what each half's fit says of the other.

    The event is an outcome of what was shown, where enough users were shown something.

    Args:
      halves: (2, E, 4 + 2 B): `Odds.totals` of either half of the held-out users.
    """
    shown = EVENTS.index("shown")
    event: Event = "shown" if halves[:, shown, 0].sum() >= MIN_SHOWN_USERS else "taken"
    prior_rate = PRIOR_SHOWN_RATE if event == "shown" else 1 / max(num_items, 1)
    sums = halves[:, EVENTS.index(event)]
    fitted = fit(Tally.of(sums.sum(axis=0)), event, center, prior_rate)
    tallies = [Tally.of(half) for half in sums]
    others = [fit(tally, event, center, prior_rate) for tally in reversed(tallies)]
    errors = [
        calibration_error(tally, other.calibration, center) * tally.num_users
        for tally, other in zip(tallies, others, strict=True)
        if other is not None
    ]
    if fitted is None or len(errors) < len(tallies):
        return fitted
    return dataclasses.replace(fitted, expected_error=sum(errors) / float(sums[:, 0].sum()))


def _fit_of(tally: Tally, event: Event, slope: float, offset: float, center: float) -> Fit:
    masses = tally.bins.spread(tally.candidates)
    return Fit(
        slope=slope,
        intercept=offset - slope * center,
        event=event,
        num_users=round(tally.num_users),
        base_rate=tally.rate,
        mean_predicted=float(sigmoid(slope * tally.bins.nodes + offset) @ masses),
    )


def calibration_error(tally: Tally, fitted: Calibration, center: float) -> float:
    """Returns the mean distance between probability and observed rate of the candidates.

    Candidates are put into `NUM_ERROR_BINS` bins by score, so that as many positives are expected
    in each: of rare events, bins of equal numbers would tell the ranking's tail alone.
    """
    assert tally.positives is not None
    nodes, observed = tally.bins.nodes, tally.positives
    predicted = tally.candidates * sigmoid(fitted.slope * (nodes + center) + fitted.intercept)
    before = np.cumsum(predicted) - predicted
    place = (NUM_ERROR_BINS * before / max(predicted.sum(), 1e-300)).astype(np.int64)
    gaps = np.bincount(np.clip(place, 0, NUM_ERROR_BINS - 1), predicted - observed)
    return float(np.abs(gaps).sum())


def _occupied(bins: Bins, candidates: Array) -> tuple[Array, Array]:
    nodes, masses = bins.nodes, bins.spread(candidates)
    return nodes[masses > 0], masses[masses > 0]


def _prior(slopes: Array) -> Array:
    out: Array = 0.5 * ((slopes - 1) / PRIOR_SLOPE_STD) ** 2
    return out


def _best(log_posterior: Callable[[Array], Array]) -> float:
    """Returns the best slope by two grids, the second between the neighbours of the best."""
    place = int(np.argmax(log_posterior(_SLOPES)))
    near = _SLOPES[max(place - 1, 0)], _SLOPES[min(place + 1, len(_SLOPES) - 1)]
    finer = np.linspace(*near, 41)
    return float(finer[int(np.argmax(log_posterior(finer)))])


def _intercepts(slopes: Array, nodes: Array, masses: Array, rate: float) -> Array:
    """Returns with which intercept each slope has this mean probability, (A,), by bisection."""
    log_odds = slopes[:, None] * nodes
    middle = np.log(rate) - np.log1p(-rate)
    low = middle - log_odds.max(axis=1) - 1
    high = middle - log_odds.min(axis=1) + 1
    for _ in range(40):
        guess = (low + high) / 2
        too_low = sigmoid(log_odds + guess[:, None]) @ masses < rate
        low, high = np.where(too_low, guess, low), np.where(too_low, high, guess)
    found: Array = (low + high) / 2
    return found
