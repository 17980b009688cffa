"""The engine: a module's trainable layers replaced, and a step that cannot escape the clip.

    PerUserGradients(module) -> rows(…) -> forward -> backward(loss) -> parameter.grad_sample

Everything that would make a silent hole is an error: a trainable parameter in a layer that the
engine does not know, a loss that is not one number a user, a forward pass without users, a backward
pass beside the engine's, an ordinary gradient, gradients left over from an earlier batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from raysys.errors import PrivacyError
from raysys.privacy.clipping.layers import Forward, known_parameters, replacement
from raysys.privacy.clipping.rows import UserRows
from raysys.privacy.clipping.samples import dense, require_per_user_gradients

_NUM_POWERS = 8


class PerUserGradients:
    """Per-user gradients of a module's trainable parameters, in one backward pass.

    Known are Linear (weight and bias, each trained or not), LayerNorm, LoRA on Linear of any rank,
    scaling and dropout, with A frozen (FFA-LoRA) or not, and AdaLoRA on Linear. A parameter that
    several layers share, or one layer used twice, gets the sum. What the loss does not depend on
    gets zeros. Gradient checkpointing works.

    Evaluation under `no_grad` needs no users and runs the module's own forward.

    `keep_factors=True` makes steps of short texts and large ranks cheaper; it needs the optimizers
    of `raysys.privacy.optimizer`, where Opacus' own refuse what is then in `grad_sample`.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> with PerUserGradients(layer) as engine:
    ...     with engine.rows(torch.tensor([0, 0, 1]), num_users=2):
    ...         out = layer(torch.tensor([[1.0, 2.0], [10.0, 20.0], [5.0, 6.0]]))
    ...     engine.backward(torch.stack([out[:2].sum(), out[2].sum()]))
    >>> layer.weight.grad_sample
    tensor([[[11., 22.]],
    <BLANKLINE>
            [[ 5.,  6.]]])

    Raises:
      PrivacyError: Trainable parameters of layers that are not known; the message names them all.
    """

    def __init__(self, module: torch.nn.Module, *, keep_factors: bool = False) -> None:
        _require_known(module)
        self._parameters = list(module.named_parameters())
        self._trainable = [(name, p) for name, p in self._parameters if p.requires_grad]
        self._mixing = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self._keep_factors = keep_factors
        self._replaced: list[torch.nn.Module] = []
        self._current: UserRows | None = None
        self._fed: list[UserRows] = []
        self._in_backward = False
        for layer in module.modules():
            forward = replacement(layer, self._current_rows)
            if forward is not None:
                self._replace(layer, forward)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Gives the module its own forward passes back."""
        for layer in self._replaced:
            del layer.forward
        self._replaced = []

    @contextlib.contextmanager
    def rows(self, user_of_row: torch.Tensor | None, num_users: int) -> Iterator[None]:
        """Says whose the rows are that the module is fed inside the block.

        Several blocks may precede one backward pass: an encoder that embeds queries and then items.

        Args:
          user_of_row: (N,) int64, the user of each row of the first axis, in any order. None: the
            first axis is the user.
          num_users: U. A user without a row gets a gradient of zero.

        Raises:
          PrivacyError: Users are out of range, or not those of an earlier block of this step, the
            blocks are nested, or a BatchNorm would mix users.
        """
        self._require_may_feed(num_users)
        options: Any = {
            "keep_factors": self._keep_factors, "before_backward": self._require_own_backward,
        }  # fmt: skip
        self._current = (
            UserRows(num_users=num_users, num_rows=num_users, **options)
            if user_of_row is None
            else UserRows.of(user_of_row, num_users, **options)
        )
        try:
            yield
            self._fed.append(self._current)
        except BaseException:
            self._fed = []  # whoever catches it begins a new step
            raise
        finally:
            self._current = None

    def backward(self, loss: torch.Tensor) -> None:
        """Runs the one backward pass, which sets `grad_sample` (U, ...) on all that is trained.

        Args:
          loss: (U,), each user's own loss, a function of that user's rows alone.

        Raises:
          PrivacyError: The loss has another shape, something else than a per-user gradient was
            found before or after, or the set of trained parameters has changed. No gradient of any
            kind is left behind.
        """
        self._require_may_run(loss)
        self._in_backward = True
        try:
            loss.sum().backward()  # type: ignore[no-untyped-call]
            for _, parameter in self._trainable:
                if getattr(parameter, "grad_sample", None) is None:
                    parameter.grad_sample = parameter.new_zeros((len(loss), *parameter.shape))  # type: ignore[attr-defined]
            require_per_user_gradients(self._trainable, len(loss))
        except BaseException:
            self._clear()
            raise
        finally:
            self._in_backward = False
            self._fed = []

    def require_independent_users(self, loss: torch.Tensor) -> None:
        """Checks by two more backward passes that no user's loss depends on another user's rows.

        Negatives from the batch, or any normalisation over it, let one user move the gradients
        of all others, which no clip bounds. Each user's gradient must be the same number of times
        as large as that user's loss is counted, however often others' are: by powers of two, which
        change no digit. The check is worth its cost in the first step; it leaves no gradients, and
        the graph for `backward`. Of one user it says nothing.

        Raises:
          PrivacyError: The loss of a user moves another user's gradient.
        """
        self._require_may_run(loss)
        self._in_backward = True
        generator = torch.Generator()  # its own: the check must not move what training draws
        generator.seed()
        # Of two users always two powers.
        times = 2.0 ** (torch.randperm(len(loss), generator=generator) % _NUM_POWERS)
        try:
            once = self._gradients(loss, torch.ones_like(times))
            for name, found in self._gradients(loss, times).items():
                if not _is_multiple(found, once[name], times):
                    raise PrivacyError(
                        f"{name}: one user's loss depends on another's rows, which no clip bounds; "
                        "compute each user's loss from that user's rows alone"
                    )
        finally:
            self._clear()
            self._in_backward = False

    def _gradients(self, loss: torch.Tensor, times: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns per-user gradients (U, ...) by name, each user's loss counted `times` (U,)."""
        self._clear()
        (loss * times.to(loss)).sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        samples = [(name, getattr(p, "grad_sample", None)) for name, p in self._trainable]
        return {name: dense(sample).clone() for name, sample in samples if sample is not None}

    def _replace(self, layer: torch.nn.Module, forward: Forward) -> None:
        layer.forward = _PerUserForward(forward, layer.forward)
        self._replaced.append(layer)

    def _current_rows(self) -> UserRows:
        if self._current is not None:
            return self._current
        if self._in_backward and len({id(rows) for rows in self._fed}) == 1:
            return self._fed[0]  # gradient checkpointing computes the block again
        if self._in_backward:
            raise PrivacyError(
                "gradient checkpointing with several blocks of rows before one backward pass: "
                "whose rows are computed again is unknown; feed all rows in one block"
            )
        raise PrivacyError("a trainable layer ran without users; feed it inside engine.rows(…)")

    def _require_own_backward(self) -> None:
        if not self._in_backward:
            raise PrivacyError(
                "a backward pass beside the engine's, which checks nothing; call engine.backward"
            )

    def _require_may_feed(self, num_users: int) -> None:
        if self._current is not None:
            raise PrivacyError("engine.rows is nested; leave one block before the next")
        if num_users < 1:
            raise PrivacyError(
                f"num_users: expected at least 1, found {num_users}; an empty step takes "
                "set_empty_gradients"
            )
        if self._fed and self._fed[0].num_users != num_users:
            raise PrivacyError(
                f"num_users: {num_users}, but {self._fed[0].num_users} in an earlier block before "
                "the same backward pass; run that step's backward, or make the blocks one step's"
            )
        if any(layer.training for layer in self._mixing):
            raise PrivacyError(
                "a BatchNorm in training mode mixes users, which no clip bounds; put it in eval "
                "mode"
            )

    def _require_may_run(self, loss: torch.Tensor) -> None:
        if self._current is not None or not self._fed:
            raise PrivacyError("engine.backward: expected it after a block of engine.rows")
        num_users = self._fed[0].num_users
        if tuple(loss.shape) != (num_users,):
            raise PrivacyError(
                f"loss: expected one number a user, shape {(num_users,)}, found "
                f"{tuple(loss.shape)}; sum each user's own terms, and nothing over users"
            )
        now = [(name, p) for name, p in self._parameters if p.requires_grad]
        if [name for name, _ in now] != [name for name, _ in self._trainable]:
            raise PrivacyError(
                "the trained parameters are not those that the engine was made for; make a new one"
            )
        for name, parameter in self._trainable:
            if parameter.grad is not None or getattr(parameter, "grad_sample", None) is not None:
                raise PrivacyError(
                    f"{name}: has a gradient of an earlier batch; call zero_grad(set_to_none=True) "
                    "of the private optimizer"
                )

    def _clear(self) -> None:
        for _, parameter in self._trainable:
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]


class _PerUserForward:
    """A layer's forward pass: per user while gradients are recorded, its own otherwise."""

    def __init__(self, forward: Forward, own: Forward) -> None:
        self._forward, self._own = forward, own

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (self._forward if torch.is_grad_enabled() else self._own)(*args, **kwargs)

    def __deepcopy__(self, memo: object) -> Self:
        raise PrivacyError(
            "a copy of this module would compute with the original's weights; detach the engine "
            "before copying"
        )


def _is_multiple(found: torch.Tensor, once: torch.Tensor, times: torch.Tensor) -> bool:
    """Returns whether each user's gradient is that many `times` (U,) the one counted once."""
    expected = (once * times.to(once).view(-1, *[1] * (once.dim() - 1))).flatten(1)
    # Sums on a GPU may add in another order each time.
    tolerance = 1e-6 if once.device.type == "cpu" else 1e-3
    difference = (found.flatten(1) - expected).norm(dim=1)
    # A user of NaN is not another user's doing.
    small = difference <= tolerance * expected.norm(dim=1) + 1e-30
    return bool((small | difference.isnan()).all())


def _require_known(module: torch.nn.Module) -> None:
    known: set[str] = set()
    for name, layer in module.named_modules():
        if "forward" in layer.__dict__:
            raise PrivacyError(
                f"{name or 'the module'}: its forward was replaced already; detach the other engine"
            )
        prefix = f"{name}." if name else ""
        known.update(prefix + below for below in known_parameters(layer))
    unknown = [
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and name not in known
    ]
    if unknown:
        raise PrivacyError(
            f"no per-user gradients are known for {', '.join(unknown)}; freeze them, or train "
            "Linear, LayerNorm, LoRA and AdaLoRA layers only"
        )
