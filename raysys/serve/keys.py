"""The pseudonym keys of a replica: all that it was given, and the one that counts now.

    key file | environment -> Keys <- key id of the ledger's head state, key id of each version

A replica may have a new key before the ledger names it, and goes on with the old one until then. So
all replicas change over together, in the second in which they see the rotation, and each of them
can read what the others signed. A key that it has not got yet is looked for in the file again.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable

from raysys.errors import MissingKeyError, RaysysError
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.serve.request_id import RequestIds, RequestTag

READ_INTERVAL_S = 1.0
"""Missing keys are looked for at most so often: whoever sends a bad request id has it done."""

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """A key and those before it, and what a replica does with them."""

    key_id: str
    chain: Pseudonymizer
    request_ids: RequestIds


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SignedTag:
    """What a request id says, and by which key."""

    tag: RequestTag
    key: Key
    is_outdated: bool
    """A key that counts no longer signed it. It may have been given up because it had leaked."""


class Keys:
    """Threads may share it."""

    def __init__(
        self, read: Callable[[], Pseudonymizer], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Reads the keys.

        Raises:
          ConfigError: As `Pseudonymizer.from_config`.
        """
        self._read = read
        self._clock = clock
        self._keys = _by_id(read())
        self._read_at = clock()
        self._followed: str | None = None

    @property
    def current(self) -> Key:
        """The key that the ledger names; the newest there is, if it names none or one not here."""
        return self._find(self._followed) or next(reversed(self._keys.values()))

    def follow(self, key_id: str | None) -> None:
        """Goes over to the key that the ledger names, as soon as this replica has it."""
        if key_id == self._followed:
            return
        self._followed = key_id
        if key_id is not None and self._find(key_id) is None:
            _logger.warning("%s; until then it uses %s", _missing(key_id), self.current.key_id)

    def of(self, key_id: str | None) -> Key:
        """Returns a key by its id, or the current one for None.

        Raises:
          MissingKeyError: It is not among those that this replica was given.
        """
        if key_id is None:
            return self.current
        key = self._find(key_id)
        if key is None:
            raise MissingKeyError(_missing(key_id))
        return key

    def read_request_id(self, request_id: str) -> SignedTag | None:
        """Returns what a request id says, None if no key of this replica signed it."""
        signed = self._verify(request_id)
        if signed is None and self._read_again():
            signed = self._verify(request_id)
        return signed

    def _verify(self, request_id: str) -> SignedTag | None:
        current = self.current
        keys = list(self._keys.values())
        for place, key in reversed(list(enumerate(keys))):
            tag = key.request_ids.read(request_id)
            if tag is not None:
                return SignedTag(tag=tag, key=key, is_outdated=place < keys.index(current))
        return None

    def _find(self, key_id: str | None) -> Key | None:
        if key_id is not None and key_id not in self._keys:
            self._read_again()
        return self._keys.get(key_id or "")

    def _read_again(self) -> bool:
        """Looks for new keys, at most once a while; returns whether there are any."""
        if self._clock() - self._read_at < READ_INTERVAL_S:
            return False
        self._read_at = self._clock()
        try:
            keys = _by_id(self._read())
        except RaysysError as error:
            _logger.warning("the user keys cannot be read again: %s", error)
            return False
        # Keys are only ever added: a file without some of these is not the one that was followed.
        if not self._keys.keys() < keys.keys():
            return False
        # Those that are known stay the same objects: a request may hold one.
        self._keys = {**keys, **self._keys}
        return True


def _missing(key_id: str) -> str:
    return (
        f"user key {key_id} is not among those of this replica; add it to the key file, or restart "
        "the replica with the new environment"
    )


def _by_id(newest: Pseudonymizer) -> dict[str, Key]:
    """All prefixes of the chain, oldest first. Each signs with its own last key."""
    chains = [newest.until(key_id) for key_id in newest.key_ids]
    return {c.key_id: Key(c.key_id, c, RequestIds(c.keys[-1])) for c in chains}
