"""Applies the shop's rules to a ranking: what is shown, whatever the model says.

    config.rules x ItemTable -> Rules
    candidates, values -> block -> boost -> order -> pin and cap together -> what is shown

Everything is decided by the candidates, their values and the config alone, so all replicas show the
same. Values are scores; for ads they are expected values, which nothing boosts or pins.

Shape suffixes: K = candidates, N = items of the table.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.config import BlockRule, BoostRule, CategoryCapRule, PinRule, RuleConfig
from raysys.ingest.features import IndexArray, ItemTable
from raysys.partitions.schema import Surface

Touched = Mapping[int, Sequence[str]]
"""Place among the candidates -> the rules that moved the item."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arranged:
    """What is shown."""

    order: NDArray[np.int64]
    """(shown,) places among the candidates, first to last."""
    values: NDArray[np.floating[Any]]
    """(K,) with boosts."""
    touched: Touched


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Boost:
    label: str
    mask: NDArray[np.bool_]
    """(N,)."""
    add: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Pin:
    label: str
    item: int
    position: int
    queries: frozenset[str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _OfSurface:
    blocked: NDArray[np.bool_] | None
    """(N,)."""
    boosts: tuple[_Boost, ...]
    pins: tuple[_Pin, ...]
    caps: tuple[CategoryCapRule, ...]


class Rules:
    """The rules as they apply to the items of one version. Threads may share it."""

    def __init__(self, config: Sequence[RuleConfig], items: ItemTable) -> None:
        self._category = items.category
        by_id = np.argsort(np.array(items.ids, object), kind="stable")
        self._place_by_id = np.empty(len(by_id), np.int32)
        self._place_by_id[by_id] = np.arange(len(by_id), dtype=np.int32)
        surfaces: tuple[Surface, ...] = ("search", "recommend", "ads")
        self._of = {surface: _compile(config, items, surface) for surface in surfaces}

    def blocked(self, surface: Surface) -> NDArray[np.bool_] | None:
        """Returns which items are never shown, (N,); None where all may be."""
        return self._of[surface].blocked

    def pinned(self, surface: Surface, query: str | None) -> list[int]:
        """Returns the items that are pinned for a request."""
        return [pin.item for pin in self._pins(surface, query)]

    def arrange(
        self,
        surface: Surface,
        query: str | None,
        candidates: IndexArray,
        values: NDArray[np.floating[Any]],
    ) -> Arranged:
        """Returns the candidates as they are shown: best first, equal ones by item id, and ruled.

        Args:
          candidates: (K,) item indexes, each once.
          values: (K,) what they are ranked by; higher is better.
        """
        rules = self._of[surface]
        touched: defaultdict[int, list[str]] = defaultdict(list)
        for boost in rules.boosts:
            places = np.flatnonzero(boost.mask[candidates])
            values = values.copy()
            values[places] += boost.add
            for place in places.tolist():
                touched[place].append(boost.label)
        order = np.lexsort((self._place_by_id[candidates], -values))
        if rules.blocked is not None:
            order = order[~rules.blocked[candidates[order]]]
        pins = self._pins(surface, query)
        if pins or rules.caps:
            order = self._place(order, candidates, pins, rules.caps, touched)
        return Arranged(order=order, values=values, touched=touched)

    def _pins(self, surface: Surface, query: str | None) -> list[_Pin]:
        pins = self._of[surface].pins
        if not pins:
            return []
        asked = normalised(query or "")
        return [pin for pin in pins if not pin.queries or asked in pin.queries]

    def _place(
        self,
        order: NDArray[np.int64],
        candidates: IndexArray,
        pins: Sequence[_Pin],
        caps: Sequence[CategoryCapRule],
        touched: defaultdict[int, list[str]],
    ) -> NDArray[np.int64]:
        places = order.tolist()
        place_of = dict(zip(candidates[order].tolist(), places, strict=True))
        fixed = _positions(pins, place_of)
        for place, label in fixed.values():
            touched[place].append(label)
        pinned = {place for place, _ in fixed.values()}
        rest = [place for place in places if place not in pinned]
        slots = _Slots(self._category[candidates], caps, touched)
        slots.reserve((position, place) for position, (place, _) in fixed.items())
        ruled = max([cap.first for cap in caps] + [position + 1 for position in fixed], default=0)
        shown = [
            fixed[position][0] if position in fixed else slots.next(position, rest)
            for position in range(min(ruled, len(order)))
        ]
        return np.array(shown + rest, np.int64)


def _positions(pins: Sequence[_Pin], place_of: Mapping[int, int]) -> dict[int, tuple[int, str]]:
    """Returns position from 0 -> place and label.

    An item's first pin counts, and a position's: a later one gets the next free position. Pins past
    the end get the last free ones.
    """
    wanted: dict[int, _Pin] = {}
    for pin in pins:
        if pin.item in place_of:
            wanted.setdefault(pin.item, pin)
    fixed: dict[int, tuple[int, str]] = {}
    num = len(place_of)
    for pin in sorted(wanted.values(), key=lambda pin: pin.position > num):
        ahead = range(pin.position - 1, num)
        free = [position for position in (*ahead, *reversed(range(num))) if position not in fixed]
        fixed[free[0]] = (place_of[pin.item], pin.label)
    return fixed


class _Slots:
    """Fills positions one after the other, best first, within the caps while that can be."""

    def __init__(
        self,
        category: IndexArray,
        caps: Sequence[CategoryCapRule],
        touched: defaultdict[int, list[str]],
    ) -> None:
        self._category = category
        self._caps = caps
        self._touched = touched
        self._counts: list[Counter[int]] = [Counter() for _ in caps]

    def reserve(self, fixed: Iterable[tuple[int, int]]) -> None:
        """Counts the pinned items, before any other is placed."""
        for position, place in fixed:
            self._count(position, place)

    def next(self, position: int, rest: list[int]) -> int:
        """Takes the best item for a position out of the rest."""
        held: list[tuple[int, CategoryCapRule]] = []
        chosen = rest[0]  # if no others are left, nothing is held back
        for place in rest:
            cap = self._full(position, place)
            if cap is None:
                chosen = place
                self._label(held)
                break
            held.append((place, cap))
        rest.remove(chosen)
        self._count(position, chosen)
        return chosen

    def _label(self, held: Iterable[tuple[int, CategoryCapRule]]) -> None:
        for place, cap in held:
            label = f"category_cap {cap.max_items} in first {cap.first}"
            if label not in self._touched[place]:
                self._touched[place].append(label)

    def _full(self, position: int, place: int) -> CategoryCapRule | None:
        category = int(self._category[place])
        for cap, counts in zip(self._caps, self._counts, strict=True):
            if category >= 0 and position < cap.first and counts[category] >= cap.max_items:
                return cap
        return None

    def _count(self, position: int, place: int) -> None:
        for cap, counts in zip(self._caps, self._counts, strict=True):
            counts[int(self._category[place])] += position < cap.first


def normalised(query: str) -> str:
    """Returns what two queries have in common that a rule takes for one.

    >>> normalised("  Blue\\tCHEESE ")
    'blue cheese'
    """
    return " ".join(query.casefold().split())


def matching(
    items: ItemTable,
    *,
    item_ids: Iterable[str] = (),
    category: Iterable[str] = (),
    brand: Iterable[str] = (),
) -> NDArray[np.bool_]:
    """Returns which items are named, or are of a category or brand that is, (N,)."""
    mask = of_names(items.category, items.category_names, category)
    mask |= of_names(items.brand, items.brand_names, brand)
    mask[items.indexes_of(list(item_ids))] = True
    return mask


def of_names(codes: IndexArray, names: Sequence[str], wanted: Iterable[str]) -> NDArray[np.bool_]:
    """Returns which codes are of the wanted names, (N,)."""
    chosen = set(wanted)
    # One more than there are codes: -1, which is unknown, is none of them.
    is_wanted = np.zeros(max(len(names), int(codes.max(initial=-1)) + 1) + 1, np.bool_)
    is_wanted[: len(names)] = [name in chosen for name in names]
    out: NDArray[np.bool_] = is_wanted[codes]
    return out


def _compile(config: Sequence[RuleConfig], items: ItemTable, surface: Surface) -> _OfSurface:
    blocks = [r.block for r in config if r.block and surface in r.block.surfaces]
    return _OfSurface(
        blocked=_blocked(blocks, items),
        boosts=tuple(
            _boost(r.boost, items) for r in config if r.boost and surface in r.boost.surfaces
        ),
        pins=tuple(
            pin
            for r in config
            if r.pin and surface in r.pin.surfaces and (pin := _pin(r.pin, items)) is not None
        ),
        caps=tuple(
            r.category_cap for r in config if r.category_cap and surface in r.category_cap.surfaces
        ),
    )


def _blocked(blocks: Sequence[BlockRule], items: ItemTable) -> NDArray[np.bool_] | None:
    if not blocks:
        return None
    masks = [matching(items, item_ids=b.items, category=b.category, brand=b.brand) for b in blocks]
    out: NDArray[np.bool_] = np.logical_or.reduce(masks)
    return out


def _boost(rule: BoostRule, items: ItemTable) -> _Boost:
    if rule.add is not None:
        add, by = rule.add, f"{rule.add:+g}"
    else:
        assert rule.multiply is not None
        add, by = math.log(rule.multiply), f"x{rule.multiply:g}"
    named = (("item", rule.items), ("category", rule.category), ("brand", rule.brand))
    what = " ".join(f"{kind}={','.join(values)}" for kind, values in named if values)
    mask = matching(items, item_ids=rule.items, category=rule.category, brand=rule.brand)
    return _Boost(label=f"boost {what} {by}", mask=mask, add=add)


def _pin(rule: PinRule, items: ItemTable) -> _Pin | None:
    """Returns None where the version does not know the item."""
    item = items.index_of(rule.item)
    if item is None:
        return None
    queries = frozenset(map(normalised, rule.queries))
    label = f"pin position={rule.position}"
    return _Pin(label=label, item=item, position=rule.position, queries=queries)
