"""The config: what is wrong is named, with its key, its value and what was expected."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from raysys.config import Config, PseudonymConfig, load_config, parse_config
from raysys.errors import ConfigError
from tests.helpers import write_config

MINIMAL: dict[str, Any] = {"root": "file:///shop", "pseudonyms": {"key_file": "key"}}


def parse(**sections: Any) -> Config:
    return parse_config({**MINIMAL, **sections})


def test_a_root_and_a_key_file_are_enough() -> None:
    config = parse()
    assert config.root == "file:///shop" and config.privacy.enabled


def test_every_value_of_the_file_arrives(tmp_path: Path) -> None:
    extra = "privacy:\n  epsilon_total: 3\n  enabled: false\ningest:\n  gains: {click: 2}\n"
    config = load_config(write_config(tmp_path, "s3://bucket/shop", extra))
    assert config.root == "s3://bucket/shop"
    assert config.privacy.epsilon_total == 3.0 and not config.privacy.enabled
    assert config.ingest.gains == {"click": 2.0}


def test_what_an_update_adapts_arrives(tmp_path: Path) -> None:
    default = parse().model
    assert (default.adapter, default.target_modules) == ("lora", ("output.dense",))
    assert (default.num_adapted_layers, default.initial_rank) == (1, default.lora_rank)
    extra = "model: {adapter: adalora, target_modules: [query, value], num_adapted_layers: 2}\n"
    model = load_config(write_config(tmp_path, "s3://bucket/shop", extra)).model
    assert (model.adapter, model.target_modules) == ("adalora", ("query", "value"))
    assert (model.num_adapted_layers, model.initial_rank) == (2, 6)
    assert parse(model={"adapter": "adalora", "adalora_initial_rank": 9}).model.initial_rank == 9


def test_the_key_file_lies_relative_to_the_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, "file:///shop")
    monkeypatch.chdir("/")
    assert load_config(path).pseudonyms.key_file == str(tmp_path / "key")


def test_a_key_in_the_environment_is_a_name_and_no_path(tmp_path: Path) -> None:
    path = write_config(tmp_path, "file:///shop")
    path.write_text("root: file:///shop\npseudonyms: {key_env: USER_KEY}\n")
    assert load_config(path).pseudonyms == PseudonymConfig(key_env="USER_KEY")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse().root = "file:///other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        pytest.param(
            {"privacy": {"epsilon": 8}},
            "privacy.epsilon: unknown key; did you mean privacy.epsilon_total?",
            id="unknown-key-near-another",
        ),
        pytest.param(
            {"lease": {"zzz": 1}}, "lease.zzz: unknown key; known: duration_s", id="unknown-key"
        ),
        pytest.param({"zzzzzz": 1}, "zzzzzz: unknown key; known: root", id="unknown-section"),
        pytest.param({"lease": 5}, "lease: expected a mapping of keys, got 5", id="not-a-section"),
        pytest.param(
            {"pseudonyms": {}},
            "pseudonyms: expected either key_file or key_env, got neither",
            id="no-key",
        ),
        pytest.param(
            {"pseudonyms": {"key_file": "key", "key_env": "KEY"}},
            "pseudonyms: expected either key_file or key_env, got both",
            id="two-keys",
        ),
        pytest.param(
            {"privacy": {"delta": "1e-4"}},
            "privacy.delta: expected a number (YAML reads 1e-4 as text: write 1.0e-4), got '1e-4'",
            id="number-as-text",
        ),
        pytest.param(
            {"train": {"num_steps": 1.5}},
            "train.num_steps: expected a whole number, got 1.5",
            id="fraction-for-count",
        ),
        pytest.param(
            {"train": {"num_steps": True}},
            "train.num_steps: expected a whole number, got True",
            id="bool-for-count",
        ),
        pytest.param(
            {"privacy": {"enabled": "no"}},
            "privacy.enabled: expected true or false, got 'no'",
            id="text-for-bool",
        ),
        pytest.param(
            {"privacy": {"epsilon_total": float("nan")}},
            "privacy.epsilon_total: expected a finite number, got nan",
            id="nan",
        ),
        pytest.param(
            {"partitions": {"late_files": "maybe"}},
            "partitions.late_files: expected 'fail' or 'quarantine' or 'reprocess', got 'maybe'",
            id="unknown-choice",
        ),
        pytest.param(
            {"partitions": {"vanished_files": "reprocess"}},
            "partitions.vanished_files: expected 'fail' or 'quarantine' (what is gone cannot be "
            "read again), got 'reprocess'",
            id="impossible-choice",
        ),
        pytest.param(
            {"labels": {"decision_threshold": 0.8}},
            "labels.decision_threshold: expected the default, or train.loss: pointwise: scores of "
            "other losses are no probabilities, got 0.8",
            id="threshold-without-probabilities",
        ),
        pytest.param(
            {"rollout": {"weight_fraction": 1.5}},
            "rollout.weight_fraction: expected a fraction in (0, 1), got 1.5",
            id="out-of-bounds",
        ),
        pytest.param(
            {"ingest": {"gains": {"view": 1}}},
            "ingest.gains: expected positive gains for click, cart, purchase, got {'view': 1.0}",
            id="unknown-gain",
        ),
        pytest.param(
            {"model": {"target_modules": "query"}},
            "model.target_modules: expected a list, got 'query'",
            id="text-for-list",
        ),
        pytest.param(
            {"model": {"target_modules": ["query", 3]}},
            "model.target_modules[1]: expected text, got 3",
            id="number-in-a-list-of-texts",
        ),
        pytest.param(
            {"model": {"target_modules": []}},
            "model.target_modules: expected at least one name, each once (model.adapter: none "
            "adapts nothing), got []",
            id="empty-list",
        ),
        pytest.param(
            {"model": {"adapter": "dora"}},
            "model.adapter: expected 'lora' or 'adalora' or 'none', got 'dora'",
            id="unknown-adapter",
        ),
        pytest.param(
            {"model": {"lora_rank": 4, "adalora_initial_rank": 3}},
            "model.adalora_initial_rank: expected 0, or more than model.lora_rank, 4, got 3",
            id="rank-that-would-grow",
        ),
        pytest.param(
            {"root": "/tmp/shop"},
            "root: expected file:///folder or s3://bucket/prefix, got '/tmp/shop'",
            id="root-without-scheme",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(
    sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**sections)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("root: [", "is not YAML", id="not-yaml"),
        pytest.param("", "config: expected a mapping of keys, got None", id="empty"),
        pytest.param("- a", "config: expected a mapping of keys", id="a-list"),
        pytest.param("root: file:///x", "pseudonyms: missing", id="incomplete"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "shop.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"shop\.yaml cannot be read"):
        load_config(tmp_path / "shop.yaml")


def test_the_hash_follows_values_and_not_their_order_or_place() -> None:
    one = parse(privacy={"epsilon_total": 3.0}, lease={"duration_s": 5.0})
    other = parse(lease={"duration_s": 5.0}, privacy={"epsilon_total": 3})
    assert one.hash() == other.hash() != parse().hash()


SECTIONS = [
    field.name for field in dataclasses.fields(Config) if field.name not in ("root", "rules")
]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_of_a_section_is_validated(section: str) -> None:
    """No count, rate or duration may be far below zero, wherever it stands."""
    defaults = getattr(parse(), section)
    for field in dataclasses.fields(defaults):
        if field.type in ("int", "float") and field.name != "seed":
            with pytest.raises(ConfigError, match=rf"^{section}\.{field.name}"):
                parse(**{section: {field.name: -5}})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        pytest.param(
            {"missing_columns": "default", "defaults": {"user_id": "u"}},
            "schema.defaults: expected a column out of event_type, surface, got 'user_id'",
            id="no-default-for-users",
        ),
        pytest.param(
            {"missing_columns": "default", "defaults": {"event_type": "view"}},
            "schema.defaults.event_type: expected impression or click or cart or purchase, got",
            id="unknown-event-type",
        ),
        pytest.param(
            {"defaults": {"event_type": "click"}},
            "schema.missing_columns: expected 'default', since schema.defaults is set, got 'fail'",
            id="defaults-that-nothing-uses",
        ),
        pytest.param(
            {"added_columns": "drop"},
            "schema.added_columns: expected 'ignore' or 'rescue' or 'fail', got 'drop'",
            id="unknown-policy",
        ),
    ],
)
def test_a_schema_contract_that_cannot_hold_is_refused(
    schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(schema=schema)
    assert str(caught.value).startswith(message)


def test_defaults_of_missing_columns_arrive() -> None:
    config = parse(schema={"missing_columns": "default", "defaults": {"event_type": "purchase"}})
    assert config.schema.defaults == {"event_type": "purchase"}
