"""The root: one folder, local or on S3, below which everything durable lies.

    root = Root("s3://shop/raysys")
    root.put_if_absent("ledger/00000000000000000001.json", data)  # True for exactly one writer
    root.read_bytes("ledger/00000000000000000001.json")

The ledger's exactly-once rests on `put_if_absent` alone: of all writers of a path one wins, and a
writer that is killed leaves the whole object or none. S3 does it with `If-None-Match: *`, a local
folder with write, fsync, `link`. Endpoint and credentials of S3 come from the standard AWS
environment. Paths are relative to the root and "/"-separated.

root.py       what the rest of raysys uses
local.py      a POSIX folder
s3.py         a bucket's prefix; s3_errors.py says what may pass by itself
patience.py   how long a store that does not answer is asked again
ranges.py     an object as a file that reads ranges
s3_arrow.py   the same for Ray Train, through s3fs
parquet.py    frames as bytes
"""

from raysys.storage.root import Root
from raysys.storage.store import ObjectInfo

__all__ = ["ObjectInfo", "Root"]
