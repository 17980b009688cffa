"""What a task does with one partition: bad files and rows are set aside, named and counted."""

from __future__ import annotations

import dataclasses
import datetime
import io
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from raysys.config import Config, IngestConfig, PrivacyConfig, PseudonymConfig
from raysys.errors import PartitionChangedError
from raysys.ingest import clean_task, pipeline
from raysys.ingest import read as reading
from raysys.ingest.clean import CLEAN_COLUMNS
from raysys.ingest.groups import tuning_group
from raysys.ingest.pipeline import IngestJob, _clean
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.shards import group_files, read_shard
from raysys.partitions.discover import discover
from raysys.storage import Root

KEY = b"0123456789abcdef"
NOON = datetime.datetime(2017, 3, 1, 12, tzinfo=datetime.UTC)
RAW_ID = "alice@example.com"
UPDATE = "u0001-aaaaaa"


def event(event_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "event_id": event_id, "event_type": "purchase", "user_id": RAW_ID, "item_id": "i1",
        "ts": NOON, **changes,
    }  # fmt: skip


def parquet(*rows: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(list(rows)).write_parquet(buffer)
    return buffer.getvalue()


def read(root: Root, prefix: str) -> pl.DataFrame:
    return pl.concat(
        pl.read_parquet(io.BytesIO(root.read_bytes(file.path))) for file in root.list(prefix)
    )


@pytest.fixture
def job(local_root: Root, tmp_path: Path) -> IngestJob:
    """One partition of a good file, a file with bad rows, and two files that cannot be read."""
    (tmp_path / "key").write_bytes(KEY)
    files = {
        "a.parquet": parquet(event("e1"), event("e2", user_id="bob")),
        "b.parquet": parquet(event("e3"), event("e4", item_id=""), event("e5", ts=None)),
        "c.parquet": b"not parquet",
        "d.parquet": parquet({"event_id": "e6"}),
    }
    for name, data in files.items():
        local_root.put(f"events/dt=2017-03-01/{name}", data)
    return IngestJob(
        root=local_root,
        work=local_root,
        config=Config(
            root=local_root.uri,
            pseudonyms=PseudonymConfig(key_file=str(tmp_path / "key")),
            ingest=IngestConfig(num_shards=2),
        ),
        update_id=UPDATE,
        base_state=None,
        partitions=discover(local_root).partitions,
        read_before=(),
        user_key_id=Pseudonymizer(KEY).key_id,
        key_ids={},
        seed=0,
    )


def clean(job: IngestJob) -> dict[str, Any]:
    """Runs the one task of the job."""
    (files,) = group_files(job.partitions, job.config.ingest.task_bytes)
    return _clean({"task": 0, "files": files}, job)


def test_rows_of_unreadable_files_are_not_counted_and_the_files_are_named(job: IngestJob) -> None:
    done = clean(job)
    assert done["num_rows"] == 5
    assert done["row_counts"] == {"quarantined: no item_id": 1, "quarantined: no ts": 1}
    bad = done["bad_files"]
    assert list(bad) == [f"events/dt=2017-03-01/{name}.parquet" for name in ("c", "d")]
    assert all(reason.startswith(path) for path, reason in bad.items())


def test_bad_rows_go_to_quarantine_with_file_and_reason_but_without_the_user(
    job: IngestJob,
) -> None:
    clean(job)
    refused = read(job.root, f"quarantine/{UPDATE}").sort("event_id")
    assert refused.select("event_id", "reason").rows() == [("e4", "no item_id"), ("e5", "no ts")]
    assert set(refused["path"]) == {"events/dt=2017-03-01/b.parquet"}
    assert "user" not in " ".join(refused.columns)


def test_usable_rows_lie_in_the_batch_of_their_users_shard(job: IngestJob) -> None:
    done = clean(job)
    shards = [pl.concat(read_shard(job.root, done["paths"], shard)) for shard in range(2)]
    rows = pl.concat(shards)
    assert rows.columns == CLEAN_COLUMNS
    assert sorted(rows["event_id"]) == ["e1", "e2", "e3"]
    for shard, held in enumerate(shards):
        assert {int(name[:8], 16) % 2 for name in held["user"]} <= {shard}


def test_the_raw_user_id_is_in_nothing_that_was_written(job: IngestJob) -> None:
    clean(job)
    # The search finds what is there: the partition itself, which is the shop's, holds the id.
    assert RAW_ID in _text_of(job.root.read_bytes("events/dt=2017-03-01/a.parquet"))
    hasher = Pseudonymizer(KEY)
    paths = [file.path for file in job.root.list(f"staging/{UPDATE}")]
    written = pl.concat([f for s in range(2) for f in read_shard(job.root, paths, s)]).write_json()
    assert hasher.pseudonym(RAW_ID) in written
    for text in (written, read(job.root, f"quarantine/{UPDATE}").write_json()):
        assert RAW_ID not in text and "bob" not in text


def _text_of(data: bytes) -> str:
    return pl.read_parquet(io.BytesIO(data)).write_json()


def test_a_task_that_is_run_again_writes_the_same(job: IngestJob) -> None:
    def written() -> dict[str, bytes]:
        files = [*job.root.list("staging"), *job.root.list("quarantine")]
        return {file.path: job.root.read_bytes(file.path) for file in files}

    first = clean(job), written()
    assert (clean(job), written()) == first


def test_a_file_that_is_corrupt_at_its_end_leaves_nothing_of_its_beginning(
    job: IngestJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean_task, "PART_ROWS", 10)
    monkeypatch.setattr(reading.iter_events, "__kwdefaults__", {"batch_rows": 10})
    rows = pl.DataFrame([event(f"e{i}", item_id="i" if i % 3 else "") for i in range(100)])
    buffer = io.BytesIO()
    pq.write_table(rows.to_arrow(), buffer, row_group_size=10, write_page_checksum=True)
    data = bytearray(buffer.getvalue())
    last = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(9).column(0)
    page = last.data_page_offset + last.total_compressed_size // 2
    data[page : page + 8] = bytes(255 - byte for byte in data[page : page + 8])
    job.root.delete_prefix("events")
    job.root.put("events/dt=2017-03-01/z.parquet", bytes(data))
    broken = dataclasses.replace(job, partitions=discover(job.root).partitions)
    written: list[str] = []
    put = Root.put
    monkeypatch.setattr(
        Root, "put", lambda root, path, data: (written.append(path), put(root, path, data))
    )
    done = clean(broken)
    assert len(written) > 3, "much of it was written before the end was read"
    assert list(done["bad_files"]) == ["events/dt=2017-03-01/z.parquet"]
    assert (done["num_rows"], done["paths"], done["row_counts"]) == (0, [], {})
    assert job.root.list("staging") == [] and job.root.list("quarantine") == []


@pytest.mark.parametrize("change", ["gone", "rewritten"])
def test_a_file_that_changes_while_it_is_read_fails_the_update(
    job: IngestJob, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = job.partitions[0].files[0].path
    honest = clean_task.iter_events

    def meanwhile(*args: Any, **options: Any) -> Any:
        yield from honest(*args, **options)
        job.root.delete_prefix(path)
        if change == "rewritten":
            job.root.put(path, parquet(event("e9"), event("e10"), event("e11")))

    monkeypatch.setattr(clean_task, "iter_events", meanwhile)
    with pytest.raises(PartitionChangedError, match=path):
        clean(job)


def test_a_file_that_is_gone_before_it_is_read_is_no_bug_of_ours(job: IngestJob) -> None:
    path = job.partitions[0].files[0].path
    job.root.delete_prefix(path)
    with pytest.raises(PartitionChangedError, match=f"{path} vanished"):
        clean(job)


@pytest.mark.parametrize("enabled", [True, False], ids=["private", "not private"])
def test_released_counts_have_noise_by_all_the_items_that_one_user_may_raise(
    job: IngestJob, enabled: bool
) -> None:
    """25 items by 1 each are 5 in L2 norm, and noise is 3 times that."""
    config = dataclasses.replace(
        job.config,
        ingest=dataclasses.replace(job.config.ingest, max_items_per_user_period=25),
        privacy=PrivacyConfig(enabled=enabled, count_noise_multiplier=3.0),
    )
    job, nothing = dataclasses.replace(job, config=config), io.BytesIO()
    schema = {"period": pl.Int32, "item": pl.Int32, "count": pl.Int32}
    pl.DataFrame(schema=schema).write_parquet(nothing)
    for shard in range(job.num_shards):
        job.work.put(pipeline._staged(job, "counts", shard), nothing.getvalue())
    released = pipeline._release(job, 10_000)
    # Nine standard errors: the noise has no seed.
    assert np.std(released) == pytest.approx(15.0 if enabled else 0.0, rel=9 / np.sqrt(20_000))


def test_a_shard_is_told_which_users_are_charged(job: IngestJob) -> None:
    trained, tried = (tuning_group(0.5, job.user_key_id, tuned_on=on) for on in (False, True))
    charged = dataclasses.replace(job, group=trained, tried=tried)
    found = pipeline._settings(charged, Mock())
    assert (found.group, found.tried) == (trained, tried)
    assert found.user_key_id == job.user_key_id
