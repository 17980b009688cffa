"""Signed request ids: any replica can join feedback to its request, without shared memory.

    rank on replica 1 -> RequestTag -> RequestIds.sign() -> "request_id" of the answer
    feedback on replica 2 <- RequestIds.read() <- "request_id" of the feedback

The id says who was answered by which version, when, on which side of which rollout, with what
chance and how many items, and whether that was kept as impressions. A keyed hash over all of it
keeps callers from making ids up, by which they could vote for a version. Its key is derived from a
pseudonym key, which every replica has, so that ids survive restarts; after a rotation the earlier
keys still read what they signed (`serve.keys`). It shows the pseudonym of the user, never the raw
id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import secrets
from typing import cast

from raysys.partitions.schema import Surface
from raysys.rollout.counters import Arm

_MAC_DIGITS = 24
"""96 bits."""
_NONE = "-"
_WITH_USER = "user"
_MILLION = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestTag:
    """What a request id says."""

    nonce: str
    """16 hex digits that no other request has."""
    answered_at: float
    """UNIX seconds by the replica's clock, to the millisecond."""
    version: str
    """The version that ranked."""
    surface: Surface
    pseudonym: str
    """Of the user; of the request itself where it had none."""
    has_user: bool
    rollout_id: str | None
    """The analysis that the request counts for (`RolloutView.analysis_id`), None if for none."""
    arm: Arm
    """The side of the split that the user is on, whichever version answered in the end."""
    bucket: int
    """Analysis bucket of the user, in [0, NUM_BUCKETS)."""
    num_shown: int = 0
    """Items of the answer: feedback names none at a higher position."""
    propensity: float | None = None
    """Probability that the user is answered by this version, over all draws of the split, to six
    digits; None where it is not known: stable answered in place of a canary that failed."""
    sample_fraction: float = 1.0
    """Share of requests whose impressions were kept, to six digits."""

    @property
    def is_kept(self) -> bool:
        """Whether the impressions of this answer are kept: all of them, or none."""
        digest = hashlib.blake2b(self.nonce.encode(), digest_size=8, person=b"impressions")
        return int.from_bytes(digest.digest()) < self.sample_fraction * 2**64


def new_nonce() -> str:
    """Returns 16 random hex digits."""
    return secrets.token_hex(8)


class RequestIds:
    """Signs and reads request ids.

    >>> ids = RequestIds(b"0123456789abcdef")
    >>> tag = RequestTag(nonce="00ff00ff00ff00ff", answered_at=1.5, version="v0001-1a2b3c",
    ...                  surface="search", pseudonym="ab12", has_user=True, rollout_id="r0001",
    ...                  arm="canary", bucket=7, num_shown=10, propensity=0.2)
    >>> ids.sign(tag).rpartition('.')[0]
    '00ff00ff00ff00ff.5dc.v0001-1a2b3c.search.ab12.user.r0001.canary.7.10.200000.1000000'
    >>> ids.read(ids.sign(tag)) == tag
    True
    """

    def __init__(self, secret: bytes) -> None:
        # Another format needs another `person`, so that ids of the old one read as unknown.
        self._key = hashlib.blake2b(secret, person=b"raysys.request.2").digest()

    def sign(self, tag: RequestTag) -> str:
        """Returns the id of an answer, of letters, digits, dots and hyphens."""
        fields = (
            tag.nonce,
            f"{round(tag.answered_at * 1000):x}",
            tag.version,
            tag.surface,
            tag.pseudonym,
            _WITH_USER if tag.has_user else _NONE,
            tag.rollout_id or _NONE,
            tag.arm,
            str(tag.bucket),
            str(tag.num_shown),
            _NONE if tag.propensity is None else _millionths(tag.propensity),
            _millionths(tag.sample_fraction),
        )
        assert not any("." in field for field in fields), fields
        text = ".".join(fields)
        return f"{text}.{self._mac(text)}"

    def read(self, request_id: str) -> RequestTag | None:
        """Returns what an id says, None if it was not signed with this key."""
        text, _, mac = request_id.rpartition(".")
        if not (request_id.isascii() and hmac.compare_digest(mac, self._mac(text))):
            return None
        nonce, answered_at, version, surface, pseudonym, user, rollout_id, *rest = text.split(".")
        arm, bucket, num_shown, propensity, sample_fraction = rest
        return RequestTag(
            nonce=nonce,
            answered_at=int(answered_at, 16) / 1000,
            version=version,
            surface=cast(Surface, surface),
            pseudonym=pseudonym,
            has_user=user == _WITH_USER,
            rollout_id=None if rollout_id == _NONE else rollout_id,
            arm=cast(Arm, arm),
            bucket=int(bucket),
            num_shown=int(num_shown),
            propensity=None if propensity == _NONE else int(propensity) / _MILLION,
            sample_fraction=int(sample_fraction) / _MILLION,
        )

    def _mac(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()[:_MAC_DIGITS]


def _millionths(fraction: float) -> str:
    return str(round(fraction * _MILLION))
