"""Imports User Behavior Insights, the queries and events of a search engine, as a shop's events.

python jobs/import_ubi.py --root file:///data/shop --queries queries.ndjson --events events.ndjson
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from raysys.errors import ConfigError, RaysysError
from raysys.ingest.ubi import import_ubi
from raysys.ingest.ubi_documents import ACTIONS
from raysys.partitions.schema import EVENT_TYPES, EventType
from raysys.storage import Root


def main() -> int:
    """Imports, and prints one line for each file written and where every line went."""
    parser = argparse.ArgumentParser(description="Import User Behavior Insights.")
    parser.add_argument("--root", required=True, help="file:///folder or s3://bucket/prefix")
    parser.add_argument("--queries", type=Path, nargs="*", default=[], help="NDJSON or parquet")
    parser.add_argument("--events", type=Path, nargs="*", default=[], help="NDJSON or parquet")
    parser.add_argument(
        "--action",
        action="append",
        default=[],
        metavar="NAME=TYPE",
        help=f"an action_name of the shop's own: {', '.join(EVENT_TYPES)} or ignore; repeatable",
    )
    parser.add_argument("--user-field", default="client_id", help="the field that tells the user")
    arguments = parser.parse_args()
    try:
        root = Root(arguments.root)
        root.check_writable()
        report = import_ubi(
            root,
            arguments.queries,
            arguments.events,
            actions={**ACTIONS, **dict(map(_action, arguments.action))},
            user_field=arguments.user_field,
            on_partition=lambda key: print(f"[import] {key}", flush=True),
        )
    except RaysysError as error:
        print(f"raysys: {error}", file=sys.stderr)
        return error.exit_code
    print(f"[import] query lines: {_listed(report.query_lines)}")
    print(f"[import] event lines: {_listed(report.event_lines)}")
    print(f"[import] rows: {_listed(report.rows)}")
    print(
        f"[import] {report.num_written:,} rows written, {report.num_present:,} were there already, "
        f"{report.num_without_query:,} without their query"
    )
    if not report.num_written + report.num_present:
        print("raysys: no line became a row; the counts above say why", file=sys.stderr)
        return 1
    return 0


def _action(text: str) -> tuple[str, EventType | None]:
    name, _, kind = text.rpartition("=")
    for event_type in EVENT_TYPES:
        if name and kind == event_type:
            return name, event_type
    if name and kind == "ignore":
        return name, None
    raise ConfigError(
        f"--action {text}: expected NAME=TYPE with one of {', '.join(EVENT_TYPES)} or ignore"
    )


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items())) or "none"


if __name__ == "__main__":
    sys.exit(main())
