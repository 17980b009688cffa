"""Which steps run next: in blocks, and under privacy each permitted in the ledger before it runs.

    rank 0: NextSteps(done) -> StepsPermitted in the ledger -> all ranks run the block -> checkpoint

Write-ahead: a step that may have run is charged, whatever became of it. A block is taken from the
ledger once, by whoever appends its record, so a group of workers that was restarted goes on behind
all steps that its predecessor was permitted. What it lost is neither run again nor replaced: the
noise of those steps may have been seen. So an update runs as many steps as it reserved at the most,
and each of them once.
"""

from __future__ import annotations

from collections.abc import Callable

from raysys.errors import LeaseLostError
from raysys.ledger.log import Log
from raysys.ledger.records import StepsPermitted
from raysys.ledger.state import State
from raysys.storage import Root

NextSteps = Callable[[int], range]
"""Takes the number of steps after which this process stands, returns the numbers of those to run
now; none when all are used up. Rank 0 alone asks."""


def next_block(after: int, *, num_steps: int, size: int) -> range:
    """Returns the block that follows the first `after` of `num_steps` steps.

    >>> next_block(10, num_steps=15, size=10), next_block(15, num_steps=15, size=10)
    (range(10, 15), range(15, 15))
    """
    return range(min(after, num_steps), min(after + size, num_steps))


def uncharged(*, num_steps: int, size: int) -> NextSteps:
    """Returns the blocks of a run that charges nothing: it goes on where its weights stand."""
    return lambda done: next_block(done, num_steps=num_steps, size=size)


def charged(root: Root, update_id: str, *, num_steps: int, size: int) -> NextSteps:
    """Returns the blocks of a private update: each goes to the ledger first, and to one asker only.

    Where the asker's weights stand does not matter: what was permitted counts as run.

    Raises, when asked:
      LeaseLostError: The update has ended. Whoever asks was given up for dead.
      StorageUnavailableError: It is unknown whether the block was permitted; then it is used up.
    """
    log = Log(root)

    def take(done: int) -> range:
        block = range(0)

        def decide(state: State) -> StepsPermitted | None:
            nonlocal block
            block = next_block(num_permitted(state, update_id), num_steps=num_steps, size=size)
            return StepsPermitted(update_id=update_id, num_steps=block.stop) if block else None

        log.transact(decide)
        return block

    return take


def num_permitted(state: State, update_id: str) -> int:
    """Returns how many steps of the active update may have run.

    Raises:
      LeaseLostError: It is not the active one.
    """
    if state.active is None or state.active.update_id != update_id:
        raise LeaseLostError(
            f"update {update_id} has ended, so no more of its steps may run; submit again"
        )
    return state.active.permitted_steps
