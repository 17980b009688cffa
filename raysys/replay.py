"""Replays a committed update: the same partitions, config and seeds must make the same examples.

    commit record + state/<update>/replay.json -> ingest below replays/ -> compare hashes
    without privacy: -> train with the recorded seed -> compare weights

It proves where a version came from: what was trained on, and that nothing else was. Under privacy
the noise of item counts is taken from what was released, since it has no seed, and weights are not
compared, for the same reason. Of a selection without privacy the trial that was chosen is trained
again. What is made lies below `replays/` and is removed; nothing else of
the root changes.
"""

from __future__ import annotations

import dataclasses
import io
import secrets
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from raysys.config import Config, parse_config, with_values
from raysys.errors import (
    PartitionChangedError,
    ReplayMismatchError,
    UnknownVersionError,
)
from raysys.ingest.features import DAY_S
from raysys.ingest.pipeline import Ingested, IngestJob, ingest, released_path
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.seen import key_ids
from raysys.ledger.log import Log
from raysys.ledger.records import FileRef, UpdateCommitted, UpdateStarted
from raysys.ledger.state import State
from raysys.model.adapter import activations_cut
from raysys.model.catalogue import encode_new_texts
from raysys.model.scorer import Head
from raysys.partitions.discover import changed
from raysys.partitions.layout import REPLAYS
from raysys.privacy.plan import PrivacyPlan
from raysys.registry.loaded import VersionWeights
from raysys.registry.recipe import Recipe, installed_libraries
from raysys.registry.store import load_weights, read_checked, text_indexes
from raysys.storage import Root
from raysys.train.loop import TrainJob
from raysys.train.output import TrainOutput
from raysys.train.trainer import train


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What a replay found to be the same."""

    update_id: str
    num_examples: int
    num_shards: int
    weights: bool
    """Whether the weights were trained again too."""


def replay(
    config: Config,
    version: str,
    on_progress: Callable[[str], None] = lambda line: None,
    start_ray: Callable[[], None] = lambda: None,
) -> Replayed:
    """Makes a version's examples again, and without privacy its weights.

    Args:
      config: Says where the root and the keys are; the rest is as it was then.
      version: A version, or the id of a committed update.

    Raises:
      UnknownVersionError: Nothing of that name was committed.
      PartitionChangedError: A file that it read is gone or another one.
      ReplayMismatchError: Something came out differently.
    """
    root = Root(config.root)
    state, started, commit = _find(Log(root), version)
    recipe = Recipe.load(root, commit)
    then = _config_of(recipe, config)
    _require_key(started, then)
    _require_files(root, started)
    for name, found in installed_libraries().items():
        if found != recipe.libraries.get(name):
            on_progress(f"{name} is {found} here, it was {recipe.libraries.get(name)} then")
    start_ray()
    _delete_abandoned(root)
    name = f"{int(time.time())}-{commit.update_id}-{secrets.token_hex(3)}"
    work = Root(f"{root.uri}/{REPLAYS}/{name}")
    try:
        ingested = _ingest(root, work, state, started, commit, recipe, then)
        _compare_examples(commit, ingested)
        on_progress(f"{ingested.num_examples:,} examples are those of {commit.update_id}")
        with_weights = _can_train_again(commit, then)
        if commit.selected and not with_weights:
            on_progress(f"the weights of {commit.update_id} are not compared: {_why_not(commit)}")
        if with_weights:
            trained = _train(work, root, state, commit, _as_trained(commit, then), ingested)
            _compare_weights(root, commit, trained)
            on_progress(f"the weights are those of {commit.version}")
    finally:
        root.delete_prefix(work.uri.removeprefix(f"{root.uri}/"))
    return Replayed(
        update_id=commit.update_id,
        num_examples=ingested.num_examples,
        num_shards=ingested.num_shards,
        weights=with_weights,
    )


def _why_not(commit: UpdateCommitted) -> str:
    if commit.private:
        return "private noise has no seed"
    if commit.version is None:
        return "it was held, so they were not kept"
    return "with tune.scheduler: pbt the trial's hyperparameters changed on the way"


def _can_train_again(commit: UpdateCommitted, config: Config) -> bool:
    changed_midway = bool(commit.selected) and config.tune.scheduler == "pbt"
    return not commit.private and commit.version is not None and not changed_midway


def _as_trained(commit: UpdateCommitted, config: Config) -> Config:
    """Returns the config of the trial that was selected, which ran in one process; without a
    selection the update's own."""
    if not commit.selected:
        return config
    alone = {"train.num_workers": 1, "train.min_workers": 0}
    return with_values(config, {**commit.selected, **alone})


def _delete_abandoned(root: Root) -> None:
    """Deletes what killed replays left: none takes a day."""
    for name in root.list_folders(REPLAYS):
        began = name.partition("-")[0]
        if began.isdigit() and int(began) < time.time() - DAY_S:
            root.delete_prefix(f"{REPLAYS}/{name}")


def _find(log: Log, version: str) -> tuple[State, UpdateStarted, UpdateCommitted]:
    state = log.refresh()
    for commit in state.committed:
        if version in (commit.version, commit.update_id):
            records = (entry.record for entry in log.entries())
            started = next(
                record
                for record in records
                if isinstance(record, UpdateStarted) and record.update_id == commit.update_id
            )
            return state, started, commit
    known = ", ".join(state.versions) or "none"
    raise UnknownVersionError(f"version {version}: no such commit; versions: {known}")


def _config_of(recipe: Recipe, config: Config) -> Config:
    then = parse_config(recipe.config)
    return dataclasses.replace(then, root=config.root, pseudonyms=config.pseudonyms)


def _require_key(started: UpdateStarted, config: Config) -> None:
    found = Pseudonymizer.from_config(config.pseudonyms).key_ids
    if started.user_key_id not in found:
        raise ReplayMismatchError(
            f"pseudonyms: the keys here are {', '.join(found)}, the update was made with "
            f"{started.user_key_id}; give that one"
        )


def _require_files(root: Root, started: UpdateStarted) -> None:
    folders = {file.path.rpartition("/")[0] for file in _files(started)}
    found = {info.path: info for folder in sorted(folders) for info in root.list(folder)}
    for file in _files(started):
        if why := changed(file, found.get(file.path)):
            raise PartitionChangedError(
                f"{file.path} {why}; {started.update_id} can only be replayed on what it read: "
                "restore it from a backup"
            )


def _files(started: UpdateStarted) -> list[FileRef]:
    return [*(file for p in started.partitions for file in p.files), *started.item_files]


def _ingest(
    root: Root,
    work: Root,
    state: State,
    started: UpdateStarted,
    commit: UpdateCommitted,
    recipe: Recipe,
    config: Config,
) -> Ingested:
    job = IngestJob(
        root=root,
        work=work,
        config=config,
        update_id=commit.update_id,
        base_state=started.base_state,
        partitions=started.partitions,
        read_before=recipe.read_before,
        user_key_id=started.user_key_id,
        key_ids=key_ids(state.committed),
        seed=commit.seed,
        group=commit.spent.group if commit.spent else None,
    )
    return ingest(job, commit.item_files, released=_released(root, commit))


def _released(root: Root, commit: UpdateCommitted) -> NDArray[np.float64] | None:
    if not commit.private:
        return None
    path = released_path(commit.update_id)
    counts: NDArray[np.float64] = np.load(
        io.BytesIO(read_checked(root, path, commit.artifacts.get(path, "none")))
    )
    return counts


def _compare_examples(commit: UpdateCommitted, ingested: Ingested) -> None:
    for path, sha256 in commit.example_hashes.items():
        if ingested.example_hashes.get(path) != sha256:
            raise ReplayMismatchError(
                f"{path} came out with sha256 {str(ingested.example_hashes.get(path))[:12]}…, it "
                f"was {sha256[:12]}…; compare the libraries' versions"
            )
    if ingested.row_counts != dict(commit.row_counts):
        raise ReplayMismatchError(
            f"rows went to {ingested.row_counts}, they went to {dict(commit.row_counts)}"
        )


def _train(
    work: Root,
    root: Root,
    state: State,
    commit: UpdateCommitted,
    config: Config,
    ingested: Ingested,
) -> TrainOutput:
    base = Head.decayed_frequency(config.model.hidden_units)
    weights: VersionWeights | None = None
    if commit.base_version is not None:
        _, weights = load_weights(root, state.versions[commit.base_version])
        base = weights.head
    texts, text_of_item = text_indexes(ingested.items)
    changed = None if weights is None else weights.adapted_weights
    encode_new_texts(root, config.model, texts, activations_cut(config.model, changed or ()))
    train_config = config.train
    plan = PrivacyPlan.for_update(
        config.privacy,
        num_steps=train_config.num_steps if weights else train_config.bootstrap_num_steps,
        num_count_releases=0,
    )
    job = TrainJob.of(
        config, plan, head=base, adapted_weights=changed,
        text_of_item=text_of_item, seed=commit.seed,
    )  # fmt: skip
    return train(
        job, texts, root=work, cache=root, update_id=commit.update_id,
        num_shards=ingested.num_shards,
    )  # fmt: skip


def _compare_weights(root: Root, commit: UpdateCommitted, trained: TrainOutput) -> None:
    _, weights = load_weights(root, commit)
    recorded_weights = {**weights.head.weights, **weights.adapted_weights}
    trained_weights = {**trained.head.weights, **trained.adapted_weights}
    if other := recorded_weights.keys() ^ trained_weights.keys():
        raise ReplayMismatchError(
            f"weights {', '.join(sorted(other))} are not in both {commit.version} and its replay"
        )
    for name, recorded in recorded_weights.items():
        again = trained_weights[name]
        if not np.array_equal(recorded, again):
            worst = float(np.abs(recorded - again).max())
            raise ReplayMismatchError(
                f"weight {name} of {commit.version} came out up to {worst:.3g} away; another "
                "processor or number of threads may add up in another order"
            )
