"""The Serve application: one ingress deployment that ranks in-process, one rollout controller.

    serve deploy serve_configs/ranker.yaml
    curl -d '{"user_id": "alice", "candidates": ["a", "b"]}' \\
         -H 'Content-Type: application/json' localhost:8000/v1/rank

`serve.api` is the HTTP side on a plain FastAPI app, `Ranker` the deployment around it, and `build`
what a Serve config imports. New model versions never touch that config: replicas follow the ledger.
"""

from __future__ import annotations

import gc
import uuid
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from raysys.config import load_config
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.stats import load_item_ids
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted
from raysys.registry.store import load_version
from raysys.rollout.controller import RolloutController
from raysys.rollout.reports import ReplicaReport
from raysys.rollout.view import RolloutView
from raysys.serve.api import create_api
from raysys.serve.auth import Tokens
from raysys.serve.feedback import EventWriter
from raysys.serve.follower import Controller, Follower
from raysys.serve.keys import Keys
from raysys.serve.metrics import RayMetrics, controller_metrics
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
    max_ongoing_requests=1000,  # feedback waits for its file, which takes no CPU
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
        root, "impressions", interval_s=args.impressions_interval_s, metrics=metrics
    )
    feedback = EventWriter(root, "feedback", interval_s=args.feedback_interval_s, metrics=metrics)
    keys = Keys(lambda: Pseudonymizer.from_config(config.pseudonyms))
    shelves = Shelves(config.retrieval, config.rules)
    service = RankService(
        replica_id=uuid.uuid4().hex,
        config=config.rollout,
        versions=ResidentVersions(
            lambda name: shelves.prepare(load_named(name, root, log, keys, load)),
            lambda update_id: load_item_ids(root, update_id),
        ),
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
    controller = RolloutController.bind(parsed.config, controller_metrics)  # type: ignore[attr-defined]
    application: Application = Ranker.bind(parsed, controller)  # type: ignore[attr-defined]
    return application
