"""Keeps Ray Tune silent: under privacy nothing about single trials may be told or written.

    silence = Silence()
    with hush():
        Tuner(…, RunConfig(storage_filesystem=silence.filesystem, callbacks=…)).fit()
    silence.forget()

Ray Tune prints how many trials there are whatever its verbosity, writes a folder, a result file and
a TensorBoard log for each of them below its storage path, and another copy on the driver's disk.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.fs
from fsspec.implementations.memory import MemoryFileSystem
from ray.tune.experiment import Trial
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback, TBXLoggerCallback

_MARKER = ".validate_storage_marker"
_LOGGERS = ("ray.tune", "ray.train", "ray.air")


class _DriverMemory(MemoryFileSystem):  # type: ignore[misc]
    """Files of this process. In others they are not there, which only the check of a common storage
    would mind: trials write nothing."""

    protocol = "driver-memory"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        if path.endswith(_MARKER):
            return {"name": path, "size": 0, "type": "file"}
        found: dict[str, Any] = super().info(path, **options)
        return found


class _Mute:
    def log_trial_start(self, trial: Trial) -> None: ...
    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None: ...
    def log_trial_end(self, trial: Trial, failed: bool = False) -> None: ...


class _NoJson(_Mute, JsonLoggerCallback): ...


class _NoCsv(_Mute, CSVLoggerCallback): ...


class _NoTensorBoard(_Mute, TBXLoggerCallback):
    """Remembers where the driver's own copy is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.folder: Path | None = None

    def log_trial_start(self, trial: Trial) -> None:
        assert trial.local_path is not None
        self.folder = Path(trial.local_path).parent.parent


class Silence:
    """In place of Ray Tune's own loggers, which it adds where it finds none of their classes."""

    def __init__(self) -> None:
        self._last = _NoTensorBoard()
        self.callbacks = [_NoJson(), _NoCsv(), self._last]  # type: ignore[no-untyped-call]
        self.filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(_DriverMemory()))

    def forget(self) -> None:
        """Removes what Ray Tune kept for itself, in memory and on the driver's disk."""
        _DriverMemory.store.clear()
        _DriverMemory.pseudo_dirs[:] = [""]
        if self._last.folder is not None:
            shutil.rmtree(self._last.folder, ignore_errors=True)


@contextlib.contextmanager
def hush() -> Iterator[None]:
    """Drops what this process prints and what Ray logs in it."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
