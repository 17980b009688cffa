"""A version is loaded as it was published, or not at all, and holds no user."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load, save

from raysys.errors import ArtifactError
from raysys.evaluate.calibrate import Calibration
from raysys.ingest.example_set import NUM_ATTENDED
from raysys.ingest.features import UserHistory, features
from raysys.ingest.history import history_slices
from raysys.ingest.shard_state import shard_path
from raysys.ingest.stats import save_item_state
from raysys.ledger.records import UpdateCommitted
from raysys.model.encoder import TextEncoder
from raysys.model.encoder_files import weights_sha256
from raysys.model.scorer import head_inputs, pool_history
from raysys.registry.encoders import Encoders, torch_encoder
from raysys.registry.loaded import VersionWeights
from raysys.registry.store import load_version, load_weights, publish, text_indexes
from raysys.registry.version import Manifest, version_path
from raysys.storage import Root
from tests import tiny_shop
from tests.helpers import committed

VERSION, UPDATE = "v0001-aaaaaa", "u0001-aaaaaa"
ADAPTED = "encoder.layer.1.output.dense"
NOW = tiny_shop.WINDOW_START + 2 * 86_400.0
FILES = (
    "manifest.json", "head.safetensors", "encoder.safetensors", "texts.parquet", "golden.json",
    "report.md", "adapter/adapter_config.json",
)  # fmt: skip
HISTORIES = shard_path(UPDATE, "histories", 0, 1)
PATHS = (
    *(version_path(VERSION, name) for name in FILES),
    f"state/{UPDATE}/items.parquet", f"state/{UPDATE}/items.json", HISTORIES,
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tiny_encoder: str) -> VersionWeights:
    texts, _ = text_indexes(tiny_shop.item_states()[-1].table())
    matrix = np.random.default_rng(1).normal(size=(16, 32)).astype(np.float32)
    return VersionWeights(
        head=tiny_shop.random_head(),
        adapted_weights={ADAPTED: matrix},
        texts=texts,
        text=TextEncoder(tiny_encoder, 8).with_weights({ADAPTED: matrix}).embed(texts),
    )


@pytest.fixture(scope="module")
def histories() -> pl.DataFrame:
    return tiny_shop.shard(tiny_shop.outcomes(20)).state.histories


def manifest(encoder: str, **changes: object) -> Manifest:
    values = {
        "version": VERSION, "update_id": UPDATE, "base_version": None, "encoder": encoder,
        "encoder_sha256": weights_sha256(Path(encoder)), "max_tokens": 8, "lora_rank": 4,
        "adapter": "lora", "adapted_modules": (ADAPTED,), "alpha": 1.0, "state": UPDATE,
    }  # fmt: skip
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


Publish = Callable[..., UpdateCommitted]


@pytest.fixture
def publish_version(
    tiny_encoder: str, weights: VersionWeights, histories: pl.DataFrame, local_root: Root
) -> Publish:
    """Writes state and version below the root; returns the commit record that names them."""

    def run(**changes: object) -> UpdateCommitted:
        save_item_state(local_root, UPDATE, tiny_shop.item_states()[-1])
        buffer = io.BytesIO()
        histories.write_parquet(buffer)
        local_root.put(HISTORIES, buffer.getvalue())
        artifacts = publish(
            local_root, manifest(tiny_encoder, **changes), weights,
            adapter={"adapter_config.json": b"{}"}, report="# Version\n",
        )  # fmt: skip
        return committed(version=VERSION, artifacts=artifacts)

    return run


def test_a_version_knows_the_key_of_its_histories(
    local_root: Root, publish_version: Publish
) -> None:
    record = dataclasses.replace(publish_version(), user_key_id="7ecd1ca3")
    assert load_version(local_root, record).user_key_id == "7ecd1ca3"


def rewritten(
    root: Root, record: UpdateCommitted, name: str, change: Callable[[bytes], bytes]
) -> UpdateCommitted:
    """The record of a version one of whose files was published with other content."""
    path = version_path(VERSION, name)
    data = change(root.read_bytes(path))
    root.put(path, data)
    digest = hashlib.sha256(data).hexdigest()
    return dataclasses.replace(record, artifacts={**record.artifacts, path: digest})


def expected_scores(
    weights: VersionWeights, history: UserHistory, candidates: np.ndarray, query: np.ndarray | None
) -> np.ndarray:
    """By the parts that training and evaluation use."""
    table = tiny_shop.item_states()[-1].table()
    _, index = text_indexes(table)
    attended, attention = history.attention(NUM_ATTENDED)
    pooled = pool_history(weights.text[index[attended]], attention)
    text = weights.text[index[candidates]]
    inputs = head_inputs(
        features(history, table, candidates, now=NOW),
        None if pooled is None else text @ pooled,
        None if query is None else text @ query,
    )
    return weights.head.score(inputs)


def test_a_loaded_version_scores_as_the_weights_that_were_published(
    publish_version: Publish,
    local_root: Root,
    weights: VersionWeights,
    histories: pl.DataFrame,
    tiny_encoder: str,
) -> None:
    version = load_version(local_root, publish_version())
    assert version.name == VERSION
    candidates = np.array([3, 0, 39, 17, 8], np.int32)
    known = history_slices(histories, tiny_shop.item_states()[-1].as_of)
    query = TextEncoder(tiny_encoder, 8).with_weights(weights.adapted_weights).embed(["w3 w4"])[0]
    assert len(known) == 20
    for user in [*known, "nobody"]:
        history = known.get(user, UserHistory.empty())
        for text, vector in ((None, None), ("w3 w4", query)):
            found = version.score(version.history(user), candidates, now=NOW, query=text)
            expected = expected_scores(weights, history, candidates, vector)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert version.knows_query("w3 w4") and not version.knows_query("w5")
    version.check_golden()


def test_versions_in_one_process_share_its_encoder(
    publish_version: Publish, local_root: Root
) -> None:
    record, encoders = publish_version(), Encoders()
    versions = [load_version(local_root, record, encoders) for _ in range(3)]
    assert {version.encoder_runtime for version in versions} == {"onnx"}
    assert encoders.num_sessions() == 2, "one a layer"
    versions[0].embed_queries(["w3 w4", "w5"])
    assert all(version.knows_query("w5") for version in versions)
    assert load_version(local_root, record).knows_query("w5") is False, "another process"


def test_onnx_runtime_has_to_embed_golden_queries_as_training_recorded(
    publish_version: Publish, local_root: Root
) -> None:
    """Of an earlier version, which recorded none, it has to embed texts as they are stored."""

    def with_embedding(change: Callable[[list[float]], list[float]] | None) -> str:
        def changed(data: bytes) -> bytes:
            requests = json.loads(data)
            for request in requests:
                vector = request.pop("embedding", None)
                if change and vector:
                    request["embedding"] = change(vector)
            return json.dumps(requests).encode()

        record = rewritten(local_root, publish_version(), "golden.json", changed)
        return load_version(local_root, record).encoder_runtime

    assert with_embedding(lambda vector: vector) == "onnx"
    assert with_embedding(None) == "onnx"
    assert with_embedding(lambda vector: [value + 2e-4 for value in vector]) == "torch"


def test_users_with_different_histories_get_different_scores(
    publish_version: Publish, local_root: Root, histories: pl.DataFrame
) -> None:
    version = load_version(local_root, publish_version())
    everything = np.arange(len(version.items), dtype=np.int32)
    scores = [
        version.score(version.history(user), everything, now=NOW, query=None)
        for user in [*histories["user"].unique(), "nobody"]
    ]
    assert len({values.tobytes() for values in scores}) == 21


def test_a_history_that_a_request_brings_counts_as_of_now(
    publish_version: Publish, local_root: Root
) -> None:
    version = load_version(local_root, publish_version())
    history = version.history_of(["i03", "no such item", "i03", "i07"], NOW)
    assert history.items.tolist() == [3, 7] and history.decayed.tolist() == [2.0, 1.0]


def test_the_next_update_starts_from_the_published_weights(
    publish_version: Publish, local_root: Root, weights: VersionWeights
) -> None:
    found_manifest, found = load_weights(local_root, publish_version())
    assert found_manifest.version == VERSION and found.texts == weights.texts
    assert found.adapted_weights.keys() == {ADAPTED}
    assert np.array_equal(found.adapted_weights[ADAPTED], weights.adapted_weights[ADAPTED])
    assert np.array_equal(found.text, weights.text) and found.text.dtype == np.float32
    assert found.head.weights.keys() == weights.head.weights.keys()
    for name, value in weights.head.weights.items():
        assert np.array_equal(found.head.weights[name], value)


def test_a_version_of_an_earlier_raysys_is_read_as_it_was(
    publish_version: Publish, local_root: Root, weights: VersionWeights
) -> None:
    """Manifests of schema 1 named the one module; its matrix was called `weight`."""

    def manifest_of_schema_1(data: bytes) -> bytes:
        body = json.loads(data)
        (module,) = body.pop("adapted_modules")
        assert body.pop("adapter") == "lora"
        return json.dumps({**body, "adapted_module": module, "schema_version": 1}).encode()

    record = publish_version()
    old = rewritten(local_root, record, "manifest.json", manifest_of_schema_1)
    old = rewritten(
        local_root, old, "encoder.safetensors", lambda data: save({"weight": load(data)[ADAPTED]})
    )
    found_manifest, found = load_weights(local_root, old)
    assert found_manifest == load_weights(local_root, publish_version())[0]
    assert found.adapted_weights.keys() == {ADAPTED}
    assert np.array_equal(found.adapted_weights[ADAPTED], weights.adapted_weights[ADAPTED])


def test_an_earlier_version_serves_as_it_did(
    publish_version: Publish, local_root: Root, tmp_path: Path
) -> None:
    record = rewritten(
        local_root, publish_version(), "encoder.safetensors",
        lambda data: save({"weight": load(data)[ADAPTED]}),
    )  # fmt: skip
    load_version(local_root, record).check_golden()


def test_a_version_of_an_untouched_encoder_is_loaded(
    publish_version: Publish, local_root: Root
) -> None:
    record = publish_version(adapter="none", adapted_modules=())
    record = rewritten(local_root, record, "encoder.safetensors", lambda data: save({}))
    manifest, found = load_weights(local_root, record)
    assert (manifest.adapter, manifest.adapted_modules, found.adapted_weights) == ("none", (), {})


def test_the_ledger_names_every_file_of_the_version_and_of_its_state(
    publish_version: Publish, local_root: Root
) -> None:
    record = publish_version()
    stored = [file.path for folder in ("versions", "state") for file in local_root.list(folder)]
    assert sorted(record.artifacts) == sorted(stored) == sorted(PATHS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.partition("/")[2])
def test_a_flipped_bit_is_an_error_that_names_the_file(
    publish_version: Publish, local_root: Root, path: str
) -> None:
    record = publish_version()
    data = bytearray(local_root.read_bytes(path))
    data[len(data) // 2] ^= 1
    local_root.put(path, bytes(data))
    with pytest.raises(ArtifactError, match=f"^{path} has sha256 .* the ledger says"):
        load_version(local_root, record)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.partition("/")[2])
def test_a_missing_file_is_an_error_that_names_it(
    publish_version: Publish, local_root: Root, path: str
) -> None:
    record = publish_version()
    local_root.delete_prefix(path)
    with pytest.raises(ArtifactError, match=f"^{path} is missing"):
        load_version(local_root, record)


def test_a_file_that_the_ledger_does_not_name_is_not_read(
    publish_version: Publish, local_root: Root
) -> None:
    record = publish_version()
    path = version_path(VERSION, "head.safetensors")
    others = {name: digest for name, digest in record.artifacts.items() if name != path}
    with pytest.raises(ArtifactError, match=f"^{path} has sha256"):
        load_version(local_root, dataclasses.replace(record, artifacts=others))


def test_another_encoder_than_the_version_was_trained_on_is_refused(
    publish_version: Publish, local_root: Root
) -> None:
    record = publish_version(encoder_sha256="f" * 64)
    with pytest.raises(ArtifactError, match=f"{VERSION} was trained on encoder ffffffffffff"):
        load_version(local_root, record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda data: b"{", "the manifest cannot be read", id="not JSON"),
        pytest.param(lambda data: b"[]", "the manifest cannot be read", id="not an object"),
        pytest.param(
            lambda data: data.replace(b'"alpha"', b'"beta"'), "cannot be read", id="other keys"
        ),
        pytest.param(
            lambda data: data.replace(b'"schema_version": 3', b'"schema_version": 4'),
            "schema_version 4, this raysys reads up to 3: upgrade",
            id="of a newer raysys",
        ),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_refused(
    publish_version: Publish, local_root: Root, change: Callable[[bytes], bytes], message: str
) -> None:
    record = rewritten(local_root, publish_version(), "manifest.json", change)
    with pytest.raises(ArtifactError, match=message):
        load_version(local_root, record)


def _with_head(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[bytes], bytes]:
    def run(data: bytes) -> bytes:
        tensors = load(data)
        return save({**tensors, "skip.weight": change(tensors["skip.weight"].copy())})

    return run


@pytest.mark.parametrize(
    ("change", "size"),
    [
        pytest.param(lambda weight: weight * 1.05, r"\d", id="changed weights"),
        pytest.param(lambda weight: weight * np.float32("nan"), "nan", id="NaN weights"),
        pytest.param(lambda weight: weight * np.float32("inf"), "nan|inf", id="infinite weights"),
    ],
)
def test_the_golden_requests_catch_weights_that_score_otherwise(
    publish_version: Publish,
    local_root: Root,
    change: Callable[[np.ndarray], np.ndarray],
    size: str,
) -> None:
    """Every hash is right here: the wrong weights were published."""
    record = publish_version()
    load_version(local_root, record).check_golden()
    wrong = rewritten(local_root, record, "head.safetensors", _with_head(change))
    with np.errstate(invalid="ignore"):
        version = load_version(local_root, wrong)
        with pytest.raises(ArtifactError, match=f"{VERSION} scores a golden request .*(?:{size})"):
            version.check_golden()


def test_the_golden_requests_catch_an_encoder_that_embeds_queries_otherwise(
    publish_version: Publish, local_root: Root
) -> None:
    record = rewritten(
        local_root, publish_version(), "encoder.safetensors",
        lambda data: save({ADAPTED: -load(data)[ADAPTED]}),
    )  # fmt: skip
    with pytest.raises(ArtifactError, match="golden request"):
        load_version(local_root, record).check_golden()


def test_a_version_without_golden_requests_is_refused(
    publish_version: Publish, local_root: Root
) -> None:
    record = rewritten(local_root, publish_version(), "golden.json", lambda data: b"[]")
    with pytest.raises(ArtifactError, match=f"{VERSION} has no golden requests"):
        load_version(local_root, record).check_golden()


def test_no_user_is_in_a_versions_files_but_in_its_histories_alone(
    publish_version: Publish, local_root: Root, histories: pl.DataFrame
) -> None:
    publish_version()
    users = [user.encode() for user in histories["user"].unique()]
    holding = []
    for file in [*local_root.list("versions"), *local_root.list("state")]:
        data = local_root.read_bytes(file.path)
        if file.path.endswith(".parquet"):
            data = pl.read_parquet(io.BytesIO(data)).write_ndjson().encode()
        if any(user in data for user in users):
            holding.append(file.path)
    assert holding == [HISTORIES]


def test_the_golden_requests_are_the_same_whoever_the_users_are(
    publish_version: Publish, local_root: Root, histories: pl.DataFrame
) -> None:
    record, path = publish_version(), HISTORIES
    buffer = io.BytesIO()
    histories.clear().write_parquet(buffer)
    local_root.put(path, buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    nobody = dataclasses.replace(record, artifacts={**record.artifacts, path: digest})
    golden = json.loads(local_root.read_bytes(version_path(VERSION, "golden.json")))
    version = load_version(local_root, nobody)
    version.encoder = torch_encoder(version.manifest, version._weights.adapted_weights)
    assert golden == version.record_golden()


def test_a_version_flags_by_the_configured_probability(
    publish_version: Publish, local_root: Root
) -> None:
    log_odds = np.log(np.array([0.05, 0.19, 0.21]) / np.array([0.95, 0.81, 0.79]))
    record = publish_version(loss="pointwise", decision_threshold=0.2)
    assert load_version(local_root, record).flags(log_odds).tolist() == [False, False, True]


def test_scores_that_only_rank_flag_nothing(publish_version: Publish, local_root: Root) -> None:
    version = load_version(local_root, publish_version())
    with pytest.raises(ValueError, match=r"listwise loss.*train\.loss: pointwise"):
        version.flags(np.zeros(2, np.float32))


def test_a_version_explains_its_scores_in_parts_that_add_up(
    publish_version: Publish, local_root: Root, histories: pl.DataFrame
) -> None:
    version = load_version(local_root, publish_version())
    candidates = np.array([3, 0, 39, 17, 8], np.int32)
    for user in (histories["user"][0], "nobody"):
        for query in (None, "w3 w4"):
            asked = (version.history(user), candidates)
            scores = version.score(*asked, now=NOW, query=query)
            parts = version.explain(*asked, now=NOW, query=query)
            np.testing.assert_allclose(sum(parts.values()), scores, rtol=1e-5, atol=1e-5)
            assert (np.abs(parts["query"]).max() > 0) == (query is not None)
            assert (np.abs(parts["repeat"]).max() > 0) == (user != "nobody")


def test_a_version_gives_the_probabilities_of_its_calibration(
    publish_version: Publish, local_root: Root
) -> None:
    calibration = Calibration(slope=0.5, intercept=-2.0, event="shown")
    version = load_version(local_root, publish_version(calibration=calibration))
    assert version.calibration == calibration
    found = version.probabilities(np.array([-1e9, 4.0, 1e9], np.float32))
    assert found.tolist() == [0.0, 0.5, 1.0] and found.dtype == np.float32


def test_a_version_without_calibration_gives_the_chances_of_the_next_item(
    publish_version: Publish, local_root: Root
) -> None:
    version = load_version(local_root, publish_version())
    everything = np.arange(len(version.items), dtype=np.int32)
    scores = version.score(UserHistory.empty(), everything, now=version.items.as_of, query=None)
    assert version.calibration.event == "next"
    assert version.probabilities(scores).sum() == pytest.approx(1.0, rel=1e-4)


def test_scores_of_a_pointwise_version_are_log_odds_where_nothing_was_fitted(
    publish_version: Publish, local_root: Root
) -> None:
    version = load_version(local_root, publish_version(loss="pointwise"))
    assert version.calibration.event == "trained"
    assert version.probabilities(np.array([0.0], np.float32)).tolist() == [0.5]


def test_the_golden_requests_catch_another_calibration(
    publish_version: Publish, local_root: Root
) -> None:
    calibration = Calibration(slope=0.5, intercept=-9.0, event="taken")
    record = publish_version(calibration=calibration)
    load_version(local_root, record).check_golden()
    wrong = rewritten(
        local_root, record, "manifest.json", lambda data: data.replace(b"-9.0", b"-9.01")
    )
    with pytest.raises(ArtifactError, match=f"{VERSION} gives a golden request probabilities"):
        load_version(local_root, wrong).check_golden()


def test_a_version_of_before_calibration_is_served_as_it_was(
    publish_version: Publish, local_root: Root
) -> None:
    def manifest_of_schema_2(data: bytes) -> bytes:
        body = json.loads(data)
        del body["calibration"]
        return json.dumps({**body, "schema_version": 2}).encode()

    def golden_of_then(data: bytes) -> bytes:
        return json.dumps(
            [{k: v for k, v in r.items() if k != "probabilities"} for r in json.loads(data)]
        ).encode()

    record = rewritten(local_root, publish_version(), "manifest.json", manifest_of_schema_2)
    record = rewritten(local_root, record, "golden.json", golden_of_then)
    version = load_version(local_root, record)
    version.check_golden()
    assert version.manifest.calibration is None and version.calibration.event == "next"


@pytest.mark.parametrize("slope", ["-1.0", "NaN"])
def test_a_calibration_that_would_turn_the_ranking_round_is_refused(
    publish_version: Publish, local_root: Root, slope: str
) -> None:
    calibration = Calibration(slope=0.625, intercept=-9.0, event="taken")
    record = rewritten(
        local_root, publish_version(calibration=calibration), "manifest.json",
        lambda data: data.replace(b"0.625", slope.encode()),
    )  # fmt: skip
    with pytest.raises(ArtifactError, match=r"cannot be read: .* slope >= 0"):
        load_version(local_root, record)
