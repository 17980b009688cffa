"""Turns a raw `user_id` into a keyed pseudonym at the door; the raw id is written nowhere.

    key file -> Pseudonymizer -> 32 hex digits: HMAC-SHA256(key, user_id), truncated to 128 bits

The same hash decides which shard a user belongs to and whether the user is held out, so both
are stable over updates without a table of users.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from pathlib import Path

import polars as pl

from raysys.errors import ConfigError

MIN_KEY_BYTES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Pseudonymizer:
    """A secret key and what it does to user ids.

    >>> hasher = Pseudonymizer(b"0123456789abcdef")
    >>> hasher.key_id, hasher.pseudonym("alice")[:8]
    ('7ecd1ca3', 'fdbf8b1c')
    """

    key: bytes = dataclasses.field(repr=False)

    @classmethod
    def from_file(cls, path: str | Path) -> Pseudonymizer:
        """Reads the key; white space around it does not count.

        Raises:
          ConfigError: The file is missing, unreadable or too short.
        """
        try:
            key = Path(path).read_bytes().strip()
        except OSError as error:
            raise ConfigError(
                f"pseudonyms.key_file: {path} cannot be read ({error.strerror}); make one with "
                "`openssl rand -hex 32 > FILE` and keep it as secret and as long as the model"
            ) from error
        if len(key) < MIN_KEY_BYTES:
            raise ConfigError(
                f"pseudonyms.key_file: {path} holds {len(key)} bytes, at least {MIN_KEY_BYTES} "
                "are needed; make one with `openssl rand -hex 32`"
            )
        return cls(key)

    @property
    def key_id(self) -> str:
        """Eight hex digits that name the key without giving it away."""
        return hashlib.sha256(b"raysys key id" + self.key).hexdigest()[:8]

    def pseudonym(self, user_id: str) -> str:
        """Returns the user's pseudonym, 32 hex digits."""
        return hmac.new(self.key, user_id.encode(), hashlib.sha256).hexdigest()[:32]


def is_pseudonym(column: str) -> pl.Expr:
    """Whether the column holds what `Pseudonymizer.pseudonym` could have made."""
    return pl.col(column).str.contains("^[0-9a-f]{32}$")


def user_shard(num_shards: int) -> pl.Expr:
    """The shard in [0, num_shards) of the pseudonyms in column `user`."""
    return pl.col("user").str.slice(0, 8).str.to_integer(base=16) % num_shards


def is_held_out(fraction: float) -> pl.Expr:
    """Whether the user in column `user` is never trained on."""
    return pl.col("user").str.slice(8, 8).str.to_integer(base=16) < int(fraction * 2**32)
