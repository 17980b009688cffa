"""`Root.open_input`: a file over one object that reads the ranges that are asked for."""

from __future__ import annotations

import io
import random

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.storage import Root

DATA = bytes(random.Random(0).randbytes(5000))


def test_reads_from_anywhere_like_a_file_of_the_same_bytes(root: Root) -> None:
    root.put("a", DATA)
    draw = random.Random(1)
    with root.open_input("a") as file, io.BytesIO(DATA) as same:
        assert file.readable() and file.seekable()
        for _ in range(30):
            offset, size = draw.randrange(6000), draw.choice([0, 1, 700, 9000, -1])
            whence = draw.choice([io.SEEK_SET, io.SEEK_END])
            offset = -min(offset, len(DATA)) if whence == io.SEEK_END else offset
            assert file.seek(offset, whence) == same.seek(offset, whence)
            assert file.read(size) == same.read(size)
            assert file.tell() == same.tell()


def test_reads_an_empty_object(root: Root) -> None:
    root.put("a", b"")
    with root.open_input("a") as file:
        assert file.read() == b"" and file.seek(0, io.SEEK_END) == 0


def test_what_is_absent_is_file_not_found_at_once(root: Root) -> None:
    root.put("a/b", b"")
    with pytest.raises(FileNotFoundError, match="a/c"):
        root.open_input("a/c")


def test_arrow_and_polars_read_parquet_from_it(root: Root) -> None:
    table = pa.table({"x": list(range(1000)), "y": ["z"] * 1000})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    root.put("events/a.parquet", sink.getvalue())
    with root.open_input("events/a.parquet") as file:
        assert pq.ParquetFile(file, pre_buffer=True).read().equals(table)
    with root.open_input("events/a.parquet") as file:
        assert pl.read_parquet(file, columns=["x"])["x"].to_list() == table["x"].to_pylist()


def test_a_closed_file_is_not_read(root: Root) -> None:
    root.put("a", DATA)
    file = root.open_input("a")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
