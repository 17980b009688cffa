"""One object of a store as a seekable file that reads only the ranges that are asked for.

    pyarrow.parquet.ParquetFile -> RangeReader -> read_range(start, stop) -> one ranged GET

It reads nothing ahead: of a parquet file that is its footer and the columns that are wanted.
"""

from __future__ import annotations

import io
from collections.abc import Callable


class RangeReader(io.RawIOBase):
    """A binary file over `read_range`, which returns the bytes in `[start, stop)`."""

    def __init__(self, size_bytes: int, read_range: Callable[[int, int], bytes]) -> None:
        self._size_bytes = size_bytes
        self._read_range = read_range
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._require_open()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._require_open()
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}
        if whence not in starts or starts[whence] + offset < 0:
            raise ValueError(f"cannot seek by {offset} from {whence}")
        self._position = starts[whence] + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Returns the next `size` bytes, fewer at the end of the object, by one request at most."""
        self._require_open()
        start, stop = self._position, self._size_bytes
        if size is not None and size >= 0:
            stop = min(start + size, stop)
        if start >= stop:
            return b""
        data = self._read_range(start, stop)
        assert len(data) == stop - start, "a store returns a whole range or raises"
        self._position = stop
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _require_open(self) -> None:
        if self.closed:
            raise ValueError("the file is closed")
