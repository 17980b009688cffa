"""One worker's training: it learns, it moves what it says, alpha is exact, broken stacks fail."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel

from raysys.errors import HealthError, PrivacyError
from raysys.evaluate.metrics import ranking_metrics
from raysys.ingest.cases import Case, read_cases
from raysys.ingest.example_set import NUM_ATTENDED, ExampleSet
from raysys.ingest.features import UserHistory, features
from raysys.model.encoder import TextEncoder, TokenActivations, load_encoder
from raysys.model.ranker import RankerModule
from raysys.model.scorer import Head, head_inputs, pool_history
from raysys.train import loop, output
from raysys.train import step as one_step
from raysys.train.loop import Trained, train_on_shards
from tests import tiny_shop

ADAPTED = "encoder.layer.1.output.dense"
NOT_PRIVATE = tiny_shop.plan(enabled=False, num_steps=30, sampling_prob=0.5)

Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def activations(tiny_encoder: str) -> TokenActivations:
    texts = tiny_shop.distinct_texts()
    return TextEncoder(tiny_encoder, 8).activations(texts).select(texts)


@pytest.fixture
def train(tiny_encoder: str, activations: TokenActivations, world: None) -> Train:
    """Trains on these shards with a job of these changes."""

    def run(*shards: ExampleSet, **changes: Any) -> Trained:
        job = tiny_shop.train_job(tiny_encoder, **changes)
        return train_on_shards(
            job, list(shards), activations, num_workers=1, on_step=lambda step: None
        )

    return run


def past(num_users: int = 40, *, seed: int = 0) -> ExampleSet:
    """Examples of all days before the evaluation window."""
    events = tiny_shop.outcomes(num_users, seed=seed)
    return tiny_shop.shard(events.filter(pl.col("ts") < tiny_shop.WINDOW_START)).examples


def window(num_users: int = 40) -> list[Case]:
    """Each user's last day, seen from its beginning."""
    buffer = io.BytesIO()
    tiny_shop.shard(tiny_shop.outcomes(num_users)).cases.write_parquet(buffer)
    return list(read_cases(buffer.getvalue()))


def scores(
    head: Head, text: NDArray[np.float32], history: UserHistory, now: float
) -> NDArray[np.float32]:
    """Scores of all items, by NumPy alone."""
    table = tiny_shop.item_states()[0].table()
    index = tiny_shop.text_of_item()
    attended, attention = history.attention(NUM_ATTENDED)
    pooled = pool_history(text[index[attended]], attention)
    shown = features(history, table, np.arange(len(table), dtype=np.int32), now=now)
    return head.score(head_inputs(shown, None if pooled is None else text[index] @ pooled, None))


def ndcg10(head: Head, text: NDArray[np.float32], cases: Sequence[Case]) -> float:
    found = [
        ranking_metrics(scores(head, text, case.history, case.now), case.positives, case.gains)
        for case in cases
    ]
    return float(np.mean([ndcg for ndcg, _, _ in found]))


def test_training_without_privacy_learns_to_rank_the_days_that_follow(train: Train) -> None:
    before = Head.decayed_frequency(8)
    trained = train(past(), plan=NOT_PRIVATE, learning_rate=0.03)
    cases = window()
    start = ndcg10(before, trained.text_before, cases)
    assert start < 0.2
    assert ndcg10(trained.head, trained.text_after, cases) > start + 0.2


def test_training_without_privacy_lowers_the_loss(train: Train) -> None:
    losses = []
    for num_steps in (2, 40):
        plan = tiny_shop.plan(enabled=False, num_steps=num_steps, sampling_prob=1.0)
        losses.append(train(past(), plan=plan, learning_rate=0.03).mean_loss)
    assert losses[1] < losses[0] - 0.2


def test_a_private_run_moves_every_weight_and_no_two_runs_are_alike(train: Train) -> None:
    first, second = (train(past()) for _ in range(2))
    start = tiny_shop.train_job("unused").head
    for name, value in first.head.weights.items():
        assert np.isfinite(value).all()
        assert not np.array_equal(value, start.weights[name])
        assert not np.array_equal(value, second.head.weights[name])
    assert not np.array_equal(first.adapted_weights[ADAPTED], second.adapted_weights[ADAPTED])
    assert not np.array_equal(first.text_before, first.text_after)


def test_lora_starts_from_the_a_of_the_updates_seed_and_only_b_moves(train: Train) -> None:
    a = [_lora(train(past()), "lora_A") for _ in range(2)]
    assert torch.equal(*a)
    assert not torch.equal(_lora(train(past(), seed=1), "lora_A"), a[0])
    trained = train(past(), model={"train_lora_a": True})
    assert not torch.equal(_lora(trained, "lora_A"), a[0])


def _lora(trained: Trained, which: str) -> torch.Tensor:
    assert trained.peft_model is not None
    weights = dict(trained.peft_model.named_parameters())
    (found,) = (value.detach() for name, value in weights.items() if which in name)
    return found


@pytest.mark.parametrize("alpha", [0.25, 1.0], ids="alpha {}".format)
@pytest.mark.parametrize("train_lora_a", [False, True], ids=["B trained", "A and B trained"])
def test_the_new_version_is_the_previous_one_plus_alpha_times_what_was_learned(
    train: Train, monkeypatch: pytest.MonkeyPatch, alpha: float, train_lora_a: bool
) -> None:
    learned: dict[str, Any] = {}
    run_steps = loop._run_steps

    def spy(job: Any, module: RankerModule, *rest: Any, **options: Any) -> list[float]:
        losses = run_steps(job, module, *rest, **options)
        learned.update(
            head=module.head.head(),
            delta=module.tower.scaling * (module.tower.lora_b @ module.tower.lora_a).detach(),
        )
        return losses

    monkeypatch.setattr(loop, "_run_steps", spy)
    previous_weight = np.random.default_rng(3).normal(size=(16, 32)).astype(np.float32)
    trained = train(
        past(), head=tiny_shop.random_head(), adapted_weights={ADAPTED: previous_weight},
        train={"alpha": alpha}, model={"train_lora_a": train_lora_a},
    )  # fmt: skip
    for name, old in tiny_shop.random_head().weights.items():
        change = learned["head"].weights[name] - old
        assert change.any()
        np.testing.assert_allclose(trained.head.weights[name], old + alpha * change, atol=1e-6)

    assert abs(learned["delta"]).max() > 1e-3
    expected = previous_weight + alpha * learned["delta"].numpy()
    np.testing.assert_allclose(trained.adapted_weights[ADAPTED], expected, rtol=0, atol=1e-6)


def test_the_delta_and_the_merged_matrix_and_the_embeddings_are_one_version(
    train: Train, tiny_encoder: str, tmp_path: Path
) -> None:
    """From the second version on, the delta belongs on the previous version's matrix."""
    previous = np.random.default_rng(3).normal(size=(16, 32)).astype(np.float32)
    trained = train(
        past(), adapted_weights={ADAPTED: previous}, learning_rate=0.1, train={"alpha": 0.5}
    )
    texts = tiny_shop.distinct_texts()
    encoder = TextEncoder(tiny_encoder, 8)
    np.testing.assert_allclose(
        trained.text_before, encoder.with_weights({ADAPTED: previous}).embed(texts), atol=1e-5
    )
    np.testing.assert_allclose(
        trained.text_after, encoder.with_weights(trained.adapted_weights).embed(texts), atol=1e-5
    )

    assert trained.peft_model is not None
    trained.peft_model.save_pretrained(str(tmp_path))
    base = load_encoder(Path(tiny_encoder))
    base.encoder.layer[-1].output.dense.weight.data = torch.from_numpy(previous)
    PeftModel.from_pretrained(base, str(tmp_path)).merge_and_unload()
    merged = base.encoder.layer[-1].output.dense.weight
    np.testing.assert_allclose(merged.detach().numpy(), trained.adapted_weights[ADAPTED], atol=1e-5)


def test_the_run_leaves_the_previous_versions_arrays_alone(train: Train) -> None:
    head, weight = tiny_shop.random_head(), np.ones((16, 32), np.float32)
    train(past(), head=head, adapted_weights={ADAPTED: weight})
    assert (weight == 1).all()
    for name, value in tiny_shop.random_head().weights.items():
        assert np.array_equal(head.weights[name], value)


class _Sgd(torch.optim.SGD):
    """In place of AdamW, which turns rounding errors of tiny gradients into whole steps."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr)


@pytest.mark.parametrize("enabled", [True, False], ids=["clipped", "not private"])
def test_microbatches_change_nothing(
    train: Train, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", _Sgd)
    plan = tiny_shop.plan(enabled=enabled, noise_multiplier=0.0, sampling_prob=1.0)
    one, many, every = (
        train(
            past(10), plan=plan, head=tiny_shop.random_head(), learning_rate=0.5,
            train={"microbatch_users": size, "requests_per_step": 4},
        )
        for size in (256, 3, 1)
    )  # fmt: skip
    for name, value in one.head.weights.items():
        assert abs(value - tiny_shop.random_head().weights[name]).max() > 1e-3
        for other in (many, every):
            np.testing.assert_allclose(other.head.weights[name], value, atol=2e-5)
    np.testing.assert_allclose(
        many.adapted_weights[ADAPTED], one.adapted_weights[ADAPTED], atol=2e-5
    )


def test_a_private_run_of_no_users_is_all_noise_and_takes_all_its_steps(
    tiny_encoder: str, activations: TokenActivations, world: None
) -> None:
    job, steps = tiny_shop.train_job(tiny_encoder), list[int]()
    trained = train_on_shards(job, [], activations, num_workers=1, on_step=steps.append)
    assert steps == [1, 2, 3, 4, 5]
    assert trained.num_users == 0 and np.isnan(trained.mean_loss)
    assert np.isfinite(trained.adapted_weights[ADAPTED]).all()


@pytest.mark.parametrize("name", ["both", "one"], ids=["both have users", "one has no users"])
def test_two_ranks_end_with_the_same_weights(two_workers: list[dict[str, Any]], name: str) -> None:
    for what in ("merged", "skip"):
        first, second = (worker[f"{name}_{what}"] for worker in two_workers)
        assert np.isfinite(first).all() and np.array_equal(first, second)


def test_without_privacy_users_without_any_history_still_train_the_head(train: Train) -> None:
    """A new shop's first day: no text similarity has a gradient, so LoRA rightly stays put."""
    events = tiny_shop.outcomes(40)
    first_day = events.filter(pl.col("ts") < tiny_shop.DAY_0 + 86_400)
    trained = train(tiny_shop.shard(first_day).examples, plan=NOT_PRIVATE)
    assert np.array_equal(trained.text_before, trained.text_after)
    assert not np.array_equal(
        trained.head.weights["skip.weight"], Head.decayed_frequency(8).weights["skip.weight"]
    )


class _Idle(torch.optim.AdamW):
    """An optimizer that holds other weights than the model's (opacus #820)."""

    def step(self, closure: Any = None) -> None:
        return None


def test_an_optimizer_that_does_not_move_the_model_is_refused(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", _Idle)
    with pytest.raises(HealthError, match=r"training left tower\.lora_b unchanged, or"):
        train(past())


@pytest.mark.parametrize("learning_rate", [0.0, float("inf")], ids="learning rate {}".format)
def test_training_that_changes_nothing_or_diverges_is_refused(
    train: Train, learning_rate: float
) -> None:
    with pytest.raises(HealthError, match="unchanged, or not finite"):
        train(past(), learning_rate=learning_rate)


def test_training_on_nobody_without_privacy_is_refused(train: Train) -> None:
    with pytest.raises(HealthError, match="no sampled user had a loss"):
        train(plan=NOT_PRIVATE)


def test_a_weight_beside_the_engine_stops_the_first_step(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ordinary(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr("raysys.model.ranker.per_user_linear", ordinary)
    with pytest.raises(PrivacyError, match="has a gradient that no clip bounds"):
        train(past())


@pytest.fixture
def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The arguments of each forward pass and of its loss."""
    seen: list[dict[str, torch.Tensor]] = []
    original, loss = RankerModule.forward, one_step.LOSSES["listwise"]

    def forward(self: Any, **batch: torch.Tensor) -> torch.Tensor:
        seen.append(dict(batch))
        return original(self, **batch)

    def record(scores: torch.Tensor, **labels: torch.Tensor) -> torch.Tensor:
        seen[-1].update(labels)
        return loss(scores, **labels)

    monkeypatch.setattr(RankerModule, "forward", forward)
    monkeypatch.setattr(one_step, "LOSSES", {"listwise": record})
    return seen


def test_each_request_sees_its_own_query(
    train: Train, tiny_encoder: str, forward_passes: list[dict[str, torch.Tensor]]
) -> None:
    """Queries of different lengths got one another's embeddings once."""
    queries = ["w1 w2 w3", "w9", None, "w4 w5"]
    query = pl.col("item").cast(pl.Int64).floordiv(10).replace_strict(dict(enumerate(queries)))
    train(tiny_shop.shard(tiny_shop.outcomes(40).with_columns(query=query)).examples)
    encoder = TextEncoder(tiny_encoder, 8)
    asked = [np.zeros(16) if q is None else encoder.embed([q])[0] for q in queries]
    index = tiny_shop.text_of_item()
    for batch in forward_passes:
        # The first candidate is a positive, and its item tells the category.
        for text, found in zip(
            batch["text_index"][:, 0, 0].tolist(), batch["query_text"][:, 0], strict=True
        ):
            category = int(np.flatnonzero(index == text)[0]) // 10
            np.testing.assert_allclose(found.numpy(), asked[category], atol=1e-3)
    assert len(forward_passes) == 5


def test_a_user_with_fewer_requests_is_padded_without_any_gain(
    train: Train, forward_passes: list[dict[str, torch.Tensor]]
) -> None:
    events = tiny_shop.outcomes(12)
    some = sorted(events["user"].unique())[:6]
    fewer = events.filter(~pl.col("user").is_in(some) | (pl.col("ts") < tiny_shop.DAY_0 + 86_400))
    plan = tiny_shop.plan(num_steps=1, sampling_prob=1.0)
    train(tiny_shop.shard(fewer).examples, plan=plan, train={"requests_per_step": 3})
    (batch,) = forward_passes
    num_requests = (batch["gains"].sum(-1) > 0).sum(-1)
    assert set(num_requests.tolist()) == {1, 3}
    padded = batch["gains"][num_requests == 1]
    assert not padded[:, 1:].any() and padded[:, 0].any()


def test_a_step_takes_the_planned_number_of_requests_and_no_more(
    train: Train, forward_passes: list[dict[str, torch.Tensor]]
) -> None:
    train(past(), train={"requests_per_step": 2})
    for batch in forward_passes:
        assert batch["text_index"].shape[1] <= 2
        real = batch["valid"] & (batch["gains"] > 0)
        assert bool(real[:, 0].any(-1).all())


def test_the_shards_of_a_worker_hold_all_its_users(train: Train) -> None:
    first, second = past(seed=1), past(seed=2)
    trained = train(first, second)
    assert trained.num_users == first.num_users + second.num_users > 0


def test_what_rank_0_writes_is_what_the_driver_reads(
    train: Train, tiny_encoder: str, tmp_path: Path
) -> None:
    trained = train(past())
    output.write_output(tmp_path, trained, encoder="as-configured")
    read = output.read_output(tmp_path)
    for name in ("text_before", "text_after"):
        assert np.array_equal(getattr(read, name), getattr(trained, name))
    assert read.head.weights.keys() == trained.head.weights.keys()
    for name, value in trained.head.weights.items():
        assert np.array_equal(read.head.weights[name], value)
    assert read.adapted_modules == (ADAPTED,)
    assert read.adapted_weights.keys() == trained.adapted_weights.keys() == {ADAPTED}
    assert np.array_equal(read.adapted_weights[ADAPTED], trained.adapted_weights[ADAPTED])
    assert sorted(read.adapter) == ["adapter_config.json", "adapter_model.safetensors"]
    written = read.adapter["adapter_config.json"].decode()
    assert "as-configured" in written and tiny_encoder not in written


def test_nothing_that_depends_on_single_users_but_the_weights_leaves_the_worker(
    train: Train, tmp_path: Path
) -> None:
    """Number of users and mean loss are sensitive: the driver must not even get them."""
    output.write_output(tmp_path, train(past()), encoder="as-configured")
    files = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    assert files == [
        "adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "arrays.safetensors", "encoder.safetensors", "head.safetensors", "output.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "output.json").read_text()).keys() == {"adapted_modules"}
    names = {field.name for field in dataclasses.fields(output.TrainOutput)}
    assert not names & {"num_users", "mean_loss"}


@pytest.mark.parametrize(
    "wrong,told",
    [
        pytest.param(lambda loss: loss.mean(), "one number a user", id="a scalar"),
        pytest.param(lambda loss: loss[:, None], "one number a user", id="(U, 1)"),
        pytest.param(
            lambda loss: loss[:, None].expand(-1, 3), "one number a user", id="by candidate"
        ),
        pytest.param(lambda loss: loss[:1], "one number a user", id="of another number of users"),
        pytest.param(lambda loss: loss / loss.mean(), "depends on another's rows", id="of others"),
    ],
)
def test_a_loss_that_is_not_each_users_own_stops_before_the_first_step(
    tiny_encoder: str,
    activations: TokenActivations,
    world: None,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[torch.Tensor], torch.Tensor],
    told: str,
) -> None:
    loss, steps = one_step.LOSSES["listwise"], list[int]()
    step = torch.optim.AdamW.step
    stepped: list[str] = []

    def spy(self: torch.optim.AdamW, closure: Any = None) -> Any:
        stepped.append("stepped")
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    job = tiny_shop.train_job(tiny_encoder)
    arguments: dict[str, Any] = {"num_workers": 1, "on_step": steps.append}
    train_on_shards(job, [past()], activations, **arguments)
    assert len(stepped) == len(steps) == 5
    monkeypatch.setattr(
        one_step, "LOSSES", {"listwise": lambda *args, **labels: wrong(loss(*args, **labels))}
    )
    with pytest.raises(PrivacyError, match=told):
        train_on_shards(job, [past()], activations, **arguments)
    assert len(stepped) == len(steps) == 5


def test_a_first_batch_of_nan_does_not_hide_that_users_are_mixed(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a loss of NaN depends on, its gradients are NaN and add nothing."""
    loss, sums = one_step.LOSSES["listwise"], list[float]()

    def mixing(*args: Any, **labels: Any) -> torch.Tensor:
        losses = loss(*args, **labels)
        sums.append(float(losses.detach().sum()))
        return losses + losses.sum() * (torch.nan if len(sums) < 3 else 1)

    monkeypatch.setattr(one_step, "LOSSES", {"listwise": mixing})
    with pytest.raises(PrivacyError, match="one user's loss depends on another's rows"):
        train(past())
    assert len(sums) == 3
