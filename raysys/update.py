"""One update, from new partitions to a committed version. Read it from top to bottom.

    plan -> reserve -> ingest -> encode -> train -> compare -> gate -> publish -> commit

Nothing counts until the one commit record names it. A process that dies before that leaves a
reservation, whose privacy stays charged, and folders that nobody reads: the next update takes its
partitions and deletes its folders.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

from raysys.config import Config
from raysys.evaluate.compare import Weights, compare
from raysys.evaluate.gate import Decision, judge
from raysys.evaluate.metrics import Comparison
from raysys.evaluate.report import render_report
from raysys.ingest.items import read_items
from raysys.ingest.pipeline import Ingested, IngestJob, ingest
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.seen import key_ids, updates_to_ask
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.ledger.records import KeptLoss, UpdateCommitted, UpdateStarted, UserGroup
from raysys.ledger.state import State
from raysys.model.adapter import activations_cut
from raysys.model.catalogue import encode_new_texts
from raysys.model.encoder_files import resolve_encoder, weights_sha256
from raysys.model.scorer import Head
from raysys.partitions.discover import EVERYTHING, PartitionRange
from raysys.partitions.layout import quarantine, staging
from raysys.partitions.orphans import delete_orphans
from raysys.partitions.plan import UpdatePlan
from raysys.privacy.accounting import statement
from raysys.privacy.budget import spent_epsilon
from raysys.privacy.kept import keep
from raysys.privacy.plan import PrivacyPlan
from raysys.privacy.statement import build_statement
from raysys.registry.loaded import VersionWeights
from raysys.registry.recipe import Recipe
from raysys.registry.store import hash_state, load_weights, publish, text_indexes
from raysys.registry.version import Manifest
from raysys.reserve import Planner, check_catalogue, planned_spend, reserve
from raysys.storage import Root
from raysys.strategy import Outcome, Progress, Ready, Strategy
from raysys.train.trainer import train


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What stays the same through one update."""

    config: Config
    root: Root
    state: State
    """Right after the update was started."""
    started: UpdateStarted
    plan: UpdatePlan
    privacy: PrivacyPlan
    lease: Lease
    on_progress: Progress
    began: float

    @property
    def update_id(self) -> str:
        return self.started.update_id

    @property
    def tried(self) -> UserGroup | None:
        """The users whom a selection's trials read."""
        reserved = self.started.reserved
        return reserved.selection.group if reserved and reserved.selection else self.privacy.group


def train_once(ready: Ready) -> Outcome:
    """Trains one model, as the config says."""
    output = train(
        ready.job(ready.config, ready.privacy),
        ready.texts,
        root=ready.root,
        cache=ready.root,
        update_id=ready.started.update_id,
        num_shards=ready.ingested.num_shards,
    )
    num_steps = ready.privacy.spend.num_steps
    return Outcome(output=output, config=ready.config, num_steps=num_steps)


def run_update(
    config: Config,
    on_progress: Progress = lambda line: None,
    start_ray: Callable[[], None] = lambda: None,
    within: PartitionRange = EVERYTHING,
    strategy: Strategy | None = None,
) -> UpdateCommitted:
    """Runs one update and returns its commit record.

    Args:
      start_ray: Connects to a cluster, unless the caller has done so. Called once all that can be
        refused without one is: starting Ray takes seconds.
      within: Which partitions it may look at.
      strategy: How the new weights are made; None trains once.

    Raises:
      EmptyPlanError: Nothing is new.
      PartitionChangedError: A partition is not as it should be, and the config says `fail`.
      BudgetExhaustedError: What privacy is left does not suffice. Nothing was read or written.
      LeaseHeldError: Another update is at work.
      RaysysError: As its subclass says. The partitions stay unconsumed.
    """
    began = time.monotonic()
    root = Root(config.root)
    root.check_writable()
    keys = Pseudonymizer.from_config(config.pseudonyms)
    weights_sha256(resolve_encoder(config.model.encoder))
    activations_cut(config.model)
    log = Log(root)
    delete_orphans(root, log)
    planner = Planner(root, config, within)
    owner = f"{platform.node()}:{os.getpid()}"
    strategy = strategy or Strategy(train=train_once)

    kept: KeptLoss | None = None

    def decide(state: State) -> UpdateStarted:
        return reserve(
            state,
            planner.plan(state),
            config,
            keys=keys,
            owner=owner,
            charge=strategy.charge,
            root=root,
            kept_loss=kept,
        )

    # While another update is active, what is left for this one is open.
    if (state := log.refresh()).active is None:
        decide(state)
        _require_catalogue(root, planner.plan(state))
    start_ray()
    if config.privacy.enabled:
        kept = keep(root, log.refresh())
    with Lease(log, owner=owner, duration_s=config.lease.duration_s) as lease:
        started = lease.start(decide)
        plan = planner.latest
        assert plan.partitions == started.partitions, "what is planned is what was reserved"
        state = log.refresh()
        delete_orphans(root, log)
        if started.private:
            _tell_epsilon(config, state, root, on_progress)
        run = _Run(
            config=config, root=root, state=state, started=started, plan=plan, lease=lease,
            privacy=plan_privacy(config, plan, started), on_progress=on_progress, began=began,
        )  # fmt: skip
        record = _run(run, strategy)
        lease.commit(record)
    root.delete_prefix(staging(record.update_id))
    on_progress(f"{record.update_id} committed {record.version or 'no version'}")
    return record


def _tell_epsilon(config: Config, state: State, root: Root, on_progress: Progress) -> None:
    privacy = config.privacy
    on_progress(
        f"epsilon is {spent_epsilon(state, privacy.delta, root):.3f} of {privacy.epsilon_total:g} "
        f"with this update ({statement(privacy.delta)})"
    )


def plan_privacy(config: Config, plan: UpdatePlan, started: UpdateStarted) -> PrivacyPlan:
    """Returns the mechanisms of an update: those that the ledger has reserved."""
    return PrivacyPlan.of(config.privacy, started.reserved or planned_spend(config, plan))


def _require_catalogue(root: Root, plan: UpdatePlan) -> None:
    check_catalogue(plan)
    if plan.base_state is None:
        rows, _, bad_files = read_items(root, plan.item_files)
        if rows.is_empty():
            check_catalogue(plan, next(iter(bad_files.values()), "no rows"))


def _run(run: _Run, strategy: Strategy) -> UpdateCommitted:
    ingested = _ingest(run)
    _list_set_aside(run, ingested)
    run.lease.check()
    ready = _prepare(run, ingested)
    try:
        outcome = strategy.train(ready)
    except FileNotFoundError:
        run.lease.check()  # whoever took over has deleted what this update was working on
        raise
    trained = outcome.output
    run = dataclasses.replace(run, config=outcome.config)
    run.lease.check()
    comparison = compare(
        run.root,
        run.update_id,
        items=ingested.items_before,
        text_of_item=ready.text_of_item,
        before=Weights(head=ready.head, text=trained.text_before),
        after=Weights(head=trained.head, text=trained.text_after),
        config=run.config.evaluate,
        num_shards=ingested.num_shards,
        after_trials=outcome.after_trials,
        logs_impressions=_logs_impressions(ingested),
    )
    decision = judge(comparison, run.config.gate)
    run.on_progress(f"gate {decision.verdict}: {decision.reason}")
    version, artifacts = None, hash_state(run.root, run.update_id)
    if decision.verdict == "passed":
        version = run.state.next_version(run.update_id)
        artifacts = _publish(run, version, outcome, ready, comparison)
    return _record(run, version, artifacts, ingested, comparison, decision, outcome)


def _logs_impressions(ingested: Ingested) -> bool:
    counts = ingested.label_counts["impressions"]
    return any(counts.get(fate, 0) for fate in ("with_outcome", "without_outcome"))


def _ingest(run: _Run) -> Ingested:
    partitions = run.plan.partitions
    run.on_progress(
        f"{run.update_id} reads {len(partitions)} new partitions, {partitions[0].key} to "
        f"{partitions[-1].key}"
    )
    job = IngestJob(
        root=run.root,
        work=run.root,
        config=run.config,
        update_id=run.update_id,
        base_state=run.plan.base_state,
        partitions=partitions,
        read_before=updates_to_ask(run.state.committed, partitions),
        user_key_id=run.started.user_key_id,
        key_ids=key_ids(run.state.committed),
        seed=run.started.seed,
        group=run.privacy.group,
        tried=run.tried,
    )
    Recipe.of(run.config, read_before=job.read_before).save(run.root, run.update_id)
    ingested = ingest(job, run.plan.item_files)
    # That optional columns are not there is no news; the record has them too.
    told = {k: n for k, n in ingested.column_counts.items() if not k.startswith("missing:")}
    if told:
        run.on_progress(f"columns: {_told(told)}")
    for path, reason in ingested.quarantined_files.items():
        run.on_progress(f"quarantined file {path}: {reason}")
    run.on_progress(
        f"{ingested.num_rows:,} rows of {ingested.num_users:,} users became "
        f"{ingested.num_examples:,} examples; rows: {_told(ingested.row_counts)}; impressions: "
        f"{_told(ingested.label_counts['impressions'])}; outcomes: "
        f"{_told(ingested.label_counts['outcomes'])}; requests: "
        f"{_told(ingested.label_counts['requests'])}"
    )
    return ingested


def _list_set_aside(run: _Run, ingested: Ingested) -> None:
    """Lists what the plan left out beside the files that could not be read."""
    reasons = {aside.path: f"{aside.kind}: {aside.reason}" for aside in run.plan.set_aside}
    for path, reason in reasons.items():
        run.on_progress(f"set aside {path}: {reason}")
    if reasons:
        listed = json.dumps({**ingested.quarantined_files, **reasons}, indent=1, sort_keys=True)
        run.root.put(f"{quarantine(run.update_id)}/files.json", listed.encode())


def _load_base(run: _Run) -> tuple[Head, VersionWeights | None]:
    if run.plan.base_version is None:
        return Head.decayed_frequency(run.config.model.hidden_units), None
    _, weights = load_weights(run.root, run.state.versions[run.plan.base_version])
    return weights.head, weights


def _prepare(run: _Run, ingested: Ingested) -> Ready:
    texts, text_of_item = text_indexes(ingested.items)
    base, base_weights = _load_base(run)
    changed = None if base_weights is None else base_weights.adapted_weights
    cut = activations_cut(run.config.model, changed or ())
    num_new = encode_new_texts(run.root, run.config.model, texts, cut)
    run.on_progress(f"{num_new:,} of {len(texts):,} item texts are new and were encoded")
    return Ready(
        config=run.config,
        root=run.root,
        started=run.started,
        privacy=run.privacy,
        ingested=ingested,
        head=base,
        adapted_weights=changed,
        texts=texts,
        text_of_item=text_of_item,
        on_progress=run.on_progress,
    )


def _publish(
    run: _Run,
    version: str,
    outcome: Outcome,
    ready: Ready,
    comparison: Comparison,
) -> dict[str, str]:
    config, trained = run.config, outcome.output
    manifest = Manifest(
        version=version,
        update_id=run.update_id,
        base_version=run.plan.base_version,
        encoder=config.model.encoder,
        encoder_sha256=weights_sha256(resolve_encoder(config.model.encoder)),
        adapter=config.model.adapter,
        adapted_modules=trained.adapted_modules,
        max_tokens=config.model.max_tokens,
        lora_rank=config.model.lora_rank,
        alpha=config.train.alpha,
        state=run.update_id,
        loss=config.train.loss,
        decision_threshold=config.labels.decision_threshold,
        selected=outcome.selected,
        calibration=comparison.calibration.calibration if comparison.calibration else None,
    )
    weights = VersionWeights(
        head=trained.head,
        adapted_weights=trained.adapted_weights,
        texts=ready.texts,
        text=trained.text_after,
    )
    report = _report(run, version, outcome, ready.ingested, comparison)
    return publish(run.root, manifest, weights, adapter=trained.adapter, report=report)


def _report(
    run: _Run, version: str, outcome: Outcome, ingested: Ingested, comparison: Comparison
) -> str:
    partitions = run.plan.partitions
    return render_report(
        title=f"Version {version}",
        facts={
            "update": run.update_id,
            "base version": run.plan.base_version or "none: a head set by hand",
            "partitions": f"{partitions[0].key} to {partitions[-1].key} ({len(partitions)})",
            "rows": ingested.row_counts,
            "impressions": ingested.label_counts["impressions"],
            "outcomes": ingested.label_counts["outcomes"],
            "requests": ingested.label_counts["requests"],
            "users": ingested.num_users,
            "steps": outcome.num_steps,
            **({"selected": dict(outcome.selected)} if outcome.selected else {}),
            **outcome.metrics,
        },
        metrics=dataclasses.asdict(comparison),
        statement=build_statement(run.state, run.config, run.root),
    )


def _record(
    run: _Run,
    version: str | None,
    artifacts: dict[str, str],
    ingested: Ingested,
    comparison: Comparison,
    decision: Decision,
    outcome: Outcome,
) -> UpdateCommitted:
    return UpdateCommitted(
        update_id=run.update_id,
        owner=run.started.owner,
        version=version,
        verdict=decision.verdict,
        reason=decision.reason,
        base_version=run.plan.base_version,
        partitions=run.plan.partitions,
        item_files=run.plan.item_files,
        set_aside=run.plan.set_aside,
        watermark=run.plan.watermark,
        num_rows=ingested.num_rows,
        num_users=ingested.num_users,
        row_counts=ingested.row_counts,
        column_counts=ingested.column_counts,
        label_counts=ingested.label_counts,
        example_hashes=ingested.example_hashes,
        quarantined_files=ingested.quarantined_files,
        artifacts=artifacts,
        metrics=_without_nan({**dataclasses.asdict(comparison), **outcome.metrics}),
        config_hash=run.started.config_hash,
        seed=run.started.seed,
        private=run.started.private,
        spent=run.started.reserved,
        seconds=round(time.monotonic() - run.began, 3) if outcome.tells_time else 0.0,
        user_key_id=run.started.user_key_id,
        selected=outcome.selected,
    )


def _told(counts: Mapping[str, int]) -> str:
    """Names what there was; the record also says what was looked for and not found."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "none"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
