"""Updates that adapt this or that: what they move, user by user, and what a version of them serves.

The line of versions here has an earlier one that changed other modules than the update does.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear, normalize

from raysys.config import load_config
from raysys.errors import ConfigError
from raysys.model.adapter import NAME, Adapter, activations_cut
from raysys.model.encoder import TextEncoder, TokenActivations
from raysys.model.encoder_files import weights_sha256
from raysys.model.losses import listwise_loss
from raysys.model.ranker import HeadModule, RankerModule
from raysys.model.scorer import NUM_INPUTS
from raysys.model.tower import build_tower
from raysys.registry.encoders import torch_encoder
from raysys.registry.loaded import LoadedVersion, VersionWeights
from raysys.registry.store import text_indexes
from raysys.registry.version import Manifest
from raysys.storage import Root
from raysys.train import output
from raysys.train.loop import Trained, TrainJob, train_on_shards
from tests import tiny_shop
from tests.stub_steps import Steps
from tests.update_shop import DAYS, contents, write_catalogue, write_day, write_shop

KINDS: dict[str, dict[str, Any]] = {
    "B trained": {"adapter": "lora"},
    "A and B trained": {"adapter": "lora", "train_lora_a": True},
    "AdaLoRA": {"adapter": "adalora"},
}
TARGETS: dict[str, dict[str, Any]] = {
    "last projection": {"target_modules": ("output.dense",)},
    "query and value": {"target_modules": ("query", "value")},
    "inner projection": {"target_modules": ("intermediate.dense",)},
    "all of two layers": {"target_modules": ("all-linear",), "num_adapted_layers": 2},
}
EARLIER = "encoder.layer.1.attention.self.key"
USERS, REQUESTS, CANDIDATES = 4, 2, 5
LABELS = ("gains", "weight", "log_q", "valid")
Batch = dict[str, torch.Tensor]
Gradients = dict[str, torch.Tensor]
shared = functools.cache(TextEncoder)


def earlier(name: str) -> dict[str, NDArray[np.float32]]:
    """The matrices of the version before."""
    own = shared(name, 8).model.get_parameter(f"{EARLIER}.weight").numpy()
    noise = np.random.default_rng(0).normal(0, own.std(), own.shape)
    return {EARLIER: (own + noise).astype(np.float32)}


def job(name: str, changes: dict[str, Any], **more: Any) -> TrainJob:
    defaults = {"adapted_weights": earlier(name), "learning_rate": 0.05, "train": {"alpha": 0.5}}
    return tiny_shop.train_job(name, model=changes, **{**defaults, **more})


def activations(job: TrainJob) -> TokenActivations:
    texts = tiny_shop.distinct_texts()
    cut = activations_cut(job.model, job.adapted_weights or ())
    return shared(job.model.encoder, 8).activations(texts, cut).select(texts)


def train(job: TrainJob, *, query: str | None = None) -> Trained:
    shard = tiny_shop.shard(tiny_shop.outcomes(24, query=query)).examples
    return train_on_shards(
        job, [shard], activations(job), num_workers=1, on_step=lambda step: None
    )  # fmt: skip


def short(name: str) -> str:
    return name.removeprefix("encoder.layer.")


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_private_update_moves_the_configured_weights_and_no_others(
    tiny_encoder: str, world: None, tmp_path: Path, kind: str, targets: str
) -> None:
    update = job(tiny_encoder, {**KINDS[kind], **TARGETS[targets]})
    trained = train(update)
    expected = {
        "last projection": {"1.output.dense"},
        "query and value": {"1.attention.self.query", "1.attention.self.value"},
        "inner projection": {"1.intermediate.dense"},
        "all of two layers": {
            f"{layer}.{part}"
            for layer in range(2)
            for part in ("attention.self.query", "attention.self.key", "attention.self.value",
                         "attention.output.dense", "intermediate.dense", "output.dense")
        },
    }[targets]  # fmt: skip
    assert {short(name) for name in trained.adapted_modules} == expected
    assert trained.adapted_weights.keys() == set(trained.adapted_modules) | {EARLIER}
    previous = shared(tiny_encoder, 8).with_weights(earlier(tiny_encoder)).model
    for name, parameter in previous.named_parameters():
        found = trained.adapted_weights.get(name.removesuffix(".weight"))
        moved = found is not None and not np.array_equal(found, parameter.numpy())
        assert moved == (short(name).removesuffix(".weight") in expected and "bias" not in name)
    for name, value in trained.head.weights.items():
        assert not np.array_equal(value, update.head.weights[name])
    assert not np.array_equal(trained.text_before, trained.text_after)

    # What is written is what was trained, PEFT's files included.
    output.write_output(tmp_path, trained, encoder=tiny_encoder)
    output.require_reloads(tmp_path, trained, update, activations(update))
    read = output.read_output(tmp_path)
    assert sorted(read.adapter) == ["adapter_config.json", "adapter_model.safetensors"]
    assert read.adapted_modules == trained.adapted_modules
    for name, value in trained.adapted_weights.items():
        assert np.array_equal(read.adapted_weights[name], value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ("query", "q_proj")}, r"^model\.target_modules: no module q_proj; "),
        ({"num_adapted_layers": 3}, r"^model\.num_adapted_layers: the encoder has 2 layers, got 3"),
    ],
    ids=["unknown module", "too many layers"],
)
def test_an_update_of_what_the_encoder_lacks_starts_nothing(
    tiny_encoder: str,
    tmp_path: Path,
    local_root: Root,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    config = load_config(write_shop(tmp_path, local_root, tiny_encoder))
    write_catalogue(local_root)
    write_day(local_root, DAYS[0])
    wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    steps, before = Steps(monkeypatch), contents(local_root)
    with pytest.raises(ConfigError, match=message):
        steps.update(wrong)
    assert contents(local_root) == before
    assert steps.update(config).version is not None


def test_an_update_of_the_head_alone_leaves_every_text_as_it_was(
    tiny_encoder: str, world: None, tmp_path: Path
) -> None:
    update = job(tiny_encoder, {"adapter": "none"})
    trained = train(update)
    assert trained.peft_model is None and trained.adapted_modules == ()
    assert trained.adapted_weights.keys() == {EARLIER}
    assert np.array_equal(trained.text_before, trained.text_after)
    assert not np.array_equal(
        trained.head.weights["skip.weight"], update.head.weights["skip.weight"]
    )
    output.write_output(tmp_path, trained, encoder=tiny_encoder)
    output.require_reloads(tmp_path, trained, update, activations(update))
    assert output.read_output(tmp_path).adapter == {}
    first = train(job(tiny_encoder, {"adapter": "none"}, adapted_weights=None))
    assert first.adapted_weights == {}


def test_adalora_ends_with_the_configured_rank_and_spreads_it_over_modules(
    tiny_encoder: str, world: None
) -> None:
    plan = tiny_shop.plan(num_steps=12)
    changes = {"adapter": "adalora", "lora_rank": 2, "adalora_initial_rank": 5}
    trained = train(job(tiny_encoder, {**changes, **TARGETS["all of two layers"]}, plan=plan))
    assert trained.peft_model is not None
    before = shared(tiny_encoder, 8).with_weights(earlier(tiny_encoder)).model
    ranks = [
        np.linalg.matrix_rank(
            trained.adapted_weights[name] - before.get_parameter(f"{name}.weight").numpy(),
            tol=1e-4,
        )
        for name in trained.adapted_modules
    ]
    assert sum(ranks) <= 2 * 12 < 5 * 12
    assert max(ranks) > 2, "a module may have more than the mean, as another has less"

    one_step = train(job(tiny_encoder, changes, plan=tiny_shop.plan(num_steps=1)))
    assert one_step.adapted_modules, "too few steps to decide leave all rank where it is"


# User by user, through the real ranker.


def make_ranker(
    name: str, kind: str, targets: str
) -> tuple[RankerModule, Adapter, TokenActivations]:
    update = job(name, {**KINDS[kind], **TARGETS[targets]})
    torch.manual_seed(3)
    adapter = Adapter.fresh(
        shared(name, 8), update.model, update.adapted_weights or {}, num_steps=10
    )
    with torch.no_grad():
        for _, layer in adapter.layers():
            factor = layer.lora_E[NAME] if kind == "AdaLoRA" else layer.lora_B[NAME].weight
            factor.normal_()
            size = layer.base_layer.weight.norm() / layer.get_delta_weight(NAME).norm()
            factor.mul_(0.3 * size)
    public = activations(update)
    module = RankerModule(build_tower(adapter, public), HeadModule(tiny_shop.random_head()))
    return module, adapter, public


def make_batch(num_texts: int) -> Batch:
    """Users whose candidates share texts; the first user's are all one text."""
    generator = torch.Generator().manual_seed(0)
    shape = (USERS, REQUESTS, CANDIDATES)
    text_index = torch.randint(6, shape, generator=generator) * (num_texts // 6)
    text_index[0] = 3
    sides = normalize(torch.randn(USERS, REQUESTS, 2, 16, generator=generator), dim=-1)
    gains = torch.zeros(shape)
    gains[..., :2] = torch.tensor([3.0, 1.0])
    return {
        "features": torch.randn(*shape, NUM_INPUTS - 3, generator=generator),
        "text_index": text_index,
        "history_text": sides[:, :, 0],
        "query_text": sides[:, :, 1],
        "gains": gains,
        "weight": torch.rand(shape, generator=generator) + 0.5,
        "log_q": torch.randn(shape, generator=generator) - 3,
        "valid": torch.ones(shape, dtype=torch.bool),
    }


def by_the_engine(module: RankerModule, batch: Batch) -> Gradients:
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    loss = listwise_loss(module(**inputs), **{name: batch[name] for name in LABELS})
    module.backward(loss)
    return {name: p.grad_sample for name, p in module.trainable()}  # type: ignore[attr-defined]


def one_by_one(
    module: RankerModule, adapter: Adapter, public: TokenActivations, batch: Batch
) -> Gradients:
    """One ordinary backward pass a user through PEFT's own layers, from the public activations."""
    module._engine.detach()
    names, parameters = zip(*module.trainable(), strict=True)
    layers = adapter.encoder.model.encoder.layer[-public.cut.num_layers :]
    hidden = torch.from_numpy(public.hidden).float()
    padding = torch.arange(hidden.shape[1]) >= torch.from_numpy(public.lengths)[:, None]
    rows = []
    for user in range(USERS):
        one = {name: value[user : user + 1] for name, value in batch.items()}
        text = hidden
        for layer in layers:
            text = layer(text, torch.zeros(padding.shape).masked_fill(padding, -1e9)[:, None, None])
        text = normalize((text * ~padding[..., None]).sum(1), dim=-1)[one["text_index"]]
        loss = listwise_loss(_head(module.head, text, one), **{k: one[k] for k in LABELS})
        rows.append(torch.autograd.grad(loss.sum(), parameters))
    return {n: torch.stack(g) for n, g in zip(names, zip(*rows, strict=True), strict=True)}


def _head(head: HeadModule, text: torch.Tensor, batch: Batch) -> torch.Tensor:
    cosines = [
        (text * batch[side][:, :, None]).sum(-1, keepdim=True)
        for side in ("history_text", "query_text")
    ]
    inputs = torch.cat([batch["features"], *cosines, torch.ones_like(cosines[0])], -1)

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        weights = dict(head.get_submodule(name).named_parameters())
        return linear(x, weights["weight"], weights.get("bias"))

    hidden = torch.relu(layer("second", torch.relu(layer("first", inputs))))
    return (layer("last", hidden) + layer("skip", inputs))[..., 0]


def worst_error(found: Gradients, expected: Gradients) -> float:
    """Largest error over parameters and users, relative to the parameter's largest gradient."""
    assert found.keys() == expected.keys()
    return max(
        float((found[k] - e).flatten(1).norm(dim=1).max() / e.flatten(1).norm(dim=1).max())
        for k, e in expected.items()
    )


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_per_user_gradients_are_those_of_one_backward_pass_a_user(
    tiny_encoder: str, kind: str, targets: str
) -> None:
    module, adapter, public = make_ranker(tiny_encoder, kind, targets)
    batch = make_batch(len(public.texts))
    found = by_the_engine(module, batch)
    expected = one_by_one(module, adapter, public, batch)
    per_module = {"B trained": 1, "A and B trained": 2, "AdaLoRA": 3}[kind]
    assert len(found) == per_module * len(adapter.modules) + 6
    assert all(float(e.flatten(1).norm(dim=1).max()) > 0 for e in expected.values())
    assert worst_error(found, expected) < 1e-5


@pytest.mark.parametrize("broken", ["one user's rows are another's", "a text counts once"])
def test_the_comparison_notices_rows_that_are_not_their_users(
    tiny_encoder: str, broken: str
) -> None:
    module, adapter, public = make_ranker(tiny_encoder, "AdaLoRA", "query and value")
    tower: Any = module.tower
    rows, batch = tower.rows, make_batch(len(public.texts))
    if broken == "a text counts once":
        # Texts are embedded once for all users, and each belongs to the first who is shown it.
        forward = tower.forward

        def once(text_index: torch.Tensor) -> torch.Tensor:
            texts, place = torch.unique(text_index, return_inverse=True)
            first = torch.zeros(USERS, len(texts), dtype=torch.int64)
            first[0] = texts
            out: torch.Tensor = forward(first)[0][place]
            return out

        tower.forward = once
    else:
        tower.rows = lambda users, num_users: rows(users.roll(5), num_users)
    found = by_the_engine(module, batch)
    assert worst_error(found, one_by_one(module, adapter, public, batch)) > 1e-2


# What a version serves.


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_version_with_other_targets_than_the_one_before_serves_what_the_peft_model_scores(
    tiny_encoder: str, world: None, kind: str, targets: str
) -> None:
    # Steps so long that embeddings become others. Much longer ones make weights of a hundred, and
    # attention so steep that the cache's half precision decides which token it falls on.
    update = job(tiny_encoder, {**KINDS[kind], **TARGETS[targets]}, learning_rate=0.3)
    trained = train(update, query="w3 w4")
    assert trained.peft_model is not None
    # A head that took such steps turns the cache's half precision into tenths of a score.
    trained = dataclasses.replace(trained, head=update.head)
    table = tiny_shop.item_states()[-1].table()
    texts, _ = text_indexes(table)
    whole = _whole_model(trained.peft_model, shared(tiny_encoder, 8), [*texts, "w3 w4"])
    served = _version(update, trained, texts, trained.text_after)
    by_peft = _version(update, trained, texts, whole[:-1])
    by_peft.encoder.embed = lambda query: whole[-1]
    without = _version(update, trained, texts, trained.text_before)
    without.encoder = torch_encoder(without.manifest, update.adapted_weights or {})
    found, expected, other = (_scores(v) for v in (served, by_peft, without))
    changed = abs(other - expected).max()
    assert changed > 0.002, "the version before scores otherwise"
    # The cache's half precision: 3 % in the worst of 340 runs. Other matrices would make it 100 %.
    assert abs(found - expected).max() < 0.25 * changed


@torch.no_grad()
def _whole_model(
    model: torch.nn.Module, encoder: TextEncoder, texts: list[str]
) -> NDArray[np.float32]:
    batch = encoder.tokenize(texts)
    states = model(**batch).last_hidden_state
    found: NDArray[np.float32] = normalize(
        (states * batch["attention_mask"][..., None]).sum(1), dim=1
    ).numpy()
    return found


def _version(
    update: TrainJob, trained: Trained, texts: list[str], text: NDArray[np.float32]
) -> LoadedVersion:
    weights = VersionWeights(
        head=tiny_shop.random_head(), adapted_weights=trained.adapted_weights, texts=texts,
        text=text,
    )  # fmt: skip
    table = tiny_shop.item_states()[-1].table()
    return LoadedVersion(make_manifest(update.model.encoder, trained), weights, table, {})


def _scores(version: LoadedVersion) -> NDArray[np.float32]:
    now = tiny_shop.WINDOW_START
    history = version.history_of(["i03", "i17"], now)
    everything = np.arange(len(version.items), dtype=np.int32)
    return version.score(history, everything, now=now, query="w3 w4")


def make_manifest(encoder: str, trained: Trained) -> Manifest:
    return Manifest(
        version="v0002-bbbbbb", update_id="u0002-bbbbbb", base_version="v0001-aaaaaa",
        encoder=encoder, encoder_sha256=weights_sha256(Path(encoder)), adapter="lora",
        adapted_modules=trained.adapted_modules, max_tokens=8, lora_rank=4, alpha=0.5,
        state="u0002-bbbbbb",
    )  # fmt: skip
