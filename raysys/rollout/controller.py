"""The one actor that judges a rollout: it follows the ledger, hears replicas, and decides.

    ledger --refresh--> RolloutView --long poll--> replicas
    replicas --ReplicaReport--> RolloutCounts --judge, decide--> ledger --> webhook

It keeps nothing of its own: rollout, step and decisions are in the ledger, with the time that the
step has run; counts come again from the replicas. So it may die at any moment; replicas go on with
the last view, and the next controller continues. A decision is a ledger record first. Replicas act
on it only when they see it there, and it is decided anew on the newest state, so that an operator
who was faster prevails.

`Control` is the actor without Ray, `RolloutController` the Serve deployment around it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

from ray import serve

from raysys.config import RolloutConfig, load_config
from raysys.errors import RaysysError
from raysys.ledger.log import Log
from raysys.ledger.records import CONTROLLER, Entry, RolloutChanged
from raysys.ledger.state import State
from raysys.rollout.analysis import Measurement, judge
from raysys.rollout.notify import Notifier, message
from raysys.rollout.policy import Decision, decide
from raysys.rollout.progress import step_seconds
from raysys.rollout.reports import ReplicaReport, RolloutCounts
from raysys.rollout.state import abort, advance, current_step, pause, rules_of
from raysys.rollout.view import RolloutView
from raysys.rollout.watch import BuildReport, watch
from raysys.storage import Root

REFRESH_INTERVAL_S = 1.0
"""Seconds between two looks at the ledger: an operator's abort takes no longer to be seen."""
TELL_AGAIN_S = 3600.0
"""A transition that is older than this, of a rollout that has ended, is no news any more."""

_logger = logging.getLogger(__name__)


class Control:
    """Follows, counts and decides. For one event loop; ledger access runs in threads."""

    def __init__(
        self,
        log: Log,
        config: RolloutConfig,
        *,
        clock: Callable[[], float] = time.time,
        notifier: Notifier | None = None,
    ) -> None:
        self._log = log
        self._config = config
        self._clock = clock
        self._notifier = notifier
        self._told: int | None = None
        self._state = State()
        self._view: RolloutView | None = None
        self._changed = asyncio.Condition()
        self._counts: RolloutCounts | None = None
        self._measurement: Measurement | None = None
        self._judged_at = -float("inf")

    async def run(self) -> None:
        """Follows and judges until it is cancelled. A failure is logged, and tried again."""
        while True:
            try:
                await self.step()
            except RaysysError as error:
                _logger.warning("rollout controller keeps its last state: %s", error)
            except Exception:
                _logger.exception("rollout controller keeps its last state after a bug")
            await asyncio.sleep(REFRESH_INTERVAL_S)

    async def step(self) -> None:
        """Refreshes the view, and judges if a canary is on trial and its interval has passed.

        Raises:
          RaysysError: The ledger cannot be read or written now.
        """
        await self._follow(await asyncio.to_thread(self._log.refresh))
        if self._counts is not None and self._clock() - self._judged_at >= self._config.interval_s:
            self._judged_at = self._clock()
            await self._judge(self._counts, self._state)

    async def wait_for_change(self, known_sequence: int, timeout_s: float) -> RolloutView | None:
        """Returns the view as soon as it is newer than `known_sequence`; None after `timeout_s`."""

        def is_newer() -> bool:
            return self._view is not None and self._view.sequence > known_sequence

        async with self._changed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(is_newer)
            return self._view if is_newer() else None

    async def report(self, report: ReplicaReport) -> int:
        """Takes a replica's counts; returns the number of the first conversion to send next."""
        counts = self._counts
        if counts is None or counts.rollout_id != report.rollout_id:
            return 0  # of a weight or rollout that ended, or that is not here yet
        if report.refusal is not None:
            await self._write(self._state, Decision(kind="rollback", reason=report.refusal))
        return counts.take(report)

    def measurement(self) -> dict[str, Any] | None:
        """Returns the newest look at the canary, None if there is none on trial."""
        if self._measurement is None or self._counts is None:
            return None
        return {**self._measurement.to_json(), "shadow": self._counts.shadow.to_json()}

    async def _follow(self, state: State) -> None:
        view = RolloutView.of(state)
        known = self._view
        if known and view.sequence < known.sequence:
            return
        self._state = state
        if not (known and view.says_the_same(known)):
            await self._adopt(view)
        await self._tell(state)

    async def _adopt(self, view: RolloutView) -> None:
        if view.canary is None or view.analysis_id is None:
            self._counts = None
        elif self._counts is None or self._counts.rollout_id != view.analysis_id:
            self._counts, self._measurement = RolloutCounts(view.analysis_id), None
        async with self._changed:
            self._view = view
            self._changed.notify_all()

    async def _tell(self, state: State) -> None:
        """Tells the webhook of transitions since the last time; replicas heard of them before.

        A new controller does not know what its predecessor has told. It tells of the newest
        transition once more if that may still be news; the `sequence` gives a repetition away.
        """
        last, told = state.rollout_sequence, self._told
        if self._notifier is None or state.rollout is None or last == told:
            return
        if told is None:
            at = state.rollout_changed_at
            assert at is not None
            if state.canary is not None or self._clock() - at < TELL_AGAIN_S:
                self._notifier.tell(message(state.rollout, sequence=last, at=at))
        else:
            for entry in await asyncio.to_thread(self._entries, told, last):
                if isinstance(entry.record, RolloutChanged):
                    body = message(entry.record, sequence=entry.sequence, at=entry.at)
                    self._notifier.tell(body)
        self._told = last

    def _entries(self, after: int, last: int) -> list[Entry]:
        return list(itertools.islice(self._log.entries(after), last - after))

    async def _judge(self, counts: RolloutCounts, state: State) -> None:
        assert state.rollout is not None
        rules = rules_of(state, self._config)
        step = current_step(state, rules)
        least = step.analysis.min_requests if step and step.analysis else None
        self._measurement = judge(*counts.totals(), rules, min_requests=least)
        decision = decide(
            self._measurement,
            phase=state.rollout.phase,
            step=step,
            step_s=step_seconds(state, self._clock()),
            config=rules,
        )
        await self._write(state, decision, self._measurement)

    async def _write(
        self, decided_on: State, decision: Decision, measurement: Measurement | None = None
    ) -> None:
        if decision.kind == "wait":
            return
        change = {"advance": advance, "pause": pause, "rollback": abort}[decision.kind]

        def decide_anew(state: State) -> RolloutChanged | None:
            # Whoever changed the rollout meanwhile prevails. If the decision is still due after
            # that, the next look takes it.
            if state.rollout_sequence != decided_on.rollout_sequence:
                return None
            return change(
                state,
                actor=CONTROLLER,
                reason=decision.reason,
                measurement=measurement.to_json() if measurement else None,
            )

        entry = await asyncio.to_thread(self._log.transact, decide_anew)
        if entry is not None:
            _logger.info("rollout: %s: %s", decision.kind, decision.reason)
        await self._follow(await asyncio.to_thread(self._log.refresh))


@serve.deployment(
    num_replicas=1,
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=1000,  # each replica keeps one long poll open
    graceful_shutdown_timeout_s=2.0,
)
class RolloutController:
    """`Control` as a Serve deployment."""

    def __init__(self, config_path: str, metrics: BuildReport | None = None) -> None:
        config = load_config(config_path)
        rollout, loop = config.rollout, asyncio.get_running_loop()
        notifier = None
        if rollout.webhook_url is not None:
            notifier = Notifier(rollout.webhook_url, timeout_s=rollout.webhook_timeout_s)
            self._telling = loop.create_task(notifier.run())
        root = Root(config.root)
        self._control = Control(Log(root), rollout, notifier=notifier)
        self._task = loop.create_task(self._control.run())
        if metrics is not None:
            # Apart from the control: nothing that is merely shown may delay a rollback.
            self._watch = loop.create_task(watch(Log(root), metrics(config, root)))

    async def wait_for_change(self, known_sequence: int, timeout_s: float) -> RolloutView | None:
        """As `Control.wait_for_change`."""
        return await self._control.wait_for_change(known_sequence, timeout_s)

    async def report(self, report: ReplicaReport) -> int:
        """As `Control.report`."""
        return await self._control.report(report)

    async def measurement(self) -> dict[str, Any] | None:
        """As `Control.measurement`."""
        return self._control.measurement()

    async def check_health(self) -> None:
        """Fails, so that Serve starts another controller, if this one has stopped to follow."""
        if self._task.done():
            raise RuntimeError("the rollout controller's loop has ended")
