"""The judge of the fault tests sees an answer that was not allowed."""

from __future__ import annotations

import pytest

from tests.helpers import entries, rollout
from tests.serve_load import GRACE_S, Answered, without_weight

STABLE, CANARY = "v0001-aaaaaa", "v0002-bbbbbb"
ENTRIES = entries([rollout(), rollout("rolled_back")], at=100.0)
"""A canary with weight from 100 s to 101 s."""


@pytest.mark.parametrize(
    ("version", "sent_at", "is_allowed"),
    [
        (STABLE, 50.0, True),
        (STABLE, 100.5, True),
        (STABLE, 200.0, True),
        (CANARY, 100.5, True),
        (CANARY, 101 + GRACE_S, True),
        (CANARY, 101 + GRACE_S + 0.1, False),
        ("v0003-cccccc", 100.5, False),
    ],
)
def test_a_version_may_answer_while_it_has_weight(
    version: str, sent_at: float, is_allowed: bool
) -> None:
    answer = Answered(sent_at=sent_at, user="u", version=version)
    assert (without_weight([answer], ENTRIES, STABLE) == []) == is_allowed


def test_a_version_that_was_stable_loses_its_weight_by_a_promotion() -> None:
    promoted = rollout("promoted", stable=CANARY, previous=STABLE)
    history = entries([rollout(), promoted], at=100.0)
    late = Answered(sent_at=110.0, user="u", version=STABLE)
    assert without_weight([late], history, STABLE) == [late]
