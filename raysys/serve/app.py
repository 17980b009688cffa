"""The Serve application: one ingress deployment that ranks in-process, one rollout controller.

    serve deploy serve_configs/ranker.yaml
    curl -d '{"user_id": "alice", "candidates": ["a", "b"]}' \\
         -H 'Content-Type: application/json' localhost:8000/v1/rank

`serve.api` is the HTTP side on a plain FastAPI app, `Ranker` the deployment around it, and `build`
what a Serve config imports. New model versions never touch that config: replicas follow the ledger.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from raysys.config import Config, load_config
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.stats import load_item_ids
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted
from raysys.registry.encoders import Encoders
from raysys.registry.store import load_version
from raysys.rollout.controller import RolloutController
from raysys.rollout.reports import ReplicaReport
from raysys.rollout.view import RolloutView
from raysys.serve.answer import Ranking, Task
from raysys.serve.api import create_api
from raysys.serve.auth import Tokens
from raysys.serve.check_process import ChildCheck
from raysys.serve.feedback import EventWriter
from raysys.serve.follower import Controller, Follower
from raysys.serve.isolated import CanaryProcess, RemoteCanary, RemoteError, RemoteStatus
from raysys.serve.keys import Keys
from raysys.serve.metrics import RayMetrics, controller_metrics
from raysys.serve.queries import QueryBatcher
from raysys.serve.ranker import ResidentVersions, Servable
from raysys.serve.replica import Replica
from raysys.serve.service import RankService
from raysys.serve.shelf import Shelves
from raysys.serve.steering import Steering
from raysys.storage import Root

LoadVersion = Callable[[Root, UpdateCommitted], Servable]


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
    # The gates of serve.limits refuse before these are reached, unless bodies are slow to arrive.
    max_ongoing_requests=1000,
    max_queued_requests=1000,
    backpressure_config=BackpressureConfig(retry_after_s=1),
    health_check_period_s=10.0,
    graceful_shutdown_timeout_s=10.0,
    # A line for each request costs a twentieth of its time; metrics and impressions say more.
    logging_config={"enable_access_log": False},
)
@serve.ingress()
class Ranker:
    """The ingress: HTTP, split, ranking and feedback in one process."""

    def __init__(
        self,
        args: RankerArgs,
        controller: DeploymentHandle[RolloutController],
        load: LoadVersion | None = None,
        canary: DeploymentHandle[Canary] | None = None,
    ) -> None:
        self._http = load_config(args.config).http
        process = None if canary is None else _CanaryHandle(canary)
        # A thread that loads a version runs Python, too: the loop gets its turn sooner than by
        # default, where a request may wait 5 ms for it each time that it waits for anything.
        sys.setswitchinterval(0.001)
        self._replica = open_replica(args, _ControllerHandle(controller), load, process)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._replica, self._http)


@serve.deployment(
    num_replicas=1,
    ray_actor_options={"num_cpus": 0.3},
    max_ongoing_requests=100,
    health_check_period_s=10.0,
    graceful_shutdown_timeout_s=10.0,
)
class Canary:
    """A replica without HTTP, in whose process the canary answers: see `serve.isolated`."""

    def __init__(
        self,
        args: RankerArgs,
        controller: DeploymentHandle[RolloutController],
        load: LoadVersion | None = None,
    ) -> None:
        replica = open_replica(args, _ControllerHandle(controller), load)
        self._service = replica.service
        self._start = asyncio.get_running_loop().create_task(replica.follower.start())

    async def rank(self, name: str, task: Task) -> Ranking | RemoteError:
        """Ranks with the canary."""
        return await self._service.rank_for_others(name, task)

    async def status(self, name: str) -> RemoteStatus | None:
        """Returns what the version is, None while it cannot answer."""
        version = self._service.versions.get(name)
        if version is None:
            return None
        return RemoteStatus(num_items=len(version.items), encoder_runtime=version.encoder_runtime)


class _CanaryHandle:
    """`isolated.CanaryProcess` by way of Serve."""

    def __init__(self, handle: DeploymentHandle[Canary]) -> None:
        self._handle = handle

    async def rank(self, name: str, task: Task) -> Ranking | RemoteError:
        answer = await self._handle.rank.remote(name, task)
        assert isinstance(answer, Ranking | RemoteError)
        return answer

    async def status(self, name: str) -> RemoteStatus | None:
        status = await self._handle.status.remote(name)
        assert status is None or isinstance(status, RemoteStatus)
        return status


def open_replica(
    args: RankerArgs,
    controller: Controller,
    load: LoadVersion | None = None,
    canary: CanaryProcess | None = None,
) -> Replica:
    """Puts a replica together from a shop's config.

    Args:
      load: `registry.store.load_version` if left out, whose versions share one encoder.
      canary: The process that canaries answer in, None if that is this one.

    Raises:
      ConfigError: The config, or a key that it names, is missing or not valid.
    """
    config = load_config(args.config)
    root = Root(config.root)
    log, metrics = Log(root), RayMetrics()
    impressions = EventWriter(
        root, "impressions", interval_s=args.impressions_interval_s, metrics=metrics
    )
    feedback = EventWriter(root, "feedback", interval_s=args.feedback_interval_s, metrics=metrics)
    keys = Keys(lambda: Pseudonymizer.from_config(config.pseudonyms))
    shelves = Shelves(config.retrieval, config.rules)
    service = RankService(
        replica_id=uuid.uuid4().hex,
        config=config.rollout,
        versions=open_versions(config, root, log, keys, shelves, load, loads_canary=canary is None),
        remote=None
        if canary is None
        else RemoteCanary(canary, timeout_s=config.replica.canary_timeout_ms / 1000),
        keys=keys,
        impressions=impressions,
        feedback=feedback,
        metrics=metrics,
        sample_fraction=config.impressions.sample_fraction,
        shadow=config.shadow,
        shelves=shelves,
        reserve=config.ads.reserve,
        max_ts_age_s=args.max_ts_age_s,
    )
    # Half a million objects of torch, Ray and the version live as long as the replica. Looking
    # through them for garbage takes 0.3 s, in which nothing else of the process runs.
    follower = Follower(service, log, controller, on_first_version=gc.freeze)
    steering = Steering(log, config.rollout, follower.adopt)
    return Replica(service, follower, impressions, feedback, steering)


def open_versions(
    config: Config,
    root: Root,
    log: Log,
    keys: Keys,
    shelves: Shelves,
    load: LoadVersion | None,
    *,
    loads_canary: bool = True,
) -> ResidentVersions:
    """Returns the versions of a replica, none of them loaded yet."""
    own = config.replica
    encoders = Encoders(num_threads=own.encoder_threads, max_cached_queries=own.max_cached_queries)
    load_here = load or functools.partial(load_version, encoders=encoders)
    return ResidentVersions(
        lambda name: shelves.prepare(load_here(root, named(name, log, keys))),
        lambda update_id: load_item_ids(root, update_id),
        check_apart=ChildCheck(
            lambda name: (load or load_version, root, named(name, log, keys)),
            timeout_s=own.check_timeout_s,
            max_bytes=own.check_max_bytes,
        ),
        loads_canary=loads_canary,
        queries=QueryBatcher(max_batch=own.max_query_batch, wait_s=own.query_wait_ms / 1000),
    )


def named(name: str, log: Log, keys: Keys) -> UpdateCommitted:
    """Returns the commit of a version.

    Raises:
      MissingKeyError: This replica has not got its user key yet, so it would find no history.
      RaysysError: The ledger cannot be read.
    """
    record = log.refresh().versions[name]
    keys.of(record.user_key_id)
    return record


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
    controller = RolloutController.bind(parsed.config, controller_metrics)  # type: ignore[attr-defined]
    canary = None
    if config.replica.isolate_canary:
        canary = Canary.bind(parsed, controller)  # type: ignore[attr-defined]
    application: Application = Ranker.bind(parsed, controller, None, canary)  # type: ignore[attr-defined]
    return application
