"""What a ledger record can say, and how it is written: one JSON object an object in the store.

    update:   UpdateStarted -> LeaseRenewed* -> UpdateCommitted | UpdateAbandoned
    rotation: UpdateStarted of no partition -> LeaseRenewed* -> PseudonymsRotated | UpdateAbandoned
    rollout:  RolloutChanged (canary) -> RolloutChanged (promoted | rolled_back)

Every record carries `schema_version`; an older one still reads. Times are UNIX seconds, UTC.
Keys and paths are relative to the root.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal

from raysys.errors import LedgerCorruptError

SCHEMA_VERSION = 1

Verdict = Literal["passed", "held"]
RolloutPhase = Literal["canary", "promoted", "rolled_back"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileRef:
    """One object of a partition, as it was when it was planned."""

    path: str
    size_bytes: int
    etag: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PartitionRef:
    """Those files of one partition that one update consumes."""

    key: str
    """For example `events/dt=2017-03-01`."""
    files: tuple[FileRef, ...]


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRenewed:
    """The heartbeat of the updater that holds the lease."""

    update_id: str
    owner: str
    lease_expires_at: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UpdateAbandoned:
    """The update will never commit. Its partitions are free again, its reservation stays spent."""

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
    """The newest partition date consumed so far, YYYY-MM-DD."""
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
    user_key_id: str | None = None
    """The key of the pseudonyms in its histories. `ledger.state` fills it in where it is None."""


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
    """`operator` or `controller`."""
    reason: str
    measurement: Mapping[str, Any] | None


Record = (
    UpdateStarted
    | LeaseRenewed
    | UpdateAbandoned
    | UpdateCommitted
    | PseudonymsRotated
    | RolloutChanged
)
_TYPES: dict[str, type[Any]] = {cls.__name__: cls for cls in typing.get_args(Record)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A record in its place in the log."""

    sequence: int
    at: float
    record: Record


def encode(entry: Entry) -> bytes:
    """Returns the bytes that are stored for an entry."""
    body = {
        "schema_version": SCHEMA_VERSION,
        "type": type(entry.record).__name__,
        "sequence": entry.sequence,
        "at": entry.at,
        **dataclasses.asdict(entry.record),
    }
    return json.dumps(body, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def decode(data: bytes, *, sequence: int) -> Entry:
    """Reads the bytes of entry `sequence`.

    Raises:
      LedgerCorruptError: Not a record, of a newer schema, or not the record of that place.
    """
    try:
        body = json.loads(data)
        version, found = body.pop("schema_version"), body.pop("sequence")
        if version > SCHEMA_VERSION:
            raise LedgerCorruptError(
                f"ledger record {sequence} has schema_version {version}, this raysys reads up to "
                f"{SCHEMA_VERSION}: upgrade raysys"
            )
        if found != sequence:
            raise LedgerCorruptError(f"ledger record {sequence} says that it is record {found}")
        at, cls = body.pop("at"), _TYPES[body.pop("type")]
        return Entry(sequence=sequence, at=at, record=_from_json(cls, body))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerCorruptError(
            f"ledger record {sequence} cannot be read ({type(error).__name__}: {error}); restore "
            "it from a backup of the root"
        ) from error


def _from_json(cls: type[Any], body: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    return cls(**{key: _revive(hints[key], value) for key, value in body.items()})


def _revive(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _from_json(hint, value)
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return tuple(_revive(args[0], item) for item in value)
    inner = [arg for arg in args if dataclasses.is_dataclass(arg)]
    return _revive(inner[0], value) if inner else value
