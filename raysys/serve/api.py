"""The HTTP API of a replica, on a plain FastAPI app: endpoints, their errors and their schema.

    request -> limits (size, token, overload) -> endpoint -> RankService | Steering -> JSON
    anything that is refused -> {"error": "one line that says what to do"}

Every endpoint has one tag, and by it its limits and the errors that its schema tells. The API is
for a shop's own servers, not for browsers: who may call it may ask for any user (no answer has
another's history in it, though), and only what changes the rollout needs a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

import raysys
from raysys.config import HttpConfig
from raysys.serve.auth import Tokens
from raysys.serve.limits import (
    FEEDBACK,
    RANKING,
    STATUS,
    STEERING,
    HeadAsGet,
    gates,
    limited_route,
)
from raysys.serve.pages import add_pages
from raysys.serve.replica import Replica
from raysys.serve.schema import (
    AdsAnswer,
    AdsRequest,
    ApiError,
    ErrorAnswer,
    FeedbackAnswer,
    FeedbackRequest,
    HealthAnswer,
    RankAnswer,
    RankRequest,
    RecommendAnswer,
    RecommendRequest,
    RolloutAnswer,
    SearchAnswer,
    SearchRequest,
    StartRequest,
    SteerRequest,
    VersionsAnswer,
    describe,
)
from raysys.serve.service import RankService

_RETRY_AFTER = {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}
_STATUS_ERRORS = (500, 503)
_BODY_ERRORS = (400, 408, 413, 415, 422, *_STATUS_ERRORS)
_STEERING_ERRORS = (401, 403, 404, 409, *_BODY_ERRORS)


ForcedVersion = Annotated[str | None, Header()]


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
    app.router.route_class = limited_route(
        config, gates(config, replica.service.report_rejection), guards
    )
    _add_errors(app, config)
    _add_ranking(app, replica.service)
    _add_status(app, replica)
    _add_steering(app, replica)
    return app


def _add_ranking(app: FastAPI, service: RankService) -> None:
    errors = _errors((404, *_BODY_ERRORS))
    options: dict[str, Any] = {"tags": [RANKING], "responses": errors}

    @app.post("/v1/rank", response_model=RankAnswer, **options)
    async def rank(request: RankRequest, x_raysys_version: ForcedVersion = None) -> Response:
        """Ranks candidates for a user. `X-Raysys-Version` has one version answer, uncounted."""
        return _json(await service.rank(request, x_raysys_version))

    @app.post("/v1/search", response_model=SearchAnswer, **options)
    async def search(request: SearchRequest, x_raysys_version: ForcedVersion = None) -> Response:
        """Finds items by a query, and ranks them for a user."""
        return _json(await service.search(request, x_raysys_version))

    @app.post("/v1/recommend", response_model=RecommendAnswer, **options)
    async def recommend(
        request: RecommendRequest, x_raysys_version: ForcedVersion = None
    ) -> Response:
        """Chooses items for a user or a history, and ranks them; without either, popular ones."""
        return _json(await service.recommend(request, x_raysys_version))

    @app.post("/v1/ads", response_model=AdsAnswer, **options)
    async def ads(request: AdsRequest, x_raysys_version: ForcedVersion = None) -> Response:
        """Ranks ads by their probability times their bid, those that reach the reserve."""
        return _json(await service.ads(request, x_raysys_version))

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

    @app.post("/v1/rollout/pause", **options)
    async def pause(request: SteerRequest | None = None) -> RolloutAnswer:
        """Keeps the canary at its weight until somebody resumes."""
        await steering.pause(request or SteerRequest())
        return await _rollout_of(replica)

    @app.post("/v1/rollout/resume", **options)
    async def resume(request: SteerRequest | None = None) -> RolloutAnswer:
        """Goes on after a pause; approves a promotion that waits for it."""
        await steering.resume(request or SteerRequest())
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
        phase=view.phase,
        step_index=view.step_index,
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


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
