"""What Prometheus is told of the ledger: phase, step and budget, whatever fails meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

import pytest

from raysys.config import load_config
from raysys.ledger.log import Log
from raysys.ledger.state import State
from raysys.privacy.budget import report_budget
from raysys.rollout import watch as watching
from raysys.rollout.watch import watch
from raysys.serve import metrics
from raysys.serve.metrics import METRICS, ControllerMetrics, RayMetrics, controller_metrics
from raysys.storage import Root
from tests.helpers import committed, folded, rollout, started, write_config, write_records

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Values:
    """Instruments that keep their values here instead of giving them to Ray's agent."""
    kept: Values = {}

    class Instrument:
        def __init__(self, name: str, *described: Any) -> None:
            self._name = name
            (self._tags,) = (part for part in described if isinstance(part, tuple))

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            assert set(tags or {}) == set(self._tags), self._name
            kept[self._name, tuple(sorted((tags or {}).items()))] = value

        def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
            key = (self._name, tuple(sorted((tags or {}).items())))
            self.set(kept.get(key, 0.0) + value, tags)

        observe = set

    for name in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, name, Instrument)
    return kept


def on_trial(**changes: Any) -> State:
    first = started()
    second = started("u0002-bbbbbb", partitions=())
    records = [first, committed(first), second, committed(second)]
    return folded(*records, rollout(**changes))


class TestController:
    def test_tells_the_phase_that_is_and_takes_back_the_one_that_was(self, values: Values) -> None:
        report = ControllerMetrics(lambda state: 0.0, None)
        report(State())
        phases = {tags: value for (name, tags), value in values.items() if "phase" in name}
        assert set(phases.values()) == {0.0} and len(phases) >= 4
        report(on_trial(step_index=3))
        assert values["raysys_rollout_phase", (("phase", "canary"),)] == 1
        assert values["raysys_rollout_step", ()] == 3
        report(on_trial(phase="promoted", stable="v0002-bbbbbb", previous="v0001-aaaaaa"))
        assert values["raysys_rollout_phase", (("phase", "canary"),)] == 0
        assert values["raysys_rollout_phase", (("phase", "promoted"),)] == 1

    def test_asks_the_accountant_only_where_something_was_spent(self, values: Values) -> None:
        asked: list[State] = []

        def spent(state: State) -> float:
            asked.append(state)
            return 3.0

        report = ControllerMetrics(spent, 8.0)
        for state in (on_trial(), on_trial(step_index=2), on_trial(step_index=2)):
            report(state)
        assert len(asked) == 1
        assert values["raysys_privacy_epsilon_left", ()] == 5.0

    def test_a_shop_without_privacy_has_no_budget(self, values: Values) -> None:
        ControllerMetrics(lambda state: 1 / 0, None)(on_trial())
        assert not any("epsilon" in name for name, _ in values)

    def test_the_budget_is_that_of_raysys_budget(
        self, values: Values, local_root: Root, tmp_path: Any
    ) -> None:
        config = load_config(write_config(tmp_path, local_root.uri))
        first = started()
        write_records(local_root, [first, committed(first)])
        state = Log(local_root).refresh()
        controller_metrics(config, local_root)(state)
        expected = report_budget(state, config.privacy)
        spent = values["raysys_privacy_epsilon_spent", ()]
        assert spent == pytest.approx(expected.epsilon_spent, rel=0.02)
        assert values["raysys_privacy_epsilon_left", ()] == pytest.approx(8.0 - spent)


def test_a_version_that_leaves_memory_is_told_as_0(values: Values) -> None:
    replica = RayMetrics()
    replica.state(weight_fraction=0.2, resident=["v1", "v2"], failing=["v3"])
    replica.state(weight_fraction=0.0, resident=["v2"], failing=[])
    of = {(name, tags): v for (name, tags), v in values.items() if "version_" in name}
    assert of == {
        ("raysys_version_resident", (("version", "v1"),)): 0.0,
        ("raysys_version_resident", (("version", "v2"),)): 1.0,
        ("raysys_version_load_failing", (("version", "v3"),)): 0.0,
    }
    assert values["raysys_rollout_weight_fraction", ()] == 0.0


def test_every_metric_is_made_by_a_replica_or_the_controller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Counter[str]()
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, lambda name, *_, **__: made.update([name]))
    RayMetrics()
    ControllerMetrics(lambda state: 0.0, None)
    assert made == dict.fromkeys(METRICS, 1)


@pytest.mark.parametrize("fault", [OSError("store"), ZeroDivisionError("bug")])
def test_watching_goes_on_after_a_failure(local_root: Root, fault: Exception) -> None:
    seen: list[State] = []
    pauses: list[float] = []

    def report(state: State) -> None:
        seen.append(state)
        if len(seen) == 1:
            raise fault

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise asyncio.CancelledError

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(watch(Log(local_root), report, sleep=sleep))
    assert len(seen) == 3 and set(pauses) == {watching.INTERVAL_S}
