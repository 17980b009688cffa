"""Sealed bytes: one JSON object that ends with the sha256 of everything before.

    {"at":1.5,...,"type":"LeaseRenewed","hash":"9f86d0..."}

The hash is over the object as it stands without its last member, byte for byte. So a tear, an edit
and even a new layout show, and no second serialisation has to come out the same as the first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from raysys.ledger.codec import to_json

_SEAL = re.compile(rb',"hash":"([0-9a-f]{64})"}')
_SEAL_LENGTH = len(',"hash":""}') + 64


def seal(body: Mapping[str, Any]) -> bytes:
    """Returns the object with its hash as the last member; `body` has none.

    >>> seal({"a": 1})[:14]
    b'{"a":1,"hash":'
    """
    assert body and "hash" not in body
    content = to_json(body).encode()
    return content[:-1] + f',"hash":"{digest(content)}"}}'.encode()


def broken_seal(data: bytes) -> str | None:
    """Returns how the bytes differ from what was sealed, as the end of a sentence, or None."""
    found = _SEAL.fullmatch(data[-_SEAL_LENGTH:])
    if found is None:
        return "does not end with its hash"
    said, actual = found[1].decode(), digest(data[:-_SEAL_LENGTH] + b"}")
    return None if said == actual else f"says hash {said[:12]}, its content has {actual[:12]}"


def digest(data: bytes) -> str:
    """Returns the sha256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()
