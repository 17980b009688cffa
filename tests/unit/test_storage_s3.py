"""A root on S3 whose network and server fail: it heals, or says which object it could not reach."""

from __future__ import annotations

import dataclasses
import io
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from botocore import exceptions as aws

from raysys.errors import RaysysError, RootError, StorageUnavailableError
from raysys.storage import Root
from raysys.storage.patience import Patience
from raysys.storage.s3 import S3Store
from raysys.storage.s3_errors import explain
from tests.conftest import HASTY, IMPATIENT, QUICK
from tests.faulty_s3 import Fault, FaultyS3

FAULTS: list[Fault] = [
    "slow_down", "reset", "silence", "lost_answer", "late_answer", "cut_body",
]  # fmt: skip
DATA = bytes(range(256)) * 40


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """A method of Root, called where `a/1`, `a/2` and `b/c/1` exist."""

    call: Callable[[Root], Any]
    returns: Any
    names: str
    """What its error names, below the root."""
    leaves: tuple[str, ...] = ("a/1", "a/2", "b/c/1")


def read_a_range(root: Root) -> bytes:
    with root.open_input("a/1") as file:
        file.seek(100)
        return file.read(900)


OPERATIONS = {
    "read_bytes": Operation(call=lambda root: root.read_bytes("a/1"), returns=DATA, names="a/1"),
    "open_input": Operation(call=read_a_range, returns=DATA[100:1000], names="a/1"),
    "list": Operation(
        call=lambda root: [(o.path, o.size_bytes) for o in root.list("a")],
        returns=[("a/1", len(DATA)), ("a/2", len(DATA))],
        names="a",
    ),
    "list_folders": Operation(
        call=lambda root: root.list_folders(""), returns=["a", "b"], names=""
    ),
    "exists": Operation(call=lambda root: root.exists("a/1"), returns=True, names="a/1"),
    "put": Operation(
        call=lambda root: root.put("a/3", DATA),
        returns=None,
        names="a/3",
        leaves=("a/1", "a/2", "a/3", "b/c/1"),
    ),
    "put_if_absent": Operation(
        call=lambda root: root.put_if_absent("a/3", DATA),
        returns=True,
        names="a/3",
        leaves=("a/1", "a/2", "a/3", "b/c/1"),
    ),
    "put_if_absent_not": Operation(
        call=lambda root: root.put_if_absent("a/1", b"other"), returns=False, names="a/1"
    ),
    "delete_prefix": Operation(
        call=lambda root: root.delete_prefix("a"), returns=None, names="a", leaves=("b/c/1",)
    ),
}  # fmt: skip


@pytest.fixture
def filled(faulty_root: Root, faulty_s3: FaultyS3) -> Root:
    for path in ("a/1", "a/2", "b/c/1"):
        faulty_root.put(path, DATA)
    faulty_s3.forget()
    return faulty_root


def contents(root: Root) -> dict[str, bytes]:
    return {info.path: root.read_bytes(info.path) for info in root.list("")}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
class TestEveryOperation:
    def test_succeeds_once_a_fault_has_passed(
        self, operation: Operation, fault: Fault, filled: Root, faulty_s3: FaultyS3
    ) -> None:
        silent = fault in ("silence", "late_answer")
        faulty_s3.next(fault, times=1 if silent else 2)
        root = Root(filled.uri, HASTY) if silent else filled
        assert operation.call(root) == operation.returns
        assert contents(filled) == dict.fromkeys(operation.leaves, DATA)

    def test_ends_in_an_error_that_names_the_object_while_it_lasts(
        self, operation: Operation, fault: Fault, filled: Root, faulty_s3: FaultyS3
    ) -> None:
        faulty_s3.always(fault)
        with pytest.raises(StorageUnavailableError) as caught:
            operation.call(Root(filled.uri, IMPATIENT))
        name = f"{filled.uri}/{operation.names}".rstrip("/")
        assert str(caught.value).startswith(f"{name}: the object store did not answer, asked ")
        assert "\n" not in str(caught.value) and "try again later" in str(caught.value)
        # At 2.5 ms and more between them no more fit into 0.04 s.
        assert 1 <= len(faulty_s3.requests) <= 17
        faulty_s3.heal()
        assert set(contents(filled).values()) == {DATA}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_no_other_layer_asks_again(operation: Operation, filled: Root, faulty_s3: FaultyS3) -> None:
    once = dataclasses.replace(HASTY, first_delay_s=9.0, max_delay_s=9.0, give_up_after_s=1.0)
    for fault in ("slow_down", "reset", "silence"):
        faulty_s3.forget()
        faulty_s3.always(fault)
        with pytest.raises(StorageUnavailableError, match="asked once"):
            operation.call(Root(filled.uri, once))
        assert len(faulty_s3.requests) == 1
        faulty_s3.heal()


class TestPatience:
    def test_delays_double_up_to_their_bound_and_half_of_each_is_drawn(self) -> None:
        patience = Patience(first_delay_s=1.0, max_delay_s=5.0)
        assert [patience.delay_s(n, 0.0) for n in range(1, 6)] == [0.5, 1.0, 2.0, 2.5, 2.5]
        assert [patience.delay_s(n, 1.0) for n in range(1, 6)] == [1.0, 2.0, 4.0, 5.0, 5.0]
        assert patience.delay_s(10**6, 0.0) == 2.5

    def test_a_root_keeps_its_patience_in_another_process(self, s3_root: str) -> None:
        make, args = Root(s3_root, IMPATIENT).__reduce__()
        assert make(*args).__reduce__() == (make, args)

    def test_a_long_delay_is_told(
        self, filled: Root, faulty_s3: FaultyS3, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("raysys.storage.s3._TELL_FROM_S", 0.0)
        faulty_s3.next("slow_down")
        filled.read_bytes("a/1")
        (line,) = caplog.messages
        assert f"{filled.uri}/a/1: " in line and "SlowDown" in line and "will ask again" in line


class TestPutIfAbsent:
    @pytest.mark.parametrize("fault", ["lost_answer", "late_answer", "cut_body"])
    def test_the_writer_whose_answer_was_lost_has_won(
        self, fault: Fault, faulty_root: Root, faulty_s3: FaultyS3
    ) -> None:
        root = Root(faulty_root.uri, HASTY if fault == "late_answer" else QUICK)
        faulty_s3.next(fault, method="PUT")
        assert root.put_if_absent("ledger/1", b"first")
        assert [method for method, _ in faulty_s3.requests][:2] == ["PUT", "PUT"]
        assert not root.put_if_absent("ledger/1", b"first")

    def test_without_its_token_it_would_think_that_it_lost(
        self, faulty_root: Root, faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(S3Store, "_head", lambda store, path: {"Metadata": {}})
        faulty_s3.next("lost_answer", method="PUT")
        assert not faulty_root.put_if_absent("ledger/1", b"first")

    def test_it_has_lost_if_another_came_between(
        self, faulty_root: Root, faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create, other = S3Store._create, Root(faulty_root.uri, QUICK)

        def be_late(store: S3Store, request: dict[str, Any]) -> bool:
            monkeypatch.setattr(S3Store, "_create", create)
            assert other.put_if_absent("ledger/1", b"same")
            return create(store, request)

        monkeypatch.setattr(S3Store, "_create", be_late)
        faulty_s3.next("lost_answer", method="PUT")
        assert not faulty_root.put_if_absent("ledger/1", b"same")

    def test_one_of_six_wins_each_path_whatever_answers_are_lost(
        self, faulty_root: Root, faulty_s3: FaultyS3
    ) -> None:
        faults: list[Fault] = ["lost_answer", "slow_down", "reset", "cut_body"]
        paths = [f"ledger/{i:02}" for i in range(16)]
        for i, path in enumerate(paths):
            faulty_s3.next(faults[i % 4], method="PUT|HEAD", path=path, times=i % 7)

        def write(writer: int) -> list[bool]:
            root = Root(faulty_root.uri, QUICK)
            return [root.put_if_absent(path, b"%d" % writer) for path in paths]

        with ThreadPoolExecutor(6) as pool:
            wins = np.array(list(pool.map(write, range(6))))
        assert wins.sum(axis=0).tolist() == [1] * len(paths)
        assert [int(faulty_root.read_bytes(path)) for path in paths] == wins.argmax(axis=0).tolist()

    def test_one_that_gave_up_left_the_whole_object_or_none(
        self, faulty_root: Root, faulty_s3: FaultyS3
    ) -> None:
        # It waits for each answer, so that what was sent has acted once it gives up.
        root = Root(faulty_root.uri, dataclasses.replace(QUICK, give_up_after_s=0.04))
        for fault, expected in {"lost_answer": {"a": DATA}, "reset": {}}.items():
            faulty_root.delete_prefix("a")
            faulty_s3.next(fault, method="PUT", times=float("inf"))  # type: ignore[arg-type]
            with pytest.raises(StorageUnavailableError, match=f"{faulty_root.uri}/a: "):
                root.put_if_absent("a", DATA)
            faulty_s3.heal()
            assert contents(faulty_root) == expected


class TestRead:
    def test_a_part_is_never_returned_for_the_whole(
        self, filled: Root, faulty_s3: FaultyS3
    ) -> None:
        faulty_s3.always("cut_body")
        # The cut has to be what ends it, not a busy machine that is late.
        impatient = Root(filled.uri, dataclasses.replace(IMPATIENT, read_timeout_s=10.0))
        with pytest.raises(StorageUnavailableError, match="a/1: "):
            impatient.read_bytes("a/1")
        assert faulty_s3.num_body_bytes >= len(DATA) / 2

    def test_a_client_that_does_not_count_would_return_a_part(
        self, filled: Root, faulty_s3: FaultyS3
    ) -> None:
        faulty_s3.always("cut_body")
        store: Any = filled._store
        url = store._s3.generate_presigned_url("get_object", Params=store._object("a/1"))
        with urllib.request.urlopen(url) as response:
            assert response.read1() == DATA[: len(DATA) // 2]

    def test_ranges_of_two_writes_are_never_mixed(self, filled: Root) -> None:
        with filled.open_input("a/1") as file:
            file.read(100)
            filled.put("a/1", DATA[::-1])
            with pytest.raises(StorageUnavailableError, match="a/1 was replaced while it was read"):
                file.read(100)

    def test_an_object_that_was_deleted_meanwhile_is_file_not_found(self, filled: Root) -> None:
        with filled.open_input("a/1") as file:
            filled.delete_prefix("a/1")
            with pytest.raises(FileNotFoundError, match="a/1"):
                file.read(100)


class TestParquet:
    @pytest.fixture
    def table(self, faulty_root: Root, faulty_s3: FaultyS3) -> pa.Table:
        """Five columns of 400 kB each that do not compress, in four row groups."""
        rng = np.random.default_rng(0)
        table = pa.table({name: rng.random(50_000) for name in "abcde"})
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=12_500, use_dictionary=False)
        faulty_root.put("x.parquet", sink.getvalue())
        faulty_s3.forget()
        return table

    def test_two_of_five_columns_cost_two_fifths_of_the_file(
        self, table: pa.Table, faulty_root: Root, faulty_s3: FaultyS3
    ) -> None:
        (info,) = faulty_root.list("")
        faulty_s3.forget()
        with faulty_root.open_input("x.parquet") as file:
            read = pq.ParquetFile(file, pre_buffer=True).read(columns=["b", "d"])
        assert read.equals(table.select(["b", "d"]))
        footer = 65_536
        assert faulty_s3.num_body_bytes <= 0.41 * info.size_bytes + footer
        # A head, the footer, and two column chunks in each of four row groups.
        assert len(faulty_s3.requests) <= 10

    def test_a_fault_that_passes_is_not_seen(
        self, table: pa.Table, faulty_root: Root, faulty_s3: FaultyS3
    ) -> None:
        for fault in FAULTS:
            faulty_s3.next(fault, method="GET")
        with Root(faulty_root.uri, HASTY).open_input("x.parquet") as file:
            assert pq.ParquetFile(file, pre_buffer=True).read().equals(table)

    def test_a_fault_that_stays_keeps_its_class_through_arrow(
        self, table: pa.Table, faulty_root: Root, faulty_s3: FaultyS3
    ) -> None:
        with Root(faulty_root.uri, IMPATIENT).open_input("x.parquet") as file:
            parquet = pq.ParquetFile(file, pre_buffer=True)
            faulty_s3.always("slow_down")
            with pytest.raises(StorageUnavailableError, match=r"x\.parquet: the object store"):
                parquet.read()


@pytest.mark.parametrize("fault", ["slow_down", "internal_error", "reset", "cut_body"])
def test_arrow_passes_over_a_fault_too(fault: Fault, filled: Root, faulty_s3: FaultyS3) -> None:
    filesystem, base = filled.arrow()
    faulty_s3.next(fault, path="/a/")
    with filesystem.open_input_stream(f"{base}/a/1") as stream:
        assert stream.read() == DATA


class TestBucket:
    def test_a_missing_one_is_told(self, s3_root: str) -> None:
        root = Root("s3://no-such-bucket/x")
        calls: list[Callable[[], Any]] = [
            root.check_writable,
            lambda: root.list("events"),
            lambda: root.read_bytes("a"),
        ]
        for call in calls:
            with pytest.raises(RootError, match="the bucket does not exist; create it"):
                call()

    def test_may_be_a_root_as_a_whole(self, s3_root: str) -> None:
        root, path = Root(s3_root), f"whole/{uuid.uuid4().hex}"
        root.put(path, b"1")
        assert root.read_bytes(path) == b"1"
        assert [o.path for o in root.list("whole")] == [path]
        assert "whole" in root.list_folders("")

    def test_a_listing_of_many_pages_is_whole(
        self, filled: Root, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pages = S3Store._pages
        monkeypatch.setattr(
            S3Store, "_pages", lambda store, prefix, **rest: pages(store, prefix, MaxKeys=1, **rest)
        )
        assert [info.path for info in filled.list("")] == ["a/1", "a/2", "b/c/1"]
        assert filled.list_folders("") == ["a", "b"]

    def test_a_fault_between_two_pages_costs_only_its_page(
        self, filled: Root, faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pages = S3Store._pages
        monkeypatch.setattr(
            S3Store, "_pages", lambda store, prefix: pages(store, prefix, MaxKeys=1)
        )
        faulty_s3.next("cut_body", path="continuation-token")
        assert [info.path for info in filled.list("")] == ["a/1", "a/2", "b/c/1"]
        assert len(faulty_s3.requests) == 4

    def test_more_than_one_request_can_delete_is_deleted(
        self, filled: Root, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("raysys.storage.s3._MAX_KEYS_PER_DELETE", 1)
        filled.delete_prefix("a")
        assert list(contents(filled)) == ["b/c/1"]

    @pytest.mark.parametrize(
        ("code", "error", "text"),
        [
            ("AccessDenied", RootError, "no access to a .*/a/2"),
            ("InternalError", StorageUnavailableError, "a: the object store did not answer.*/a/2"),
        ],
    )
    def test_an_object_that_it_did_not_delete_is_named(
        self, code: str, error: type[Exception], text: str, filled: Root,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        store: Any = Root(filled.uri, IMPATIENT)._store
        problem = {"Key": f"{filled.uri}/a/2", "Code": code, "Message": "no"}
        monkeypatch.setattr(store._s3, "delete_objects", lambda **kwargs: {"Errors": [problem]})
        with pytest.raises(error, match=text):
            store.delete_prefix("a")

    def test_settings_that_aws_does_not_know_are_one_clear_line(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(RootError, match=r"root s3://b: .*nobody.*; check the AWS settings"):
            Root("s3://b").list("")


def test_an_endpoint_where_nobody_listens_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with pytest.raises(StorageUnavailableError, match=r"s3://b/ledger/1: .*AWS_ENDPOINT_URL"):
        Root("s3://b", IMPATIENT).read_bytes("ledger/1")


def sent(code: str, status: int = 400) -> aws.ClientError:
    metadata: Any = {"ResponseMetadata": {"HTTPStatusCode": status}}
    return aws.ClientError({"Error": {"Code": code, "Message": "x\ny"}, **metadata}, "PutObject")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(sent("AccessDenied", 403), RootError, id="denied"),
        pytest.param(sent("ExpiredToken", 403), RootError, id="expired"),
        pytest.param(aws.NoCredentialsError(), RootError, id="no-credentials"),
        pytest.param(sent("InvalidURI"), RootError, id="invalid"),
        pytest.param(sent("NotImplemented", 501), RootError, id="unknown-to-the-store"),
        pytest.param(sent("NoSuchBucket", 404), RootError, id="bucket"),
        pytest.param(sent("NoSuchKey", 404), FileNotFoundError, id="object"),
        pytest.param(sent("404", 404), FileNotFoundError, id="object-by-head"),
        pytest.param(sent("SlowDown", 503), StorageUnavailableError, id="slow"),
        pytest.param(sent("", 502), StorageUnavailableError, id="gateway"),
        pytest.param(sent("429", 429), StorageUnavailableError, id="too-many"),
        pytest.param(sent("RequestTimeout", 400), StorageUnavailableError, id="slow-body"),
        pytest.param(
            sent("ConditionalRequestConflict", 409), StorageUnavailableError, id="conflict"
        ),
        pytest.param(
            aws.EndpointConnectionError(endpoint_url="http://x"),
            StorageUnavailableError,
            id="unreachable",
        ),
        pytest.param(
            aws.IncompleteReadError(actual_bytes=1, expected_bytes=2),
            StorageUnavailableError,
            id="cut",
        ),
        pytest.param(
            aws.FlexibleChecksumError(error_msg="x"), StorageUnavailableError, id="damaged"
        ),
    ],
)
def test_errors_of_the_store_get_a_class_and_one_line(
    error: Exception, expected: type[Exception]
) -> None:
    told = explain(error, "s3://b/p", "ledger/1", 1)
    assert type(told) is expected and "s3://b/p" in str(told)
    assert not isinstance(told, RaysysError) or "\n" not in str(told)
