"""What a ledger record can say, and how it is written: one JSON object an object in the store.

    update:   UpdateStarted -> LeaseRenewed* -> UpdateCommitted | UpdateAbandoned
    rotation: UpdateStarted of no partition -> LeaseRenewed* -> PseudonymsRotated | UpdateAbandoned
    private:  StepsPermitted* beside the renewals, each before the steps that it permits
    rollout:  RolloutChanged (canary) -> RolloutChanged (canary | paused)*
              -> RolloutChanged (promoted | rolled_back)

Every record carries `schema_version`; an older one still reads. Version 4 added the steps of a
rollout, version 3 spends that name disjoint users and selections. Since version 2 a record ends
with a hash of itself (`seal.py`) and carries that of the record before it as `prev`, so that a
record that was changed after it was written gives itself away. Times are UNIX seconds, UTC. Keys
and paths are relative to the root.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal

from raysys.errors import LedgerCorruptError
from raysys.ledger.codec import Reviver, class_reviver
from raysys.ledger.seal import broken_seal, digest, seal

SCHEMA_VERSION = 4
KEPT_LOSSES = "ledger/privacy"
"""The folder of what `KeptLoss` names."""

Verdict = Literal["passed", "held"]
RolloutPhase = Literal["canary", "paused", "promoted", "rolled_back"]
CONTROLLER = "controller"
"""The actor of the transitions that nobody asked for."""
SetAsideKind = Literal["late", "rewritten", "vanished", "empty"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileRef:
    """One object of a partition, as it was when it was planned."""

    path: str
    size_bytes: int
    etag: str

    @property
    def content(self) -> str:
        """Names this content of the path; written anew, it has another."""
        return f"{self.etag} {self.size_bytes} {self.path}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PartitionRef:
    """Those files of one partition that one update consumes."""

    key: str
    """For example `events/dt=2017-03-01` or `events/dt=2017-03-01/hour=05`."""
    files: tuple[FileRef, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SetAside:
    """What a plan left out for good, as the config's `quarantine` says. It is asked about once."""

    path: str
    """A file, or the folder of an empty partition."""
    size_bytes: int
    etag: str
    """Of the content that is left out; of a vanished file, what was consumed; "" for a folder."""
    kind: SetAsideKind
    reason: str

    @property
    def file(self) -> FileRef:
        """What is not asked about again."""
        return FileRef(path=self.path, size_bytes=self.size_bytes, etag=self.etag)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UserGroup:
    """Some of the users: those of one index in a scheme that splits all of them for good."""

    scheme: str
    """Names the split, its number of parts and the key of the pseudonyms that it hashes. Groups of
    one scheme are disjoint, so their spends compose in parallel; those of two may overlap."""
    index: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SelectionSpend:
    """Trials of which one is released, with its noised score and nothing else."""

    method: Literal["repeat", "compose"]
    """`repeat`: a random number of i.i.d. trials (Papernot and Steinke 2021). `compose`: a fixed
    number, each charged in full."""
    num_steps: int
    """Of each trial."""
    sampling_prob: float
    noise_multiplier: float
    """The least that a trial may have: it dominates the others at every order."""
    score_noise_multiplier: float
    """Standard deviation of the noise in a trial's score over the score's L2 sensitivity."""
    num_trials: int
    """`compose`: how many. `repeat`: 0, since the number is drawn and never told."""
    mean_trials: float
    """`repeat`: mean of the truncated negative binomial. `compose`: `num_trials`."""
    shape: float
    """`repeat`: 0 logarithmic, 1 geometric. `compose`: 0."""
    delta: float
    """`repeat`: at which its Renyi bound is turned into (epsilon, delta). `compose`: 0."""
    group: UserGroup | None = None
    """The users that the trials read; None for all."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrivacySpend:
    """The mechanisms of one update, as the accountant sees them. Unit: a user, added or removed."""

    num_steps: int
    """Steps of the Poisson-subsampled Gaussian mechanism."""
    sampling_prob: float
    noise_multiplier: float
    num_count_releases: int
    """Releases of noised item counts, each a Gaussian mechanism."""
    count_noise_multiplier: float
    num_evaluations: int = 0
    """Releases of noised evaluation sums, each a Gaussian mechanism."""
    evaluation_noise_multiplier: float = 1.0
    group: UserGroup | None = None
    """The users that the steps read; None for all. Counts and evaluations are charged to all."""
    selection: SelectionSpend | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KeptLoss:
    """Names a file with the composed privacy loss of the oldest private updates, all ended.

    A cache and never the truth: without it, the loss is composed from the spends of the records.
    """

    num_updates: int
    sha256: str

    @property
    def path(self) -> str:
        """Where the file lies below the root."""
        return f"{KEPT_LOSSES}/{self.num_updates:06d}-{self.sha256}.npz"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UpdateStarted:
    """Takes the lease and reserves partitions and privacy, before anything private is computed."""

    update_id: str
    owner: str
    lease_expires_at: float
    partitions: tuple[PartitionRef, ...]
    item_files: tuple[FileRef, ...]
    base_version: str | None
    base_state: str | None
    """The update id whose `state/` this update starts from."""
    config_hash: str
    user_key_id: str
    """The key of the pseudonyms that it writes."""
    seed: int
    private: bool
    reserved: PrivacySpend | None
    """None when `private` is false."""
    set_aside: tuple[SetAside, ...] = ()
    permits_steps: bool = False
    """Whether its private steps run only after a `StepsPermitted`. Without, as in the ledgers of
    older releases, nobody knows how many ran, and it stays charged for all that it reserved."""
    kept_loss: KeptLoss | None = None
    """The newest there is; the next update starts composing from it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRenewed:
    """The heartbeat of the updater that holds the lease."""

    update_id: str
    owner: str
    lease_expires_at: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepsPermitted:
    """Private steps may run from now on. Appended before they do, so none runs uncharged.

    It is refused once the update has ended, so a process that was given up for dead stops.
    """

    update_id: str
    num_steps: int
    """All steps of the update that may have run by the next permit, repeated ones included."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UpdateAbandoned:
    """The update will never commit. Its partitions are free again.

    It stays charged for its releases and its selection, and for the steps that were permitted; for
    all that it reserved, if it did not ask for permits.
    """

    update_id: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UpdateCommitted:
    """Partitions, watermark, artifacts, metrics and spend of one update: all of it or nothing."""

    update_id: str
    owner: str
    version: str | None
    """None when the gate held the version back. The partitions are consumed all the same."""
    verdict: Verdict
    reason: str
    base_version: str | None
    partitions: tuple[PartitionRef, ...]
    item_files: tuple[FileRef, ...]
    watermark: str
    """The newest partition consumed so far, YYYY-MM-DD or YYYY-MM-DDTHH."""
    num_rows: int
    num_users: int
    row_counts: Mapping[str, int]
    """Where every row that was read went; the values add up to `num_rows`."""
    quarantined_files: Mapping[str, str]
    """Path -> reason."""
    artifacts: Mapping[str, str]
    """Path of every artifact of the version and of the state -> sha256."""
    metrics: Mapping[str, Any]
    config_hash: str
    seed: int
    private: bool
    spent: PrivacySpend | None
    seconds: float
    """0 after a selection of a random number of trials, of which it would tell."""
    column_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Rows by what the schema contract did to a column, for example `cast:price`."""
    label_counts: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    """`impressions` and `outcomes`: where each row of them went, those that had waited included."""
    example_hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Path of every shard's examples -> sha256. They are gone; a replay must make them again."""
    set_aside: tuple[SetAside, ...] = ()
    user_key_id: str | None = None
    """The key of the pseudonyms in its state. The fold fills it in where it is None."""
    selected: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Dotted config key -> the value that a selection chose for this update; {} without one."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PseudonymsRotated:
    """The head state anew, with every pseudonym carried forward to another key: all or nothing.

    Partitions, versions and privacy stay as they are. It ends what an `UpdateStarted` without
    partitions began, so that no update runs meanwhile.
    """

    update_id: str
    """Of that record. The new head state is `state/<update_id>/`."""
    owner: str
    base_state: str
    """The state that was carried forward; versions made before still serve with theirs."""
    from_key_id: str
    to_key_id: str
    num_users: int
    artifacts: Mapping[str, str]
    """Path of every file of the new state -> sha256."""
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RolloutChanged:
    """One transition of a rollout. Written first, acted on second."""

    rollout_id: str
    phase: RolloutPhase
    stable: str
    """The version that answers everyone outside the canary's share, after this transition."""
    canary: str | None
    """The version on trial; None once it is promoted or rolled back."""
    previous: str | None
    """The version that was stable before `stable` was."""
    weight_fraction: float
    """Share of users that the canary answers; 0 once there is none."""
    actor: str
    """Who: `CONTROLLER`, `operator` on the command line, or the holder of an API token."""
    reason: str
    measurement: Mapping[str, Any] | None
    step_index: int = 1
    """The pause or analysis that the rollout is at, from 0 among its steps; their number once all
    are done. Before version 4 there was one weight, 0, and one analysis, 1."""
    stage: int = 0
    """Weights that this rollout had before this one: the traffic of each is judged by itself."""
    rules: Mapping[str, Any] | None = None
    """What judges the rollout, in its first record; `config.parse_rollout` reads it. None before
    version 4: it is judged by the config of the day."""


Record = (
    UpdateStarted
    | LeaseRenewed
    | StepsPermitted
    | UpdateAbandoned
    | UpdateCommitted
    | PseudonymsRotated
    | RolloutChanged
)
_REVIVERS: dict[str, Reviver] = {
    cls.__name__: class_reviver(cls) for cls in typing.get_args(Record)
}
RECORD_TYPES = tuple(_REVIVERS)
"""What a record's `type` can be."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A record in its place in the log."""

    sequence: int
    at: float
    record: Record
    prev: str | None = ""
    """Hash of the record before it, "" if there is none; None in version 1, which has no hashes."""
    hash: str = dataclasses.field(default="", compare=False)
    """Of the stored record, "" if it is not stored; version 1 has the sha256 of its bytes here."""


def encode(entry: Entry) -> bytes:
    """Returns the bytes that are stored for an entry."""
    record = {f.name: getattr(entry.record, f.name) for f in dataclasses.fields(entry.record)}
    return seal(
        {
            "schema_version": SCHEMA_VERSION,
            "type": type(entry.record).__name__,
            "sequence": entry.sequence,
            "at": entry.at,
            "prev": entry.prev or "",
            **record,
        }
    )


def decode(data: bytes, *, sequence: int) -> Entry:
    """Reads the bytes of entry `sequence`.

    Raises:
      LedgerCorruptError: Not a record, changed after it was written, of a newer schema, or not the
        record of that place.
    """
    try:
        body = json.loads(data)
        version = body.pop("schema_version")
        if version > SCHEMA_VERSION:
            raise LedgerCorruptError(
                f"ledger record {sequence} has schema_version {version}, this raysys reads up to "
                f"{SCHEMA_VERSION}: upgrade raysys"
            )
        prev, own_hash = _links(data, body, version, sequence)
        if (found := body.pop("sequence")) != sequence:
            raise LedgerCorruptError(
                f"ledger record {sequence} says that it is record {found}; restore both from a "
                "backup of the root"
            )
        at, revive = body.pop("at"), _REVIVERS[body.pop("type")]
        return Entry(sequence=sequence, at=at, record=revive(body), prev=prev, hash=own_hash)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerCorruptError(
            f"ledger record {sequence} cannot be read ({type(error).__name__}: {error}); restore "
            "it from a backup of the root"
        ) from error


def _links(
    data: bytes, body: dict[str, Any], version: int, sequence: int
) -> tuple[str | None, str]:
    if version < 2:
        return None, digest(data)
    if problem := broken_seal(data):
        raise LedgerCorruptError(
            f"ledger record {sequence} was changed after it was written: it {problem}; restore it "
            "from a backup of the root"
        )
    prev = body.pop("prev")
    if not isinstance(prev, str):
        raise TypeError(f"prev is {prev!r}")
    return prev, body.pop("hash")
