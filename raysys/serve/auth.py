"""Who may steer a rollout over HTTP: callers with a token from the file that the config names.

    Authorization: Bearer TOKEN -> Tokens.check() -> POST /v1/rollout/... | 401, 403

Tokens are compared by their hashes in constant time, and all of them each time, so that how long a
refusal takes says nothing. No message, log or `repr` ever has one.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import stat
from pathlib import Path

from fastapi import Request

from raysys.errors import ConfigError
from raysys.serve.schema import ApiError

MIN_TOKEN_CHARS = 32
"""Of `openssl rand -hex 16`: 128 bits cannot be guessed, however often one may try."""

_MAKE_ONE = "make one with `openssl rand -hex 32`"
_logger = logging.getLogger(__name__)


class Tokens:
    """The tokens of a file."""

    def __init__(self, path: str) -> None:
        """Names the file; empty for none, and then nobody may steer."""
        self._path = path

    def digests(self) -> list[bytes]:
        """Reads the file and returns the hash of each token.

        Raises:
          ConfigError: The file cannot be read, others may read it, or a token is too short.
        """
        path = Path(self._path)
        try:
            mode, text = path.stat().st_mode, path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"http.token_file: {path} cannot be read ({error.strerror}); {_MAKE_ONE} > FILE"
            ) from error
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            raise ConfigError(
                f"http.token_file: {path} may be read or written by everyone (mode "
                f"{stat.S_IMODE(mode):04o}); run `chmod o= {path}`"
            )
        tokens = [line for line in map(bytes.strip, text.splitlines()) if line]
        if not tokens:
            raise ConfigError(f"http.token_file: {path} has no token; {_MAKE_ONE} > FILE")
        for number, token in enumerate(tokens, 1):
            if len(token) < MIN_TOKEN_CHARS:
                raise ConfigError(
                    f"http.token_file: {path}, token {number} has {len(token)} characters, at "
                    f"least {MIN_TOKEN_CHARS} are needed; {_MAKE_ONE}"
                )
        return [_digest(token) for token in tokens]

    async def check(self, request: Request) -> None:
        """Lets a request go on if it has one of the tokens.

        Raises:
          ApiError: 401 it has none, 403 no tokens are configured, 503 they cannot be read now.
        """
        if not self._path:
            raise ApiError(
                403,
                "rollouts are not steered over HTTP here; set http.token_file, or use the command "
                "line, raysys rollout",
            )
        try:
            known = await asyncio.to_thread(self.digests)
        except ConfigError as error:
            _logger.error("nobody can steer rollouts over HTTP: %s", error)
            why = "the tokens cannot be read now; the replica's log says why"
            raise ApiError(503, why) from error
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        presented = _digest(token.strip().encode("latin-1"))
        is_known = [hmac.compare_digest(presented, digest) for digest in known]
        if scheme.lower() != "bearer" or not any(is_known):
            raise ApiError(401, "Authorization: expected `Bearer TOKEN` with a token of this shop")


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
