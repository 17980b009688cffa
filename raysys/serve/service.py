"""The ranking service of one replica, without HTTP and without Ray.

    RankRequest -> split -> resident version -> scores -> RankAnswer, impression rows, tally
    FeedbackRequest -> signed request id -> durable rows -> tally

Nothing on the way of a request waits for the controller, and only feedback waits for the object
store. A canary that fails on a request is counted as bad, and stable answers in its place: a canary
cannot cost the shop a request.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable

from raysys.config import RolloutConfig, ShadowConfig
from raysys.partitions.schema import Surface
from raysys.rollout.view import RolloutView
from raysys.serve.answer import Ranking, Task, rank_with, render
from raysys.serve.candidates import Chosen, Found, Given, GivenAds, Recommended, Selection
from raysys.serve.checks import check_candidates, check_filters, check_found, check_ranks
from raysys.serve.choice import Choice, choose, describe_versions, stable_of
from raysys.serve.feedback import EventWriter, feedback_rows
from raysys.serve.impressions import Impressions
from raysys.serve.isolated import RemoteCanary, RemoteError, RemoteVersion
from raysys.serve.keys import Key, Keys
from raysys.serve.metrics import FELL_BACK, Metrics, Outcome
from raysys.serve.ranker import (
    InvalidScoresError,
    ResidentVersions,
    ScoresError,
    Servable,
)
from raysys.serve.request_id import RequestTag, new_nonce
from raysys.serve.router import analysis_bucket
from raysys.serve.schema import (
    AdsRequest,
    AnyRequest,
    ApiError,
    FeedbackAnswer,
    FeedbackRequest,
    RankRequest,
    RecommendRequest,
    SearchRequest,
    VersionsAnswer,
)
from raysys.serve.shadow import Outcome as ShadowOutcome
from raysys.serve.shadow import Ranked, Shadow, ShadowRequest
from raysys.serve.shelf import Shelves
from raysys.serve.tally import Tally

NO_VIEW = RolloutView(
    sequence=0, rollout_id=None, stable=None, canary=None, previous=None, weight_fraction=0.0
)
"""Before the ledger was read."""

MAX_TS_AHEAD_S = 3600.0
"""Clocks of clients may be ahead by so much."""

_logger = logging.getLogger(__name__)


class RankService:
    """Answers requests with the resident versions. For one event loop."""

    def __init__(
        self,
        *,
        replica_id: str,
        config: RolloutConfig,
        versions: ResidentVersions,
        keys: Keys,
        impressions: EventWriter,
        feedback: EventWriter,
        metrics: Metrics,
        sample_fraction: float = 1.0,
        shadow: ShadowConfig | None = None,
        shelves: Shelves,
        remote: RemoteCanary | None = None,
        reserve: float = 0.0,
        max_ts_age_s: float = math.inf,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.versions = versions
        self.remote = remote
        """Has the canary answer elsewhere, where it is isolated."""
        self.view = NO_VIEW
        self.tally: Tally | None = None
        """Counts of the rollout on trial, None if there is none."""
        self._replica_id = replica_id
        self._config = self._rules = config
        self._keys = keys
        self._impressions = impressions
        self._feedback = feedback
        self._metrics = metrics
        self._sample_fraction = sample_fraction
        self.shadow = Shadow(shadow or ShadowConfig(), self._report_shadow)
        self._shelves = shelves
        self._reserve = reserve
        self._max_ts_age_s = max_ts_age_s
        self._clock = clock

    def adopt(self, view: RolloutView) -> None:
        """Follows a view from now on, unless it is older than the present one."""
        if view.sequence < self.view.sequence:
            return
        self.view = view
        self._keys.follow(view.user_key_id)
        self._rules = view.rules or self._config
        if view.canary is None or view.analysis_id is None:
            self.tally = None
        elif self.tally is None or self.tally.rollout_id != view.analysis_id:
            self.tally = Tally(self._replica_id, view.analysis_id, self._rules)

    @property
    def is_ready(self) -> bool:
        """Whether a version can answer."""
        return stable_of(self.view, self.versions) is not None

    def rejected(self, endpoint: str) -> None:
        """Counts a request that found no room in this replica."""
        self._metrics.rejected(endpoint)

    def report_state(self) -> None:
        """Tells the metrics the rollout's weight and the versions in memory."""
        self._metrics.state(
            weight_fraction=self.view.weight_fraction,
            resident=[version.name for version in self.versions.all()],
            failing=self.versions.failures(),
        )

    async def rank(self, request: RankRequest, forced_version: str | None = None) -> bytes:
        """Ranks the caller's candidates; returns a `RankAnswer` as JSON.

        Args:
          forced_version: Name of the version that is to answer; the request is not counted then.

        Raises:
          ApiError: 404 the forced version is not resident, 422 unknown candidates or filters, 500
            no version could score, 503 no version is loaded. So of all four endpoints.
        """
        return await self._answer(
            request, forced_version, Given(request.candidates), request.surface, request.query
        )

    async def search(self, request: SearchRequest, forced_version: str | None = None) -> bytes:
        """Finds items by a query and ranks them; returns a `SearchAnswer` as JSON."""
        check_filters(request.filters, self.versions)
        return await self._answer(
            request, forced_version, Found(filters=request.filters), "search", request.query
        )

    async def recommend(
        self, request: RecommendRequest, forced_version: str | None = None
    ) -> bytes:
        """Chooses items for a user and ranks them; returns a `RecommendAnswer` as JSON."""
        check_filters(request.filters, self.versions)
        selection = Recommended(filters=request.filters, exclude_seen=request.exclude_seen)
        return await self._answer(request, forced_version, selection, "recommend", None)

    async def ads(self, request: AdsRequest, forced_version: str | None = None) -> bytes:
        """Ranks ads by probability times bid; returns an `AdsAnswer` as JSON."""
        reserve = self._reserve if request.reserve is None else request.reserve
        return await self._answer(
            request, forced_version, GivenAds(request.candidates, reserve), "ads", request.query
        )

    async def _answer(
        self,
        request: AnyRequest,
        forced_version: str | None,
        selection: Selection,
        surface: Surface,
        query: str | None,
    ) -> bytes:
        started, now = time.perf_counter(), self._clock()
        self._check_ts(request.ts, now)
        nonce = new_nonce()
        sticky = request.user_id or request.request_id or nonce
        choice = choose(sticky, forced_version, self.view, self.versions, self.remote)
        # A session is no user: it must not share the pseudonym of a user of the same id.
        user = sticky if request.user_id is not None else f"\0anonymous {sticky}"
        key = self._keys.current  # for the whole request, whatever is rotated meanwhile
        tag = RequestTag(
            nonce=nonce,
            answered_at=now,
            version=choice.version.name,
            surface=surface,
            pseudonym=key.chain.pseudonym(user),
            has_user=request.user_id is not None,
            rollout_id=self.view.analysis_id if choice.is_counted else None,
            arm=choice.arm,
            bucket=analysis_bucket(sticky),
            propensity=choice.propensity,
            sample_fraction=self._sample_fraction,
        )
        task = Task(
            selection=selection,
            surface=surface,
            query=query or None,
            k=request.k,
            explain=request.explain,
            when=now if request.ts is None else request.ts,
            user=user,
            history=request.history,
        )
        try:
            ranking, outcome = await self._rank_or_fall_back(task, choice)
        except ScoresError as error:
            _logger.exception("a request failed")
            self._count(tag, "failed", started)
            raise ApiError(500, f"{error}; the replica's log has the cause") from error
        tag = dataclasses.replace(
            tag,
            version=ranking.version,
            num_shown=len(ranking.item_ids),
            propensity=None if outcome in FELL_BACK else choice.propensity,
        )
        request_id = key.request_ids.sign(tag)
        self._keep_shown(tag, request_id, ranking, task, key)
        answer = render(ranking, request_id, names_unknown=isinstance(selection, Given))
        self._count(tag, outcome, started)
        if self.shadow.draws(nonce):
            self._offer_to_shadow(task)
        return answer

    def _keep_shown(
        self, tag: RequestTag, request_id: str, ranking: Ranking, task: Task, key: Key
    ) -> None:
        if tag.is_kept:
            self._impressions.add(
                Impressions(
                    tag=tag,
                    request_id=request_id,
                    item_ids=ranking.item_ids,
                    ts=task.when,
                    query=task.query,
                    user_key_id=key.key_id,
                )
            )
        self._metrics.shown(version=tag.version, surface=tag.surface, num_items=tag.num_shown)

    async def feedback(self, request: FeedbackRequest) -> FeedbackAnswer:
        """Stores what came of an answer; returns once that is durable.

        Raises:
          ApiError: 404 the request id is none of ours, 422 another user's, 503 not stored.
        """
        for event in request.events:
            self._check_ts(event.ts, self._clock())
        signed = self._keys.read_request_id(request.request_id)
        if signed is None:
            # The id is not shown: it may be a user's that was sent by mistake.
            raise ApiError(
                404,
                "request_id: is not the id of an answer; send the request_id that the items were "
                "answered with",
            )
        tag, key = signed.tag, signed.key
        if (
            tag.has_user
            and request.user_id is not None
            and key.chain.pseudonym(request.user_id) != tag.pseudonym
        ):
            raise ApiError(
                422, "user_id: is not the user of the request; leave it out, or send that user's"
            )
        check_ranks(request, tag.num_shown)
        rows = feedback_rows(tag, request, now=self._clock(), user_key_id=key.key_id)
        try:
            await self._feedback.write(rows)
        except Exception as error:
            raise ApiError(503, "the feedback could not be stored; send it again") from error
        # Who has a key that leaked can sign, but must not vote for a version.
        counts = self.tally is not None and self.tally.rollout_id == tag.rollout_id
        if self.tally is not None and counts and not signed.is_outdated:
            for event in request.events:
                self.tally.converted(tag, event.event_type, event.rank)
        kinds = [event.event_type for event in request.events]
        self._metrics.feedback(version=tag.version, surface=tag.surface, kinds=kinds)
        return FeedbackAnswer(accepted=len(rows))

    def _check_ts(self, ts: float | None, now: float) -> None:
        """Refuses times that would write into partitions of long ago, or of days to come."""
        if ts is not None and not now - self._max_ts_age_s <= ts <= now + MAX_TS_AHEAD_S:
            raise ApiError(
                422,
                f"ts: {ts:.0f} is not within {self._max_ts_age_s:g} s before and "
                f"{MAX_TS_AHEAD_S:g} s after now; leave it out for now, or send UNIX seconds",
            )

    def resident(self) -> VersionsAnswer:
        """Says which versions are in memory, and which are not and why."""
        return describe_versions(self.view, self.versions, self.remote)

    async def _rank_or_fall_back(self, task: Task, choice: Choice) -> tuple[Ranking, Outcome]:
        try:
            return await self._rank_with(choice.version, task), choice.outcome
        except ScoresError as error:
            if choice.fallback is None:
                raise
            _logger.exception("stable answers a request in the canary's place")
            invalid = isinstance(error, InvalidScoresError)
            outcome: Outcome = "canary_invalid" if invalid else "canary_failed"
            return await self._rank_with(choice.fallback, task), outcome

    async def rank_for_others(self, name: str, task: Task) -> Ranking | RemoteError:
        """Ranks for a replica that has not got this version: see `serve.isolated`."""
        version = self.versions.get(name)
        if version is None:
            return RemoteError(kind="scores", message=f"canary {name} is not resident")
        try:
            return await self._rank_with(version, task)
        except (ApiError, ScoresError) as error:
            _logger.exception("canary %s has no ranking", name)
            return RemoteError.of(error)

    async def _rank_with(self, version: Servable | RemoteVersion, task: Task) -> Ranking:
        if isinstance(version, RemoteVersion):
            return await version.rank(task)
        try:
            if task.query:
                await self.versions.ready(version, task.query)  # the text encoder takes its time
            ranking = self._ranked(version, task)
            if not isinstance(task.selection, Given):
                check_found(ranking.item_ids, version, self.versions, self.view)
        except (ScoresError, ApiError):
            raise
        except Exception as error:
            raise ScoresError(f"version {version.name} could not score the request") from error
        return ranking

    def _ranked(self, version: Servable, task: Task) -> Ranking:
        def check(chosen: Chosen) -> None:
            check_candidates(chosen, version, self.versions, self.view)

        history = (
            # Its histories may be of an earlier key than the current one, or of a later.
            version.history(self._keys.of(version.user_key_id).chain.pseudonym(task.user))
            if task.history is None
            else version.history_of(task.history, task.when)
        )
        shelf = self._shelves.of(version)
        return rank_with(version, shelf, task, history, check)

    def _offer_to_shadow(self, task: Task) -> None:
        stable, canary = (self.versions.get(name) for name in (self.view.stable, self.view.canary))
        if stable is None or canary is None or self.view.analysis_id is None:
            return
        # All candidates are compared; what was found by search is what would be shown.
        k = None if isinstance(task.selection, Given) else task.k
        whole = dataclasses.replace(task, k=k, explain=False)

        def rank(version: Servable) -> Ranked:
            ranking = self._ranked(version, whole)
            worth = ranking.expected_values
            return Ranked(ranking.item_ids, ranking.scores if worth is None else worth)

        self.shadow.offer(
            ShadowRequest(
                analysis_id=self.view.analysis_id, stable=stable, canary=canary, rank=rank
            )
        )

    def _report_shadow(self, request: ShadowRequest, outcome: ShadowOutcome) -> None:
        counts = self.shadow.counts(request.analysis_id)
        self._metrics.shadowed(version=request.canary.name, outcome=outcome, counts=counts)

    def _count(self, tag: RequestTag, outcome: Outcome, started: float) -> None:
        latency_ms = (time.perf_counter() - started) * 1000
        if outcome == "ok" and latency_ms > self._rules.latency_slo_ms:
            outcome = "slow"
        is_bad = outcome not in ("ok", "forced", "canary_not_loaded")
        if self.tally is not None and self.tally.rollout_id == tag.rollout_id:
            self.tally.answered(
                tag,
                bad=is_bad,
                invalid=outcome == "canary_invalid",
                latency_ms=latency_ms if outcome in ("ok", "slow") else None,
            )
        self._metrics.ranked(
            version=tag.version, surface=tag.surface, outcome=outcome, latency_ms=latency_ms
        )
