"""Which of the versions in memory answers a request, and which of them are there.

view x versions x user -> choose() -> Choice -> service ranks, falls back, counts
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from raysys.rollout.counters import Arm
from raysys.rollout.view import RolloutView
from raysys.serve.isolated import RemoteCanary, RemoteVersion
from raysys.serve.metrics import Outcome
from raysys.serve.ranker import ResidentVersions, Servable
from raysys.serve.router import assign
from raysys.serve.schema import ApiError, ResidentVersion, VersionsAnswer, name_some


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which version is to answer a request."""

    version: Servable | RemoteVersion
    fallback: Servable | None = None
    """Answers if `version` fails."""
    arm: Arm = "stable"
    is_counted: bool = False
    outcome: Outcome = "ok"
    """If all goes well."""
    propensity: float = 1.0
    """Probability that the split chooses so."""


def stable_of(view: RolloutView, versions: ResidentVersions) -> Servable | None:
    """Returns stable, or what was stable until its successor is loaded."""
    named = versions.get(view.stable) or versions.get(view.previous)
    return named or next(iter(versions.all()), None)


def choose(
    sticky_key: str,
    forced_version: str | None,
    view: RolloutView,
    versions: ResidentVersions,
    remote: RemoteCanary | None,
) -> Choice:
    """Returns which version answers.

    Args:
      sticky_key: As `router.assign`.
      forced_version: Name of the version that the caller wants, whatever the split says.

    Raises:
      ApiError: 404 the forced version is not in memory, 503 no version is.
    """
    if forced_version is not None:
        return _forced(forced_version, versions, remote)
    stable = stable_of(view, versions)
    if stable is None:
        raise ApiError(503, "no version is loaded yet; retry when GET /v1/readyz says ok")
    if view.canary is None or view.rollout_id is None:
        return Choice(version=stable)
    canary = versions.get(view.canary) or _remote(view.canary, remote)
    weight = view.weight_fraction
    arm = assign(sticky_key, rollout_id=view.rollout_id, weight_fraction=weight)
    if canary is None:
        outcome: Outcome = "ok" if arm == "stable" else "canary_not_loaded"
        return Choice(version=stable, arm=arm, outcome=outcome)
    # Neither side counts before both can answer: they are compared over the same time.
    is_counted = stable.name == view.stable
    if arm == "stable":
        return Choice(version=stable, is_counted=is_counted, propensity=1 - weight)
    return Choice(
        version=canary, fallback=stable, arm=arm, is_counted=is_counted, propensity=weight
    )


def describe_versions(
    view: RolloutView, versions: ResidentVersions, remote: RemoteCanary | None
) -> VersionsAnswer:
    """Says which versions are in memory, and which are not and why."""
    roles: dict[Literal["stable", "canary", "previous"], str | None] = {
        "stable": view.stable,
        "canary": view.canary,
        "previous": view.previous,
    }
    resident = [
        ResidentVersion(
            version=version.name,
            roles=[role for role, name in roles.items() if name == version.name],
            num_items=len(version.items),
            encoder=version.encoder_runtime,
        )
        for version in versions.all()
    ]
    canary = _remote(view.canary, remote)
    if canary is not None:
        resident.append(
            ResidentVersion(
                version=canary.name,
                roles=["canary"],
                num_items=canary.status.num_items,
                encoder=canary.status.encoder_runtime,
            )
        )
    names = {version.version for version in resident}
    wanted = dict.fromkeys(name for name in roles.values() if name and name not in names)
    failures = versions.failures()
    missing = {name: failures.get(name, "is being loaded") for name in wanted}
    return VersionsAnswer(versions=resident, missing=missing)


def _forced(name: str, versions: ResidentVersions, remote: RemoteCanary | None) -> Choice:
    version = versions.get(name) or _remote(name, remote)
    if version is None:
        known = ", ".join(v.name for v in versions.all()) or "none yet"
        raise ApiError(
            404,
            f"X-Raysys-Version: version {name_some([name])} is not resident; resident: {known}",
        )
    return Choice(version=version, outcome="forced")


def _remote(name: str | None, remote: RemoteCanary | None) -> RemoteVersion | None:
    return None if remote is None else remote.get(name)
