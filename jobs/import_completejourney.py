"""Imports days of the Complete Journey as a shop's events and catalogue.

python jobs/import_completejourney.py --root file:///data/shop --first 2017-01-02 --last 2017-02-12
"""

import argparse
import datetime
import sys

from raysys.errors import RaysysError
from raysys.ingest.completejourney import import_days
from raysys.storage import Root


def main() -> int:
    """Imports, and prints one line for each partition written."""
    parser = argparse.ArgumentParser(description="Import days of the Complete Journey.")
    parser.add_argument("--root", required=True, help="file:///folder or s3://bucket/prefix")
    day = datetime.date.fromisoformat
    parser.add_argument("--first", type=day, required=True, help="first day, YYYY-MM-DD of 2017")
    parser.add_argument("--last", type=day, required=True, help="last day")
    parser.add_argument("--min-sales", type=int, default=5, help="sales until an item is listed")
    arguments = parser.parse_args()
    try:
        root = Root(arguments.root)
        root.check_writable()
        num_rows = import_days(
            root,
            arguments.first,
            arguments.last,
            min_sales=arguments.min_sales,
            on_partition=lambda key: print(f"[import] {key}", flush=True),
        )
    except RaysysError as error:
        print(f"raysys: {error}", file=sys.stderr)
        return error.exit_code
    print(f"[import] {num_rows:,} purchases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
