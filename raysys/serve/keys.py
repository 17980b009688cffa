"""The pseudonym keys of a replica: all that it was given, and the one that counts now.

    key file | environment -> Keys <- key id of the ledger's head state, key id of each version

A replica may have a new key before the ledger names it, and goes on with the old one until then. So
all replicas change over together, in the second in which they see the rotation, and each of them
can read what the others signed. A key that it has not got yet is looked for in the file again.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from raysys.errors import MissingKeyError, RaysysError
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.serve.request_id import RequestIds, RequestTag

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

    def __init__(self, read: Callable[[], Pseudonymizer]) -> None:
        """Reads the keys.

        Raises:
          ConfigError: As `Pseudonymizer.from_config`.
        """
        self._read = read
        self._keys = _by_id(read())
        self._followed: str | None = None

    @property
    def current(self) -> Key:
        """The key of the ledger's head state; the newest where there is none, or it is missing."""
        return self._keys.get(self._followed or "") or next(reversed(self._keys.values()))

    def follow(self, key_id: str | None) -> None:
        """Goes over to the key that the ledger names, if this replica has it or gets it now."""
        if key_id is None or key_id == self._followed:
            return
        try:
            self.of(key_id)
        except MissingKeyError as error:
            _logger.warning("%s; until then it goes on with key %s", error, self.current.key_id)
            return
        self._followed = key_id

    def of(self, key_id: str | None) -> Key:
        """Returns a key by its id, or the current one for None.

        Raises:
          MissingKeyError: It is not among those that this replica was given.
        """
        if key_id is None:
            return self.current
        if key_id not in self._keys:
            self._read_again()
        if key_id not in self._keys:
            raise MissingKeyError(
                f"user key {key_id} is not among those of this replica ({', '.join(self._keys)}); "
                "add it to the key file, or restart the replica with the new environment"
            )
        return self._keys[key_id]

    def read_request_id(self, request_id: str) -> SignedTag | None:
        """Returns what a request id says, None if no key of this replica signed it."""
        current = list(self._keys).index(self.current.key_id)
        for place, key in reversed(list(enumerate(self._keys.values()))):
            tag = key.request_ids.read(request_id)
            if tag is not None:
                return SignedTag(tag=tag, key=key, is_outdated=place < current)
        return None

    def _read_again(self) -> None:
        try:
            keys = _by_id(self._read())
        except RaysysError as error:
            _logger.warning("the user keys cannot be read again: %s", error)
            return
        # Keys are only ever added: a file without some of these is not the one that was followed.
        if set(self._keys) <= set(keys):
            self._keys = keys


def _by_id(newest: Pseudonymizer) -> dict[str, Key]:
    """All prefixes of the chain, oldest first. Each signs with its own last key."""
    chains = [newest.until(key_id) for key_id in newest.key_ids]
    return {c.key_id: Key(c.key_id, c, RequestIds(c.keys[-1])) for c in chains}
