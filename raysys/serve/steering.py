"""Steers the rollout over HTTP: a replica appends to the ledger what `raysys rollout` does.

    POST /v1/rollout/abort -> rollout.state.abort -> ledger record -> this replica, at once
                                                                   -> the others, by the controller

A transition is a ledger record first: an answer means that the record is there. If the replica dies
before it answers, GET /v1/rollout says whether it was written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from raysys.config import RolloutConfig
from raysys.errors import ConfigError, RaysysError, TransitionError, UnknownVersionError
from raysys.ledger.log import Log
from raysys.ledger.records import RolloutChanged
from raysys.ledger.state import State
from raysys.rollout import state as rollout
from raysys.rollout.view import RolloutView
from raysys.serve.schema import ApiError, StartRequest, SteerRequest

_OPERATOR = "operator"

Decide = Callable[[State], RolloutChanged]


class Steering:
    """Appends an operator's transitions. For one event loop; the ledger is spoken to in threads."""

    def __init__(
        self, log: Log, config: RolloutConfig, adopt: Callable[[RolloutView], None]
    ) -> None:
        self._log = log
        self._config = config
        self._adopt = adopt

    async def start(self, request: StartRequest) -> None:
        """Puts a version on trial.

        Raises:
          ApiError: 404 there is no such version, 409 there is a trial already, 422 the weight is
            not below those of the plan's later steps, 503 the ledger cannot be written now.
        """
        await self._change(
            lambda state: rollout.start(
                state,
                request.version,
                rules=self._config,
                weight_fraction=request.weight,
                actor=_OPERATOR,
            )
        )

    async def pause(self, request: SteerRequest) -> None:
        """Keeps the canary at its weight.

        Raises:
          ApiError: 409 there is no trial, or it is paused; 503 the ledger cannot be written now.
        """
        reason = request.reason or "paused by the operator"
        await self._change(lambda state: rollout.pause(state, actor=_OPERATOR, reason=reason))

    async def resume(self, request: SteerRequest) -> None:
        """Ends a pause, and approves a promotion that waits for it.

        Raises:
          ApiError: 409 nothing is paused, 503 the ledger cannot be written now.
        """
        reason = request.reason or "resumed by the operator"
        await self._change(lambda state: rollout.resume(state, actor=_OPERATOR, reason=reason))

    async def promote(self, request: SteerRequest) -> None:
        """Makes the canary stable.

        Raises:
          ApiError: 409 there is no trial, 503 the ledger cannot be written now.
        """
        reason = request.reason or "promoted by the operator"
        await self._change(lambda state: rollout.promote(state, actor=_OPERATOR, reason=reason))

    async def abort(self, request: SteerRequest) -> None:
        """Takes the canary off trial.

        Raises:
          ApiError: As `promote`.
        """
        reason = request.reason or "aborted by the operator"
        await self._change(lambda state: rollout.abort(state, actor=_OPERATOR, reason=reason))

    async def _change(self, decide: Decide) -> None:
        try:
            state = await asyncio.to_thread(self._append, decide)
        except UnknownVersionError as error:
            raise ApiError(404, str(error)) from error
        except TransitionError as error:
            raise ApiError(409, str(error)) from error
        except ConfigError as error:
            raise ApiError(422, str(error)) from error
        except (RaysysError, OSError) as error:
            raise ApiError(
                503,
                f"the ledger cannot be written now ({error}); see GET /v1/rollout, then try again",
            ) from error
        self._adopt(RolloutView.of(state))

    def _append(self, decide: Decide) -> State:
        self._log.transact(decide)
        return self._log.refresh()
