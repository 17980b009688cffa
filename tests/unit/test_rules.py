"""The shop's rules: blocked items never show, pins stand in their place, caps hold."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import (
    BlockRule,
    BoostRule,
    CategoryCapRule,
    PinRule,
    RuleConfig,
    parse_config,
)
from raysys.errors import ConfigError
from raysys.serve.rules import Arranged, Rules
from tests.fakes import item_table

NUM = 24
IDS = [f"i{i:02}" for i in range(NUM)]
CATEGORIES = ("dairy", "fruit", "bakery")
TABLE = item_table(
    IDS,
    category=(np.arange(NUM, dtype=np.int32) % 4) - 1,  # a quarter has none
    category_names=CATEGORIES,
)
ALL = np.arange(NUM, dtype=np.int32)

ids = st.sampled_from(IDS)
names = st.lists(st.sampled_from(CATEGORIES), max_size=2, unique=True).map(tuple)
blocks = st.builds(
    lambda items, category, brand: RuleConfig(
        block=BlockRule(items=(*items, "i03"), category=category, brand=brand)
    ),
    st.lists(ids, max_size=3),
    names,
    st.lists(st.just("acme"), max_size=1).map(tuple),
)
pins = st.builds(
    lambda item, position: RuleConfig(pin=PinRule(item=item, position=position)),
    ids,
    st.integers(1, NUM + 5),
)
boosts = st.builds(
    lambda items, add: RuleConfig(boost=BoostRule(items=tuple(items), add=add)),
    st.lists(ids, min_size=1, max_size=5),
    st.floats(-5, 5),
)
caps = st.builds(
    lambda most, more: RuleConfig(category_cap=CategoryCapRule(max_items=most, first=most + more)),
    st.integers(1, 4),
    st.integers(1, 12),
)
any_rules = st.lists(st.one_of(blocks, pins, boosts, caps), max_size=6)
candidates = st.lists(st.sampled_from(range(NUM)), min_size=1, unique=True).map(
    lambda items: np.array(items, np.int32)
)
seeds = st.integers(0, 1000)


def scores_of(items: np.ndarray, seed: int) -> np.ndarray:
    """Few different ones, so that many are equal."""
    return np.random.default_rng(seed).integers(-3, 3, NUM).astype(np.float32)[items]


def arrange(
    rules: Sequence[RuleConfig], items: np.ndarray = ALL, seed: int = 0, **more: Any
) -> Arranged:
    surface, query = more.get("surface", "recommend"), more.get("query")
    return Rules(rules, TABLE).arrange(surface, query, items, scores_of(items, seed))


def shown(rules: Sequence[RuleConfig], items: np.ndarray = ALL, **more: Any) -> list[str]:
    return [IDS[items[place]] for place in arrange(rules, items, **more).order]


@settings(max_examples=150, deadline=None)
@given(items=candidates, seed=seeds)
def test_without_rules_the_best_comes_first_and_equal_ones_by_item_id(
    items: np.ndarray, seed: int
) -> None:
    scores = scores_of(items, seed)
    arranged = arrange([], items, seed)
    expected = sorted(range(len(items)), key=lambda i: (-scores[i], IDS[items[i]]))
    assert arranged.order.tolist() == expected
    assert np.array_equal(arranged.values, scores)
    assert not arranged.touched


@settings(max_examples=200, deadline=None)
@given(rules=any_rules, items=candidates, seed=seeds)
def test_rules_show_every_candidate_once_but_the_blocked_ones(
    rules: list[RuleConfig], items: np.ndarray, seed: int
) -> None:
    blocked = {
        item
        for rule in rules
        if rule.block
        for i, item in enumerate(IDS)
        if item in rule.block.items
        or (TABLE.category[i] >= 0 and CATEGORIES[TABLE.category[i]] in rule.block.category)
        or TABLE.brand_names[TABLE.brand[i]] in rule.block.brand
    }
    assert Counter(shown(rules, items, seed=seed)) == Counter(
        IDS[i] for i in items if IDS[i] not in blocked
    )


@settings(max_examples=200, deadline=None)
@given(
    positions=st.dictionaries(ids, st.integers(1, NUM), max_size=6),
    others=st.lists(st.one_of(blocks, boosts, caps), max_size=3),
    items=candidates,
    seed=seeds,
)
def test_pins_stand_in_their_place(
    positions: dict[str, int], others: list[RuleConfig], items: np.ndarray, seed: int
) -> None:
    apart = {position: item for item, position in positions.items()}
    rules = [RuleConfig(pin=PinRule(item=i, position=p)) for p, i in apart.items()]
    order = shown([*others, *rules], items, seed=seed)
    assert pins_hold(order, {item: position for position, item in apart.items()})


def pins_hold(order: list[str], positions: dict[str, int]) -> bool:
    """Whether pins of different positions stand there, those past the end behind all others."""
    here = {item: position for item, position in positions.items() if item in order}
    late = [item for item, position in here.items() if position > len(order)]
    in_place = all(
        order.index(item) == position - 1
        for item, position in here.items()
        if position <= len(order)
    )
    return in_place and all(order.index(item) >= len(order) - len(here) for item in late)


@settings(max_examples=200, deadline=None)
@given(rules=any_rules, items=candidates, seed=seeds)
def test_caps_hold_as_long_as_there_are_items_of_other_categories(
    rules: list[RuleConfig], items: np.ndarray, seed: int
) -> None:
    assert caps_hold(shown(rules, items, seed=seed), rules)


def caps_hold(order: list[str], rules: list[RuleConfig]) -> bool:
    """Whether nothing is shown beyond a cap while a later item, which no rule fixed, might be."""
    caps = [rule.category_cap for rule in rules if rule.category_cap]
    pinned = {rule.pin.item for rule in rules if rule.pin}
    for position, item in enumerate(order):
        if item in pinned:
            continue
        others = [other for other in order[position:] if other not in pinned]
        if not within(order, position, item, caps, pinned) and any(
            within(order, position, other, caps, pinned) for other in others
        ):
            return False
    return True


def within(
    order: list[str], position: int, item: str, caps: list[CategoryCapRule], pinned: set[str]
) -> bool:
    code = TABLE.category[IDS.index(item)]
    for cap in caps:
        if position >= cap.first or code < 0:
            continue
        before = [
            other
            for place, other in enumerate(order[: cap.first])
            if (place < position or other in pinned) and TABLE.category[IDS.index(other)] == code
        ]
        if len(before) >= cap.max_items:
            return False
    return True


def test_the_test_of_caps_finds_an_order_that_breaks_one() -> None:
    cap = [RuleConfig(category_cap=CategoryCapRule(max_items=1, first=3))]
    assert not caps_hold(["i01", "i05", "i02", "i03"], cap)
    assert caps_hold(["i01", "i02", "i03", "i05"], cap)


def test_the_test_of_pins_finds_one_that_stands_elsewhere() -> None:
    assert not pins_hold(["i05", "i01"], {"i05": 2})
    assert pins_hold(["i01", "i05"], {"i05": 2})


def test_pins_that_want_one_place_stand_next_to_each_other_in_the_order_of_the_config() -> None:
    rules = [RuleConfig(pin=PinRule(item=item, position=1)) for item in ("i09", "i04")]
    assert shown(rules)[:2] == ["i09", "i04"]
    late = [RuleConfig(pin=PinRule(item=item, position=90)) for item in ("i09", "i04")]
    assert set(shown(late)[-2:]) == {"i09", "i04"}


def test_a_pin_for_a_query_counts_for_that_query_alone() -> None:
    rule = [RuleConfig(pin=PinRule(item="i09", position=1, queries=("Blue cheese",)))]
    assert shown(rule, query=" blue  CHEESE ")[0] == "i09"
    assert shown(rule, query="blue") == shown([], query="blue") == shown(rule)


def test_a_pinned_item_that_is_no_candidate_or_in_no_catalogue_changes_nothing() -> None:
    some = np.array([1, 2, 3], np.int32)
    for item in ("i09", "nowhere"):
        rule = [RuleConfig(pin=PinRule(item=item, position=1))]
        assert shown(rule, some) == shown([], some)


def test_rules_hold_on_their_surfaces_alone() -> None:
    rule = [RuleConfig(block=BlockRule(items=("i03",), surfaces=("ads",)))]
    assert "i03" in shown(rule)
    assert "i03" not in shown(rule, surface="ads")


def test_a_factor_of_the_odds_lifts_a_negative_score_too() -> None:
    """A factor of the score itself would push it down: that is the broken variant."""
    items = np.array([0], np.int32)
    rules = Rules([RuleConfig(boost=BoostRule(items=("i00",), multiply=2.0))], TABLE)
    arranged = rules.arrange("search", None, items, np.array([-1.0], np.float32))
    assert arranged.values[0] == pytest.approx(-1.0 + math.log(2))
    assert arranged.values[0] > -1.0 > -1.0 * 2.0


def test_touched_items_name_their_rules() -> None:
    rules = [
        RuleConfig(boost=BoostRule(brand=("acme",), add=0.3)),
        RuleConfig(boost=BoostRule(items=("i01",), category=("dairy",), multiply=1.5)),
        RuleConfig(pin=PinRule(item="i02", position=1)),
        RuleConfig(category_cap=CategoryCapRule(max_items=1, first=4)),
    ]
    few = np.array([1, 5, 2, 3], np.int32)
    arranged = Rules(rules, TABLE).arrange("recommend", None, few, np.zeros(4, np.float32))
    assert [IDS[few[place]] for place in arranged.order] == ["i02", "i01", "i03", "i05"]
    assert dict(arranged.touched) == {
        0: ["boost item=i01 category=dairy x1.5"],
        1: ["boost item=i01 category=dairy x1.5", "category_cap 1 in first 4"],
        2: ["boost brand=acme +0.3", "pin position=1"],
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"pin": {"item": "a", "positon": 1}}, "rules[0].pin.positon: unknown key; did you mean"),
        ({"pin": {"item": "a"}}, "rules[0].pin.position: missing"),
        ({"pin": {"item": "a", "position": 0}}, "rules: pin.position: expected a position from 1"),
        ({"pin": {"item": "a", "position": 1, "surfaces": ["ads"]}}, "rules[0].pin.surfaces[0]"),
        ({"boost": {"brand": ["a"], "add": 1, "multiply": 2}}, "rules: boost: expected either add"),
        ({"boost": {"add": 1}}, "rules: boost: expected at least one of items, category and brand"),
        ({"boost": {"brand": ["a"], "multiply": 0}}, "rules: boost.multiply: expected in"),
        ({"block": {"colour": ["red"]}}, "rules[0].block.colour: unknown key"),
        ({"block": {"brand": [" "]}}, "rules: block: items, category and brand: expected text"),
        ({"block": {"brand": ["a"], "surfaces": []}}, "rules: block.surfaces: expected at least"),
        ({"category_cap": {"max_items": 3, "first": 3}}, "rules: category_cap (max_items, first)"),
        ({"ban": {"brand": ["a"]}}, "rules[0].ban: unknown key"),
        ({}, "rules: an entry: expected exactly one of pin, block, boost, category_cap"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_rule_that_means_nothing_is_a_config_error(rule: Any, message: str) -> None:
    raw = {"root": "file:///shop", "pseudonyms": {"key_file": "k"}, "rules": [rule]}
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert str(caught.value).startswith(message)


def test_rules_read_from_a_config_file() -> None:
    config = parse_config(
        {
            "root": "file:///shop",
            "pseudonyms": {"key_file": "k"},
            "rules": [
                {"pin": {"item": "i01", "position": 1, "queries": ["cheddar"]}},
                {"boost": {"category": ["dairy"], "add": 1}},
            ],
        }
    )
    assert config.rules == (
        RuleConfig(pin=PinRule(item="i01", position=1, queries=("cheddar",))),
        RuleConfig(boost=BoostRule(category=("dairy",), add=1.0)),
    )
