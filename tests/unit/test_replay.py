"""What a replay compares: examples by hash, weights bit for bit. Whole ones run on a real Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raysys import replay
from raysys.config import load_config
from raysys.errors import ArtifactError, ReplayMismatchError, UnknownVersionError
from raysys.ledger.log import Log
from raysys.model.scorer import Head
from raysys.registry.loaded import VersionWeights
from raysys.registry.recipe import Recipe
from raysys.registry.store import hash_state
from raysys.storage import Root
from tests.helpers import committed, write_config
from tests.stub_steps import Steps
from tests.update_shop import DAYS, write_catalogue, write_day, write_shop

COMMIT = committed(example_hashes={"a": "1" * 64, "b": "2" * 64}, row_counts={"outcome": 3})


def ingested(**changes: Any) -> Any:
    values = {"example_hashes": dict(COMMIT.example_hashes), "row_counts": {"outcome": 3}}
    return SimpleNamespace(**{**values, **changes})


class TestExamples:
    def test_the_same_pass(self) -> None:
        again = ingested()
        assert again.example_hashes == COMMIT.example_hashes
        replay._compare_examples(COMMIT, again)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            pytest.param({"example_hashes": {"a": "1" * 64, "b": "9" * 64}}, "b came", id="other"),
            pytest.param({"example_hashes": {"b": "2" * 64}}, "a came", id="missing"),
            pytest.param({"row_counts": {"outcome": 4}}, "rows went to", id="rows"),
        ],
    )
    def test_others_are_named(self, changes: dict[str, Any], named: str) -> None:
        with pytest.raises(ReplayMismatchError, match=named):
            replay._compare_examples(COMMIT, ingested(**changes))


class TestWeights:
    @pytest.fixture
    def weights(self, monkeypatch: pytest.MonkeyPatch) -> VersionWeights:
        held = VersionWeights(
            head=Head.decayed_frequency(8),
            adapted_weights={"encoder": np.ones((2, 3), np.float32)},
            texts=[], text=np.zeros((0, 2), np.float32),
        )  # fmt: skip
        monkeypatch.setattr(replay, "load_weights", lambda root, commit: (None, held))
        return held

    def trained(self, weights: VersionWeights) -> Any:
        head = Head(weights={name: value.copy() for name, value in weights.head.weights.items()})
        return SimpleNamespace(
            head=head, adapted_weights={"encoder": weights.adapted_weights["encoder"].copy()}
        )

    def test_the_same_pass(self, weights: VersionWeights, local_root: Root) -> None:
        again = self.trained(weights)
        assert again.adapted_weights["encoder"] is not weights.adapted_weights["encoder"]
        replay._compare_weights(local_root, COMMIT, again)

    def test_one_bit_of_any_is_named(self, weights: VersionWeights, local_root: Root) -> None:
        for name in (*weights.head.weights, "encoder"):
            again = self.trained(weights)
            value = again.adapted_weights[name] if name == "encoder" else again.head.weights[name]
            value.flat[0] = np.nextafter(value.flat[0], np.float32(9))
            with pytest.raises(ReplayMismatchError, match=f"weight {name} of"):
                replay._compare_weights(local_root, COMMIT, again)


def test_a_name_that_was_not_committed_is_refused(tmp_path: Path, local_root: Root) -> None:
    config = load_config(write_config(tmp_path, local_root.uri))
    with pytest.raises(UnknownVersionError, match="v0009-eeeeee: no such commit; versions: none"):
        replay.replay(config, "v0009-eeeeee")


def test_a_commit_has_the_recipe_by_which_it_can_be_made_again(
    tmp_path: Path, local_root: Root, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_shop(tmp_path, local_root, tiny_encoder))
    write_catalogue(local_root)
    write_day(local_root, DAYS[0])
    commit = Steps(monkeypatch).update(config)
    recipe = Recipe.load(local_root, commit)
    assert replay._config_of(recipe, config) == config
    assert set(commit.artifacts) >= set(hash_state(local_root, commit.update_id))
    older = dataclasses.replace(commit, artifacts={})
    with pytest.raises(ArtifactError, match="kept no recipe; it cannot be replayed"):
        Recipe.load(local_root, older)
    path = f"state/{commit.update_id}/replay.json"
    local_root.put(path, local_root.read_bytes(path).replace(b"polars", b"pandas"))
    with pytest.raises(ArtifactError, match=rf"{path} has sha256"):
        Recipe.load(local_root, commit)
    assert Log(local_root).refresh().committed == (commit,)


def test_what_a_killed_replay_left_is_deleted_after_a_day(local_root: Root) -> None:
    now = int(replay.time.time())
    for began in (now - 90_000, now - 60):
        local_root.put(f"replays/{began}-u0001-aaaaaa-1a2b3c/x", b"x")
    replay._delete_abandoned(local_root)
    assert local_root.list_folders("replays") == [f"{now - 60}-u0001-aaaaaa-1a2b3c"]
