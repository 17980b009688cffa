"""What the shop wants of rankings whatever the model says: pins, blocks, boosts, caps.

    rules:
      - pin: {item: "4711", position: 1, queries: [cheddar]}
      - block: {brand: [acme]}
      - boost: {category: [cheese], add: 0.3}
      - category_cap: {max_items: 3, first: 10}

`serve.rules` applies them, in the order: block, boost, pin and cap together. Money orders ads, so
nothing may be pinned or boosted there.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from raysys.config.checks import require

OrganicSurface = Literal["search", "recommend"]
AnySurface = Literal["search", "recommend", "ads"]
ORGANIC: tuple[OrganicSurface, ...] = ("search", "recommend")
EVERYWHERE: tuple[AnySurface, ...] = ("search", "recommend", "ads")
MAX_POSITION = 1000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PinRule:
    """Shows an item at a position.

    Where the caller names the candidates it has to be among them; elsewhere it has to be in the
    version's item table and to pass the request's filters.
    """

    item: str
    position: int
    """From 1. In an answer that is shorter, the item comes last."""
    surfaces: tuple[OrganicSurface, ...] = ORGANIC
    queries: tuple[str, ...] = ()
    """Only for these queries, whatever their case and spaces. Default: for all requests."""

    def __post_init__(self) -> None:
        _require_text("pin.item", (self.item,))
        _require_text("pin.queries", self.queries)
        _require_some("pin.surfaces", self.surfaces)
        position = self.position
        expected = f"a position from 1 to {MAX_POSITION}"
        require(1 <= position <= MAX_POSITION, "rules: pin.position", position, expected)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockRule:
    """Never shows items that are named, or are of a category or brand that is."""

    items: tuple[str, ...] = ()
    category: tuple[str, ...] = ()
    brand: tuple[str, ...] = ()
    surfaces: tuple[AnySurface, ...] = EVERYWHERE

    def __post_init__(self) -> None:
        _require_matches("block", self.items, self.category, self.brand)
        _require_some("block.surfaces", self.surfaces)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BoostRule:
    """Changes the score of items that are named, or are of a category or brand that is."""

    items: tuple[str, ...] = ()
    category: tuple[str, ...] = ()
    brand: tuple[str, ...] = ()
    add: float | None = None
    """Added to the score; negative to push down."""
    multiply: float | None = None
    """Factor of the odds, exp(score): scores may be negative, where a factor would push down."""
    surfaces: tuple[OrganicSurface, ...] = ORGANIC

    def __post_init__(self) -> None:
        _require_matches("boost", self.items, self.category, self.brand)
        _require_some("boost.surfaces", self.surfaces)
        given = {"add": self.add, "multiply": self.multiply}
        one = (self.add is None) != (self.multiply is None)
        require(one, "rules: boost", given, "either add or multiply")
        if self.add is not None:
            require(abs(self.add) <= 1e6, "rules: boost.add", self.add, "in [-1e6, 1e6]")
        if self.multiply is not None:
            bounded = 1e-6 <= self.multiply <= 1e6
            require(bounded, "rules: boost.multiply", self.multiply, "in [1e-6, 1e6]")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CategoryCapRule:
    """Shows few items of each category first, as long as there are items of others.

    Items that would be too many follow once no others are left. Items without a category are never
    too many.
    """

    max_items: int
    """Of each category."""
    first: int
    """Among so many first positions."""
    surfaces: tuple[AnySurface, ...] = EVERYWHERE

    def __post_init__(self) -> None:
        _require_some("category_cap.surfaces", self.surfaces)
        bounds = f"1 <= max_items < first <= {MAX_POSITION}"
        values = (self.max_items, self.first)
        inside = 1 <= self.max_items < self.first <= MAX_POSITION
        require(inside, "rules: category_cap (max_items, first)", values, bounds)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RuleConfig:
    """One rule: exactly one of the kinds."""

    pin: PinRule | None = None
    block: BlockRule | None = None
    boost: BoostRule | None = None
    category_cap: CategoryCapRule | None = None

    def __post_init__(self) -> None:
        kinds = [f.name for f in dataclasses.fields(self)]
        given = [name for name in kinds if getattr(self, name) is not None]
        require(len(given) == 1, "rules: an entry", given, f"exactly one of {', '.join(kinds)}")


def _require_matches(kind: str, *lists: tuple[str, ...]) -> None:
    require(any(lists), f"rules: {kind}", {}, "at least one of items, category and brand")
    for values in lists:
        _require_text(f"{kind}: items, category and brand", values)


def _require_some(key: str, values: tuple[str, ...]) -> None:
    require(len(values) > 0, f"rules: {key}", list(values), "at least one value, or no such key")


def _require_text(key: str, values: tuple[str, ...]) -> None:
    for value in values:
        require(bool(value.strip()), f"rules: {key}", value, "text that is not blank")
