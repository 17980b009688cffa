"""Reads a shop's files: only the columns that ingest needs, and no large event file at once.

    events/dt=…/*.parquet -> iter_events() | read_events() -> Cleaned
    items/**/*.parquet    -> read_item_file() -> rows of the catalogue

Columns are pushed down into the parquet reader: the bytes of the others are not read. Row groups
are read one after the other, together where they are small.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from raysys.config import SchemaConfig
from raysys.errors import DataError
from raysys.ingest.clean import Cleaned, PseudonymCache, clean
from raysys.ingest.contract import complete, fit
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.partitions.schema import (
    EVENT_SCHEMA,
    ITEM_SCHEMA,
    ColumnPlan,
    accepted,
    check_types,
    name_columns,
    plan_columns,
)

BATCH_ROWS = 500_000


def read_events(
    source: bytes | BinaryIO,
    path: str,
    *,
    contract: SchemaConfig,
    pseudonymizer: Pseudonymizer,
    span: tuple[float, float],
) -> Cleaned:
    """Reads and judges all rows of an event file. See `iter_events`."""
    return Cleaned.concat(
        iter_events(source, path, contract=contract, pseudonymizer=pseudonymizer, span=span)
    )


def iter_events(
    source: bytes | BinaryIO,
    path: str,
    *,
    contract: SchemaConfig,
    pseudonymizer: Pseudonymizer,
    span: tuple[float, float],
    batch_rows: int = BATCH_ROWS,
) -> Iterator[Cleaned]:
    """Reads and judges the rows of an event file, at most `batch_rows` at a time.

    A file can turn out to be corrupt at its end: what was given before is then not to be used.

    Args:
      source: The file, or its bytes. It is not closed.
      path: Names the file in errors.
      span: UNIX seconds at which the file's partition begins and ends.

    Raises:
      DataError: The file is to be quarantined: it is no parquet, cut off, corrupt, or its columns
        break the contract.
    """
    with _readable(path):
        file = _open(source)
        plan = _plan(file.schema_arrow, contract, path)
    pseudonyms = PseudonymCache(pseudonymizer)
    tables = _tables(file, [*plan.read, *plan.rescued], batch_rows)
    while True:
        with _readable(path):
            table = next(tables, None)
            if table is None:
                return
            frame = _frame(table, EVENT_SCHEMA)
        yield clean(frame, plan, pseudonyms, span)


def read_item_file(source: bytes | BinaryIO, path: str) -> tuple[pl.DataFrame, Counter[str]]:
    """Reads the catalogue rows of one file, ITEM_SCHEMA.

    A column that is missing is null throughout, a value that does not fit is null.

    Returns:
      The rows, and how many of them by what happened to a column, as `ingest.clean` names it.

    Raises:
      DataError: The file is no parquet, cut off or corrupt; it has no `item_id`, or a column is
        nested or of a type of which no value can fit.
    """
    with _readable(path):
        file = _open(source)
        names: list[str] = file.schema_arrow.names
        if "item_id" not in names:
            raise DataError(
                f"{path} has no column item_id; it has {name_columns(names, ITEM_SCHEMA)}"
            )
        present = [name for name in ITEM_SCHEMA if name in names]
        check_types(
            _types(file.schema_arrow, ITEM_SCHEMA, path), ITEM_SCHEMA, frozenset(ITEM_SCHEMA), path
        )
        frame = _frame(file.read(present).select(present), ITEM_SCHEMA)
    fitted = fit(frame, present, ITEM_SCHEMA)
    counts = Counter(fitted.counts)
    counts.update({f"nulled:{name}": int(mask.sum()) for name, mask in fitted.wrong.items()})
    counts.update({f"missing:{name}": len(frame) for name in ITEM_SCHEMA if name not in names})
    counts.update({f"added:{name}": len(frame) for name in names if name not in ITEM_SCHEMA})
    return complete(fitted.frame, ITEM_SCHEMA), +counts


def _open(source: bytes | BinaryIO) -> pq.ParquetFile:
    return pq.ParquetFile(
        pa.BufferReader(source) if isinstance(source, bytes) else source,
        pre_buffer=True,
        coerce_int96_timestamp_unit="us",
        page_checksum_verification=True,
    )


def _plan(schema: pa.Schema, contract: SchemaConfig, path: str) -> ColumnPlan:
    return plan_columns(
        {field.name: _can_rescue(field.type) for field in schema},
        _types(schema, EVENT_SCHEMA, path),
        contract,
        path,
    )


def _types(
    schema: pa.Schema, wanted: Mapping[str, pl.DataType], path: str
) -> dict[str, pl.DataType]:
    """The types of those columns that are wanted."""
    names: list[str] = schema.names
    twice = sorted(name for name, number in Counter(names).items() if number > 1)
    if twice:
        named = name_columns(twice, wanted)
        raise DataError(f"{path} has columns twice: {named}; keep one of each")
    known = [field for field in schema if field.name in wanted]
    for field in known:
        if pa.types.is_nested(field.type):
            raise DataError(f"{path} has nested values in column {field.name}; flatten them")
        if not _can_read(field.type):
            good = accepted(wanted[field.name])
            raise DataError(f"{path} has {field.type} in column {field.name}; write it as {good}")
    return dict(_frame(pa.schema(known).empty_table(), wanted).schema)


def _can_read(found: pa.DataType) -> bool:
    """Whether it is a single value, of a type that Polars knows: it panics at others."""
    if isinstance(found, pa.BaseExtensionType):
        return _can_read(found.storage_type)
    if pa.types.is_dictionary(found):
        return _can_read(found.value_type)
    return not (pa.types.is_nested(found) or pa.types.is_decimal256(found))


def _can_rescue(found: pa.DataType) -> bool:
    """Whether it can be written as JSON: a single value, or lists and structs of such."""
    if pa.types.is_struct(found):
        return all(_can_rescue(field.type) for field in found)
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(is_one(found) for is_one in is_list):
        return _can_rescue(found.value_type)
    return _can_read(found)


def _tables(file: pq.ParquetFile, columns: list[str], batch_rows: int) -> Iterator[pa.Table]:
    """Gives the rows in tables of at most `batch_rows`, from as few reads as that allows."""
    for groups in _runs(file, batch_rows):
        if len(groups) == 1 and file.metadata.row_group(groups[0]).num_rows > batch_rows:
            for batch in file.iter_batches(batch_rows, row_groups=groups, columns=columns):
                yield pa.Table.from_batches([batch]).select(columns)
        else:
            # `columns` are prefixes of paths there, so that "a" also reads a column named "a.b".
            yield file.read_row_groups(groups, columns=columns).select(columns)


def _runs(file: pq.ParquetFile, batch_rows: int) -> Iterator[list[int]]:
    """Gives runs of row groups with at most `batch_rows` rows together, or of one row group."""
    run: list[int] = []
    num_rows = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if run and num_rows + size > batch_rows:
            yield run
            run, num_rows = [], 0
        run.append(group)
        num_rows += size
    if run:
        yield run


def _frame(table: pa.Table, wanted: Mapping[str, pl.DataType]) -> pl.DataFrame:
    table.validate(full=True)  # Polars takes text for UTF-8 without looking
    columns = {
        field.name: _polars_column(table[place], wanted.get(field.name))
        for place, field in enumerate(table.schema)
    }
    try:
        # Without metadata: Polars has no use for it and panics where it is no text.
        frame: Any = pl.from_arrow(pa.table(columns))
    except pl.exceptions.PanicException as error:
        raise pa.ArrowInvalid("Polars cannot take it") from error
    assert isinstance(frame, pl.DataFrame)
    return frame


def _polars_column(column: pa.ChunkedArray, wanted: pl.DataType | None) -> pa.ChunkedArray:
    found = column.type
    if isinstance(wanted, pl.String) and _is_binary(found):
        return column.cast(pa.large_string())  # Some writers do not say that bytes are text.
    if pa.types.is_timestamp(found) and found.tz not in (None, "UTC"):
        # Polars knows no offsets such as +01:00. This zone is UTC, but not the contract's type.
        return column.cast(pa.timestamp(found.unit, "Etc/UTC"))
    return column


def _is_binary(found: pa.DataType) -> bool:
    if isinstance(found, pa.BaseExtensionType):
        return _is_binary(found.storage_type)
    return any(
        is_it(found)
        for is_it in (
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_fixed_size_binary,
            pa.types.is_binary_view,
        )
    )


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turns what the parquet reader says of bad data into a `DataError`.

    It says it by OSErrors without a number too; those of the store are of a class of their own, or
    have one, and pass: a store that does not answer must not get a file quarantined.
    """
    try:
        yield
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        # Its message may quote what is in the file, and a reason is written below the root.
        kind = type(error).__name__
        raise DataError(f"{path} is not a readable parquet file ({kind})") from None
