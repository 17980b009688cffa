"""The `torch.distributed` group of a process that trains by itself: a trial, or an audit.

The loop and the engine's optimizer ask for a group, also where nobody else is in it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def group_of_one() -> Iterator[None]:
    """Opens a group of this process alone.

    A process has one group. Where Ray Tune stops a trial and starts another in its process, the
    first one's thread may still be at its last block: it is waited for. A group that somebody else
    has opened is used, and left open.
    """
    with _ONE_AT_A_TIME:
        if torch.distributed.is_initialized():
            yield
            return
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()
