"""Training examples as arrays: what ingest writes for each shard, and a train worker maps.

    ingest.examples -> ExampleSet.to_bytes() -> staging/UPDATE/examples/ -> map_examples() -> train

An uncompressed Arrow IPC file of one batch: its columns lie there as they do in memory. So a worker
draws users at random from a shard that it maps, and reads the pages of those users only.

Shape suffixes: E = examples, K = candidates (padded with -1), F = features, A = history items that
stand for the user's taste (padded with -1).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raysys.ingest.features import NUM_FEATURES, IndexArray
from raysys.storage import Root

NUM_ATTENDED = 32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExampleSet:
    """Examples sorted by user, as arrays."""

    user: IndexArray
    """(E,) 0, 1, … within the shard, ascending: who the users are does not leave ingest."""
    candidates: IndexArray
    """(E, K) item indexes."""
    gains: NDArray[np.float32]
    """(E, K)."""
    weight: NDArray[np.float32]
    """(E, K) importance of each candidate in the loss; 0 for padding."""
    log_q: NDArray[np.float32]
    """(E, K) log of the probability with which a candidate that gains nothing got here."""
    position: IndexArray
    """(E, K) place in the answer that was shown, from 1; 0 where there was none."""
    features: NDArray[np.float32]
    """(E, K, F)."""
    attended: IndexArray
    """(E, A) item indexes."""
    attention: NDArray[np.float32]
    """(E, A)."""
    queries: Sequence[str]
    """(E,) empty where the request had none."""

    @classmethod
    def empty(cls, num: int, width: int) -> ExampleSet:
        """Returns `num` examples of nothing but padding, to be filled."""
        return cls(
            user=np.zeros(num, np.int32),
            candidates=np.full((num, width), -1, np.int32),
            gains=np.zeros((num, width), np.float32),
            weight=np.zeros((num, width), np.float32),
            log_q=np.zeros((num, width), np.float32),
            position=np.zeros((num, width), np.int32),
            features=np.zeros((num, width, NUM_FEATURES), np.float32),
            attended=np.full((num, NUM_ATTENDED), -1, np.int32),
            attention=np.zeros((num, NUM_ATTENDED), np.float32),
            queries=[""] * num,
        )

    @property
    def num_users(self) -> int:
        """Distinct users."""
        return int(self.user[-1]) + 1 if len(self.user) else 0

    def to_bytes(self) -> bytes:
        """Returns an Arrow IPC file."""
        columns: dict[str, pa.Array] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "queries":
                columns[field.name] = pa.array(value, pa.string())
            elif value.ndim == 1:
                columns[field.name] = pa.array(value)
            else:
                width = int(np.prod(value.shape[1:]))
                columns[field.name] = pa.FixedSizeListArray.from_arrays(value.ravel(), width)
        table = pa.table(columns)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    @classmethod
    def from_bytes(cls, data: bytes) -> ExampleSet:
        """Reads what `to_bytes` wrote."""
        return cls._of(pa.BufferReader(data))

    @classmethod
    def map(cls, path: Path) -> ExampleSet:
        """Maps a file of what `to_bytes` wrote: arrays are read-only, and read when they are used.

        The file may be deleted at once; the map, and the space on disk, last as long as the arrays.
        """
        return cls._of(pa.memory_map(str(path)))

    @classmethod
    def _of(cls, source: pa.NativeFile) -> ExampleSet:
        table = pa.ipc.open_file(source).read_all()
        num = table.num_rows

        def array(name: str, *shape: int) -> Any:
            column = table[name].chunk(0) if num else pa.array([], table.schema.field(name).type)
            flat = column.flatten() if shape else column
            return flat.to_numpy(zero_copy_only=True).reshape(num, *shape)

        width = table.schema.field("candidates").type.list_size
        return cls(
            user=array("user"),
            queries=_Strings(table["queries"]),
            features=array("features", width, NUM_FEATURES),
            attended=array("attended", NUM_ATTENDED),
            attention=array("attention", NUM_ATTENDED),
            **{
                name: array(name, width)
                for name in ("candidates", "gains", "weight", "log_q", "position")
            },
        )


def map_examples(root: Root, path: str) -> ExampleSet:
    """Maps a shard of a root.

    On a local root that is the file in place; else a copy on this machine, in the folder of
    temporary files, which nobody else sees and which is gone with the process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return ExampleSet.map(root.local_file(path, Path(scratch)))


class _Strings(Sequence[str]):
    """An Arrow column whose strings are made when they are asked for."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return list(self._column[index].to_pylist())
        return str(self._column[int(index)].as_py())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
