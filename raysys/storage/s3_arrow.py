"""S3 as Ray Train sees it: `pyarrow.fs` over s3fs, which reads the same AWS settings as `s3.py`."""

from __future__ import annotations

import functools

import pyarrow.fs
import s3fs

from raysys.storage.patience import Patience


class _FileSystem(s3fs.S3FileSystem):  # type: ignore[misc]
    """s3fs asks again where an answer broke off, botocore for all else: 2 x 4 attempts at most."""

    retries = 2


@functools.lru_cache(maxsize=4)
def arrow_filesystem(
    pid: int, settings: frozenset[tuple[str, str]], patience: Patience
) -> pyarrow.fs.FileSystem:
    """Returns this process's file system for these AWS settings.

    No listing is cached, since other processes write below the root too.
    """
    # fsspec's own cache of instances does not know that the settings may change.
    filesystem = _FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": patience.connect_timeout_s,
            "read_timeout": patience.read_timeout_s,
            "retries": {"mode": "standard", "total_max_attempts": 4},
        },
    )
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))
