"""Dataclasses as JSON objects and back, by their annotations.

    to_json(record) -> str -> json.loads -> reviver(type(record)) -> an equal record

Records and snapshots go through it, so a field that is added to either needs no code here. What an
annotation cannot promise to bring back equal is refused when the class is first used.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

Reviver = Callable[[Any], Any]


def to_json(value: Any) -> str:
    """Returns one line of JSON with sorted keys; equal values give the same line.

    Raises:
      ValueError: It holds a number that JSON lacks.
    """
    return json.dumps(value, default=_plain, sort_keys=True, allow_nan=False, separators=(",", ":"))


@functools.cache
def reviver(hint: Any) -> Reviver | None:
    """Returns what makes a value of type `hint` out of parsed JSON; None if that is the value.

    The reviver takes its argument apart. It raises TypeError, AttributeError or ValueError if the
    JSON is of another shape.

    >>> reviver(tuple[str, ...])(["a", "b"])
    ('a', 'b')
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return class_reviver(hint)
    if origin in (typing.Union, types.UnionType):
        return _optional_reviver(args)
    if origin is tuple and args[-1] is Ellipsis:
        item = reviver(args[0])
        return tuple if item is None else lambda values: tuple(map(item, values))
    if origin is tuple:
        items = [reviver(arg) or _same for arg in args]
        return lambda values: tuple(f(v) for f, v in zip(items, values, strict=True))
    if origin is frozenset and reviver(args[0]) is None:
        return frozenset
    if origin is Mapping and args[0] is str:
        value = reviver(args[1])
        return value and (lambda found: {key: value(v) for key, v in found.items()})
    if origin is typing.Literal or hint in (str, int, float, bool, Any, types.NoneType):
        return None
    raise AssertionError(f"a field of type {hint} would not come back equal from JSON")


def class_reviver(cls: Any) -> Reviver:
    """Returns what makes an instance of a dataclass out of its parsed JSON object."""
    hints = typing.get_type_hints(cls)
    nested = [(f.name, r) for f in dataclasses.fields(cls) if (r := reviver(hints[f.name]))]

    def revive(body: Any) -> Any:
        for name, revive_field in nested:
            if name in body:
                body[name] = revive_field(body[name])
        return cls(**body)

    return revive


def fingerprint(cls: type[Any]) -> str:
    """Returns 16 hex digits that change when a field of the class, or below it, does."""
    return hashlib.sha256(to_json(_shape(cls)).encode()).hexdigest()[:16]


def _optional_reviver(args: tuple[Any, ...]) -> Reviver | None:
    found = [r for arg in args if (r := reviver(arg))]
    if not found:
        return None
    assert len(found) == 1, f"JSON does not say which of {args} it holds"
    return lambda value: None if value is None else found[0](value)


def _same(value: Any) -> Any:
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"expected a record's value, got a {type(value).__name__}")


def _shape(hint: Any) -> Any:
    if not dataclasses.is_dataclass(hint):
        inner = [_shape(arg) for arg in typing.get_args(hint)]
        return [repr(typing.get_origin(hint)), inner] if inner else repr(hint)
    hints = typing.get_type_hints(hint)
    return {f.name: _shape(hints[f.name]) for f in dataclasses.fields(hint)}
