"""Which planned partitions hold no rows: asked of parquet footers, before anything is reserved.

UpdatePlan.partitions -> partitions_without_rows() -> plan.without_empty()

A file without rows is small, so only small files are opened, and of a partition only until one has
rows. An unreadable file may hold some: ingest quarantines it.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from raysys.ledger.records import FileRef, PartitionRef
from raysys.storage import Root

MAX_BYTES = 65_536
"""A parquet file of no rows has a footer alone, of some kilobytes."""
_NUM_READERS = 16


def partitions_without_rows(root: Root, partitions: Iterable[PartitionRef]) -> frozenset[str]:
    """Returns the keys of those partitions whose files are all readable and hold no rows.

    Raises:
      StorageUnavailableError: The store does not answer.
    """
    small = [p for p in partitions if all(file.size_bytes <= MAX_BYTES for file in p.files)]
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        empty = list(pool.map(lambda p: all(_is_empty(root, file) for file in p.files), small))
    return frozenset(p.key for p, is_empty in zip(small, empty, strict=True) if is_empty)


def _is_empty(root: Root, file: FileRef) -> bool:
    if file.size_bytes == 0:
        return True
    try:
        with root.open_input(file.path) as source:
            return bool(pq.ParquetFile(source).metadata.num_rows == 0)
    except (pa.ArrowException, FileNotFoundError):
        return False
    except OSError as error:
        # Arrow says of bad data that it is an OSError without a number.
        if error.errno is not None:
            raise
        return False
