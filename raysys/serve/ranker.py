"""The versions in a replica's memory: loaded beside the traffic, checked, then swapped in.

    RolloutView -> ResidentVersions.follow() -> load, check -> resident -> score_candidates()

Stable, canary and previous are resident together; what they have in common (the frozen encoder, the
embeddings of queries) is shared by the process. A version is first checked in a process of its own,
if there is one here that it could take down with it; then it loads in a thread while the others
answer, and enters by one assignment, so that no request ever sees half of a change. A canary that
does not pass is refused for its whole rollout; whatever else does not load is tried again.

A request with a query first awaits `ResidentVersions.ready(version, query)`, so that `score` runs
no encoder on the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raysys.errors import RaysysError, Transient
from raysys.ingest.features import ItemTable, UserHistory
from raysys.rollout.view import RolloutView
from raysys.serve.queries import QueryBatcher

RETRY_S = 5.0
"""Seconds after which a version that could not be loaded is tried again."""
_NUM_CHECKED_ITEMS = 100

_logger = logging.getLogger(__name__)


class Servable(Protocol):
    """What a replica needs of a version; `registry.loaded.LoadedVersion` is one."""

    name: str
    items: ItemTable
    user_key_id: str | None
    """The key of the pseudonyms in its histories; None for the current one."""

    @property
    def text_vectors(self) -> NDArray[np.float32]: ...
    @property
    def text_of_item(self) -> NDArray[np.int32]: ...

    def history(self, user: str) -> UserHistory: ...
    def history_of(self, item_ids: Sequence[str], now: float) -> UserHistory: ...
    def knows_query(self, query: str) -> bool: ...
    @property
    def encoder_key(self) -> str:
        """Same for versions that embed queries alike."""

    @property
    def encoder_runtime(self) -> str:
        """What runs its encoder: onnx, or torch, which is slow."""

    def embed_query(self, query: str) -> NDArray[np.float32]: ...
    def embed_queries(self, queries: Sequence[str]) -> None:
        """Has `score` know these queries. Blocking."""

    def score(
        self, history: UserHistory, candidates: NDArray[np.int32], *, now: float, query: str | None
    ) -> NDArray[np.float32]: ...
    def probabilities(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns (K,) in [0, 1], never falling as scores rise."""

    def explain(
        self, history: UserHistory, candidates: NDArray[np.int32], *, now: float, query: str | None
    ) -> Mapping[str, NDArray[np.float32]]:
        """Returns named parts, (K,) each, that add up to the scores."""

    def check_golden(self) -> None: ...


Load = Callable[[str], Servable]
"""Loads a committed version by name. Blocking; raises as `registry.store.load_version`."""
LoadItemIds = Callable[[str], frozenset[str]]
"""Loads the catalogue as of an update. Blocking."""


class CheckApart(Protocol):
    """Tries a version where it can do no harm."""

    def run(self, name: str) -> None:
        """Returns once the version has passed. Blocking; raises as a `Load`, or
        `VersionCheckError`."""

    def stop(self) -> None:
        """Ends what is running."""


class ScoresError(Exception):
    """A version could not rank a request."""


class InvalidScoresError(ScoresError):
    """A version gave scores that cannot be ranked by: its weights or tables are broken."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a version is not resident."""

    rollout_id: str | None
    reason: str
    is_final: bool
    """Not tried again in this rollout: its artifacts or its scores are wrong."""
    failed_at: float


class ResidentVersions:
    """Loads what a view names, and forgets the rest. Reading it needs no lock."""

    def __init__(
        self,
        load: Load,
        load_item_ids: LoadItemIds = lambda update_id: frozenset(),
        *,
        check_apart: CheckApart | None = None,
        loads_canary: bool = True,
        queries: QueryBatcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._load_item_ids = load_item_ids
        self._catalogue: tuple[str | None, frozenset[str]] = (None, frozenset())
        self._check_apart = check_apart
        self._loads_canary = loads_canary
        self._queries = queries or QueryBatcher()
        self._newest_catalogue: str | None = None
        self._clock = clock
        self._resident: Mapping[str, Servable] = {}
        self._failures: dict[str, Failure] = {}

    def get(self, name: str | None) -> Servable | None:
        """Returns a version if it is resident."""
        return self._resident.get(name) if name is not None else None

    def all(self) -> list[Servable]:
        """Returns the resident versions."""
        return list(self._resident.values())

    async def ready(self, version: Servable, query: str) -> None:
        """Returns once the version knows the query; equal ones that wait are encoded once.

        Raises:
          Exception: Whatever its encoder raised.
        """
        await self._queries.ready(version, query)

    def stop(self) -> None:
        """Ends a check that is running."""
        if self._check_apart is not None:
            self._check_apart.stop()

    def is_known(self, item_id: str) -> bool:
        """Whether the shop has the item, as far as any version or its newest catalogue says."""
        return item_id in self._catalogue[1] or any(
            version.items.index_of(item_id) is not None for version in self.all()
        )

    def is_stranger(self, item_id: str, version: Servable) -> bool:
        """Whether a version alone has an item that the shop's newest catalogue has not."""
        others = (other for other in self.all() if other is not version)
        return (
            self._catalogue[0] is not None
            and self._catalogue[0] == self._newest_catalogue
            and item_id not in self._catalogue[1]
            and all(other.items.index_of(item_id) is None for other in others)
        )

    def failures(self) -> dict[str, str]:
        """Returns version -> reason, of those that could not be loaded."""
        return {name: failure.reason for name, failure in self._failures.items()}

    def refusal(self, view: RolloutView) -> str | None:
        """Returns why the canary of this rollout did not pass its check, None if it may."""
        failure = self._failures.get(view.canary or "")
        return failure.reason if failure and failure.is_final else None

    async def follow(self, view: RolloutView) -> None:
        """Loads the versions of a view that are due, most needed first, and drops all others.

        Call it again and again: what cannot be loaded now is noted and tried again later.
        """
        await self._follow_catalogue(view)
        canary = view.canary if self._loads_canary else None
        names = [name for name in (view.stable, canary, view.previous) if name is not None]
        self._failures = {
            name: failure
            for name, failure in self._failures.items()
            if name in names and (not failure.is_final or _still_refused(failure, name, view))
        }
        for name in dict.fromkeys(names):
            if name not in self._resident and self._is_due(name):
                await self._try(name, view)
        # The old stable goes on answering until the new one can.
        if view.stable in self._resident:
            self._resident = {n: v for n, v in self._resident.items() if n in names}
            self._queries.forget(self.all())

    async def _follow_catalogue(self, view: RolloutView) -> None:
        self._newest_catalogue = view.catalogue
        if view.catalogue is None or view.catalogue == self._catalogue[0]:
            return
        try:
            ids = await asyncio.to_thread(self._load_item_ids, view.catalogue)
        except (RaysysError, OSError) as error:
            _logger.warning("catalogue of %s not read, next try soon: %s", view.catalogue, error)
            return
        self._catalogue = (view.catalogue, ids)

    def _is_due(self, name: str) -> bool:
        failure = self._failures.get(name)
        if failure is None:
            return True
        return not failure.is_final and self._clock() - failure.failed_at >= RETRY_S

    async def _try(self, name: str, view: RolloutView) -> None:
        try:
            # With nothing resident there is nothing to protect, and a restart has to be quick.
            if self._check_apart is not None and self._resident:
                await asyncio.to_thread(self._check_apart.run, name)
            version = await asyncio.to_thread(self._load_checked, name)
        except Exception as error:
            self._note(name, view, error)
            return
        self._failures.pop(name, None)
        self._resident = {**self._resident, name: version}
        _logger.info("version %s is resident", name)

    def _load_checked(self, name: str) -> Servable:
        version = self._load(name)
        version.check_golden()
        num_items = min(len(version.items), _NUM_CHECKED_ITEMS)
        some = np.arange(num_items, dtype=np.int32)
        # Also what a version makes once it is asked for it, so that no request waits for that.
        version.probabilities(score(version, UserHistory.empty(), some, time.time(), None))
        return version

    def _note(self, name: str, view: RolloutView, error: Exception) -> None:
        # Only what may pass by itself is tried again for a canary. Stable has to answer, so its
        # artifacts are looked at again: someone may restore them.
        may_pass = isinstance(error, Transient | OSError)
        kind = "" if isinstance(error, RaysysError) else f"{type(error).__name__}: "
        self._failures[name] = Failure(
            rollout_id=view.rollout_id,
            reason=f"version {name} cannot be served: {kind}{' '.join(str(error).split())}",
            is_final=name == view.canary and not may_pass,
            failed_at=self._clock(),
        )
        _logger.warning("%s", self._failures[name].reason, exc_info=not may_pass)


def _still_refused(failure: Failure, name: str, view: RolloutView) -> bool:
    return name == view.canary and failure.rollout_id == view.rollout_id


def score(
    version: Servable,
    history: UserHistory,
    candidates: NDArray[np.int32],
    now: float,
    query: str | None,
) -> NDArray[np.float32]:
    """Returns the version's scores, (num_candidates,).

    Raises:
      InvalidScoresError: They are of another number than the candidates, or not all finite.
    """
    scores = version.score(history, candidates, now=now, query=query)
    if scores.shape != candidates.shape:
        raise InvalidScoresError(
            f"version {version.name} gave scores of shape {scores.shape} for "
            f"{len(candidates)} candidates"
        )
    if not np.isfinite(scores).all():
        raise InvalidScoresError(f"version {version.name} gave scores that are not finite")
    return scores
