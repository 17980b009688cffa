"""Reads the YAML file: every key is known, of its type and within bounds, or it is an error."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from raysys.config.checks import require
from raysys.config.data import PseudonymConfig
from raysys.config.rollout import RolloutConfig
from raysys.config.shop import Config
from raysys.errors import ConfigError


def load_config(path: str | Path) -> Config:
    """Reads and validates a YAML file. Relative paths in it start at the file's own folder.

    Raises:
      ConfigError: The file is unreadable, or a key is unknown, missing or out of bounds.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"config file {path} is not YAML: {' '.join(str(error).split())}"
        ) from error
    config = parse_config(raw)
    keys, http = config.pseudonyms, config.http
    if keys.key_file:
        keys = PseudonymConfig(key_file=_beside(path, keys.key_file))
    if http.token_file:
        http = dataclasses.replace(http, token_file=_beside(path, http.token_file))
    return dataclasses.replace(config, pseudonyms=keys, http=http)


def _beside(config_file: Path, path: str) -> str:
    return str((config_file.parent / Path(path).expanduser()).absolute())


def parse_config(raw: object) -> Config:
    """Builds a config from parsed YAML.

    >>> parse_config({"root": "file:///tmp/shop", "pseudonyms": {"key_file": "k"},
    ...               "privacy": {"epsilon": 8}})
    Traceback (most recent call last):
    raysys.errors.ConfigError: privacy.epsilon: unknown key; did you mean privacy.epsilon_total?
    """
    config = _build(Config, raw, "")
    assert isinstance(config, Config)
    for key, options in config.tune.space.items():
        for value in options:
            try:
                with_values(config, {key: value})
            except ConfigError as error:
                raise ConfigError(f"tune.space.{key}: {error}") from error
    return config


def parse_rollout(rules: Mapping[str, object]) -> RolloutConfig:
    """Builds the rules of a rollout from what the ledger keeps of them.

    Raises:
      ConfigError: They are not of this release.
    """
    config = _build(RolloutConfig, rules, "rollout.")
    assert isinstance(config, RolloutConfig)
    return config


def with_values(config: Config, values: Mapping[str, object]) -> Config:
    """Returns the config with these dotted keys replaced, checked as if the file had said so.

    Raises:
      ConfigError: A value is out of bounds, by itself or beside the others.
    """
    raw = json.loads(json.dumps(dataclasses.asdict(config)))
    for key, value in values.items():
        section, _, name = key.partition(".")
        raw[section][name] = value
    changed = _build(Config, raw, "")
    assert isinstance(changed, Config)
    return changed


def _build(cls: type, raw: object, prefix: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'config'}: expected a mapping of keys, got {raw!r}"
        )
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
            raise ConfigError(f"{prefix}{key}: unknown key; {hint}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in raw
    ]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]}: missing; the config must name it")
    return cls(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in raw.items()})


def _convert(hint: Any, value: object, key: str) -> object:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _build(hint, value, f"{key}.")
    origin = typing.get_origin(hint)
    if origin is Literal:
        options = typing.get_args(hint)
        require(value in options, key, value, " or ".join(map(repr, options)))
        return value
    if origin is Mapping:
        require(isinstance(value, Mapping), key, value, "a mapping")
        assert isinstance(value, Mapping)
        item_hint = typing.get_args(hint)[1]
        return {str(k): _convert(item_hint, v, f"{key}.{k}") for k, v in value.items()}
    if origin is tuple:
        require(isinstance(value, list | tuple), key, value, "a list")
        assert isinstance(value, list | tuple)
        item_hint = typing.get_args(hint)[0]
        return tuple(_convert(item_hint, item, f"{key}[{i}]") for i, item in enumerate(value))
    if hint is object:
        return value
    if isinstance(hint, types.UnionType):
        (known,) = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
        return None if value is None else _convert(known, value, key)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        require(math.isfinite(value), key, value, "a finite number")
        return float(value)
    number_as_text = hint is float and isinstance(value, str)
    expected = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}[hint]
    if number_as_text:
        expected += " (YAML reads 1e-4 as text: write 1.0e-4)"
    require(type(value) is hint, key, value, expected)
    return value
