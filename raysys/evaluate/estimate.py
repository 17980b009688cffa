"""Means and their intervals from sums that were noised: post-processing, which costs no privacy.

    NoisedSum of a figure, NoisedSum of the number of users -> Estimate -> Interval

An interval joins what sampling of users adds and what noise adds, by the delta method: the noise of
the sum, and of the number of users that it is divided by. The variance over users is not known
exactly either. Of a figure in [low, high] with mean m it is at most (m - low)(high - m): Bhatia and
Davis (2000), Amer. Math. Monthly 107:353-357. Squares and histograms tell more.

Shape suffix: B = knots of a histogram.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from raysys.evaluate.metrics import Interval

Array = NDArray[np.float64]

Z_95 = 1.96
MIN_COUNT_STDS = 3.0
"""With fewer users than so many deviations of the noise in their number, nothing can be told."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NoisedSum:
    """A part's noised sums and the standard deviation of the noise in each."""

    values: Array
    std: float

    def __add__(self, other: NoisedSum) -> NoisedSum:
        return NoisedSum(values=self.values + other.values, std=math.hypot(self.std, other.std))

    @property
    def value(self) -> float:
        """The sum of a part that has only one."""
        (value,) = self.values.tolist()
        return float(value)

    def weighted(self, weights: Array) -> NoisedSum:
        """Returns the sum of a histogram with a weight for each knot, (B,)."""
        total = np.array([weights @ self.values])
        return NoisedSum(values=total, std=self.std * float(np.linalg.norm(weights)))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and half its 95% interval. Noise may bring either end out of range."""

    mean: float
    half: float

    def __add__(self, other: Estimate) -> Estimate:
        # Of the same users, so the halves add up at worst.
        return Estimate(mean=self.mean + other.mean, half=self.half + other.half)

    def within(self, low: float, high: float) -> Interval:
        """Returns it as far as it is possible."""
        ends = (self.mean, self.mean - self.half, self.mean + self.half)
        return Interval(
            **dict(zip(("mean", "low", "high"), np.clip(ends, low, high).tolist(), strict=True))
        )


def bounded_mean(total: NoisedSum, count: NoisedSum) -> Estimate:
    """Mean of a figure in [0, 1], from the sum of what it exceeds 1/2 by."""
    if is_too_few(count):
        return _UNKNOWN
    mean = 0.5 + total.value / count.value
    likely = _limited(mean, 0.0, 1.0)
    return _estimate(mean, likely * (1 - likely), total, count, slope=likely - 0.5)


def histogram_mean(masses: NoisedSum, count: NoisedSum, knots: Array) -> Estimate:
    """Mean of a figure in [0, 1], from its histogram, which tells its variance too."""
    if is_too_few(count):
        return _UNKNOWN
    total = masses.weighted(knots - 0.5)
    mean = 0.5 + total.value / count.value
    likely = _limited(mean, 0.0, 1.0)
    variance = _variance(masses.weighted((knots - likely) ** 2), count, likely * (1 - likely))
    return _estimate(mean, variance, total, count, slope=likely - 0.5)


def mean_change(total: NoisedSum, square: NoisedSum, count: NoisedSum, limit: float) -> Estimate:
    """Mean of changes in [-limit, limit], from their sum and that of squares less their middle."""
    if is_too_few(count):
        return _UNKNOWN
    mean = total.value / count.value
    likely = _limited(mean, -limit, limit)
    # Squares were summed around their middle: put that back, and the mean's own square apart.
    apart = np.array([(limit**2 / 2 - likely**2) * count.value])
    deviations = NoisedSum(values=square.values + apart, std=square.std)
    variance = _variance(deviations, count, limit**2 - likely**2)
    return _estimate(mean, variance, total, count, slope=likely)


def _variance(deviations: NoisedSum, count: NoisedSum, largest: float) -> float:
    """Returns the mean squared deviation and one deviation of its noise more.

    Noise that lowered it would make the interval miss more often than it says.
    """
    return _limited((deviations.value + deviations.std) / count.value, 0.0, largest)


def _estimate(
    mean: float, variance: float, total: NoisedSum, count: NoisedSum, *, slope: float
) -> Estimate:
    """Joins what users and noise add: noise of the sum, and of the number it is divided by."""
    noise = math.hypot(total.std, slope * count.std) / count.value
    return Estimate(mean=mean, half=Z_95 * math.sqrt(variance / count.value + noise**2))


_UNKNOWN = Estimate(mean=math.nan, half=math.nan)


def _limited(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def is_too_few(count: NoisedSum) -> bool:
    """Whether noise hides how many users there are, so that no mean over them can be told."""
    return count.value < max(MIN_COUNT_STDS * count.std, 1.0)


def shares(values: Array, stds: Array) -> Array:
    """Returns the most likely shares, (B,), none negative and of total 1, given noisy ones.

    Each gives way to the total as its variance allows.

    >>> shares(np.array([0.5, 0.75, -0.25]), np.ones(3)).round(6).tolist()
    [0.375, 0.625, 0.0]
    """
    low, high = float(((values - 1) / stds**2).min()), float((values / stds**2).max())
    for _ in range(200):
        middle = (low + high) / 2
        too_high = np.maximum(values - middle * stds**2, 0.0).sum() > 1
        low, high = (middle, high) if too_high else (low, middle)
    found = np.maximum(values - high * stds**2, 0.0)
    out: Array = found / found.sum()
    return out
