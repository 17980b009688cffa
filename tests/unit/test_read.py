"""An event file is read by its needed columns, in batches, and bad bytes quarantine it."""

from __future__ import annotations

import datetime
import errno
import io
import re
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import SchemaConfig
from raysys.errors import DataError, StorageUnavailableError
from raysys.ingest.clean import Cleaned
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.read import iter_events, read_events

MIDNIGHT = datetime.datetime(2017, 3, 1, tzinfo=datetime.UTC)
DAY = (MIDNIGHT.timestamp(), MIDNIGHT.timestamp() + 86_400)
HASHER = Pseudonymizer(b"0123456789abcdef")
PATH = "events/dt=2017-03-01/a.parquet"
FAT_BYTES = 2_000_000


def events(num_rows: int) -> pl.DataFrame:
    numbers = pl.Series(range(num_rows), dtype=pl.Int64)
    return pl.DataFrame(
        {
            "event_id": "e" + numbers.cast(pl.String),
            "event_type": pl.repeat("click", num_rows, eager=True),
            "user_id": "user" + (numbers % 7).cast(pl.String),
            "item_id": "i" + (numbers % 5).cast(pl.String),
            "ts": pl.repeat(MIDNIGHT, num_rows, eager=True),
        }
    )


def parquet(frame: pl.DataFrame, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(frame.to_arrow(), buffer, **options)
    return buffer.getvalue()


def read(source: Any, **contract: Any) -> Cleaned:
    config = SchemaConfig(**contract)
    return read_events(source, PATH, contract=config, pseudonymizer=HASHER, span=DAY)


def batches(source: Any, batch_rows: int) -> list[Cleaned]:
    return list(
        iter_events(
            source,
            PATH,
            contract=SchemaConfig(),
            pseudonymizer=HASHER,
            span=DAY,
            batch_rows=batch_rows,
        )
    )


class CountingFile(io.BytesIO):
    """Counts the bytes that are read of it."""

    num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.num_read += len(data)
        return data


class TestColumnPushdown:
    @pytest.fixture
    def data(self) -> bytes:
        """A file of two row groups whose unknown column is nearly all of it."""
        noise = np.random.default_rng(0).bytes(FAT_BYTES)
        size = FAT_BYTES // 1000
        fat = pl.Series([noise[i : i + size] for i in range(0, FAT_BYTES, size)])
        return parquet(events(1000).with_columns(page=fat), row_group_size=500)

    def test_the_bytes_of_an_unknown_column_are_not_read(self, data: bytes) -> None:
        file = CountingFile(data)
        assert len(read(file).usable) == 1000
        assert file.num_read < 100_000 < FAT_BYTES < len(data)

    def test_the_count_sees_a_reader_that_reads_all(self, data: bytes) -> None:
        file = CountingFile(data)
        assert len(read(file, added_columns="rescue").rescued) == 1000
        assert file.num_read > FAT_BYTES

    def test_a_price_is_only_read_where_it_might_not_fit(self) -> None:
        prices = np.random.default_rng(0).random(100_000)
        frame = events(100_000).with_columns(price=prices)
        options = {"use_dictionary": False, "compression": "none"}
        fitting = CountingFile(parquet(frame, **options))
        narrow = CountingFile(parquet(frame.with_columns(pl.col("price").cast(str)), **options))
        assert read(fitting).column_counts["cast:price"] == 0
        assert read(narrow).column_counts["cast:price"] == 100_000
        assert narrow.num_read - fitting.num_read > 100_000 * 8


class TestBatches:
    @pytest.mark.parametrize(
        ("group_rows", "batch_rows", "sizes"),
        [
            pytest.param(100, 30, [30, 30, 30, 10], id="a large row group is cut"),
            pytest.param(10, 30, [30, 30, 30, 10], id="small row groups are read together"),
            pytest.param(40, 50, [40, 40, 20], id="a row group is not cut where it fits"),
            pytest.param(100, 100, [100], id="all at once"),
        ],
    )
    def test_a_file_comes_in_batches_that_are_bounded(
        self, group_rows: int, batch_rows: int, sizes: list[int]
    ) -> None:
        data = parquet(events(100), row_group_size=group_rows)
        parts = batches(data, batch_rows)
        assert [part.num_rows for part in parts] == sizes
        assert Cleaned.concat(parts).usable.equals(read(data).usable)

    def test_counts_add_up_over_batches(self) -> None:
        frame = events(100).with_columns(
            item_id=pl.when(pl.int_range(100) % 10 == 0).then(None).otherwise("item_id"),
            shoe_size=pl.lit(43),
        )
        data = parquet(frame, row_group_size=10)
        whole = Cleaned.concat(batches(data, 25))
        assert whole.row_counts == read(data).row_counts == {"quarantined: no item_id": 10}
        assert whole.column_counts == read(data).column_counts
        assert whole.column_counts["added:shoe_size"] == 100

    def test_a_batch_is_read_only_when_it_is_asked_for(self) -> None:
        noise = np.random.default_rng(0).bytes(200_000).hex()
        queries = pl.Series([noise[i : i + 40] for i in range(0, 400_000, 40)])
        data = parquet(events(10_000).with_columns(query=queries), row_group_size=1000)
        file = CountingFile(data)
        parts = iter_events(
            file, PATH, contract=SchemaConfig(), pseudonymizer=HASHER, span=DAY, batch_rows=1000
        )
        next(parts)
        after_first = file.num_read
        assert sum(part.num_rows for part in parts) == 9000
        assert after_first < file.num_read / 4

    def test_a_file_without_rows_is_read(self) -> None:
        data = parquet(events(0))
        assert sum(part.num_rows for part in batches(data, 10)) == read(data).num_rows == 0


class TestBadBytes:
    def test_what_is_not_parquet_is_a_data_error_that_names_the_file(self) -> None:
        with pytest.raises(DataError, match=f"^{re.escape(PATH)} is not a readable parquet file"):
            read(b"not parquet at all")

    def test_a_file_that_was_cut_off_is_a_data_error_of_one_line(self) -> None:
        data = parquet(events(10))
        assert len(read(data).usable) == 10
        for size in (0, 10, len(data) // 2, len(data) - 1):
            with pytest.raises(DataError) as error:
                read(data[:size])
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize("in_file", [False, True], ids=["bytes", "file"])
    @pytest.mark.parametrize("checksums", [False, True], ids=["no checksum", "checksum"])
    def test_corruption_of_a_later_row_group_is_found_when_it_is_reached(
        self, in_file: bool, checksums: bool
    ) -> None:
        data = parquet(events(1000), row_group_size=100, write_page_checksum=checksums)
        group = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(7).column(0)
        start, size = group.dictionary_page_offset or group.data_page_offset, 40
        broken = data[:start] + b"\xff" * size + data[start + size :]
        parts = iter_events(
            io.BytesIO(broken) if in_file else broken,
            PATH,
            contract=SchemaConfig(),
            pseudonymizer=HASHER,
            span=DAY,
            batch_rows=100,
        )
        for _ in range(7):
            assert len(next(parts).usable) == 100
        with pytest.raises(DataError, match=f"^{re.escape(PATH)} "):
            next(parts)
        with pytest.raises(DataError):
            read(broken)

    @settings(max_examples=200, deadline=None)
    @given(place=st.integers(0, 10**6), value=st.integers(1, 255))
    def test_a_changed_byte_is_at_worst_a_data_error(self, place: int, value: int) -> None:
        data = bytearray(parquet(events(50), write_page_checksum=True, row_group_size=20))
        data[place % len(data)] ^= value
        try:
            cleaned = read(bytes(data))
        except DataError:
            return
        assert len(cleaned.usable) + len(cleaned.refused) == cleaned.num_rows


class BrokenStore(CountingFile):
    """A file whose store fails after its footer was read."""

    def __init__(self, data: bytes, error: Exception) -> None:
        super().__init__(data)
        self.error = error

    def read(self, size: int | None = -1, /) -> bytes:
        if self.num_read > 2000:
            raise self.error
        return super().read(size)


@pytest.mark.parametrize(
    "error",
    [
        StorageUnavailableError("the object store did not answer"),
        FileNotFoundError("s3://bucket/a.parquet"),
        OSError(errno.EIO, "Input/output error"),
        TimeoutError("slow"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failing_store_is_not_taken_for_a_bad_file(error: Exception) -> None:
    frame = events(5000)
    with pytest.raises(type(error), match=re.escape(str(error))) as caught:
        read(BrokenStore(parquet(frame, use_dictionary=False, row_group_size=500), error))
    assert not isinstance(caught.value, DataError)


def test_a_column_whose_name_begins_with_that_of_another_is_told_apart_from_it() -> None:
    frame = events(3).with_columns(pl.lit(1.0).alias("ts.raw"), pl.lit("a").alias("user_id.old"))
    cleaned = read(frame_bytes := parquet(frame))
    assert len(cleaned.usable) == 3
    rescued = read(frame_bytes, added_columns="rescue").rescued["rescued"]
    assert rescued.to_list() == ['{"ts.raw":1.0,"user_id.old":"a"}'] * 3


def test_a_nested_column_of_no_interest_does_not_stand_in_the_way() -> None:
    kinds = pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64()))
    buffer = io.BytesIO()
    pq.write_table(events(3).to_arrow().append_column("kinds", kinds), buffer)
    assert read(buffer.getvalue()).column_counts["added:kinds"] == 3
