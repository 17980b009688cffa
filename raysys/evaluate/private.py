"""Releases an evaluation with noise: one Gaussian mechanism over sums of what each user adds.

    Figures of each user -> Release.total() -> sums over all shards -> Release.noise() (the driver)
        -> Release.comparison() -> gate, report, ledger

A user is one row of sums. The row is a list of parts; each is clipped to its bound in L2 norm and
given a share of the privacy, and in units of `bound / sqrt(share)` no row is longer than 1. A user
is either held out or trained on, and fills the parts of that group alone. Leaving a user out
therefore moves the sums by at most `l2_sensitivity`, and the noise is a multiple of that. What is
made of the noised sums costs nothing more.

AUC comes from a histogram: a user's positives, weighing 1 together, over the share of negatives
that each outranks. A positive between two knots is split between both in proportion, so the
histogram keeps the mean exactly. Other figures are sums around the middle of their range. After is
before plus difference: both are nearly the same for a user, and the difference needs less noise.

Calibration gets a tenth of what held-out users have: how often the event happens, how high its
positives score, and a histogram of all candidates' scores. In that, high scores count more: the
few candidates there carry most of the odds, and would drown in the noise of their share.

Source: the Gaussian mechanism, Dwork and Roth (2014), appendix A.

Shape suffixes: U = users, D = coordinates of the sums, B = knots or bins, E = events.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from raysys.config import EvaluateConfig
from raysys.evaluate.calibrate import Event, Fit
from raysys.evaluate.estimate import (
    Z_95,
    Array,
    Estimate,
    NoisedSum,
    bounded_mean,
    histogram_mean,
    is_too_few,
    mean_change,
    shares,
)
from raysys.evaluate.metrics import METRIC_NAMES, Comparison
from raysys.evaluate.odds import COARSE, EVENTS, FINE, Bins, Odds
from raysys.evaluate.platt import Noise, Tally, fit_noised

KNOTS = np.linspace(0.0, 1.0, 5)
"""(B,) shares of negatives outranked. More knots cost noise: AUC's grows with sqrt(B / 12)."""
MAX_TAKEN = 32
"""Items that one user takes in a window, at most, as calibration counts them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some coordinates of the sums."""

    width: int
    bound: float
    """Largest L2 norm that one user may have in it: what is longer is clipped."""
    share: float
    """Of the privacy, out of 1 for all parts of a group of users."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What was measured, a row for each case."""

    held_out: NDArray[np.bool_]
    """(U,)."""
    is_ranked: NDArray[np.bool_]
    """(U,) false where the row is of what a held-out user was shown: it counts for calibration
    alone. Such a user may have another row, but none that fills the same parts."""
    before: Array
    """(U, 3) `METRIC_NAMES` under the previous weights."""
    after: Array
    """(U, 3) under the new ones; of no meaning for users who are not held out."""
    masses: Array
    """(U, B) of the previous weights: `auc_masses`."""
    odds: Odds
    """(U, ...) of held-out users under the new weights, in bins of `bins_of`."""


def auc_masses(outranked: Array) -> Array:
    """Returns a user's histogram, (B,), of total 1.

    Args:
      outranked: (P,) share of the negatives that each positive outranks, at least one.

    >>> auc_masses(np.array([1.0, 0.625])).tolist()
    [0.0, 0.0, 0.25, 0.25, 0.5]
    """
    place = np.clip(outranked, 0, 1) * (len(KNOTS) - 1)
    left = np.minimum(place.astype(np.int64), len(KNOTS) - 2)
    right_share = place - left
    out = np.bincount(left, 1 - right_share, len(KNOTS))
    out += np.bincount(left + 1, right_share, len(KNOTS))
    return out / len(outranked)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """The mechanism: bounds and shares of the parts, and what is made of their noised sums."""

    parts: dict[str, Part]
    """In the order of the coordinates; `seen.` parts are of other users than all others."""
    noise_multiplier: float
    max_difference: float
    event: Event
    """Of calibration."""
    max_rate: float
    """Largest rate of the event that one user counts with."""

    @classmethod
    def of(cls, config: EvaluateConfig, event: Event = "taken", num_items: int = 1) -> Release:
        """Most of the privacy goes to what the gate reads: the difference of NDCG@10.

        Args:
          event: Of calibration; what it is must not depend on what one user did.
          num_items: Of the catalogue.
        """
        limit, shown = config.max_difference, event == "shown"
        wide = 1.0  # a conversion comes, goes or stays: clipped, it would count as a part of one
        parts = {
            "held.count": Part(width=1, bound=1.0, share=0.09),
            "held.ndcg10": Part(width=1, bound=0.5, share=0.09),
            "held.conversion10": Part(width=1, bound=0.5, share=0.04),
            "held.auc": Part(width=KNOTS.size, bound=1.0, share=0.07),
            "change.ndcg10": Part(width=1, bound=limit, share=0.47),
            "change.conversion10": Part(width=1, bound=wide, share=0.03),
            "change.auc": Part(width=1, bound=limit, share=0.03),
            "square.ndcg10": Part(width=1, bound=limit**2 / 2, share=0.05),
            "square.conversion10": Part(width=1, bound=wide**2 / 2, share=0.02),
            "square.auc": Part(width=1, bound=limit**2 / 2, share=0.01),
            "fit.rate": Part(width=1, bound=0.5, share=0.03),
            "fit.lift": Part(width=1, bound=1.0, share=0.02),
            "fit.scores": Part(width=len(COARSE), bound=1.0, share=0.03 if shown else 0.05),
            "seen.count": Part(width=1, bound=1.0, share=0.25),
            "seen.ndcg10": Part(width=1, bound=0.5, share=0.30),
            "seen.conversion10": Part(width=1, bound=0.5, share=0.20),
            "seen.auc": Part(width=KNOTS.size, bound=1.0, share=0.25),
        }
        if shown:  # to others than those whose window is judged
            parts["fit.count"] = Part(width=1, bound=1.0, share=0.02)
        max_rate = 1.0 if shown else min(1.0, MAX_TAKEN / max(num_items, 1))
        return cls(
            parts=parts, noise_multiplier=config.noise_multiplier, max_difference=limit,
            event=event, max_rate=max_rate,
        )  # fmt: skip

    @property
    def l2_sensitivity(self) -> float:
        """How far one user who comes or leaves moves the sums, in L2 norm, at most."""
        groups = [
            [p.share for name, p in self.parts.items() if name.startswith("seen.") == seen]
            for seen in (False, True)
        ]
        return max(math.sqrt(sum(shares)) for shares in groups)

    def rows(self, figures: Figures) -> Array:
        """Returns what each user adds to the sums, (U, D), none longer than `l2_sensitivity`."""
        change = figures.after - figures.before
        columns: dict[str, Array] = {}
        for group in ("held", "seen"):
            columns[f"{group}.count"] = np.ones(len(change))
            columns[f"{group}.auc"] = figures.masses
            for i, name in enumerate(METRIC_NAMES[:2]):
                columns[f"{group}.{name}"] = figures.before[:, i] - 0.5
        for i, name in enumerate(METRIC_NAMES):
            limit = self.parts[f"change.{name}"].bound
            clipped = np.clip(change[:, i], -limit, limit)
            columns[f"change.{name}"] = clipped
            columns[f"square.{name}"] = clipped**2 - limit**2 / 2
        columns |= self._fit_columns(figures.odds)
        fitted = figures.odds.is_fitted[:, EVENTS.index(self.event)]
        members = {
            "held": figures.held_out & figures.is_ranked,
            "seen": ~figures.held_out & figures.is_ranked,
            "fit": figures.held_out & fitted,
        }
        members |= {group: members["held"] for group in ("change", "square")}
        scaled = [
            self._scaled(part, columns[name], members[name.partition(".")[0]])
            for name, part in self.parts.items()
        ]
        return np.concatenate(scaled, axis=1)

    def _fit_columns(self, odds: Odds) -> dict[str, Array]:
        event = EVENTS.index(self.event)
        rate, lift = odds.rate[:, event], odds.lift[:, event]
        return {
            "fit.count": np.ones(len(rate)),
            "fit.rate": rate / self.max_rate - 0.5,
            "fit.lift": lift / (self.max_rate * COARSE.edges[-1]),
            "fit.scores": odds.candidates[:, event] * self._bin_weights,
        }

    @property
    def _bin_weights(self) -> Array:
        """(B,) what a bin's share counts for: about what its odds are, as far as fits the bound."""
        most = max(0.5 / self.max_rate, 1.0)
        return np.minimum(np.exp(np.maximum(COARSE.middles, 0.0)), most)

    def total(self, figures: Figures) -> Array:
        """Returns the sum of the users' rows, (D,). Sensitive: only `noise` may read it."""
        total: Array = self.rows(figures).sum(axis=0)
        return total

    def noise(self, total: Array) -> Array:
        """Returns all users' sums with fresh noise of the operating system's entropy, (D,)."""
        std = self.noise_multiplier * self.l2_sensitivity
        return total + np.random.default_rng().normal(0.0, std, total.shape)

    def comparison(self, noised: Array) -> Comparison:
        """Estimates the figures from noised sums, (D,); NaN where there are too few users."""
        sums = self._sums(noised)
        count, both = sums["held.count"], sums["held.count"] + sums["seen.count"]
        before, after, difference, prequential = {}, {}, {}, {}
        for name in METRIC_NAMES:
            held, seen = sums[f"held.{name}"], sums[f"seen.{name}"]
            limit = self.parts[f"change.{name}"].bound
            change = mean_change(sums[f"change.{name}"], sums[f"square.{name}"], count, limit)
            mean = _mean(name, held, count)
            before[name] = mean.within(0.0, 1.0)
            after[name] = (mean + change).within(0.0, 1.0)
            difference[name] = change.within(-limit, limit)
            prequential[name] = _mean(name, held + seen, both).within(0.0, 1.0)
        return Comparison(
            num_holdout_users=max(round(count.value), 0),
            before=before,
            after=after,
            difference=difference,
            num_prequential_users=max(round(both.value), 0),
            prequential=prequential,
            private=True,
            max_difference=self.max_difference,
            noise_half_width=Z_95 * sums["change.ndcg10"].std / max(count.value, 1.0),
        )

    def fit(self, noised: Array, center: float, reference: Array) -> Fit | None:
        """Estimates the calibration from noised sums, (D,); None where there are too few users.

        Args:
          center: The score at offset 0. Public, as `reference`.
          reference: (B,) as for `fit_noised`.
        """
        sums = self._sums(noised)
        count = sums["fit.count" if self.event == "shown" else "held.count"]
        if is_too_few(count):
            return None
        rate, lift, scores = (sums[f"fit.{name}"] for name in ("rate", "lift", "scores"))
        found = self.max_rate * (0.5 + rate.value / count.value)
        rate_std = self.max_rate * rate.std / count.value
        unit = self.max_rate * COARSE.edges[-1] / count.value
        stds = scores.std / count.value / self._bin_weights
        # An event that noise hides is as rare as can be told.
        least = max(self.max_rate / MAX_TAKEN, 0.5 * rate_std)
        tally = Tally(
            bins=COARSE,
            num_users=count.value,
            rate=min(max(found, least), 0.99),
            lift=unit * lift.value,
            candidates=shares(scores.values / count.value / self._bin_weights, stds),
        )
        noise = Noise(rate=rate_std, lift=unit * lift.std, candidates=stds)
        return fit_noised(tally, noise, self.event, center, reference)

    def _scaled(self, part: Part, values: Array, is_member: NDArray[np.bool_]) -> Array:
        """Clips to the part's bound, whatever the figures are, and turns it into its share."""
        values = np.nan_to_num(values.reshape(len(is_member), part.width), posinf=0.0, neginf=0.0)
        norm = np.linalg.norm(values, axis=1, keepdims=True)
        clipped = values * np.minimum(1.0, part.bound / np.maximum(norm, 1e-300))
        return np.where(is_member[:, None], clipped / self._unit(part), 0.0)

    def _unit(self, part: Part) -> float:
        return part.bound / math.sqrt(part.share)

    def _sums(self, noised: Array) -> dict[str, NoisedSum]:
        sums, start = {}, 0
        for name, part in self.parts.items():
            unit = self._unit(part)
            std = unit * self.noise_multiplier * self.l2_sensitivity
            values = noised[start : start + part.width] * unit
            sums[name] = NoisedSum(values=values, std=std)
            start += part.width
        return sums


def _mean(name: str, total: NoisedSum, count: NoisedSum) -> Estimate:
    return histogram_mean(total, count, KNOTS) if name == "auc" else bounded_mean(total, count)


def bins_of(config: EvaluateConfig) -> Bins:
    """Returns the bins of an evaluation's `Odds`."""
    return COARSE if config.private else FINE
