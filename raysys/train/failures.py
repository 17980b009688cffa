"""When workers fail: which failures a new group of workers may get over, and how the rest is told.

    worker raises -> RefuseRetries (in Ray Train's controller) -> fit() raises -> told()

Ray Train restarts a group whatever it failed of. What will fail again is not worth the private
steps that another attempt would use up.
"""

from __future__ import annotations

from typing import Any

from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError

from raysys.errors import LeaseLostError, RaysysError, Terminal, WorkersLostError

_OUR_BUGS = (AssertionError, AttributeError, LookupError, NameError, TypeError, ValueError)


def will_fail_again(error: Exception) -> bool:
    """Returns whether another attempt would meet the same error.

    What a dead worker or a torn connection leaves in the others is a RuntimeError or an OSError.
    """
    return isinstance(error, (Terminal, LeaseLostError, WorkersLostError, *_OUR_BUGS))


class RefuseRetries(UserCallback):
    """Ends a run whose workers met an error that would come again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises the error, which the controller does not retry."""
        for _, error in sorted(worker_exceptions.items()):
            if will_fail_again(error):
                raise error


def told(error: TrainingFailedError, max_failures: int) -> Exception:
    """Returns what `fit()` failed of, as the user should be told."""
    if isinstance(error, ControllerError):
        return error.controller_failure
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for found in failures.values():
        if isinstance(found, RaysysError):
            return found
    ranks = ", ".join(str(rank) for rank in sorted(failures)) or "unknown"
    kinds = ", ".join(sorted({type(found).__name__ for found in failures.values()}))
    return WorkersLostError(
        f"train workers failed more than train.max_failures ({max_failures}) times, last those of "
        f"rank {ranks} ({kinds}); see their logs, then submit again"
    )
