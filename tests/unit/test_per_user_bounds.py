"""One user moves a step by the clip norm at most, or there is an error: no third way."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from raysys.errors import PrivacyError
from raysys.privacy.clipping import PerUserGradients
from raysys.privacy.optimizer import PerUserOptimizer
from tests.per_user import (
    USER_OF_ROW,
    USERS,
    Clip,
    Scorer,
    by_engine,
    listwise,
    make_batch,
    make_scorer,
    samples,
)

CLIP = Clip(norm=0.01)
"""Below every user's gradient, so that each user is clipped and the bound is tight."""
OUTLIER = torch.tensor([1e4, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
LIMIT = CLIP.norm * (1 + 1e-6)

Step = Callable[[Scorer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def clip_users(
    module: Scorer, ids: torch.Tensor, user_of_row: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    by_engine(module, ids, user_of_row, USERS, scale)
    return CLIP.total(module)


def clip_rows(
    module: Scorer, ids: torch.Tensor, user_of_row: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The trap: every row is taken for a user, while whole users are sampled."""
    with PerUserGradients(module) as engine:
        with engine.rows(None, len(ids)):
            scores = module(ids)
        engine.backward(scale[user_of_row] * scores.exp())
    return CLIP.total(module)


def clip_nothing(
    module: Scorer, ids: torch.Tensor, user_of_row: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    trained = [p for p in module.parameters() if p.requires_grad]
    loss = (listwise(module(ids), user_of_row, USERS) * scale).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


def moved_by(step: Step, module: Scorer, user: int) -> float:
    """How far the step moves if this user was never there."""
    ids, kept = make_batch(), user != USER_OF_ROW
    with_all = step(module, ids, USER_OF_ROW, OUTLIER)
    return float((with_all - step(module, ids[kept], USER_OF_ROW[kept], OUTLIER)).norm())


@pytest.mark.parametrize("adapter", ["LoRA", "FFA-LoRA", "AdaLoRA", "LayerNorm", "bias"])
def test_a_user_ten_thousand_times_as_loud_moves_a_step_by_the_clip_norm(adapter: str) -> None:
    module = make_scorer(adapter, torch.float64)
    total = clip_users(module, make_batch(), USER_OF_ROW, OUTLIER)
    assert float(total.norm()) <= USERS * CLIP.norm
    for user in range(USERS):
        assert 0.9 * CLIP.norm < moved_by(clip_users, module, user) <= LIMIT


@pytest.mark.parametrize(
    ("step", "factor"), [(clip_rows, 1.5), (clip_nothing, 1e4)], ids=["rows", "nothing"]
)
def test_clipping_rows_or_nothing_breaks_that_bound(step: Step, factor: float) -> None:
    module = make_scorer("LoRA", torch.float64)
    assert moved_by(step, module, 0) > factor * CLIP.norm


def fed(module: torch.nn.Module, *args: torch.Tensor) -> tuple[PerUserGradients, torch.Tensor]:
    """An engine whose first axis is the user, and the module's output."""
    engine = PerUserGradients(module)
    with engine.rows(None, len(args[0])):
        out = module(*args)
    return engine, out


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda scores: scores[:, None], id="[B, 1]"),
        pytest.param(lambda scores: scores.sum(), id="scalar"),
        pytest.param(lambda scores: scores.mean(), id="criterion that averages"),
        pytest.param(
            lambda scores: cross_entropy(scores[None], torch.tensor([0])), id="listwise over users"
        ),
        pytest.param(lambda scores: scores.repeat_interleave(2), id="by candidate"),
        pytest.param(lambda scores: scores[:-1], id="a user too few"),
    ],
)
def test_a_loss_of_another_shape_is_refused_before_anything_is_computed(
    loss: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    module = make_scorer("LoRA")
    engine, scores = fed(module, make_batch(4))
    with pytest.raises(PrivacyError, match=r"loss: expected one number a user, shape \(4,\)"):
        engine.backward(loss(scores))
    assert not any(hasattr(p, "grad_sample") or p.grad is not None for p in module.parameters())
    engine.backward(scores)


class _InBatch(torch.nn.Module):
    """Each user's own item against those of all users of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.item = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x @ self.item(x).T
        return cross_entropy(scores, torch.arange(len(x)), reduction="none")


def test_a_loss_that_depends_on_other_users_is_found_before_the_backward_pass() -> None:
    engine, losses = fed(_InBatch(), torch.randn(5, 4))
    with pytest.raises(PrivacyError, match="one user's loss depends on another's rows"):
        engine.require_independent_users(losses)
    module, ids = make_scorer("LoRA"), make_batch(5)
    engine, scores = fed(module, ids)
    engine.require_independent_users(scores)
    engine.backward(scores)
    found = samples(module)
    engine.detach()
    for user in range(5):
        (expected,) = torch.autograd.grad(module(ids[user : user + 1]).sum(), module.head.weight)
        torch.testing.assert_close(found["head.weight"][user], expected)


def test_whichever_other_user_a_loss_depends_on_it_is_found() -> None:
    layer = torch.nn.Linear(4, 1)
    for num_users in (2, 4, 7):
        for user, other in itertools.permutations(range(num_users), 2):
            engine, scores = fed(layer, torch.randn(num_users, 4))
            losses = scores[:, 0].clone()
            losses[user] = losses[user] + 1e-3 * scores[other, 0]
            with pytest.raises(PrivacyError, match="one user's loss depends on another's rows"):
                engine.require_independent_users(losses)
            engine.detach()


def test_losses_of_many_users_by_themselves_pass_one_of_nan_included() -> None:
    layer, x = torch.nn.Linear(4, 1), torch.randn(40, 4)
    x[3] = torch.nan
    engine, scores = fed(layer, x)
    losses = scores[:, 0].square()
    engine.require_independent_users(losses)
    engine.backward(losses)
    found = layer.weight.grad_sample  # type: ignore[attr-defined]
    assert found[3].isnan().all() and found[:3].abs().sum((1, 2)).gt(0).all()


def test_a_batch_norm_may_not_mix_users() -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4, affine=False), torch.nn.Linear(4, 1)
    )
    engine = PerUserGradients(module)
    with pytest.raises(PrivacyError, match="BatchNorm in training mode"), engine.rows(None, 3):
        pass
    module.eval()
    with engine.rows(None, 3):
        out = module(torch.randn(3, 4))
    engine.require_independent_users(out[:, 0])


class _Unknown(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 4)
        self.conv = torch.nn.Conv1d(1, 1, 1)
        self.attention = torch.nn.MultiheadAttention(4, 2)
        self.temperature = torch.nn.Parameter(torch.ones(()))
        self.head = torch.nn.Linear(4, 5)


def test_every_trainable_parameter_that_is_not_known_is_named_before_the_first_step() -> None:
    module = _Unknown()
    with pytest.raises(PrivacyError) as error:
        PerUserGradients(module)
    named = str(error.value).split(" for ")[1].split(";")[0].split(", ")
    assert set(named) == {n for n, _ in module.named_parameters() if not n.startswith("head.")}
    module.requires_grad_(False)
    module.head.requires_grad_(True)
    PerUserGradients(module)


def test_a_weight_shared_with_a_layer_that_is_not_known_is_refused() -> None:
    module = _Unknown().requires_grad_(False)
    module.head.weight = module.table.weight
    module.head.requires_grad_(True)
    with pytest.raises(PrivacyError, match=r"known for table.weight;"):
        PerUserGradients(module)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        pytest.param({"use_dora": True}, "lora_magnitude_vector", id="DoRA"),
        pytest.param({"target_modules": ["word_embeddings"]}, "lora_embedding_A", id="embeddings"),
        pytest.param({"trainable_token_indices": [1, 2]}, "token_adapter", id="tokens"),
    ],
)
def test_peft_adapters_that_are_not_known_are_refused_by_name(
    changes: dict[str, object], named: str
) -> None:
    base = make_scorer("nothing but the head").encoder
    options = {"r": 2, "target_modules": ["query"], **changes}
    model = get_peft_model(base, LoraConfig(**options))  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match=named):
        PerUserGradients(model)


class _Beside(torch.nn.Module):
    """Uses its layer's weight in another way than by the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) @ self.layer.weight).sum(1)


def test_a_parameter_that_also_gets_an_ordinary_gradient_is_refused_and_nothing_is_left() -> None:
    module = _Beside()
    engine, losses = fed(module, torch.randn(3, 4))
    with pytest.raises(PrivacyError, match=r"layer.weight: has a gradient that no clip bounds"):
        engine.backward(losses)
    for parameter in module.parameters():
        assert parameter.grad is None and parameter.grad_sample is None  # type: ignore[attr-defined]


def test_without_the_engine_the_same_parameter_is_not_bounded() -> None:
    """Why it is refused: its ordinary gradient passes the clip."""
    torch.manual_seed(0)
    module, x = _Beside().double(), torch.randn(3, 4, dtype=torch.float64)
    x[0] *= 1e4
    (everyone,) = torch.autograd.grad(module(x).sum(), module.layer.weight)
    (others,) = torch.autograd.grad(module(x[1:]).sum(), module.layer.weight)
    assert float((everyone - others).norm()) > 1e4 * CLIP.norm


def test_an_unused_parameter_has_a_gradient_of_zero_for_each_user() -> None:
    module = torch.nn.ModuleDict({n: torch.nn.Linear(4, 1) for n in ("used", "unused")})
    with PerUserGradients(module) as engine:
        with engine.rows(None, 3):
            out = module["used"](torch.randn(3, 4))
        engine.backward(out[:, 0])
    found = samples(module)
    assert {n: bool(g.any()) for n, g in found.items()} == {
        "used.weight": True, "used.bias": True, "unused.weight": False, "unused.bias": False,
    }  # fmt: skip
    assert found["unused.weight"].shape == (3, 1, 4)


def test_parameters_thawed_after_the_engine_was_made_are_refused() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    module[0].requires_grad_(False)
    engine, out = fed(module, torch.randn(3, 4))
    module[0].requires_grad_(True)
    with pytest.raises(PrivacyError, match="not those that the engine was made for"):
        engine.backward(out[:, 0])


@pytest.mark.parametrize("scale", [1.0, 1e4], ids="loudness {:g}".format)
def test_a_four_dimensional_input_is_bounded(scale: float) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    module.double()
    x = torch.randn(5, 3, 7, 4, dtype=torch.float64)  # users, requests, candidates, features
    x[0] *= scale
    totals = []
    for rows in (x, x[1:]):
        engine, out = fed(module, rows)
        engine.backward(out.square().sum((1, 2, 3)))
        engine.detach()
        totals.append(CLIP.total(module))
    assert float(totals[0].norm()) <= 5 * CLIP.norm
    assert float((totals[0] - totals[1]).norm()) <= LIMIT


def test_an_encoder_used_for_query_and_item_is_bounded_by_user() -> None:
    module = make_scorer("LoRA", torch.float64)
    queries, items = make_batch(USERS, seed=5), make_batch(seed=6)

    def total(kept: torch.Tensor) -> torch.Tensor:
        with PerUserGradients(module) as engine:
            with engine.rows(None, USERS):
                query = module(queries)
            with engine.rows(USER_OF_ROW[kept], USERS):
                item = module(items[kept])
            users = USER_OF_ROW[kept]
            by_row = OUTLIER[users] * (query[users] * item).exp()
            loss = torch.zeros(USERS, dtype=torch.float64).index_add(0, users, by_row)
            engine.backward(loss)
        return CLIP.total(module)

    everyone = total(USER_OF_ROW >= 0)
    assert float(everyone.norm()) <= USERS * CLIP.norm
    for user in range(USERS):
        assert float((everyone - total(user != USER_OF_ROW)).norm()) <= LIMIT


def test_blocks_of_other_users_before_one_backward_pass_are_refused() -> None:
    engine = PerUserGradients(torch.nn.Linear(4, 1))
    with engine.rows(None, 3):
        pass
    with (
        pytest.raises(PrivacyError, match="num_users: 4, but 3 in an earlier block"),
        engine.rows(None, 4),
    ):
        pass
    with (
        pytest.raises(PrivacyError, match=r"engine.rows is nested"),
        engine.rows(None, 3),
        engine.rows(None, 3),
    ):
        pass


@pytest.mark.parametrize(
    ("user_of_row", "message"),
    [
        pytest.param(torch.tensor([0, 3]), r"expected users in \[0, 3\), found 0 to 3", id="large"),
        pytest.param(torch.tensor([-1, 0]), r"found -1 to 0", id="negative"),
        pytest.param(torch.tensor([0.0, 1.0]), "expected a vector of int64", id="float"),
        pytest.param(torch.zeros(2, 2, dtype=torch.int64), "expected a vector", id="2-D"),
        pytest.param(torch.zeros(0, dtype=torch.int64), "expected at least one row", id="none"),
    ],
)
def test_users_that_cannot_be_are_refused(user_of_row: torch.Tensor, message: str) -> None:
    engine = PerUserGradients(torch.nn.Linear(4, 1))
    with pytest.raises(PrivacyError, match=message), engine.rows(user_of_row, 3):
        pass


def test_inputs_whose_first_axis_is_not_the_row_are_refused() -> None:
    module = torch.nn.Linear(4, 1)
    engine = PerUserGradients(module)
    with engine.rows(torch.tensor([0, 1, 1]), 2):
        for shape in ((4,), (2, 4), (7, 3, 4)):
            with pytest.raises(PrivacyError, match="expected 3 rows first"):
                module(torch.randn(shape))


def test_a_step_whose_forward_pass_failed_is_forgotten() -> None:
    module = torch.nn.Linear(4, 1)
    engine = PerUserGradients(module)
    with pytest.raises(PrivacyError, match="expected 3 rows first"), engine.rows(None, 3):
        module(torch.randn(2, 4))
    with engine.rows(None, 2):
        out = module(torch.randn(2, 4))
    engine.backward(out[:, 0])
    assert samples(module)["weight"].shape == (2, 1, 4)


def test_a_forward_or_backward_pass_beside_the_engine_is_refused() -> None:
    module = make_scorer("LoRA")
    engine = PerUserGradients(module)
    with pytest.raises(PrivacyError, match="ran without users"):
        module(make_batch())
    with engine.rows(None, 9):
        scores = module(make_batch())
    with pytest.raises(PrivacyError, match=r"call engine.backward"):
        scores.sum().backward()
    with pytest.raises(PrivacyError, match="already"):
        PerUserGradients(module)


def test_gradients_of_an_earlier_batch_are_refused_not_added() -> None:
    module = make_scorer("LoRA")
    engine, scores = fed(module, make_batch(3))
    engine.backward(scores)
    first = samples(module)
    with engine.rows(None, 3):
        scores = module(make_batch(3, seed=7))
    with pytest.raises(PrivacyError, match="has a gradient of an earlier batch; call zero_grad"):
        engine.backward(scores)
    assert all(value is first[name] for name, value in samples(module).items())


def test_microbatches_of_users_give_the_same_sum() -> None:
    module, ids = make_scorer("LoRA", torch.float64), make_batch()
    whole = clip_users(module, ids, USER_OF_ROW, OUTLIER)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = PerUserOptimizer(
        torch.optim.SGD(trained, lr=0.0), noise_multiplier=0.0, max_grad_norm=CLIP.norm,
        expected_batch_size=1,
    )  # fmt: skip
    parts = ([0, 1], [2, 3], [4])
    with PerUserGradients(module) as engine:
        for i, users in enumerate(parts):
            optimizer.zero_grad(set_to_none=True)
            kept = torch.isin(USER_OF_ROW, torch.tensor(users))
            own = USER_OF_ROW[kept] - users[0]
            with engine.rows(own, len(users)):
                scores = module(ids[kept])
            engine.backward(listwise(scores, own, len(users)) * OUTLIER[users])
            optimizer.signal_skip_step(do_skip=i < len(parts) - 1)
            optimizer.step()
            if i == 0:
                first = torch.cat([p.summed_grad.flatten() for p in trained])  # type: ignore[attr-defined]
    found = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-12)
    assert float((first - whole).norm()) > CLIP.norm, "one part alone is not the sum"


def test_a_copied_module_is_its_own() -> None:
    """A copy would still run the engine's forward, and put gradients on the original's weights."""
    module = make_scorer("LoRA")
    with (
        PerUserGradients(module),
        pytest.raises(PrivacyError, match="detach the engine before"),
    ):
        copy.deepcopy(module)
    copy.deepcopy(module)
