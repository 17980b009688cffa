"""Queries and events of a search engine become event partitions, and no line gets lost."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config import SchemaConfig
from raysys.errors import DataError
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.read import read_events
from raysys.ingest.ubi import UbiReport, import_ubi
from raysys.ingest.ubi_documents import ACTIONS, Reading, event_rows, query_rows
from raysys.partitions.discover import discover
from raysys.partitions.layout import partition_date
from raysys.partitions.schema import EVENT_SCHEMA
from raysys.storage import Root

JOB = Path(__file__).parents[2] / "jobs" / "import_ubi.py"
HASHER = Pseudonymizer(b"0123456789abcdef")
NOON = "2024-06-01T12:00:00Z"


def query(**changes: Any) -> dict[str, Any]:
    return {
        "application": "primary-search", "query_id": "q1", "client_id": "c1",
        "user_query": "oat milk", "query_attributes": {}, "object_id_field": "sku",
        "query_response_id": "r1", "query_response_hit_ids": ["a", "b", "c"], "timestamp": NOON,
        **changes,
    }  # fmt: skip


def event(
    action: Any = "click", item: Any = "b", ordinal: Any = 2, **changes: Any
) -> dict[str, Any]:
    return {
        "application": "primary-search", "action_name": action, "query_id": "q1",
        "session_id": "s1", "client_id": "c1", "timestamp": "2024-06-01T12:00:05.250Z",
        "message_type": "CONVERSION", "message": None,
        "event_attributes": {
            "object": {"object_id": item, "object_id_field": "sku"},
            "position": {"ordinal": ordinal, "trail": "home"},
        },
        **changes,
    }  # fmt: skip


def write(path: Path, documents: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


@pytest.fixture
def imported(tmp_path: Path, local_root: Root) -> Any:
    """Imports documents into the root."""

    def run(queries: Iterable[Any] = (), events: Iterable[Any] = (), **options: Any) -> UbiReport:
        files = write(tmp_path / "q.ndjson", queries), write(tmp_path / "e.ndjson", events)
        return import_ubi(local_root, [files[0]], [files[1]], **options)

    return run


def read(root: Root) -> pl.DataFrame:
    frames = [
        pl.read_parquet(io.BytesIO(root.read_bytes(file.path))) for file in root.list("events")
    ]
    return pl.concat(frames).sort("ts", "position", "event_type")


class TestRows:
    def test_a_query_s_hits_are_impressions_by_their_order(
        self, imported: Any, local_root: Root
    ) -> None:
        imported([query()])
        columns = ["user_id", "request_id", "query", "surface", "event_type", "item_id", "position"]
        common = ("c1", "q1", "oat milk", "search", "impression")
        assert read(local_root).select(columns).rows() == [
            (*common, "a", 1), (*common, "b", 2), (*common, "c", 3)
        ]  # fmt: skip
        assert set(read(local_root)["ts"].dt.to_string("iso:strict")) == {
            "2024-06-01T12:00:00.000000+00:00"
        }

    def test_logged_impressions_of_a_query_count_instead_of_its_hits(
        self, imported: Any, local_root: Root
    ) -> None:
        report = imported(
            [query(), query(query_id="q2")], [event("impression", "a", 1), event("click")]
        )
        assert report.query_lines == {"has impression events": 1, "expanded": 1}
        rows = read(local_root).filter(event_type="impression")
        assert sorted(rows.select("request_id", "item_id").rows()) == [
            ("q1", "a"), ("q2", "a"), ("q2", "b"), ("q2", "c")
        ]  # fmt: skip

    def test_an_impression_that_cannot_be_used_does_not_take_the_place_of_the_hits(
        self, imported: Any
    ) -> None:
        report = imported([query()], [event("impression", "a", 1, client_id=None)])
        assert report.query_lines == {"expanded": 1}

    @pytest.mark.parametrize(
        ("action", "event_type"),
        [("click", "click"), ("click_through", "click"), ("add_to_cart", "cart"),
         ("purchase", "purchase"), ("impression", "impression")],
    )  # fmt: skip
    def test_an_action_becomes_an_event_of_its_query(
        self, action: str, event_type: str, imported: Any, local_root: Root
    ) -> None:
        imported([query(query_response_hit_ids=[])], [event(action)])
        row = read(local_root).row(0, named=True)
        assert row.pop("event_id")
        assert row == {
            "event_type": event_type, "user_id": "c1", "item_id": "b", "request_id": "q1",
            "ts": datetime.datetime(2024, 6, 1, 12, 0, 5, 250_000, tzinfo=datetime.UTC),
            "query": "oat milk", "surface": "search", "position": 2,
        }  # fmt: skip

    def test_an_event_without_a_query_is_a_request_of_no_search(
        self, imported: Any, local_root: Root
    ) -> None:
        report = imported([], [event("purchase", query_id=None), event(query_id="lost")])
        assert report.num_without_query == 2
        rows = read(local_root).sort("request_id").select("request_id", "query", "surface").rows()
        assert rows == [(None, None, None), ("lost", None, "search")]

    @pytest.mark.parametrize(
        ("field", "value", "kept"),
        [
            pytest.param("ordinal", {"index": 4}, 4, id="the schema before 1.3"),
            pytest.param("ordinal", None, None, id="null"),
            pytest.param("ordinal", "4", None, id="text"),
            pytest.param("ordinal", -1, None, id="negative"),
            pytest.param("ordinal", True, None, id="boolean"),
        ],
    )
    def test_a_position_is_kept_or_null(self, field: str, value: Any, kept: int | None) -> None:
        _, rows = event_rows(event(**{field: value}), Reading(), {})
        assert rows[0].position == kept

    @pytest.mark.parametrize("value", [7, 7.0, "7"])
    def test_ids_may_be_numbers(self, value: Any) -> None:
        _, rows = event_rows(event(item=value, client_id=value, query_id=value), Reading(), {})
        assert (rows[0].item_id, rows[0].user_id, rows[0].request_id) == ("7", "7", "7")

    @pytest.mark.parametrize(
        "value",
        ["2024-06-01T12:00:00Z", "2024-06-01T12:00:00", "2024-06-01T14:00:00+02:00",
         1717243200000, 1717243200000.0, "1717243200000",
         datetime.datetime(2024, 6, 1, 12), datetime.datetime(2024, 6, 1, 12, tzinfo=datetime.UTC)],
        ids=str,
    )  # fmt: skip
    def test_times_are_iso_8601_or_epoch_milliseconds(self, value: Any) -> None:
        _, rows = event_rows(event(timestamp=value), Reading(), {})
        assert rows[0].ts == datetime.datetime(2024, 6, 1, 12, tzinfo=datetime.UTC)

    @pytest.mark.parametrize("name", ["query_response_object_ids", "query_response_objects_ids"])
    def test_hits_by_their_older_names_are_read(self, name: str) -> None:
        document = query(**{name: ["x", 5]})
        del document["query_response_hit_ids"]
        fate, rows = query_rows(document, Reading(), set())
        assert fate == "expanded" and [row.item_id for row in rows] == ["x", "5"]

    def test_a_hit_without_an_id_leaves_its_position_open(self) -> None:
        _, rows = query_rows(query(query_response_hit_ids=["a", None, "c"]), Reading(), set())
        assert [(row.item_id, row.position) for row in rows] == [("a", 1), ("c", 3)]

    def test_a_shop_may_name_its_own_actions_and_its_own_user(
        self, imported: Any, local_root: Root
    ) -> None:
        report = imported(
            [],
            [event("bought", user_id="u1"), event("click", user_id="u1"), event("bought")],
            actions={**ACTIONS, "bought": "purchase", "click": None},
            user_field="user_id",
        )
        assert report.event_lines == {"purchase": 1, "ignored: click": 1, "no user_id": 1}
        assert read(local_root)["user_id"].to_list() == ["u1"]


class TestFates:
    def test_every_line_of_queries_is_accounted_for(self, tmp_path: Path, local_root: Root) -> None:
        path = tmp_path / "queries.ndjson"
        lines = [
            json.dumps(query()), json.dumps(query(query_id="q2", query_response_hit_ids=[])),
            json.dumps(query(query_id="q3", query_response_hit_ids=None)),
            json.dumps(query(query_id="")), json.dumps(query(client_id=None)),
            json.dumps(query(client_id="")), json.dumps(query(timestamp="soon")),
            json.dumps(event()), json.dumps({"index": {"_index": "ubi_queries", "_id": "1"}}),
            "", "{", "[1]", "NaN",
        ]  # fmt: skip
        path.write_text("\n".join(lines) + "\n")
        report = import_ubi(local_root, [path], [])
        assert report.query_lines == {
            "expanded": 1, "no hits": 2, "no query_id": 1, "no client_id": 2, "no timestamp": 1,
            "an event": 1, "bulk action": 1, "blank line": 1, "not JSON": 1,
            "not a JSON object": 2,
        }  # fmt: skip
        assert report.query_lines.total() == len(lines)
        assert report.rows.total() == report.num_written == len(read(local_root)) == 3

    def test_every_line_of_events_is_accounted_for(self, imported: Any, local_root: Root) -> None:
        events = [
            event(), event("product_hover"), event("wishlist"), event("wishlist"),
            event(client_id=None), event(item=None), event(item=True), event(timestamp=None),
            event(event_attributes=None), event(None), query(),
        ]  # fmt: skip
        report = imported([], events)
        assert report.event_lines == {
            "click": 1, "ignored: product_hover": 1, "unknown action: wishlist": 2,
            "no client_id": 1, "no object_id": 3, "no timestamp": 1, "no action_name": 1,
            "a query": 1,
        }  # fmt: skip
        assert report.event_lines.total() == len(events)
        assert report.rows == {"click": 1}

    @settings(max_examples=200, deadline=None)
    @given(
        document=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(
                    st.sampled_from(
                        [*query(), *event(), "object", "object_id", "position", "ordinal"]
                    ),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=8,
        ).filter(lambda value: isinstance(value, dict)),
        part=st.sampled_from(["query", "event"]),
    )
    def test_whatever_a_document_holds_has_one_fate(
        self, document: dict[str, Any], part: str
    ) -> None:
        whole = {**(query() if part == "query" else event()), **document}
        fate, rows = query_rows(whole, Reading(), set())
        assert isinstance(fate, str) and bool(rows) == (fate == "expanded")
        fate, rows = event_rows(whole, Reading(), {})
        assert isinstance(fate, str) and bool(rows) == (fate in EVENT_FATES)


EVENT_FATES = {event_type for event_type in ACTIONS.values() if event_type}


class TestRepeating:
    def test_importing_twice_changes_nothing(self, imported: Any, local_root: Root) -> None:
        def files() -> dict[str, bytes]:
            return {file.path: local_root.read_bytes(file.path) for file in local_root.list("")}

        arguments = ([query(), query(query_id="q2")], [event(), event("purchase")])
        first = imported(*arguments)
        assert (first.num_written, first.num_present) == (8, 0)
        before = files()
        second = imported(*arguments)
        assert (second.num_written, second.num_present) == (0, 8)
        assert second.rows == first.rows and files() == before

    def test_an_export_that_grew_adds_what_is_new(self, imported: Any, local_root: Root) -> None:
        imported([query()], [event()])
        report = imported([query(), query(query_id="q2")], [event(), event("purchase")])
        assert (report.num_written, report.num_present) == (4, 4)
        assert read(local_root).select("user_id", "event_id").is_unique().all()

    def test_a_line_that_comes_twice_counts_once(self, imported: Any, local_root: Root) -> None:
        report = imported([], [event(), event()])
        assert (report.num_written, report.num_present) == (1, 1)

    def test_the_same_action_of_two_clients_is_two_events(
        self, imported: Any, local_root: Root
    ) -> None:
        assert imported([], [event(), event(client_id="c2")]).num_written == 2

    def test_rows_are_written_in_files_of_a_bounded_size_whatever_their_days(
        self, imported: Any, local_root: Root, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("raysys.ingest.ubi.BATCH_ROWS", 5)
        monkeypatch.setattr("raysys.ingest.ubi._MAX_CACHED_DAYS", 1)
        events = [
            event(item=f"i{i}", timestamp=f"2024-06-{i % 3 + 1:02}T12:00Z") for i in range(20)
        ]
        report = imported([], [*events, *events])
        assert (report.num_written, report.num_present) == (20, 20)
        assert read(local_root)["item_id"].is_unique().all()
        days = {partition_date(p.key).day for p in discover(local_root).partitions}
        assert days == {1, 2, 3}


class TestFiles:
    def test_plain_compressed_wrapped_and_parquet_files_hold_the_same(
        self, tmp_path: Path, local_root: Root
    ) -> None:
        plain = write(tmp_path / "plain.ndjson", [query()])
        packed = tmp_path / "packed.ndjson.gz"
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        wrapped = write(tmp_path / "wrapped.ndjson", [{"_id": "1", "_source": query()}])
        columns = tmp_path / "columns.parquet"
        pq.write_table(pa.Table.from_pylist([{**query(), "query_attributes": None}]), columns)
        report = import_ubi(local_root, [plain, packed, wrapped, columns], [])
        assert report.query_lines == {"expanded": 4}
        assert (report.num_written, report.num_present) == (3, 9)

    @pytest.mark.parametrize("name", ["missing.ndjson", "bad.ndjson.gz", "bad.parquet"])
    def test_a_file_that_cannot_be_read_is_named(
        self, name: str, tmp_path: Path, local_root: Root
    ) -> None:
        (tmp_path / "bad.ndjson.gz").write_bytes(gzip.compress(b"{}\n" * 100)[:-12])
        (tmp_path / "bad.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match=f"{name} cannot be read: ") as error:
            import_ubi(local_root, [], [tmp_path / name])
        assert "\n" not in str(error.value)


def test_all_rows_pass_the_door_of_ingest(imported: Any, root: Root, tmp_path: Path) -> None:
    queries = [query(query_id=f"q{i}", client_id=f"c{i % 7}") for i in range(50)]
    events = [
        event(action, query_id=f"q{i}", client_id=f"c{i % 7}")
        for i in range(50)
        for action in ("click", "purchase")
    ]
    files = write(tmp_path / "q.ndjson", queries), write(tmp_path / "e.ndjson", events)
    report = import_ubi(root, [files[0]], [files[1]])
    (partition,) = discover(root).partitions
    start = datetime.datetime(2024, 6, 1, tzinfo=datetime.UTC).timestamp()
    num_rows = 0
    for file in partition.files:
        cleaned = read_events(
            root.read_bytes(file.path),
            file.path,
            contract=SchemaConfig(added_columns="fail"),
            pseudonymizer=HASHER,
            span=(start, start + 86_400),
        )
        assert cleaned.refused.is_empty()
        assert not any(name.startswith("cast:") for name in cleaned.column_counts)
        assert cleaned.usable["position"].null_count() == 0
        assert cleaned.usable["query"].unique().to_list() == ["oat milk"]
        assert not cleaned.usable["event_id"].str.contains("c[0-6]").any()
        num_rows += len(cleaned.usable)
    assert num_rows == report.num_written == 250


def test_the_rows_have_columns_of_the_contract(imported: Any, local_root: Root) -> None:
    imported([query()], [event()])
    frame = read(local_root)
    assert all(EVENT_SCHEMA[name] == dtype for name, dtype in frame.schema.items())


class TestJob:
    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, JOB, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(JOB.parents[1])},
        )

    def test_it_says_where_every_line_went(self, tmp_path: Path) -> None:
        queries = write(tmp_path / "q.ndjson", [query(), query(client_id="")])
        events = write(tmp_path / "e.ndjson", [event(), event("bought"), event("wishlist")])
        root = (tmp_path / "root").as_uri()
        done = self.run(
            "--root", root, "--queries", queries, "--events", events, "--action", "bought=purchase"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            "[import] events/dt=2024-06-01",
            "[import] query lines: expanded 1, no client_id 1",
            "[import] event lines: click 1, purchase 1, unknown action: wishlist 1",
            "[import] rows: click 1, impression 3, purchase 1",
            "[import] 5 rows written, 0 were there already, 0 without their query",
        ]

    def test_it_refuses_an_action_of_no_known_type_in_one_line(self, tmp_path: Path) -> None:
        done = self.run("--root", tmp_path.as_uri(), "--action", "bought=sale")
        assert done.returncode == 1
        assert done.stderr.startswith("raysys: --action bought=sale: expected NAME=TYPE")
        assert len(done.stderr.splitlines()) == 1
