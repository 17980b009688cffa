"""Listing the names after one: how a reader finds the end of a long ledger."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

from raysys.storage import Root


def test_lists_the_names_right_in_a_folder_that_come_after_one(root: Root) -> None:
    for path in ("ledger/2", "ledger/1", "ledger/3", "ledger/snapshots/9", "ledger2/9"):
        root.put(path, b"")
    assert root.list_names("ledger") == ["1", "2", "3"]
    assert root.list_names("ledger", after="1") == ["2", "3"]
    assert root.list_names("ledger", after="2x") == ["3"]
    assert root.list_names("ledger", after="3") == root.list_names("absent") == []


def test_lists_names_beyond_one_page_of_an_answer(s3_root: str) -> None:
    root = Root(f"{s3_root}/{uuid.uuid4().hex}")
    names = [f"{number:04d}" for number in range(1100)]  # S3 answers 1000 at a time
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: root.put(f"ledger/{name}", b""), names))
    assert root.list_names("ledger") == names
    assert root.list_names("ledger", after="0049") == names[50:]
