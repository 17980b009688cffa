"""A raw user id is written nowhere: no object below the root, no log, no output, no answer.

Updates and replicas meet good and bad input in which every user id carries a mark, and everything
that they leave is searched for it. Ingest is the real one, its Ray Data tasks called in a row.
"""

from __future__ import annotations

import datetime
import io
import json
import logging
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from raysys.errors import StorageUnavailableError
from raysys.ingest.pseudonym import no_values_in_errors
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted
from raysys.storage import Root
from tests.fakes import ITEMS, FakeReplica, FakeVersion
from tests.helpers import committed, started
from tests.stub_steps import Steps, ingest_in_a_row
from tests.update_shop import (
    DAYS,
    RAW_ID_MARK,
    find_raw_ids,
    parquet,
    raw_id,
    write_catalogue,
    write_day,
    write_shop,
)

JOB = Path(__file__).parents[2] / "jobs" / "update.py"
ALICE, BOB = raw_id(1), raw_id(2)
NOON = datetime.datetime.fromisoformat(f"{DAYS[0]}T12:00:00+00:00")


def event(**changes: Any) -> dict[str, Any]:
    return {"event_id": "e1", "event_type": "purchase", "user_id": ALICE, "item_id": "i01",
            "ts": NOON, **changes}  # fmt: skip


def frame(**changes: Any) -> bytes:
    return parquet(pl.DataFrame([event(**changes)]))


def with_column(name: str, column: pl.Series | pl.Expr) -> bytes:
    return parquet(pl.DataFrame([event()]).with_columns(pl.lit(column).alias(name)))


def described() -> bytes:
    """The id is in the file's metadata, which some messages quote."""
    buffer = io.BytesIO()
    pl.DataFrame([event()]).write_parquet(buffer, metadata={"author": ALICE})
    return buffer.getvalue()[:-9]


BAD_FILES: dict[str, bytes] = {
    "not parquet": f"event_id,user_id\ne1,{ALICE}\n".encode(),
    "cut off": frame()[:-20],
    "cut off in its metadata": described(),
    "no header": parquet(pl.DataFrame({ALICE: ["e2"], "purchase": ["e3"]})),
    "a user as a column": parquet(pl.DataFrame([event()]).drop("ts").with_columns(x=1)
                                  .rename({"x": BOB})),
    "a user for a time": frame(ts=ALICE),
    "bytes for a time": frame(ts=ALICE.encode()),
    "an enum for a time": with_column("ts", pl.Series([ALICE], dtype=pl.Enum([ALICE, BOB]))),
    "categories for a time": with_column("ts", pl.Series([ALICE], dtype=pl.Categorical())),
    "a user for a price": frame(price=ALICE),
    "a user for a type": frame(event_type=ALICE),
    "a user for a key": frame(user_key_id=ALICE),
    "a raw id that claims a key": frame(user_key_id="7ecd1ca3"),
    "a user in a list": frame(user_id=[ALICE]),
    "a user in a struct": frame(user_id={"id": ALICE}),
    "bytes for a user": frame(user_id=ALICE.encode() + b"\xff"),
    "a user without an item": frame(item_id=None),
    "a user of another day": frame(ts=NOON.replace(year=2016)),
    "an unknown column": frame(email=ALICE),
}  # fmt: skip


class Shop:
    """A shop that is updated without Ray; all output, logs and objects can be searched."""

    def __init__(self, folder: Path, encoder: str, patch: pytest.MonkeyPatch) -> None:
        self.root = Root((folder / "root").as_uri())
        self.config = write_shop(folder, self.root, encoder)
        self.patch = patch
        Steps(patch)
        ingest_in_a_row(patch)
        patch.setattr("ray.init", lambda **settings: None)
        write_catalogue(self.root)
        write_day(self.root, DAYS[0], bad_rows=True)

    def run_job(self) -> int | str | None:
        """As `python jobs/update.py` would run, except that a bug is raised."""
        self.patch.setattr(sys, "argv", [str(JOB), "--config", str(self.config)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(JOB), run_name="__main__")
        return exit_info.value.code


@pytest.fixture
def shop(tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, tiny_encoder, monkeypatch)


@pytest.fixture
def said(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[[], str]]:
    """Everything that was printed, by any library, and logged, at any level."""
    caplog.set_level(logging.DEBUG)

    def text() -> str:
        printed, error = capfd.readouterr()
        return printed + error + caplog.text

    yield text


class TestUpdate:
    def test_of_good_and_bad_rows_leaves_none(self, shop: Shop, said: Callable[[], str]) -> None:
        assert shop.run_job() == 0
        state = Log(shop.root).refresh()
        assert num_quarantined(state.committed[-1]) == 2
        assert find_raw_ids(shop.root) == []
        assert "rows of" in (told := said()) and RAW_ID_MARK not in told

    def test_of_bad_files_leaves_none(self, shop: Shop, said: Callable[[], str]) -> None:
        for name, data in BAD_FILES.items():
            shop.root.put(f"events/dt={DAYS[0]}/{name}.parquet", data)
        assert shop.run_job() == 0
        assert find_raw_ids(shop.root) == []
        assert "committed" in (told := said())
        assert [line for line in told.splitlines() if RAW_ID_MARK in line] == []
        commit = Log(shop.root).refresh().committed[-1]
        assert len(commit.quarantined_files) > 8 and num_quarantined(commit) > 6

    def test_of_a_bad_item_file_leaves_none(self, shop: Shop, said: Callable[[], str]) -> None:
        shop.root.put("items/bad.parquet", parquet(pl.DataFrame({ALICE: [1]})))
        shop.root.put("items/broken.parquet", ALICE.encode())
        shop.root.put("items/times.parquet", parquet(pl.DataFrame(
            {"item_id": ["i01"], "updated_at": [ALICE.encode()]}
        )))  # fmt: skip
        assert shop.run_job() == 0
        assert len(Log(shop.root).refresh().committed[-1].quarantined_files) == 3
        assert find_raw_ids(shop.root) == []
        assert RAW_ID_MARK not in said()

    def test_that_fails_at_the_door_says_where_and_no_values(
        self, shop: Shop, said: Callable[[], str]
    ) -> None:
        def breaks(frame: pl.DataFrame, *rest: Any, **named: Any) -> None:
            raise pl.exceptions.ComputeError(f"conversion failed: {frame['user_id'].to_list()}")

        shop.patch.setattr("raysys.ingest.read.clean", breaks)
        with pytest.raises(RuntimeError, match=r"ComputeError at .*test_raw_ids.py:\d+") as caught:
            runpy.run_path(str(JOB))["update"](update_config(shop))
        assert find_raw_ids(shop.root) == []
        assert RAW_ID_MARK not in said() + _traceback(caught.value)
        (abandoned,) = Log(shop.root).refresh().abandoned
        assert abandoned.reason == "RuntimeError; see the job's log"

    def test_that_fails_behind_it_has_none_to_tell(self, shop: Shop) -> None:
        """Whatever a later step's exception quotes is made of pseudonyms."""

        def breaks(rows: pl.DataFrame, **named: Any) -> None:
            raise ValueError(f"{rows.to_dicts()}")

        shop.patch.setattr("raysys.ingest.pipeline.split_events", breaks)
        with pytest.raises(ValueError, match=r"'user': '[0-9a-f]{32}'") as caught:
            runpy.run_path(str(JOB))["update"](update_config(shop))
        assert RAW_ID_MARK not in _traceback(caught.value)
        assert find_raw_ids(shop.root) == []


def num_quarantined(commit: UpdateCommitted) -> int:
    counts = commit.row_counts
    return sum(num for reason, num in counts.items() if reason.startswith("quarantined"))


def update_config(shop: Shop) -> Any:
    from raysys.config import load_config

    return load_config(shop.config)


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


class TestDoor:
    def test_a_foreign_message_does_not_get_out(self) -> None:
        with (
            pytest.raises(RuntimeError, match="ValueError at") as caught,
            no_values_in_errors("a.parquet"),
        ):
            raise ValueError(ALICE)
        assert RAW_ID_MARK not in _traceback(caught.value)

    def test_without_it_one_would(self) -> None:
        try:
            raise ValueError(ALICE)
        except ValueError as error:
            assert RAW_ID_MARK in _traceback(error)


BAD_REQUESTS: dict[str, tuple[str, Any]] = {
    "user too long": ("rank", {"user_id": ALICE * 20, "candidates": ["apple"]}),
    "user in a list": ("rank", {"user_id": [ALICE], "candidates": ["apple"]}),
    "user in an object": ("rank", {"user_id": {"id": ALICE}, "candidates": ["apple"]}),
    "user with a broken character": ("rank", {"user_id": f"{ALICE}\ud800", "candidates": ["a"]}),
    "session too long": ("rank", {"request_id": ALICE * 20, "candidates": ["apple"]}),
    "unknown candidates": ("rank", {"user_id": ALICE, "candidates": ["zebra"]}),
    "no candidates": ("rank", {"user_id": ALICE}),
    "unknown key": ("rank", {"user_id": ALICE, "candidates": ["apple"], "kk": 1}),
    "a user alone": ("rank", ALICE),
    "time of long ago": ("rank", {"user_id": ALICE, "candidates": ["apple"], "ts": 1.0}),
    "a user for a request": ("feedback", {"request_id": ALICE, "events": []}),
    "a user for an answer": (
        "feedback",
        {"request_id": ALICE, "events": [{"event_type": "click", "item_id": "apple"}]},
    ),
    "feedback for a long user": ("feedback", {"request_id": ALICE * 40, "events": []}),
}


class TestReplica:
    @pytest.fixture
    def replica(self, local_root: Root) -> FakeReplica:
        start = started("u0001-aaaaaa")
        records = [start, committed(start, version="v0001-aaaaaa")]
        versions = {"v0001-aaaaaa": FakeVersion("v0001-aaaaaa")}
        return FakeReplica(local_root, versions, records, max_ts_age_s=60.0)

    def rank(self, client: Any, **changes: Any) -> Any:
        body = {"user_id": ALICE, "candidates": list(ITEMS), "request_id": BOB, **changes}
        return client.post("/v1/rank", json=body)

    def feedback(self, client: Any, request_id: str, user_id: str = ALICE) -> Any:
        events = [{"event_type": "click", "item_id": "apple"}]
        body = {"request_id": request_id, "user_id": user_id, "events": events}
        return client.post("/v1/feedback", json=body)

    def test_good_requests_leave_none(self, replica: FakeReplica, said: Callable[[], str]) -> None:
        with replica.client() as client:
            answer = self.rank(client)
            anonymous = self.rank(client, user_id=None)
            for response in (answer, anonymous):
                done = self.feedback(client, response.json()["request_id"])
                assert done.status_code == 200
                assert RAW_ID_MARK not in response.text + done.text
            other = self.feedback(client, answer.json()["request_id"], user_id=BOB)
            assert other.status_code == 422 and RAW_ID_MARK not in other.text
        assert len(replica.root.list("events")) >= 2
        assert find_raw_ids(replica.root) == [] and RAW_ID_MARK not in said()
        assert RAW_ID_MARK not in repr(vars(replica.metrics))

    @pytest.mark.parametrize(("place", "body"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
    def test_a_refusal_does_not_say_it_back(
        self, place: str, body: Any, replica: FakeReplica, said: Callable[[], str]
    ) -> None:
        with replica.client() as client:
            response = client.post(
                f"/v1/{place}",
                content=json.dumps(body),
                headers={"Content-Type": "application/json"},
            )
        assert 400 <= response.status_code < 500
        assert RAW_ID_MARK not in response.text
        assert find_raw_ids(replica.root) == [] and RAW_ID_MARK not in said()

    def test_nor_does_one_of_a_body_that_is_no_json(
        self, replica: FakeReplica, said: Callable[[], str]
    ) -> None:
        with replica.client() as client:
            for body in (f'{{"user_id": "{ALICE}', f"user_id={ALICE}", ALICE):
                headers = {"Content-Type": "application/json"}
                response = client.post("/v1/rank", content=body, headers=headers)
                assert response.status_code == 400 and RAW_ID_MARK not in response.text
        assert RAW_ID_MARK not in said()

    def test_a_version_that_breaks_on_a_user_has_none_to_tell(
        self, replica: FakeReplica, said: Callable[[], str]
    ) -> None:
        def breaks(scores: Any) -> Any:
            raise KeyError(replica.available["v0001-aaaaaa"].users)  # type: ignore[union-attr]

        with replica.client() as client:
            replica.available["v0001-aaaaaa"]._score = breaks  # type: ignore[union-attr]
            assert self.rank(client).status_code == 500
        assert "KeyError" in (told := said()) and RAW_ID_MARK not in told

    def test_feedback_that_cannot_be_stored_is_logged_without_it(
        self, replica: FakeReplica, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with replica.client() as client:
            request_id = self.rank(client).json()["request_id"]

            def breaks(frame: pl.DataFrame) -> bytes:
                raise StorageUnavailableError(f"{frame.to_dicts()}")

            with monkeypatch.context() as patch:
                patch.setattr("raysys.serve.feedback.to_parquet", breaks)
                assert self.feedback(client, request_id).status_code == 503
        assert "events were not stored" in (told := said()) and RAW_ID_MARK not in told


class TestSearch:
    """Negative controls: the searches above would find what they look for."""

    @pytest.mark.parametrize(
        "path",
        ["state/u0001-aaaaaa/a.parquet", f"events/dt={DAYS[0]}/feedback-1.parquet",
         f"events/dt={DAYS[0]}/impressions-1.parquet", "versions/v0001-aaaaaa/a.parquet"],
    )  # fmt: skip
    def test_a_leak_below_the_root_is_found(self, local_root: Root, path: str) -> None:
        local_root.put(path, parquet(pl.DataFrame({"user_id": [ALICE]})))
        assert find_raw_ids(local_root) == [path]

    def test_a_leak_into_output_or_log_is_found(self, said: Callable[[], str]) -> None:
        print(ALICE, file=sys.stderr)
        assert RAW_ID_MARK in said()
        logging.getLogger("raysys.serve.service").debug("user %s", ALICE)
        assert RAW_ID_MARK in said()

    def test_a_reason_that_quotes_a_value_is_found(
        self, shop: Shop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "raysys.partitions.schema.name_columns", lambda names, schema: list(names)
        )
        shop.root.put(f"events/dt={DAYS[0]}/bad.parquet", BAD_FILES["no header"])
        assert shop.run_job() == 0
        found = find_raw_ids(shop.root)
        assert any(path.startswith("ledger/") for path in found)
        assert any(path.startswith("quarantine/") for path in found)

    def test_an_answer_that_says_a_value_back_is_found(
        self, local_root: Root, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("raysys.serve.refusals._got", lambda error: f", got {error['input']}")
        with FakeReplica(local_root, {}).client() as client:
            response = client.post("/v1/rank", json=BAD_REQUESTS["user too long"][1])
        assert RAW_ID_MARK in response.text
