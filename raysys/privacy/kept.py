"""Keeps the composed privacy loss beside the ledger, so that a year is not composed every day.

    Root, State -> life_so_far() -> Composed       read what is kept, add what came after it
    Root, State -> keep()        -> KeptLoss       written before the UpdateStarted that names it

What is kept covers the oldest updates, all of which have ended: their spends never change again.
The record names the file by its sha256, and the file says of which spends, libraries and
discretisation it is. If anything is different, or the file is gone, all is composed from the
records instead: the file saves time, and nothing rests on it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from dp_accounting.pld.pld_pmf import DensePLDPmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from raysys.errors import RaysysError
from raysys.ledger.codec import to_json
from raysys.ledger.records import KEPT_LOSSES, KeptLoss, PrivacySpend, UserGroup
from raysys.ledger.state import State
from raysys.privacy.composed import COARSE, Composed, Part
from raysys.storage import Root

_SCHEMA = 1
_NUM_FILES = 2
"""The newest, and the one before for who is just reading it."""

_logger = logging.getLogger(__name__)


def life_so_far(root: Root | None, state: State) -> Composed:
    """Returns the privacy loss of all updates, a running one with all that it reserved.

    Args:
      root: Where a part of it may be kept; without, all of it is composed from the records.
    """
    spends = [spend for _, spend, _ in state.spends]
    composed, num = _read(root, state.kept_loss, spends) if root else (Composed.nothing(), 0)
    for spend in spends[num:]:
        composed = composed.plus(spend)
    return composed


def keep(root: Root, state: State) -> KeptLoss | None:
    """Writes the privacy loss of all updates that have ended; best effort, None if it is not kept.

    It may be named by any later record: what it covers stays as it is.
    """
    ended = list(itertools.takewhile(lambda charged: charged[2] != "reserved", state.spends))
    spends = [spend for _, spend, _ in ended]
    if not spends:
        return None
    composed, num = _read(root, state.kept_loss, spends)
    if state.kept_loss is not None and num == len(spends):
        return state.kept_loss
    for spend in spends[num:]:
        composed = composed.plus(spend)
    data = _encode(composed, spends)
    kept = KeptLoss(num_updates=len(spends), sha256=hashlib.sha256(data).hexdigest())
    try:
        root.put(kept.path, data)
        for name in root.list_names(KEPT_LOSSES)[:-_NUM_FILES]:
            root.delete_prefix(f"{KEPT_LOSSES}/{name}")
    except RaysysError as error:
        _logger.warning("the privacy loss so far is not kept: %s", error)
        return None
    return kept


def _read(
    root: Root, kept: KeptLoss | None, spends: Sequence[PrivacySpend]
) -> tuple[Composed, int]:
    """Returns what is kept and of how many of `spends` it is; nothing, of none, if unusable."""
    if kept is None or kept.num_updates > len(spends):
        return Composed.nothing(), 0
    covered = spends[: kept.num_updates]
    try:
        data = root.read_bytes(kept.path)
        if hashlib.sha256(data).hexdigest() != kept.sha256:
            raise ValueError("its sha256 is another one")
        return _decode(data, covered), len(covered)
    except (FileNotFoundError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        _logger.warning(
            "%s/%s is not used, the budget is composed from the records: %s",
            root.uri, kept.path, error,
        )  # fmt: skip
        return Composed.nothing(), 0


def _made_from(spends: Sequence[PrivacySpend]) -> dict[str, Any]:
    """Returns what has to be equal for a file to be used."""
    return {
        "schema": _SCHEMA,
        "dp-accounting": importlib.metadata.version("dp-accounting"),
        "interval": COARSE,
        "spends": hashlib.sha256(to_json(list(spends)).encode()).hexdigest(),
    }


def _encode(composed: Composed, spends: Sequence[PrivacySpend]) -> bytes:
    arrays: dict[str, Any] = {}
    everyone = [[scheme, _pack(part, arrays)] for scheme, part in composed.everyone.items()]
    groups = [
        [group.scheme, group.index, _pack(part, arrays)] for group, part in composed.groups.items()
    ]
    head = {"made_from": _made_from(spends), "everyone": everyone, "groups": groups}
    buffer = io.BytesIO()
    np.savez(buffer, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
    return buffer.getvalue()


def _decode(data: bytes, spends: Sequence[PrivacySpend]) -> Composed:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        head = json.loads(arrays["head"].tobytes())
        if head["made_from"] != _made_from(spends):
            raise ValueError(f"it was made from {head['made_from']}")
        # What ran on whom is counted from the records; only its loss is taken from the file.
        parts = Composed.nothing().plus(*spends)
        everyone = {
            scheme: Part.restored(parts.everyone[scheme].ran, _unpack(packed, arrays), COARSE)
            for scheme, packed in head["everyone"]
        }
        groups = dict[UserGroup, Part]()
        for scheme, index, packed in head["groups"]:
            group = UserGroup(scheme=scheme, index=index)
            loss = _unpack(packed, arrays)
            groups[group] = Part.restored(parts.groups[group].ran, loss, COARSE)
    return Composed(interval=COARSE, everyone=everyone, groups=groups)


def _pack(part: Part, arrays: dict[str, Any]) -> list[Any]:
    """Adds the probabilities of a loss to `arrays`; returns where they are, and the rest of it.

    dp-accounting has no way of its own to store a loss. Its two directions are of a user who is
    removed and of one who is added; they are one where the mechanisms are symmetric.
    """
    # One place reads what dp-accounting keeps to itself, and a test reads back what it wrote.
    loss = part.loss
    directions = [loss._pmf_remove] if loss._symmetric else [loss._pmf_remove, loss._pmf_add]
    packed = []
    for pmf in (direction.to_dense_pmf() for direction in directions):
        name = f"probs{len(arrays)}"
        arrays[name] = np.asarray(pmf._probs, np.float64)
        packed.append([name, int(pmf._lower_loss), float(pmf._infinity_mass)])
    return packed


def _unpack(packed: list[Any], arrays: Any) -> PrivacyLossDistribution:
    return PrivacyLossDistribution(
        *(
            DensePLDPmf(COARSE, lower_loss, arrays[name], infinity_mass, pessimistic_estimate=True)
            for name, lower_loss, infinity_mass in packed
        )
    )
