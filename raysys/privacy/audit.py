"""How much privacy a run is seen to lose: lower bounds of epsilon, to set beside the claimed one.

    canaries' scores -> plan_guesses(), count_correct(), one_run_epsilon()    one run, all canaries
                     -> plan_threshold(), threshold_epsilon(), roc()          with against without

An accountant says what a run loses at most if the engine does what it says. These bounds say what
it lost at least, whatever the engine does: one above the claim proves the engine wrong, one below
proves nothing. What can be chosen (how many guesses, which threshold) is chosen from simulated
scores of the claimed mechanism, before any score of the run is seen. The less a bound assumes, the
looser it is:

    one_run_epsilon()     nothing
    threshold_epsilon()   scores do not depend on one another
    gaussian_noise()      and noise is Gaussian: only how much of it is in question

>>> round(one_run_epsilon(num_canaries=1000, num_guesses=1000, num_correct=731), 2)
0.88

Sources: Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846), Theorem 5.2 and Appendix D; thresholds
and canaries by gradient: Nasr et al. 2023 (arXiv 2302.07956).

Shape suffixes: M = canaries, N = scores.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Scores = NDArray[np.float64]
CONFIDENCE = 0.95
_NUM_SIMULATED = 20_000
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
"""Of all canaries, which `plan_guesses` considers guessing to be in, and to be out."""
_QUANTILES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
"""Of scores without a canary, which `plan_threshold` considers; and of those with one."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A mechanism as the accountant sees it: Poisson-sampled Gaussian steps."""

    num_steps: int
    sampling_prob: float
    noise_multiplier: float

    def log_likelihood_ratio(self, seen: NDArray[np.floating]) -> Scores:
        """Returns how much more one step looks like one of a world with the canary, as a logarithm.

        No test tells the worlds apart better than the sum over all steps (Neyman and Pearson).

        Args:
          seen: (..., M) the released sum along each canary's direction, over the clip norm, all
            that is known taken off: 1 plus noise where the canary was sampled, else noise.
        """
        variance = self.noise_multiplier**2
        sampled = (np.asarray(seen, np.float64) - 0.5) / variance
        if self.sampling_prob == 1:
            return sampled
        prob = self.sampling_prob
        return np.logaddexp(math.log1p(-prob), math.log(prob) + sampled)

    def simulate(
        self, rng: np.random.Generator, num: int = _NUM_SIMULATED
    ) -> tuple[Scores, Scores]:
        """Returns scores (num,) of runs with a canary and of runs without, if the claim holds."""
        with_canary, without = np.zeros(num), np.zeros(num)
        for _ in range(self.num_steps):
            sampled = rng.random(num) < self.sampling_prob
            noise = rng.normal(0, self.noise_multiplier, (2, num))
            with_canary += self.log_likelihood_ratio(sampled + noise[0])
            without += self.log_likelihood_ratio(noise[1])
        return with_canary, without


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guesses:
    """How many canaries are guessed, chosen before scores are seen. The others count for nothing.

    >>> Guesses(num_in=2, num_out=1).num
    3
    """

    num_in: int
    """The highest scores are guessed to be of canaries that took part."""
    num_out: int
    """The lowest, of canaries that did not."""

    @property
    def num(self) -> int:
        """All guesses, r in the paper."""
        return self.num_in + self.num_out


def one_run_p_value(
    *, num_canaries: int, num_guesses: int, num_correct: int, epsilon: float, delta: float
) -> float:
    """Returns at most how likely so many right guesses are if the run is (epsilon, delta)-private.

    Each canary took part with probability 1/2, independent of all else. Neighbouring relation: add
    or remove one.

    Raises:
      ValueError: Not 0 <= num_correct <= num_guesses <= num_canaries.
    """
    if not 0 <= num_correct <= num_guesses <= num_canaries:
        raise ValueError(
            f"expected 0 <= right <= guesses <= canaries, got {num_correct} <= {num_guesses} <= "
            f"{num_canaries}"
        )
    if num_correct == 0:
        return 1.0
    # A guess is right at most as often as that of randomised response.
    accuracy = 1 / (1 + math.exp(-epsilon))
    p_value = float(special.bdtrc(num_correct - 1, num_guesses, accuracy))
    if delta > 0:
        below = _binomial_pmf(np.arange(num_correct)[::-1], num_guesses, accuracy)
        worst = float((np.cumsum(below) / np.arange(1, num_correct + 1)).max())
        p_value += 2 * num_canaries * delta * worst
    return min(p_value, 1.0)


def _binomial_pmf(k: NDArray[np.int64], n: int, prob: float) -> NDArray[np.float64]:
    """As `scipy.stats.binom.pmf`, which spends ten times as long on looking at its arguments."""
    ways = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    out: NDArray[np.float64] = np.exp(ways + k * math.log(prob) + (n - k) * math.log1p(-prob))
    return out


def one_run_epsilon(
    *,
    num_canaries: int,
    num_guesses: int,
    num_correct: int,
    delta: float = 0.0,
    confidence: float = CONFIDENCE,
) -> float:
    """Returns the epsilon that one run shows at least, with `confidence`; 0 if it shows none.

    >>> round(one_run_epsilon(num_canaries=100, num_guesses=100, num_correct=100), 2)
    3.49
    >>> one_run_epsilon(num_canaries=1000, num_guesses=1000, num_correct=500)
    0.0
    """

    def refuted(epsilon: float) -> bool:
        p_value = one_run_p_value(
            num_canaries=num_canaries, num_guesses=num_guesses, num_correct=num_correct,
            epsilon=epsilon, delta=delta,
        )  # fmt: skip
        return p_value < 1 - confidence

    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def count_correct(scores: Scores, included: NDArray[np.bool_], guesses: Guesses) -> int:
    """Returns how many guesses are right, for scores (M,) and whether each canary took part."""
    order = np.argsort(scores, kind="stable")
    low, high = order[: guesses.num_out], order[len(order) - guesses.num_in :]
    return int(included[high].sum() + (~included[low]).sum())


def plan_guesses(
    simulated: tuple[Scores, Scores],
    num_canaries: int,
    *,
    delta: float,
    confidence: float = CONFIDENCE,
) -> Guesses:
    """Returns the guesses that should show most, by `Claim.simulate`."""
    with_canary, without = simulated
    took_part = np.repeat([True, False], [len(with_canary), len(without)])
    took_part = took_part[np.argsort(np.concatenate([with_canary, without]))]
    total = len(took_part)
    numbers = sorted({0, *(round(share * num_canaries) for share in _SHARES)})

    def expected(guesses: Guesses) -> float:
        low = round(guesses.num_out / num_canaries * total)
        high = round(guesses.num_in / num_canaries * total)
        right = (~took_part[:low]).sum() + took_part[total - high :].sum()
        return one_run_epsilon(
            num_canaries=num_canaries, num_guesses=guesses.num,
            num_correct=min(int(right * num_canaries / total), guesses.num),
            delta=delta, confidence=confidence,
        )  # fmt: skip

    options = [Guesses(num_in=i, num_out=o) for i in numbers for o in numbers]
    possible = [guesses for guesses in options if 0 < guesses.num <= num_canaries]
    return max(possible, key=lambda guesses: (expected(guesses), guesses.num))


def threshold_epsilon(
    with_canary: Scores,
    without: Scores,
    threshold: float,
    *,
    delta: float = 0.0,
    confidence: float = CONFIDENCE,
) -> float:
    """Returns the epsilon that two worlds show at least, with `confidence`, by one threshold.

    Args:
      with_canary: (N,) independent scores of a world with the canary.
      without: (N',) and of one without.
      threshold: Fixed before the scores were seen. Above it, one says "with".

    Both rates get a one-sided Clopper-Pearson bound at half of what may err.

    >>> far = np.arange(1000.0)
    >>> round(threshold_epsilon(far, far - 1000, 0.0), 2)
    5.6
    """
    may_err = (1 - confidence) / 2
    hits, alarms = int((with_canary >= threshold).sum()), int((without >= threshold).sum())
    hit_rate = float(stats.beta.ppf(may_err, hits, len(with_canary) - hits + 1)) if hits else 0.0
    alarm_rate = 1.0
    if alarms < len(without):
        alarm_rate = float(stats.beta.ppf(1 - may_err, alarms + 1, len(without) - alarms))
    shown = [
        math.log((much - delta) / little)
        for much, little in ((hit_rate, alarm_rate), (1 - alarm_rate, 1 - hit_rate))
        if much > delta
    ]
    return max([0.0, *shown])


def plan_threshold(
    simulated: tuple[Scores, Scores],
    num_with: int,
    num_without: int,
    *,
    delta: float,
    confidence: float = CONFIDENCE,
) -> float:
    """Returns the threshold that should show most for so many scores, by `Claim.simulate`."""
    with_canary, without = simulated
    options = [
        *np.quantile(without, _QUANTILES),
        *np.quantile(with_canary, [1 - quantile for quantile in _QUANTILES]),
    ]

    def expected(threshold: float) -> float:
        # As many scores as there will be, at the same quantiles.
        some, others = (
            np.quantile(scores, (np.arange(num) + 0.5) / num)
            for scores, num in ((with_canary, num_with), (without, num_without))
        )
        return threshold_epsilon(some, others, threshold, delta=delta, confidence=confidence)

    return float(max(options, key=expected))


def gaussian_noise(
    with_canary: Scores, without: Scores, claim: Claim, *, confidence: float = CONFIDENCE
) -> float:
    """Returns the noise multiplier that runs had at most, with `confidence`, if noise is Gaussian.

    Args:
      with_canary: (N,) what the steps released along a canary's direction over the clip norm, all
        steps added up; at least some dozens, since their mean is taken for normal.
      without: (N',) the same along directions of canaries that did not take part.

    Noise is read off the directions of nobody, a user's weight off the others.

    Returns:
      Infinity where the canaries had no weight to be seen.
    """
    may_err = (1 - confidence) / 2
    per_step = (without**2).sum() / claim.num_steps
    noise = math.sqrt(per_step / float(stats.chi2.ppf(may_err, len(without))))
    steps = claim.num_steps * claim.sampling_prob
    error = with_canary.std(ddof=1) / math.sqrt(len(with_canary))
    weight = (with_canary.mean() - float(stats.norm.isf(may_err)) * error) / steps
    return noise / float(weight) if weight > 0 else math.inf


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Roc:
    """How well scores tell a world with a canary from one without."""

    tpr_at_1_percent_fpr: float
    """True positives where one in a hundred scores without a canary is a false one."""
    auc: float
    """Chance that a score with a canary is above one without."""


def roc(with_canary: Scores, without: Scores) -> Roc:
    """Returns the two figures of (N,) scores with a canary and (N',) without.

    >>> roc(np.arange(1.0, 101.0), np.arange(100.0))
    Roc(tpr_at_1_percent_fpr=0.01, auc=0.50995)
    """
    threshold = np.quantile(without, 0.99, method="higher")
    ranks = stats.rankdata(np.concatenate([with_canary, without]))[: len(with_canary)]
    wins = ranks.sum() - len(with_canary) * (len(with_canary) + 1) / 2
    return Roc(
        tpr_at_1_percent_fpr=float((with_canary > threshold).mean()),
        auc=float(wins / (len(with_canary) * len(without))),
    )
