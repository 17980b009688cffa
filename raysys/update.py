"""One update, from new partitions to a committed version. Read it from top to bottom.

    plan -> reserve -> ingest -> encode -> train -> compare -> gate -> publish -> commit

Nothing counts until the one commit record names it. A process that dies before that leaves a
reservation, whose privacy stays charged, and folders that nobody reads: the next update takes its
partitions and deletes its folders.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable
from typing import Any

from raysys.config import Config
from raysys.errors import DataError
from raysys.evaluate.compare import Weights, compare
from raysys.evaluate.gate import Decision, judge
from raysys.evaluate.metrics import Comparison
from raysys.evaluate.report import privacy_statement, render_report
from raysys.ingest.features import IndexArray
from raysys.ingest.pipeline import Ingested, IngestJob, ingest, period_ends, read_items
from raysys.ingest.pseudonym import Pseudonymizer, check_key
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted, UpdateStarted
from raysys.ledger.state import State
from raysys.model.catalogue import encode_new_texts
from raysys.model.encoder import resolve_encoder, weights_sha256
from raysys.model.scorer import Head
from raysys.partitions.discover import discover
from raysys.partitions.layout import staging
from raysys.partitions.orphans import delete_orphans
from raysys.partitions.plan import UpdatePlan, plan_update
from raysys.privacy.accounting import ACCOUNTANT
from raysys.privacy.budget import check_reservation, spent_epsilon
from raysys.privacy.plan import PrivacyPlan
from raysys.registry.store import VersionWeights, hash_state, load_weights, publish, text_indexes
from raysys.registry.version import Manifest
from raysys.storage import Root
from raysys.train.loop import TrainJob
from raysys.train.trainer import TrainOutput, train

Progress = Callable[[str], None]


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


def run_update(
    config: Config,
    on_progress: Progress = lambda line: None,
    start_ray: Callable[[], None] = lambda: None,
) -> UpdateCommitted:
    """Runs one update and returns its commit record.

    Args:
      start_ray: Connects to a cluster, unless the caller has done so. Called once all that can be
        refused without one is: starting Ray takes seconds.

    Raises:
      EmptyPlanError: Nothing is new.
      BudgetExhaustedError: What privacy is left does not suffice. Nothing was read or written.
      LeaseHeldError: Another update is at work.
      RaysysError: As its subclass says. The partitions stay unconsumed.
    """
    began = time.monotonic()
    root = Root(config.root)
    root.check_writable()
    keys = Pseudonymizer.from_config(config.pseudonyms)
    weights_sha256(resolve_encoder(config.model.encoder))
    log = Log(root)
    delete_orphans(root, log)
    found, now = discover(root), time.time()

    def plan_of(state: State) -> UpdatePlan:
        return plan_update(found, state, config.partitions, now)

    owner = f"{platform.node()}:{os.getpid()}"

    def reserve(state: State) -> UpdateStarted:
        return _reserve(state, plan_of(state), config, keys, owner)

    # While another update is active, what is left for this one is open.
    if (state := log.refresh()).active is None:
        reserve(state)
        _require_catalogue(root, plan_of(state))
    start_ray()
    with Lease(log, owner=owner, duration_s=config.lease.duration_s) as lease:
        started = lease.start(reserve)
        state = log.refresh()
        # A rollback since then may have moved the base: what was recorded holds.
        plan = dataclasses.replace(
            plan_of(state), base_version=started.base_version, base_state=started.base_state
        )
        assert plan.partitions == started.partitions, "what is planned is what was reserved"
        delete_orphans(root, log)
        run = _Run(
            config=config, root=root, state=state, started=started, plan=plan,
            privacy=plan_privacy(config, plan), lease=lease, on_progress=on_progress, began=began,
        )  # fmt: skip
        record = _run(run)
        lease.commit(record)
    root.delete_prefix(staging(record.update_id))
    on_progress(f"{record.update_id} committed {record.version or 'no version'}")
    return record


def plan_privacy(config: Config, plan: UpdatePlan) -> PrivacyPlan:
    """Returns the mechanisms of an update, known before any of its data is read."""
    train_config = config.train
    first = plan.base_version is None
    return PrivacyPlan.for_update(
        config.privacy,
        num_steps=train_config.bootstrap_num_steps if first else train_config.num_steps,
        num_count_releases=len(period_ends(plan.partitions, config.ingest.period_days)),
    )


def _reserve(
    state: State, plan: UpdatePlan, config: Config, keys: Pseudonymizer, owner: str
) -> UpdateStarted:
    """Decides, on the state that directly precedes the record, what the update takes."""
    check_key(keys, state.user_key_id, config.root)
    reserved = plan_privacy(config, plan).reserved
    if reserved is not None:
        check_reservation(state, reserved, config.privacy)
    update_id = state.next_update_id()
    digest = hashlib.sha256(f"{config.ingest.seed} {update_id}".encode()).digest()
    return UpdateStarted(
        update_id=update_id,
        owner=owner,
        lease_expires_at=time.time() + config.lease.duration_s,
        partitions=plan.partitions,
        item_files=plan.item_files,
        base_version=plan.base_version,
        base_state=plan.base_state,
        config_hash=config.hash(),
        user_key_id=keys.key_id,
        seed=int.from_bytes(digest[:6]),
        private=reserved is not None,
        reserved=reserved,
    )


def _require_catalogue(root: Root, plan: UpdatePlan) -> None:
    """Refuses a first update without items before privacy is reserved for it."""
    if plan.base_state is not None:
        return
    rows, bad_files = read_items(root, plan.item_files)
    if rows.is_empty():
        reason = next(iter(bad_files.values()), "no item files")
        raise DataError(
            f"the catalogue is empty ({reason}): write item rows below items/dt=YYYY-MM-DD/ first"
        )


def _run(run: _Run) -> UpdateCommitted:
    ingested = _ingest(run)
    run.lease.check()
    texts, text_of_item = text_indexes(ingested.items)
    base, base_weights = _load_base(run)
    trained = _train(run, base, base_weights, texts, text_of_item)
    run.lease.check()
    comparison = compare(
        run.root,
        run.update_id,
        items=ingested.items_before,
        text_of_item=text_of_item,
        before=Weights(head=base, text=trained.text_before),
        after=Weights(head=trained.head, text=trained.text_after),
        config=run.config.evaluate,
        num_shards=run.config.ingest.num_shards,
    )
    decision = judge(comparison, run.config.gate)
    run.on_progress(f"gate {decision.verdict}: {decision.reason}")
    version, artifacts = None, hash_state(run.root, run.update_id)
    if decision.verdict == "passed":
        version = run.state.next_version(run.update_id)
        artifacts = _publish(run, version, trained, texts, ingested, comparison)
    return _record(run, version, artifacts, ingested, comparison, decision)


def _ingest(run: _Run) -> Ingested:
    partitions = run.plan.partitions
    run.on_progress(
        f"{run.update_id} reads {len(partitions)} new partitions, {partitions[0].key} to "
        f"{partitions[-1].key}"
    )
    job = IngestJob(
        root=run.root,
        config=run.config,
        update_id=run.update_id,
        base_state=run.plan.base_state,
        user_key_id=run.started.user_key_id,
        partitions=partitions,
        seed=run.started.seed,
    )
    ingested = ingest(job, run.plan.item_files)
    for path, reason in ingested.quarantined_files.items():
        run.on_progress(f"quarantined file {path}: {reason}")
    run.on_progress(
        f"{ingested.num_rows:,} rows of {ingested.num_users:,} users became "
        f"{ingested.num_examples:,} examples; rows: {ingested.row_counts}"
    )
    return ingested


def _load_base(run: _Run) -> tuple[Head, VersionWeights | None]:
    if run.plan.base_version is None:
        return Head.decayed_frequency(run.config.model.hidden_units), None
    _, weights = load_weights(run.root, run.state.versions[run.plan.base_version])
    return weights.head, weights


def _train(
    run: _Run,
    base: Head,
    base_weights: VersionWeights | None,
    texts: list[str],
    text_of_item: IndexArray,
) -> TrainOutput:
    config = run.config
    num_new = encode_new_texts(run.root, config.model, texts)
    run.on_progress(f"{num_new:,} of {len(texts):,} item texts are new and were encoded")
    first = base_weights is None
    job = TrainJob(
        model=config.model,
        train=config.train,
        plan=run.privacy,
        learning_rate=(
            config.train.bootstrap_learning_rate if first else config.train.learning_rate
        ),
        head=base,
        adapted_weight=None if base_weights is None else base_weights.adapted_weight,
        text_of_item=text_of_item,
        seed=run.started.seed,
    )
    return train(
        job, texts, root=run.root, update_id=run.update_id, num_shards=config.ingest.num_shards
    )


def _publish(
    run: _Run,
    version: str,
    trained: TrainOutput,
    texts: list[str],
    ingested: Ingested,
    comparison: Comparison,
) -> dict[str, str]:
    config = run.config
    manifest = Manifest(
        version=version,
        update_id=run.update_id,
        base_version=run.plan.base_version,
        encoder=config.model.encoder,
        encoder_sha256=weights_sha256(resolve_encoder(config.model.encoder)),
        adapted_module=trained.adapted_module,
        max_tokens=config.model.max_tokens,
        lora_rank=config.model.lora_rank,
        alpha=config.train.alpha,
        state=run.update_id,
    )
    weights = VersionWeights(
        head=trained.head,
        adapted_weight=trained.merged_weight,
        texts=texts,
        text=trained.text_after,
    )
    report = _report(run, version, ingested, comparison)
    return publish(run.root, manifest, weights, adapter=trained.adapter, report=report)


def _report(run: _Run, version: str, ingested: Ingested, comparison: Comparison) -> str:
    partitions = run.plan.partitions
    statement = privacy_statement(
        # One update without privacy anywhere in the model's life voids the statement.
        private=run.started.private and all(update.private for update in run.state.committed),
        epsilon_spent=spent_epsilon(run.state, run.config.privacy.delta),
        epsilon_total=run.config.privacy.epsilon_total,
        delta=run.config.privacy.delta,
        accountant=ACCOUNTANT,
    )
    return render_report(
        title=f"Version {version}",
        facts={
            "update": run.update_id,
            "base version": run.plan.base_version or "none: a head set by hand",
            "partitions": f"{partitions[0].key} to {partitions[-1].key} ({len(partitions)})",
            "rows": ingested.row_counts,
            "users": ingested.num_users,
            "steps": run.privacy.spend.num_steps,
        },
        metrics=dataclasses.asdict(comparison),
        statement=statement,
    )


def _record(
    run: _Run,
    version: str | None,
    artifacts: dict[str, str],
    ingested: Ingested,
    comparison: Comparison,
    decision: Decision,
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
        watermark=run.plan.watermark,
        num_rows=ingested.num_rows,
        num_users=ingested.num_users,
        row_counts=ingested.row_counts,
        quarantined_files=ingested.quarantined_files,
        artifacts=artifacts,
        metrics=_without_nan(dataclasses.asdict(comparison)),
        config_hash=run.started.config_hash,
        seed=run.started.seed,
        private=run.started.private,
        spent=run.privacy.reserved,
        seconds=round(time.monotonic() - run.began, 3),
        user_key_id=run.started.user_key_id,
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
