"""Which version answers a user: a hash split that is exact, sticky and monotone in the weight.

    assign("bob", rollout_id="r0001", weight_fraction=0.2) -> "canary" | "stable"

A user lands at a fixed point in [0, 10000) for each rollout, and the canary answers the points
below its weight. So a user sees one version for the whole rollout, on every replica and after
every restart; raising the weight only adds users; and the rollout id as salt draws new users for
each rollout. The analysis groups users by another hash, so that its buckets do not depend on the
split (Kohavi et al. 2009, "Controlled experiments on the web", section 4.1).
"""

from __future__ import annotations

import hashlib

from raysys.rollout.counters import NUM_BUCKETS, Arm

NUM_POINTS = 10_000
"""Resolution of the split: weights are whole numbers of 1/10,000."""


def assign(sticky_key: str, *, rollout_id: str, weight_fraction: float) -> Arm:
    """Returns the arm of the rollout that answers a user.

    Args:
      sticky_key: The user id; the request id where there is none.
      rollout_id: Salt of the split.
      weight_fraction: The canary's share, in [0, 1].

    >>> [assign("bob", rollout_id="r0001", weight_fraction=w) for w in (0.05, 0.2, 0.5)]
    ['stable', 'canary', 'canary']
    """
    below = round(weight_fraction * NUM_POINTS)
    return "canary" if split_point(sticky_key, rollout_id=rollout_id) < below else "stable"


def split_point(sticky_key: str, *, rollout_id: str) -> int:
    """Returns the user's point in [0, NUM_POINTS) for one rollout."""
    return _hash(sticky_key, purpose=b"split", salt=rollout_id) % NUM_POINTS


def analysis_bucket(sticky_key: str) -> int:
    """Returns the user's bucket in [0, NUM_BUCKETS), the same in every rollout."""
    return _hash(sticky_key, purpose=b"bucket") % NUM_BUCKETS


def _hash(text: str, *, purpose: bytes, salt: str = "") -> int:
    # `person` keeps the two hashes apart. The salt is the key, which holds 64 bytes. Of
    # 64 bits the modulus leaves an unevenness below 1e-15.
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=salt.encode(), person=purpose)
    return int.from_bytes(digest.digest())
