"""Turns a raw `user_id` into a keyed pseudonym at the door; the raw id is written nowhere.

    key file | environment -> Pseudonymizer -> 32 hex digits for each user id

The source holds one key a line, oldest first. Keys are added, never taken away, and a pseudonym
runs through all of them: HMAC(k_n, … HMAC(k_2, HMAC(k_1, user_id))), each HMAC-SHA256 cut to 128
bits. So a pseudonym that is stored can be carried forward without its raw id, and who has an
earlier key alone cannot compute a later pseudonym (RFC 2104; the threat model stands in
docs/decisions/2026-11-24-pseudonym-keys-chain.md).

The pseudonym decides the user's shard. It also draws, the first time that a user is seen, whether
the user is held out; the draw is then carried in `state/`, since it must outlive the pseudonym.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import polars as pl

from raysys.config import PseudonymConfig
from raysys.errors import ConfigError, RaysysError

MIN_KEY_BYTES = 16
HELD_OUT_SCHEMA = {"user": pl.String(), "held_out": pl.Boolean()}
"""One row for each user whose draw was made."""

_MAKE_ONE = "make one with `openssl rand -hex 32`"


class Pseudonymizer:
    """A chain of secret keys, oldest first, and what it does to user ids.

    >>> hasher = Pseudonymizer(b"0123456789abcdef")
    >>> hasher.key_id, hasher.pseudonym("alice")[:8]
    ('7ecd1ca3', 'fdbf8b1c')
    >>> rotated = Pseudonymizer(b"0123456789abcdef", b"the key after it")
    >>> rotated.key_ids
    ('7ecd1ca3', '9028587b')
    >>> rotated.translate(hasher.pseudonym("alice"), "7ecd1ca3") == rotated.pseudonym("alice")
    True
    """

    __slots__ = ("key_ids", "keys")

    def __init__(self, *keys: bytes) -> None:
        assert keys, "a chain has a key"
        self.keys = keys
        self.key_ids = tuple(_key_id(keys[:num]) for num in range(1, len(keys) + 1))
        """Eight hex digits for each key: they name the chain up to it, and do not give it away."""

    def __repr__(self) -> str:
        return f"Pseudonymizer(key_ids={self.key_ids})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pseudonymizer) and self.keys == other.keys

    def __hash__(self) -> int:
        return hash(self.key_ids)

    @classmethod
    def from_config(cls, config: PseudonymConfig) -> Pseudonymizer:
        """Reads the keys from where the config says.

        Raises:
          ConfigError: They are missing or unreadable, or one is too short or stands twice.
        """
        return cls.from_env(config.key_env) if config.key_env else cls.from_file(config.key_file)

    @classmethod
    def from_file(cls, path: str | Path) -> Pseudonymizer:
        """Reads the keys from a file.

        Raises:
          ConfigError: As `from_config`.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"pseudonyms.key_file: {path} cannot be read ({error.strerror}); make one with "
                "`openssl rand -hex 32 > FILE` and keep it as secret and as long as the model"
            ) from error
        return cls(*_parse(text, f"pseudonyms.key_file: {path}"))

    @classmethod
    def from_env(cls, name: str) -> Pseudonymizer:
        """Reads the keys from an environment variable, which holds what the file would.

        Raises:
          ConfigError: As `from_config`.
        """
        text = os.environb.get(name.encode())
        if text is None:
            raise ConfigError(
                f"pseudonyms.key_env: the environment variable {name} is not set in this process; "
                "every node that runs updates or replicas needs it (docs/operations.md, User keys)"
            )
        return cls(*_parse(text, f"pseudonyms.key_env: {name}"))

    @property
    def key_id(self) -> str:
        """The id of the newest key, and of the pseudonyms that this chain makes."""
        return self.key_ids[-1]

    def pseudonym(self, user_id: str) -> str:
        """Returns the user's pseudonym, 32 hex digits."""
        return _apply(self.keys, user_id)

    def until(self, key_id: str) -> Pseudonymizer:
        """Returns the chain as it was when the key of this id was its newest.

        Raises:
          ConfigError: The chain has no such key.
        """
        return Pseudonymizer(*self.keys[: self._num_keys(key_id)])

    def translate(self, pseudonym: str, key_id: str) -> str:
        """Returns what became of a pseudonym of an earlier key: the same user's under the newest.

        Raises:
          ConfigError: The chain has no such key.
        """
        return _apply(self.keys[self._num_keys(key_id) :], pseudonym)

    def _num_keys(self, key_id: str) -> int:
        if key_id not in self.key_ids:
            raise ConfigError(
                f"pseudonyms: key {key_id} is not among those given ({', '.join(self.key_ids)}); "
                "give all keys that were ever used, oldest first"
            )
        return self.key_ids.index(key_id) + 1


def check_key(pseudonymizer: Pseudonymizer, used: str | None, root_uri: str) -> None:
    """Refuses to make pseudonyms that those in the state could not be joined to.

    Args:
      used: The key of the pseudonyms in the state, None before the first update.

    Raises:
      ConfigError: It is not the newest key.
    """
    if used in (None, pseudonymizer.key_id):
        return
    if used in pseudonymizer.key_ids:
        raise ConfigError(
            f"pseudonyms: the newest key is {pseudonymizer.key_id}, but the histories below "
            f"{root_uri} are of key {used}; run jobs/rotate_key.py first"
        )
    raise ConfigError(
        f"pseudonyms: the keys given are {', '.join(pseudonymizer.key_ids)}, but the histories "
        f"below {root_uri} were made with key {used}; give the old key back, or start a new root"
    )


def carry_forward(
    users: pl.Series, key_ids: pl.Series | str, pseudonymizer: Pseudonymizer
) -> pl.Series:
    """Returns pseudonyms of keys of the chain as those of its newest; each distinct one once.

    Args:
      key_ids: The key of each; what has none (null) is returned as it is.
    """
    if isinstance(key_ids, str):
        key_ids = pl.repeat(key_ids, len(users), dtype=pl.String(), eager=True)
    is_old = (key_ids != pseudonymizer.key_id).fill_null(False)
    if not is_old.any():
        return users
    pairs = pl.DataFrame({"user": users, "key": key_ids})
    distinct = pairs.filter(is_old).unique()
    carried = [pseudonymizer.translate(user, key_id) for user, key_id in distinct.iter_rows()]
    mapped = distinct.with_columns(new=pl.Series(carried, dtype=pl.String()))
    joined = pairs.join(mapped, on=["user", "key"], how="left", maintain_order="left")
    return joined.select(pl.coalesce("new", "user").alias(users.name)).to_series()


@contextlib.contextmanager
def no_values_in_errors(path: str) -> Iterator[None]:
    """Keeps the words of foreign exceptions out of every log while rows still have raw ids.

    Polars and Arrow quote values. What is raised instead says where it happened, and no more.

    Raises:
      RuntimeError: For anything but a `RaysysError` or a missing file, which pass.
    """
    try:
        yield
    except (RaysysError, FileNotFoundError):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = " < ".join(f"{f.filename}:{f.lineno} {f.name}" for f in reversed(frames[-4:]))
        raise RuntimeError(
            f"{path}: {type(error).__name__} at {places}; its message is withheld, since it may "
            "quote raw user ids"
        ) from None


def replace_inside(frame: pl.DataFrame, column: str, *, old: str, new: str) -> pl.DataFrame:
    """Returns the frame with each row's value of `old` replaced by that of `new` in a text column.

    Only pseudonyms are looked for: a raw id may be any text, `1` for example.
    """
    rows = frame.select(column, old, new).with_row_index("_row")
    stale = rows.filter(
        is_pseudonym(old)
        & (pl.col(old) != pl.col(new))
        & pl.col(column).str.contains(pl.col(old), literal=True)
    )
    if stale.is_empty():
        return frame
    values = [text.replace(before, after) for _, text, before, after in stale.iter_rows()]
    return frame.with_columns(frame[column].scatter(stale["_row"], values))


def is_pseudonym(column: str) -> pl.Expr:
    """Whether the column holds what `Pseudonymizer.pseudonym` could have made."""
    return pl.col(column).str.contains("^[0-9a-f]{32}$")


def user_shard(num_shards: int) -> pl.Expr:
    """The shard in [0, num_shards) of the pseudonyms in column `user`."""
    return pl.col("user").str.slice(0, 8).str.to_integer(base=16) % num_shards


def is_held_out(fraction: float) -> pl.Expr:
    """The draw: whether the user in column `user` is never trained on, if first seen now."""
    return pl.col("user").str.slice(8, 8).str.to_integer(base=16) < int(fraction * 2**32)


def draw_held_out(users: pl.Series, known: pl.DataFrame, fraction: float) -> pl.DataFrame:
    """Returns who is held out: what is known stays, everyone else is drawn by pseudonym.

    A draw that were made anew under another key, or for another fraction, would hold out users whom
    the model was trained on, and the gate would compare on them.

    Args:
      users: Pseudonyms, in any number.
      known: HELD_OUT_SCHEMA, the draws of earlier updates.

    Returns:
      HELD_OUT_SCHEMA, one row for each known user and each of `users`, sorted by user.
    """
    distinct = pl.DataFrame({"user": users.unique()}, schema={"user": pl.String()})
    new = distinct.join(known, on="user", how="anti")
    drawn = new.with_columns(held_out=is_held_out(fraction))
    return pl.concat([known.select(list(HELD_OUT_SCHEMA)), drawn]).sort("user")


def _parse(text: bytes, source: str) -> list[bytes]:
    keys = [line for line in map(bytes.strip, _lines(text)) if line] or [b""]
    for number, key in enumerate(keys, 1):
        place = f"{source} holds" if len(keys) == 1 else f"{source}, line {number}, holds"
        if len(key) < MIN_KEY_BYTES:
            raise ConfigError(
                f"{place} {len(key)} bytes, at least {MIN_KEY_BYTES} are needed; {_MAKE_ONE}"
            )
        if key in keys[: number - 1]:
            raise ConfigError(f"{place} an earlier key again; {_MAKE_ONE} for each line")
    return keys


def _lines(text: bytes) -> list[bytes]:
    """One key a line; whatever is no text is one key, line breaks in it included."""
    is_text = all(byte in b"\t\n\r" or 0x20 <= byte < 0x7F for byte in text)
    return text.splitlines() if is_text else [text]


def _key_id(keys: tuple[bytes, ...]) -> str:
    return hashlib.sha256(b"raysys key id" + b"\n".join(keys)).hexdigest()[:8]


def _apply(keys: Iterable[bytes], text: str) -> str:
    for key in keys:
        text = hmac.digest(key, text.encode(), hashlib.sha256).hex()[:32]
    return text
