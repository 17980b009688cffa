"""Which users are in a group: users are split for good, by pseudonym, into disjoint groups.

    cohort_group(8, key_id, 3) -> UserGroup -> in_group(pseudonyms, group) -> a mask
    tuning_group(0.1, key_id)

The ledger charges a group's spends to its users alone, so who trains and who charges must agree on
who they are: both ask here. A scheme's name says how the users are split and whose pseudonyms are
hashed. After a rotation of the key, or with another number of parts, it is another scheme, and
what the old one was charged counts for everyone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from raysys.errors import PrivacyError
from raysys.ledger.records import UserGroup

_SCHEME = re.compile(r"(?P<kind>cohorts|tuning)/(?P<size>[^/]+)/(?P<key>[^/]+)")


def cohort_group(num_cohorts: int, key_id: str, turn: int) -> UserGroup:
    """Returns the cohort whose turn it is, of `num_cohorts` that take turns.

    >>> cohort_group(8, "7ecd1ca3", 11)
    UserGroup(scheme='cohorts/8/7ecd1ca3', index=3)
    """
    return UserGroup(scheme=f"cohorts/{num_cohorts}/{key_id}", index=turn % num_cohorts)


def tuning_group(fraction: float, key_id: str, *, tuned_on: bool = True) -> UserGroup:
    """Returns the users who are kept for tuning, or all others.

    >>> tuning_group(0.1, "7ecd1ca3")
    UserGroup(scheme='tuning/0.1/7ecd1ca3', index=0)
    """
    return UserGroup(scheme=f"tuning/{fraction!r}/{key_id}", index=0 if tuned_on else 1)


def in_group(users: Iterable[str], group: UserGroup, *, key_id: str) -> NDArray[np.bool_]:
    """Returns who is in a group, (number of users,).

    Args:
      users: Pseudonyms.
      key_id: The key that they were made with.

    Raises:
      PrivacyError: The group is of another key's pseudonyms, or of no known scheme.
    """
    match = _SCHEME.fullmatch(group.scheme)
    if match is None:
        raise PrivacyError(f"group {group.scheme}: unknown scheme; upgrade raysys")
    if match["key"] != key_id:
        raise PrivacyError(
            f"group {group.scheme} splits pseudonyms of key {match['key']}, these are of key "
            f"{key_id}; submit the update again"
        )
    drawn = np.fromiter((_hash(match["kind"], user) for user in users), np.uint64)
    if match["kind"] == "cohorts":
        index = drawn % np.uint64(int(match["size"]))
    else:
        index = (drawn >= np.uint64(int(float(match["size"]) * 2**63))).astype(np.uint64)
    mask: NDArray[np.bool_] = index == np.uint64(group.index)
    return mask


def _hash(kind: str, user: str) -> int:
    """63 bits that have nothing in common with those of the user's shard or hold-out."""
    digest = hashlib.sha256(f"raysys group {kind} {user}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
