"""The `rollout:` section: every step is checked key by key, and an error names the key."""

from __future__ import annotations

import re
from typing import Any

import pytest

from raysys.config import Analysis, Pause, RolloutConfig, Step, parse_config, parse_rollout
from raysys.errors import ConfigError

SHOP = {"root": "file:///shop", "pseudonyms": {"key_file": "k"}}
RAMP = [
    {"set_weight": 0.05},
    {"pause": {"duration_s": 600}},
    {"analysis": {}},
    {"set_weight": 0.2},
    {"analysis": {"min_requests": 5000}},
    {"pause": {}},
]


def parsed(**rollout: Any) -> RolloutConfig:
    return parse_config({**SHOP, "rollout": rollout}).rollout


def test_steps_are_read_in_order() -> None:
    assert parsed(steps=RAMP).plan == (
        Step(set_weight=0.05),
        Step(pause=Pause(duration_s=600.0)),
        Step(analysis=Analysis()),
        Step(set_weight=0.2),
        Step(analysis=Analysis(min_requests=5000)),
        Step(pause=Pause()),
    )
    assert parsed(steps=RAMP).num_stages == 2


def test_without_steps_there_is_one_weight_and_one_analysis() -> None:
    plan = parsed(weight_fraction=0.3).plan
    assert plan == (Step(set_weight=0.3), Step(analysis=Analysis()))


@pytest.mark.parametrize("steps", [[], RAMP])
def test_rules_come_back_from_the_ledger_without_the_webhook(steps: list[Any]) -> None:
    config = parsed(steps=steps, max_p99_ms=50, webhook_url="https://chat.example/secret")
    assert "webhook_url" not in config.rules()
    assert parse_rollout(config.rules()).plan == config.plan
    assert parse_rollout(config.rules()).max_p99_ms == 50.0


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        pytest.param(
            {"steps": [{"set_wait": 0.1}]},
            "rollout.steps[0].set_wait: unknown key; did you mean rollout.steps[0].set_weight?",
            id="unknown-step",
        ),
        pytest.param(
            {"steps": [{"set_weight": 0.1}, {"pause": 600}]},
            "rollout.steps[1].pause: expected a mapping of keys, got 600",
            id="pause-without-key",
        ),
        pytest.param(
            {"steps": [{"set_weight": 0.1}, {"pause": {"duration": 600}}]},
            "did you mean rollout.steps[1].pause.duration_s?",
            id="pause-misspelt",
        ),
        pytest.param(
            {"steps": [{"set_weight": 0.1}, {"analysis": None}]},
            "rollout.steps[1]: expected exactly one of set_weight: 0.1, pause: {duration_s: 600}, "
            "analysis: {}, got 'none of them'",
            id="empty-step",
        ),
        pytest.param(
            {"steps": [{"set_weight": 0.1, "analysis": {}}]},
            "rollout.steps[0]: expected exactly one of",
            id="two-in-one",
        ),
        pytest.param(
            {"steps": [{"analysis": {}}]},
            "rollout.steps[0]: expected set_weight as the first step",
            id="no-weight-first",
        ),
        pytest.param(
            {"steps": [{"set_weight": 0.2}, {"analysis": {}}, {"set_weight": 0.1}, {"pause": {}}]},
            "rollout.steps[2].set_weight: expected a fraction in (0, 1) that is more than 0.2",
            id="weight-falls",
        ),
        pytest.param(
            {"steps": [{"set_weight": 1.0}, {"analysis": {}}]},
            "rollout.steps[0].set_weight: expected a fraction in (0, 1), got 1.0",
            id="nobody-left-for-stable",
        ),
        pytest.param(
            {"steps": [{"set_weight": 0.2}]},
            "rollout.steps[0]: expected a pause or an analysis after it",
            id="weight-last",
        ),
        pytest.param(
            {"steps": [{"set_weight": 0.2}, {"pause": {"duration_s": 0}}]},
            "rollout.steps[1].pause.duration_s: expected > 0",
            id="no-time",
        ),
        pytest.param(
            {"steps": [{"set_weight": 0.2}, {"analysis": {"min_requests": 0}}]},
            "rollout.steps[1].analysis.min_requests: expected >= 1",
            id="no-requests",
        ),
        pytest.param(
            {"max_p99_ratio": 0.5}, "rollout.max_p99_ratio: expected >= 1, or null", id="ratio"
        ),
        pytest.param(
            {"on_deadline": "promote"},
            "rollout.on_deadline: expected 'rollback' or 'pause'",
            id="deadline",
        ),
    ],
)
def test_what_is_wrong_with_a_plan_is_named_with_its_place(
    rollout: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parsed(**rollout)


@pytest.mark.parametrize("url", ["ftp://host/T0K3N", "chat.example/T0K3N", "https:///T0K3N"])
def test_a_webhook_that_is_none_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.webhook_url: expected http") as caught:
        parsed(webhook_url=url)
    assert "T0K3N" not in str(caught.value)


def test_a_rollout_may_begin_with_a_look_in_the_shadow() -> None:
    pause, analysis = Step(pause=Pause()), Step(analysis=Analysis())
    ahead = (Step(set_weight=0.0), pause, Step(set_weight=0.1), analysis)
    assert RolloutConfig(steps=ahead).plan[0].set_weight == 0


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param((Step(set_weight=0.0), Step(analysis=Analysis())), id="nothing to judge"),
        pytest.param(
            (Step(set_weight=0.1), Step(pause=Pause()), Step(set_weight=0.0), Step(pause=Pause())),
            id="back to 0",
        ),
    ],
)
def test_no_other_weight_is_0(steps: tuple[Step, ...]) -> None:
    with pytest.raises(ConfigError, match=r"set_weight: expected a fraction in \(0, 1\)"):
        RolloutConfig(steps=steps)
