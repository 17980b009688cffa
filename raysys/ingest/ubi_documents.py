"""Reads User Behavior Insights: each document's fate, and the event rows that it becomes.

    a line -> documents() -> query_rows() | event_rows() -> (fate, rows)

Pure but for the reading of files.
Source: the UBI schema, 1.0 to 1.3 (https://github.com/o19s/ubi, Apache-2.0), and what OpenSearch's
plugin writes: times in epoch milliseconds, and other names for the hits in its older versions.
"""

from __future__ import annotations

import datetime
import gzip
import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raysys.errors import DataError
from raysys.partitions.schema import EventType, Surface

ACTIONS: Mapping[str, EventType | None] = {
    "impression": "impression",
    "click": "click",
    "click_through": "click",
    "add_to_cart": "cart",
    "purchase": "purchase",
    **dict.fromkeys(
        ("view", "watch", "product_hover", "on_search", "search", "brand_filter", "type_filter",
         "product_sort", "button_click", "page_exit", "login", "logout", "new_user_entry")
    ),
}  # fmt: skip
"""What becomes of the schema's and its collectors' `action_name`s; None: nothing, on purpose."""
_HITS = ("query_response_hit_ids", "query_response_object_ids", "query_response_objects_ids")
_BULK = {"index", "create", "update", "delete"}
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

Document = Mapping[str, Any]


class EventRow(NamedTuple):
    """A row of an event file; the fields are columns of the contract."""

    event_id: str
    """Made of the rest but the user: rows are told apart by both."""
    event_type: EventType
    user_id: str
    item_id: str
    ts: datetime.datetime
    request_id: str | None
    query: str | None
    surface: Surface | None
    position: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How documents are read."""

    actions: Mapping[str, EventType | None] = field(default_factory=lambda: ACTIONS)
    """Event type of each `action_name`; None ignores it."""
    user_field: str = "client_id"
    """The field that tells the user."""


def documents(paths: Sequence[Path]) -> Iterator[Document | str]:
    """Gives one document a line, or why there is none."""
    for path in paths:
        try:
            yield from _parquet_rows(path) if path.suffix == ".parquet" else _json_lines(path)
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path} cannot be read: {reason}") from error


def _parquet_rows(path: Path) -> Iterator[Document]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(10_000):
            yield from batch.to_pylist()


def _json_lines(path: Path) -> Iterator[Document | str]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for line in file:
            yield _document(line)


def _document(line: bytes) -> Document | str:
    if not line.strip():
        return "blank line"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(value, dict):
        return "not a JSON object"
    if len(value) == 1 and next(iter(value)) in _BULK:
        return "bulk action"
    source = value.get("_source")
    return source if isinstance(source, dict) else value


def query_text(document: Document | str) -> dict[str | None, str | None]:
    """Returns the text of each query that a line of queries tells of."""
    if isinstance(document, str) or "action_name" in document:
        return {}
    query_id = _text(document.get("query_id"))
    return {query_id: _text(document.get("user_query"))} if query_id else {}


def query_rows(
    document: Document | str, reading: Reading, logged: Collection[str | None]
) -> tuple[str, list[EventRow]]:
    """Returns the fate of a line of queries, and the impressions that it becomes.

    Args:
      logged: Queries whose impressions are among the events.
    """
    if isinstance(document, str):
        return document, []
    if "action_name" in document:
        return "an event", []
    query_id, user = _text(document.get("query_id")), _text(document.get(reading.user_field))
    ts = _time(document.get("timestamp"))
    if query_id is None:
        return "no query_id", []
    if user is None:
        return f"no {reading.user_field}", []
    if ts is None:
        return "no timestamp", []
    if query_id in logged:
        return "has impression events", []
    hits = next((hits for name in _HITS if isinstance(hits := document.get(name), list)), [])
    query = _text(document.get("user_query"))
    rows = [
        _row("impression", user, item, ts, query_id, query, position, action="impression")
        for position, hit in enumerate(hits, 1)
        if (item := _text(hit)) is not None
    ]
    return ("expanded" if rows else "no hits"), rows


def event_rows(
    document: Document | str, reading: Reading, texts: Mapping[str | None, str | None]
) -> tuple[str, list[EventRow]]:
    """Returns the fate of a line of events, and the row that it becomes, if any.

    Args:
      texts: Text of each query.
    """
    if isinstance(document, str):
        return document, []
    action = _text(document.get("action_name"))
    if action is None:
        return ("a query" if "user_query" in document else "no action_name"), []
    if action not in reading.actions:
        return f"unknown action: {action}", []
    event_type = reading.actions[action]
    if event_type is None:
        return f"ignored: {action}", []
    user, ts = _text(document.get(reading.user_field)), _time(document.get("timestamp"))
    item = _text(_inner(document, "event_attributes", "object", "object_id"))
    if user is None:
        return f"no {reading.user_field}", []
    if item is None:
        return "no object_id", []
    if ts is None:
        return "no timestamp", []
    query_id = _text(document.get("query_id"))
    position = _position(document)
    query = texts.get(query_id)
    row = _row(event_type, user, item, ts, query_id, query, position, action=action)
    return event_type, [row]


def _row(
    event_type: EventType,
    user: str,
    item: str,
    ts: datetime.datetime,
    query_id: str | None,
    query: str | None,
    position: int | None,
    *,
    action: str,
) -> EventRow:
    micros = (ts - _EPOCH) // datetime.timedelta(microseconds=1)
    place = "" if position is None else str(position)
    return EventRow(
        event_id="|".join((query_id or "", action, item, str(micros), place)),
        event_type=event_type,
        user_id=user,
        item_id=item,
        ts=ts,
        request_id=query_id,
        query=query,
        surface="search" if query_id else None,
        position=position,
    )


def _position(document: Document) -> int | None:
    """The ordinal; an object around it in the schema before 1.3."""
    ordinal = _inner(document, "event_attributes", "position", "ordinal")
    if isinstance(ordinal, dict):
        ordinal = ordinal.get("index")
    is_whole = isinstance(ordinal, int) and not isinstance(ordinal, bool)
    return ordinal if is_whole and 0 <= ordinal < 2**31 else None


def _inner(document: Any, *names: str) -> Any:
    for name in names:
        document = document.get(name) if isinstance(document, Mapping) else None
    return document


def _text(value: Any) -> str | None:
    """An id or a text, None if it is blank or neither. 42.0 is 42, as pandas writes it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).encode(errors="replace").decode() or None


def _time(value: Any) -> datetime.datetime | None:
    """ISO 8601, UTC if it does not say otherwise, or epoch milliseconds."""
    try:
        if isinstance(value, str) and not value.strip().isdigit():
            value = datetime.datetime.fromisoformat(value.strip())
        if isinstance(value, datetime.datetime):
            return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).astimezone(
                datetime.UTC
            )
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return _EPOCH + datetime.timedelta(milliseconds=float(value))
    except (ValueError, OverflowError):
        pass
    return None
