"""An end at any chosen change of a root: kill -9, in this process, or a disk that is full.

    kill_before(change, action)                   dies before this change of the disk
    kill_at_request(number, action, acted=...)    dies at this request that changes S3
    fill_disk_before(change, action)              no space left from this change on

Each returns how many changes were made, so that a test can go through all of them.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from botocore.httpsession import URLLib3Session


class Killed(BaseException):
    """Stands for kill -9: no handler of ours catches it, and nothing changes the root after it."""


class _Watch:
    """Counts the changes that the thread that made it makes, and stops the chosen one.

    `stop` is called before that change and before every later one.
    """

    def __init__(self, first: int | None, stop: Callable[[str], None]) -> None:
        self.num_changes = 0
        self.reached = False
        self._first = first
        self._stop = stop
        self._thread = threading.get_ident()

    def is_mine(self) -> bool:
        return threading.get_ident() == self._thread

    def change(self, event: str) -> None:
        if not self.is_mine():
            return
        self.reached = self.reached or self.num_changes == self._first
        if self.reached:
            self._stop(event)
        self.num_changes += 1


_watch: _Watch | None = None
_is_hooked = False
_CHANGES = {"os.link", "os.symlink", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
_DELETIONS = {"os.remove", "os.rmdir"}


def _on_audit(event: str, args: tuple[Any, ...]) -> None:
    if _watch is None:
        return
    opens_to_write = event == "open" and args[2] & os.O_ACCMODE != os.O_RDONLY
    if event in _CHANGES or opens_to_write:
        _watch.change(event)


def run_watched(
    first: int | None, stop: Callable[[str], None], action: Callable[[], object]
) -> int:
    """Calls `stop` before change number `first` and each later one; returns how many were made.

    Python tells its audit hooks of each file that it is about to create, link, rename or delete,
    so no change of the disk is missed, whichever code makes it.
    """
    global _watch, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_on_audit)
        _is_hooked = True
    watch = _watch = _Watch(first, stop)
    try:
        action()
    except Killed:
        assert watch.reached
    finally:
        _watch = None
    return watch.num_changes


def _die(event: str) -> None:
    raise Killed


def kill_before(change: int | None, action: Callable[[], object]) -> int:
    """Runs `action`, which dies before it makes this change; returns how many it made."""
    return run_watched(change, _die, action)


def fill_disk_before(change: int | None, action: Callable[[], object]) -> int:
    """Runs `action`, which finds the disk full at change number `change` and after it.

    Files can still be deleted. Returns how many changes were made, or raises what `action` raises.
    """

    def refuse(event: str) -> None:
        if event not in _DELETIONS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return run_watched(change, refuse, action)


def kill_at_request(number: int | None, action: Callable[[], object], *, acted: bool) -> int:
    """Runs `action`, which dies as it sends the S3 request of this number that changes something.

    Args:
      acted: Whether the request still reaches the store, and only its answer does not come back.

    Returns:
      How many such requests were sent.
    """
    watch = _Watch(number, _die)
    send = URLLib3Session.send

    def send_or_die(session: URLLib3Session, request: Any) -> Any:
        if watch.reached and watch.is_mine():
            raise Killed
        if request.method not in ("PUT", "POST", "DELETE"):
            return send(session, request)
        if acted and watch.num_changes == number and watch.is_mine():
            send(session, request)
        watch.change(request.method)
        return send(session, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(URLLib3Session, "send", send_or_die)
        try:
            action()
        except Killed:
            assert watch.reached
    return watch.num_changes
