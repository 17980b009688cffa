"""The parts of a score add up to it, and each is due to what it names."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from raysys.ingest.features import FEATURE_NAMES, NUM_FEATURES
from raysys.model.explain import BASE, GROUPS, explain, sets_without
from raysys.model.scorer import NUM_INPUTS, Head
from tests.tiny_shop import random_head

NAMES = tuple(GROUPS)


def inputs(num: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, NUM_INPUTS)).astype(np.float32)


def scaled(head: Head, factor: float) -> Head:
    return Head(weights={name: w * np.float32(factor) for name, w in head.weights.items()})


def rewired(head: Head, columns: list[int], values: object) -> Head:
    """The head with other weights on some of its inputs."""
    weights = {name: w.copy() for name, w in head.weights.items()}
    for name in ("first.weight", "skip.weight"):
        weights[name][:, columns] = values if values == 0 else weights[name][:, values]
    return Head(weights=weights)


def by_orders(head: Head, row: np.ndarray) -> dict[str, float]:
    """Shapley's definition: the mean over all orders in which the groups become known."""
    parts = dict.fromkeys(NAMES, 0.0)
    for order in itertools.permutations(NAMES):
        known = np.zeros_like(row)
        for name in order:
            before = head.score(known[None])[0]
            known[list(GROUPS[name])] = row[list(GROUPS[name])]
            parts[name] += float(head.score(known[None])[0] - before)
    return {name: part / math.factorial(len(NAMES)) for name, part in parts.items()}


def test_every_input_is_in_one_group() -> None:
    assert sorted(itertools.chain(*GROUPS.values())) == list(range(NUM_INPUTS))


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_add_up_to_the_score(seed: int) -> None:
    head, x = random_head(hidden_units=32, seed=seed), inputs(seed=seed)
    total = sum(explain(head, x).values())
    np.testing.assert_allclose(total, head.score(x), rtol=1e-5, atol=1e-5)


def test_they_are_the_means_over_all_orders() -> None:
    head, x = random_head(), inputs(2)
    found = explain(head, x)
    for i, row in enumerate(x):
        for name, part in by_orders(head, row).items():
            assert found[name][i] == pytest.approx(part, abs=1e-5)


def test_known_one_after_the_other_they_would_not_be() -> None:
    """The negative control: the parts of one order depend on which it is."""
    head, (row,) = random_head(), inputs(1)
    known = np.zeros_like(row)
    base = head.score(known[None])[0]
    known[list(GROUPS["repeat"])] = row[list(GROUPS["repeat"])]
    first_alone = float(head.score(known[None])[0] - base)
    assert abs(explain(head, row[None])["repeat"][0] - first_alone) > 1e-3


def test_a_group_that_the_head_ignores_gets_nothing() -> None:
    for name, columns in GROUPS.items():
        blind = rewired(random_head(), list(columns), 0)
        parts = explain(blind, inputs())
        assert np.array_equal(parts[name], np.zeros(20, np.float32))
        assert all(np.abs(part).max() > 1e-3 for other, part in parts.items()
                   if other not in (name, BASE))  # fmt: skip


def test_groups_that_do_the_same_get_the_same() -> None:
    price, popularity = list(GROUPS["price"]), list(GROUPS["popularity"])
    twins, x = rewired(random_head(), price, popularity), inputs()
    x[:, price] = x[:, popularity]
    parts = explain(twins, x)
    np.testing.assert_allclose(parts["price"], parts["popularity"], atol=1e-6)
    x[:, price] *= 2
    parts = explain(twins, x)
    assert np.abs(parts["price"] - parts["popularity"]).max() > 1e-2


def test_a_linear_head_is_explained_by_its_weights() -> None:
    head, x = Head.decayed_frequency(8), inputs()
    parts = explain(head, x)
    column = FEATURE_NAMES.index
    np.testing.assert_allclose(parts["repeat"], 3.0 * x[:, column("own_decayed_count")], rtol=1e-5)
    np.testing.assert_allclose(parts["popularity"], 0.3 * x[:, column("popularity")], rtol=1e-5)
    for name in ("text", "query", "price", "category", BASE):
        assert np.array_equal(parts[name], np.zeros(20, np.float32))


def test_what_is_unknown_has_no_part() -> None:
    x = np.zeros((3, NUM_INPUTS), np.float32)
    x[:, NUM_FEATURES] = [0.1, 0.2, 0.3]
    parts = explain(random_head(), x)
    assert np.abs(parts["text"]).min() > 0
    assert all(np.array_equal(parts[name], np.zeros(3, np.float32))
               for name in NAMES if name != "text")  # fmt: skip


def test_the_base_is_the_score_of_a_request_of_which_nothing_is_known() -> None:
    head = random_head()
    unknown = head.score(np.zeros((1, NUM_INPUTS), np.float32))[0]
    np.testing.assert_allclose(explain(head, inputs())[BASE], np.full(20, unknown), rtol=1e-5)


def test_no_candidates_have_no_parts() -> None:
    parts = explain(random_head(), inputs(0))
    assert parts.keys() == {BASE, *NAMES} and all(part.shape == (0,) for part in parts.values())


def test_large_scores_stay_within_their_own_precision() -> None:
    head, x = scaled(random_head(hidden_units=32), 3.0), inputs() * 10
    total = sum(part.astype(np.float64) for part in explain(head, x).values())
    scores = head.score(x)
    assert np.abs(scores).max() > 1000
    np.testing.assert_allclose(total, scores, rtol=1e-5, atol=1e-5 * np.abs(scores).max())


def test_a_group_joins_the_sets_of_the_others_as_often_as_there_are_orders() -> None:
    for group in range(5):
        others, weights = sets_without(group, 5)
        assert len(others) == 16 and not (others >> group & 1).any()
        assert weights.sum() == pytest.approx(1.0)
