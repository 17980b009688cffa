"""Audits the private engine as a shop's config runs it, on users who do not exist.

    config -> claim; made-up users + canaries -> train_on_shards() -> bounds beside the claim

It runs what an update's worker runs: the plan's sampler and optimizer, the ranker, the loop. Its
users are made up, so there is nothing to charge: of the root it reads one file of the catalogue,
which is public, and it writes nothing. One process suffices, without Ray: how many workers share a
step changes neither the clip nor the noise, which unit tests hold.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from raysys.config import Config
from raysys.config.checks import require
from raysys.errors import ConfigError
from raysys.ingest.example_set import ExampleSet
from raysys.ingest.items import read_items
from raysys.ingest.sample import max_candidates
from raysys.ingest.stats import item_texts
from raysys.ledger.records import FileRef
from raysys.model.adapter import Adapter, activations_cut
from raysys.model.encoder import TextEncoder
from raysys.model.ranker import HeadModule
from raysys.model.scorer import Head
from raysys.partitions.layout import ITEMS
from raysys.privacy.accounting import ACCOUNTANT, RELATION, UNIT, epsilon
from raysys.privacy.audit import (
    CONFIDENCE,
    Claim,
    Roc,
    count_correct,
    gaussian_noise,
    one_run_epsilon,
    plan_guesses,
    plan_threshold,
    roc,
    threshold_epsilon,
)
from raysys.privacy.calibrate import noise_multiplier_of
from raysys.privacy.plan import PrivacyPlan
from raysys.storage import Root
from raysys.train.canaries import Canaries
from raysys.train.group import group_of_one
from raysys.train.loop import TrainJob, train_on_shards

NUM_CANARIES = 1000
"""By default, or as many as there are trained weights if these are fewer."""
MIN_CANARIES = 50
"""Of fewer, no bound says anything."""
_MAX_OTHERS = 500
_MAX_ITEMS = 200
_REQUESTS_OF_USER = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """What was claimed, and what was seen."""

    num_steps: int
    sampling_prob: float
    noise_multiplier: float
    num_runs: int
    num_others: int
    """Made-up users of each run beside the canaries."""
    num_canaries: int
    """Of all runs together."""
    num_included: int
    """Of them took part."""
    claimed_epsilon: float
    """Of these steps alone: a version's own figure has counts and further updates in it."""
    delta: float
    unit: str
    relation: str
    accountant: str
    confidence: float
    """Of the lower bounds by guesses and by threshold."""
    num_guesses: int
    num_correct: int
    one_run_epsilon: float
    """Lower bound by guessing which canaries took part, whatever the engine does."""
    threshold_epsilon: float
    """Lower bound by one threshold, fixed beforehand, for scores that are independent."""
    gaussian_epsilon: float
    """Lower bound if the noise is Gaussian, at the stricter `gaussian_confidence`: it comes close
    to the claim, which a sound engine must not exceed by chance."""
    gaussian_confidence: float
    seen: Roc
    expected: Roc
    """Of the claimed mechanism."""

    @property
    def lower_bound(self) -> float:
        """The largest of the three."""
        return max(self.one_run_epsilon, self.threshold_epsilon, self.gaussian_epsilon)

    @property
    def refuted(self) -> bool:
        """Whether the engine lost more than is claimed."""
        return self.lower_bound > self.claimed_epsilon


def audit(
    config: Config,
    *,
    num_canaries: int | None = None,
    num_steps: int | None = None,
    num_runs: int = 1,
    confidence: float = CONFIDENCE,
    on_progress: Callable[[str], None] = lambda line: None,
) -> AuditReport:
    """Trains on made-up users and canaries, and returns what the canaries' gradients show.

    Args:
      num_canaries: Of each run; at most one for each trained weight. `NUM_CANARIES` by default.
      num_steps: `train.num_steps` by default.
      num_runs: Independent ones: what they show counts together.

    Raises:
      ConfigError: Without privacy nothing is claimed; or a value is out of bounds.
    """
    num_steps = config.train.num_steps if num_steps is None else num_steps
    if num_canaries is None:
        num_canaries = min(NUM_CANARIES, _num_trained_weights(config))
    _check(config, num_canaries, num_steps, num_runs, confidence)
    # With a horizon the config itself names no noise.
    privacy = dataclasses.replace(config.privacy, noise_multiplier=noise_multiplier_of(config))
    plan = PrivacyPlan.for_update(privacy, num_steps=num_steps, num_count_releases=0)
    texts = _public_texts(config)
    runs = []
    for run in range(1, num_runs + 1):
        canaries = Canaries(
            num=num_canaries, num_others=_num_others(config), claim=_claim(plan),
            l2_clip_norm=plan.l2_clip_norm, rng=np.random.default_rng(),
        )  # fmt: skip
        on_progress(
            f"run {run} of {num_runs}: {plan.spend.num_steps} steps on {_num_others(config):,} "
            f"made-up users and {canaries.num_users:,} of {num_canaries:,} canaries"
        )
        _train(config, plan, texts, canaries)
        runs.append(canaries)
    return _report(config, plan, runs, confidence)


def _check(
    config: Config, num_canaries: int, num_steps: int, num_runs: int, confidence: float
) -> None:
    if not config.privacy.enabled:
        raise ConfigError(
            "privacy.enabled: false claims no privacy, so there is nothing to audit; set it to true"
        )
    require(num_canaries >= MIN_CANARIES, "--canaries", num_canaries, f">= {MIN_CANARIES}")
    require(num_steps >= 1, "--steps", num_steps, ">= 1")
    require(num_runs >= 1, "--runs", num_runs, ">= 1")
    require(0 < confidence < 1, "--confidence", confidence, "a fraction in (0, 1)")


def _num_trained_weights(config: Config) -> int:
    """Returns how many numbers an update trains."""
    encoder = TextEncoder(config.model.encoder, config.model.max_tokens)
    adapter = Adapter.fresh(encoder, config.model, {}, num_steps=1)
    head = HeadModule(Head.decayed_frequency(config.model.hidden_units))
    parameters = itertools.chain(adapter.encoder.model.parameters(), head.parameters())
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def _claim(plan: PrivacyPlan) -> Claim:
    return Claim(
        num_steps=plan.spend.num_steps,
        sampling_prob=plan.spend.sampling_prob,
        noise_multiplier=plan.spend.noise_multiplier,
    )


def _num_others(config: Config) -> int:
    """As many as fill a step, up to a number that makes an audit quick: the auditor knows their
    gradients, so they neither help nor hide a canary."""
    wanted = round(config.privacy.expected_batch_users / config.privacy.sampling_prob)
    return min(max(wanted, 1), _MAX_OTHERS)


def _train(config: Config, plan: PrivacyPlan, texts: list[str], canaries: Canaries) -> None:
    encoder = TextEncoder(config.model.encoder, config.model.max_tokens)
    activations = encoder.activations(texts, activations_cut(config.model))
    job = TrainJob.of(
        config,
        plan,
        head=Head.decayed_frequency(config.model.hidden_units),
        adapted_weights=None,
        text_of_item=np.arange(len(texts), dtype=np.int32),
        seed=int(np.random.default_rng().integers(2**32)),
    )
    # Canaries come last: `Canaries` knows its users by their index.
    shards = [made_up_users(n, texts, config) for n in (_num_others(config), canaries.num_users)]
    with group_of_one():
        train_on_shards(
            job, shards, activations.select(texts), num_workers=1, on_step=lambda step: None,
            probe=canaries,
        )  # fmt: skip


def _report(
    config: Config, plan: PrivacyPlan, runs: Sequence[Canaries], confidence: float
) -> AuditReport:
    claim, delta = _claim(plan), config.privacy.delta
    scores, sums, included = (
        np.concatenate([getattr(run, name) for run in runs])
        for name in ("scores", "sums", "included")
    )
    with_canary, without = scores[included], scores[~included]
    simulated = claim.simulate(np.random.default_rng())
    guesses = plan_guesses(simulated, len(scores), delta=delta, confidence=confidence)
    threshold = plan_threshold(
        simulated, len(with_canary), len(without), delta=delta, confidence=confidence
    )
    num_correct = count_correct(scores, included, guesses)
    stricter = 1 - (1 - confidence) / 100
    noise = gaussian_noise(sums[included], sums[~included], claim, confidence=stricter)
    return AuditReport(
        num_steps=claim.num_steps,
        sampling_prob=claim.sampling_prob,
        noise_multiplier=claim.noise_multiplier,
        num_runs=len(runs),
        num_others=_num_others(config),
        num_canaries=len(scores),
        num_included=len(with_canary),
        claimed_epsilon=epsilon([plan.spend], delta),
        delta=delta,
        unit=UNIT,
        relation=RELATION,
        accountant=ACCOUNTANT,
        confidence=confidence,
        num_guesses=guesses.num,
        num_correct=num_correct,
        one_run_epsilon=one_run_epsilon(
            num_canaries=len(scores), num_guesses=guesses.num, num_correct=num_correct,
            delta=delta, confidence=confidence,
        ),
        threshold_epsilon=threshold_epsilon(
            with_canary, without, threshold, delta=delta, confidence=confidence
        ),
        gaussian_epsilon=_epsilon_of_noise(plan, noise, delta),
        gaussian_confidence=stricter,
        seen=roc(with_canary, without),
        expected=roc(*simulated),
    )  # fmt: skip


def _epsilon_of_noise(plan: PrivacyPlan, noise_multiplier: float, delta: float) -> float:
    """Less noise than half of the claimed refutes it enough, and would take the accountant long."""
    if math.isinf(noise_multiplier):
        return 0.0
    noise = max(noise_multiplier, plan.spend.noise_multiplier / 2)
    return epsilon([dataclasses.replace(plan.spend, noise_multiplier=noise)], delta)


def made_up_users(num: int, texts: list[str], config: Config) -> ExampleSet:
    """Returns examples of users who chose at random among items of these texts."""
    rng = np.random.default_rng()
    out = ExampleSet.empty(num * _REQUESTS_OF_USER, max_candidates(config.ingest))
    out.user[:] = np.repeat(np.arange(num), _REQUESTS_OF_USER)
    out.candidates[:] = rng.integers(len(texts), size=out.candidates.shape)
    out.gains[:, 0] = max(config.ingest.gains.values())
    out.weight[:] = 1.0
    out.features[:] = rng.random(out.features.shape)
    out.attended[:] = rng.integers(len(texts), size=out.attended.shape)
    out.attention[:] = 1 / out.attention.shape[1]
    queries = [texts[item] if asked else "" for item, asked in
               zip(out.candidates[:, 0], rng.random(len(out.user)) < 0.5, strict=True)]  # fmt: skip
    return dataclasses.replace(out, queries=queries)


def _public_texts(config: Config) -> list[str]:
    """Returns texts of the shop's catalogue, made-up ones where it has no file that reads."""
    root = Root(config.root)
    files = [
        FileRef(path=info.path, size_bytes=info.size_bytes, etag=info.etag)
        for info in root.list(ITEMS)
        if info.path.endswith(".parquet")
    ]
    rows, _, _ = read_items(root, files[:1])
    found = [text for text in dict.fromkeys(item_texts(rows.head(_MAX_ITEMS))) if text]
    return found or [f"product {number} of category {number % 7}" for number in range(_MAX_ITEMS)]
