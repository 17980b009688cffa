"""What an update needs besides its records to be made again: `state/<update_id>/replay.json`.

update -> Recipe.of().save() -> committed by its hash -> replay -> Recipe.load()
"""

from __future__ import annotations

import dataclasses
import json
import platform
from importlib.metadata import version as installed_version
from typing import Any

from raysys.config import Config
from raysys.errors import ArtifactError
from raysys.ledger.records import UpdateCommitted
from raysys.partitions.layout import state_folder
from raysys.registry.store import read_checked
from raysys.storage import Root

_LIBRARIES = ("raysys", "polars", "numpy", "torch", "ray")
_SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The settings of an update, as they were when it ran."""

    config: dict[str, Any]
    read_before: tuple[str, ...]
    """Updates whose events it knew."""
    libraries: dict[str, str]
    """Versions: another Polars may hash rows, and so draw, in another way."""

    @classmethod
    def of(cls, config: Config, *, read_before: tuple[str, ...]) -> Recipe:
        """Returns the recipe of an update that runs here and now."""
        return cls(
            config=dataclasses.asdict(config),
            read_before=read_before,
            libraries=installed_libraries(),
        )

    def save(self, root: Root, update_id: str) -> None:
        """Writes it beside the state, before the commit that hashes it."""
        body = {"schema_version": _SCHEMA_VERSION, **dataclasses.asdict(self)}
        root.put(_recipe_path(update_id), json.dumps(body, sort_keys=True).encode())

    @classmethod
    def load(cls, root: Root, commit: UpdateCommitted) -> Recipe:
        """Reads what was committed.

        Raises:
          ArtifactError: There is none, it is not the one that was committed, or of a newer raysys.
        """
        path = _recipe_path(commit.update_id)
        if path not in commit.artifacts:
            raise ArtifactError(
                f"{commit.update_id} was committed by a raysys that kept no recipe; it cannot be "
                "replayed"
            )
        body = json.loads(read_checked(root, path, commit.artifacts[path]))
        if body.pop("schema_version") != _SCHEMA_VERSION:
            raise ArtifactError(f"{path} is of another schema: use the raysys that wrote it")
        return cls(**{**body, "read_before": tuple(body["read_before"])})


def installed_libraries() -> dict[str, str]:
    """Returns the versions on which draws, sums and weights depend."""
    found = {name: installed_version(name) for name in _LIBRARIES}
    return {**found, "python": platform.python_version()}


def _recipe_path(update_id: str) -> str:
    return f"{state_folder(update_id)}/replay.json"
