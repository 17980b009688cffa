"""Bounds of config values, and the one sentence that names a value out of bounds."""

from __future__ import annotations

import math
from collections.abc import Callable

from raysys.errors import ConfigError


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raises `ConfigError` with what was expected, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {value!r}")


Bound = tuple[Callable[[float], bool], str]
NOT_NEGATIVE: Bound = (lambda value: value >= 0, ">= 0")
AT_LEAST_1: Bound = (lambda value: value >= 1, ">= 1")
POSITIVE: Bound = (lambda value: 0 < value < math.inf, "> 0")
NOISE: Bound = (lambda value: 0.3 <= value < math.inf, ">= 0.3: less noise protects nobody")
FRACTION: Bound = (lambda value: 0 < value < 1, "a fraction in (0, 1)")


def check(config: object, section: str, bound: Bound, *names: str) -> None:
    """Requires that these fields of a section are within a bound."""
    holds, expected = bound
    for name in names:
        value = getattr(config, name)
        require(holds(value), f"{section}.{name}", value, expected)
