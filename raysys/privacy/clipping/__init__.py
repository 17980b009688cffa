"""Per-user gradients in one forward and one backward pass, for Opacus to clip and noise.

    engine = PerUserGradients(module)           # PEFT models, our head, plain modules
    with engine.rows(user_of_row, num_users):
        out = module(**batch)
    engine.backward(loss)                       # loss (U,); sets parameter.grad_sample (U, ...)
    optimizer.step()                            # Opacus: clip each user, sum, noise, step

The privacy unit is a user, and whole users are sampled. So a user's rows (candidates, queries,
requests) are summed before the one clip: clipping rows would void the guarantee. The sum is part
of the matrix product that ordinary training runs too, hence it costs next to nothing.

`per_user_linear` is the same for code that computes with weights itself.

Files: `rows` says whose each row is; `functions` are the layers' autograd functions; `layers` puts
them in the place of a module's own; `engine` guards the step; `samples` is what the optimizer gets,
of short inputs `factored`.
"""

from raysys.privacy.clipping.engine import PerUserGradients
from raysys.privacy.clipping.factored import FactoredGradients
from raysys.privacy.clipping.functions import per_user_linear
from raysys.privacy.clipping.rows import UserRows
from raysys.privacy.clipping.samples import (
    add_grad_sample,
    dense,
    require_per_user_gradients,
    set_empty_gradients,
)

__all__ = [
    "FactoredGradients",
    "PerUserGradients",
    "UserRows",
    "add_grad_sample",
    "dense",
    "per_user_linear",
    "require_per_user_gradients",
    "set_empty_gradients",
]
