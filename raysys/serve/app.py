"""The Serve application: one ingress deployment that ranks in-process, one rollout controller.

    serve deploy serve_configs/ranker.yaml
    curl -d '{"user_id": "alice", "candidates": ["a", "b"]}' \\
         -H 'Content-Type: application/json' localhost:8000/v1/rank

`create_api` is the HTTP side on a plain FastAPI app, `Ranker` the deployment around it, and `build`
what a Serve config imports. New model versions never touch that config: replicas follow the ledger.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

import raysys
from raysys.config import HttpConfig, load_config
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.stats import load_item_ids
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted
from raysys.registry.store import load_version
from raysys.rollout.controller import RolloutController
from raysys.rollout.reports import ReplicaReport
from raysys.rollout.view import RolloutView
from raysys.serve.auth import Tokens
from raysys.serve.feedback import EventWriter
from raysys.serve.follower import Controller, Follower
from raysys.serve.keys import Keys
from raysys.serve.limits import (
    FEEDBACK,
    RANKING,
    STATUS,
    STEERING,
    HeadAsGet,
    gates,
    limited_route,
)
from raysys.serve.metrics import RayMetrics
from raysys.serve.pages import add_pages
from raysys.serve.ranker import ResidentVersions, Servable
from raysys.serve.replica import Replica
from raysys.serve.schema import (
    ApiError,
    ErrorAnswer,
    FeedbackAnswer,
    FeedbackRequest,
    HealthAnswer,
    RankAnswer,
    RankRequest,
    RolloutAnswer,
    StartRequest,
    SteerRequest,
    VersionsAnswer,
    describe,
)
from raysys.serve.service import RankService
from raysys.serve.steering import Steering
from raysys.storage import Root

LoadVersion = Callable[[Root, UpdateCommitted], Servable]

_RETRY_AFTER = {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}
_STATUS_ERRORS = (500, 503)
_BODY_ERRORS = (400, 408, 413, 415, 422, *_STATUS_ERRORS)
_STEERING_ERRORS = (401, 403, 404, 409, *_BODY_ERRORS)


def _errors(statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    """The error answers of an endpoint, for its schema."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase}
        for status in statuses
    }
    found[503]["headers"] = {"Retry-After": _RETRY_AFTER}
    return found


def create_api(replica: Replica, config: HttpConfig) -> FastAPI:
    """Returns the HTTP API of a replica, which starts and stops with it.

    HEAD is answered wherever GET is. OPTIONS is not: browsers of other sites have no business here.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await replica.start()
        yield
        await replica.stop()

    app = FastAPI(
        title="raysys",
        version=raysys.__version__,
        description="Ranks candidates for a shop's users, and takes what came of it.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    add_pages(app)
    app.add_middleware(HeadAsGet)
    guards = {STEERING: Tokens(config.token_file).check}
    app.router.route_class = limited_route(config, gates(config), guards)
    _add_errors(app, config)
    _add_ranking(app, replica.service)
    _add_status(app, replica)
    _add_steering(app, replica)
    return app


def _add_ranking(app: FastAPI, service: RankService) -> None:
    errors = _errors((404, *_BODY_ERRORS))

    @app.post("/v1/rank", tags=[RANKING], responses=errors)
    async def rank(
        request: RankRequest, x_raysys_version: Annotated[str | None, Header()] = None
    ) -> RankAnswer:
        """Ranks candidates for a user. `X-Raysys-Version` has one version answer, uncounted."""
        return await service.rank(request, x_raysys_version)

    @app.post("/v1/feedback", tags=[FEEDBACK], responses=errors)
    async def feedback(request: FeedbackRequest) -> FeedbackAnswer:
        """Stores what the user did with an answer. Send items of its ranking only."""
        return await service.feedback(request)


def _add_status(app: FastAPI, replica: Replica) -> None:
    service, errors = replica.service, _errors(_STATUS_ERRORS)

    @app.get("/v1/versions", tags=[STATUS], responses=errors)
    async def versions() -> VersionsAnswer:
        """The versions in this replica's memory."""
        return service.resident()

    @app.get("/v1/rollout", tags=[STATUS], responses=errors)
    async def rollout() -> RolloutAnswer:
        """The rollout as this replica follows it, and the controller's newest measurement."""
        return await _rollout_of(replica)

    @app.get("/v1/healthz", tags=[STATUS], responses=errors)
    async def healthz() -> HealthAnswer:
        """The replica is alive, also while it has no version yet."""
        return HealthAnswer(status="ok")

    @app.get("/v1/readyz", tags=[STATUS], responses=errors)
    async def readyz() -> HealthAnswer:
        """A version is loaded, has passed its check and answers. The error says why not."""
        if not service.is_ready:
            missing = service.resident().missing
            why = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            raise ApiError(
                503, f"not ready: {why or 'no version is committed: run an update first'}"
            )
        return HealthAnswer(status="ok")


def _add_steering(app: FastAPI, replica: Replica) -> None:
    """Adds the endpoints that need a token. Its check is the guard's: before a body is read."""
    steering, errors = replica.steering, _errors(_STEERING_ERRORS)
    token = HTTPBearer(auto_error=False, description="A token of the file `http.token_file`.")
    options: dict[str, Any] = {
        "tags": [STEERING],
        "responses": errors,
        "dependencies": [Security(token)],
    }

    @app.post("/v1/rollout/start", **options)
    async def start(request: StartRequest) -> RolloutAnswer:
        """Puts a version on trial beside stable."""
        await steering.start(request)
        return await _rollout_of(replica)

    @app.post("/v1/rollout/promote", **options)
    async def promote(request: SteerRequest | None = None) -> RolloutAnswer:
        """Makes the canary stable."""
        await steering.promote(request or SteerRequest())
        return await _rollout_of(replica)

    @app.post("/v1/rollout/abort", **options)
    async def abort(request: SteerRequest | None = None) -> RolloutAnswer:
        """Takes the canary off trial; stable answers everyone again."""
        await steering.abort(request or SteerRequest())
        return await _rollout_of(replica)


async def _rollout_of(replica: Replica) -> RolloutAnswer:
    view = replica.service.view
    return RolloutAnswer(
        sequence=view.sequence,
        rollout_id=view.rollout_id,
        stable=view.stable,
        canary=view.canary,
        previous=view.previous,
        weight_fraction=view.weight_fraction,
        measurement=await replica.follower.measurement() if view.canary else None,
    )


def _add_errors(app: FastAPI, config: HttpConfig) -> None:
    """Gives every error the one shape, a single line that says what to do."""
    headers = {
        401: {"WWW-Authenticate": "Bearer"},
        # What is left of the body is not read, so that the connection can say nothing else.
        408: {"Connection": "close"},
        413: {"Connection": "close"},
        503: {"Retry-After": str(config.retry_after_s)},
    }

    def answer(status: int, message: str) -> JSONResponse:
        return JSONResponse(
            {"error": " ".join(message.split())}, status, headers=headers.get(status)
        )

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return answer(error.status, error.message)

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(*describe(error.errors()))

    @app.exception_handler(HTTPException)
    async def bad_request(request: Request, error: HTTPException) -> JSONResponse:
        place = f"{request.method} {request.url.path}"
        response = answer(
            error.status_code, f"{place}: {error.detail}; see /docs for what there is"
        )
        if allowed := (error.headers or {}).get("Allow"):
            response.headers["Allow"] = allowed.replace("GET", "GET, HEAD")
        return response

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "internal error; the replica's log has the cause")


class _ControllerHandle:
    """`follower.Controller` by way of Serve."""

    def __init__(self, handle: DeploymentHandle[RolloutController]) -> None:
        self._handle = handle

    async def wait_for_change(self, known_sequence: int, timeout_s: float) -> RolloutView | None:
        view = await self._handle.wait_for_change.remote(known_sequence, timeout_s)
        assert view is None or isinstance(view, RolloutView)
        return view

    async def report(self, report: ReplicaReport) -> int:
        num_held = await self._handle.report.remote(report)
        assert isinstance(num_held, int)
        return num_held

    async def measurement(self) -> dict[str, Any] | None:
        measurement = await self._handle.measurement.remote()
        assert measurement is None or isinstance(measurement, dict)
        return measurement


class RankerArgs(BaseModel):
    """`args` of the application in a Serve config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str
    """Path of the shop's YAML file, the same on every node; relative to Ray's working directory."""
    feedback_interval_s: Annotated[float, Field(gt=0)] = 1.0
    """Feedback waits up to so long for its file, and its caller with it: shorter is faster, and
    makes more and smaller files."""
    max_ts_age_s: Annotated[float, Field(gt=0)] = 86_400.0
    """How far in the past a request may say that it was made. It decides the partition."""
    impressions_interval_s: Annotated[float, Field(gt=0)] = 10.0
    """Impressions wait so long for theirs; a replica that is killed loses those that wait."""


@serve.deployment(
    num_replicas=1,
    ray_actor_options={"num_cpus": 0.3},
    max_ongoing_requests=1000,  # feedback waits for its file, which takes no CPU
    health_check_period_s=10.0,
    graceful_shutdown_timeout_s=10.0,
)
@serve.ingress()
class Ranker:
    """The ingress: HTTP, split, ranking and feedback in one process."""

    def __init__(
        self,
        args: RankerArgs,
        controller: DeploymentHandle[RolloutController],
        load: LoadVersion = load_version,
    ) -> None:
        self._http = load_config(args.config).http
        self._replica = open_replica(args, _ControllerHandle(controller), load)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._replica, self._http)


def open_replica(args: RankerArgs, controller: Controller, load: LoadVersion) -> Replica:
    """Puts a replica together from a shop's config.

    Raises:
      ConfigError: The config, or a key that it names, is missing or not valid.
    """
    config = load_config(args.config)
    root = Root(config.root)
    log, metrics = Log(root), RayMetrics()
    impressions = EventWriter(
        root, "impressions", interval_s=args.impressions_interval_s, on_drop=metrics.dropped
    )
    feedback = EventWriter(root, "feedback", interval_s=args.feedback_interval_s)
    keys = Keys(lambda: Pseudonymizer.from_config(config.pseudonyms))
    service = RankService(
        replica_id=uuid.uuid4().hex,
        config=config.rollout,
        versions=ResidentVersions(
            lambda name: load_named(name, root, log, keys, load),
            lambda update_id: load_item_ids(root, update_id),
        ),
        keys=keys,
        impressions=impressions,
        feedback=feedback,
        metrics=metrics,
        max_ts_age_s=args.max_ts_age_s,
    )
    follower = Follower(service, log, controller)
    steering = Steering(log, config.rollout, follower.adopt)
    return Replica(service, follower, impressions, feedback, steering)


def load_named(name: str, root: Root, log: Log, keys: Keys, load: LoadVersion) -> Servable:
    """Loads a committed version.

    Raises:
      MissingKeyError: This replica has not got its user key yet, so it would find no history.
      RaysysError: As `load`.
    """
    record = log.refresh().versions[name]
    keys.of(record.user_key_id)
    return load(root, record)


def build(args: Mapping[str, Any]) -> Application:
    """Returns the application that `serve_configs/ranker.yaml` names.

    Raises:
      ConfigError: The shop's file is not valid; the application is then refused as a whole.
      ValidationError: `args` is not `RankerArgs`.
    """
    parsed = RankerArgs.model_validate(args)
    config = load_config(parsed.config)
    if config.http.token_file:
        Tokens(config.http.token_file).digests()
    # Serve's decorators are typed to return the class; what they return has `bind`.
    controller = RolloutController.bind(parsed.config)  # type: ignore[attr-defined]
    application: Application = Ranker.bind(parsed, controller)  # type: ignore[attr-defined]
    return application
