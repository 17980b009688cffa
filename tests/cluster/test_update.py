"""Whole updates on a real Ray: below a local folder and on S3, killed, refused, held, not private."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest
import ray
from typer.testing import CliRunner

from raysys.cli import app
from raysys.config import load_config
from raysys.errors import LeaseHeldError
from raysys.evaluate.report import NOT_PRIVATE
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted
from raysys.registry.store import load_version
from raysys.registry.version import version_path
from raysys.storage import Root
from raysys.update import run_update
from tests.helpers import file_uses, started
from tests.update_shop import (
    DAYS,
    contents,
    find_problems,
    find_raw_ids,
    outline,
    parquet,
    raw_id,
    write_catalogue,
    write_day,
    write_shop,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")
REPOSITORY = Path(__file__).parents[2]
UNREADABLE = f"events/dt={DAYS[1]}/cut-off.parquet"
LEFT_BEHIND = (
    "staging/u0009-dddddd/clean/0000/000000.parquet", "state/u0009-dddddd/items.json",
    "versions/v0009-dddddd/manifest.json", "quarantine/u0009-dddddd/rows-2017-03-01.parquet",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """Two updates of one shop, the first with bad input, the second with killed ones' remains."""

    root: Root
    num_rows: list[int]
    """Written for each update."""
    commits: list[UpdateCommitted]
    problems: list[list[str]]
    """After each update."""
    lines: list[str]
    raw_ids_on_the_way: list[str]
    """Objects that held a raw id when the gate had judged: staging is full then."""


def tell(root: Root, folder: Path, encoder: str) -> Story:
    config = load_config(write_shop(folder, root, encoder))
    story = Story(root=root, num_rows=[], commits=[], problems=[], lines=[], raw_ids_on_the_way=[])

    def on_progress(line: str) -> None:
        story.lines.append(line)
        if line.startswith("gate"):
            assert root.list("staging"), "this is when there is most to find"
            story.raw_ids_on_the_way.extend(find_raw_ids(root))

    def update() -> None:
        story.commits.append(run_update(config, on_progress))
        story.problems.append(find_problems(root))

    write_catalogue(root)
    story.num_rows.append(write_day(root, DAYS[0], bad_rows=True) + write_day(root, DAYS[1]))
    root.put(UNREADABLE, root.read_bytes(f"events/dt={DAYS[1]}/a.parquet")[:-100])
    update()

    root.delete_prefix("events")
    for path in LEFT_BEHIND:
        root.put(path, b"left by a killed update")
    story.num_rows.append(write_day(root, DAYS[2]))
    update()
    return story


@pytest.fixture(scope="module")
def tell_once(
    s3_root: str, tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Story]:
    """Tells the story below a root of either kind, once."""
    told: dict[str, Story] = {}

    def story(kind: str) -> Story:
        if kind not in told:
            folder = tmp_path_factory.mktemp("shop")
            uris = {"local": (folder / "root").as_uri(), "s3": f"{s3_root}/{uuid.uuid4().hex}"}
            told[kind] = tell(Root(uris[kind]), folder, tiny_encoder)
        return told[kind]

    return story


@pytest.fixture(scope="module", params=["local", "s3"])
def story(request: pytest.FixtureRequest, tell_once: Callable[[str], Story]) -> Story:
    return tell_once(request.param)


class TestTwoUpdates:
    def test_each_reads_what_is_new_and_needs_no_older_file(self, story: Story) -> None:
        first, second = story.commits
        assert [p.key for p in first.partitions] == [f"events/dt={day}" for day in DAYS[:2]]
        assert [p.key for p in second.partitions] == [f"events/dt={DAYS[2]}"]
        assert set(map(len, file_uses(story.commits).values())) == {1}
        assert len(first.item_files) == 1 and second.item_files == ()
        assert (first.watermark, second.watermark) == (DAYS[1], DAYS[2])

    def test_the_second_starts_from_the_first(self, story: Story) -> None:
        first, second = story.commits
        assert first.base_version is None and second.base_version == first.version
        versions = [load_version(story.root, commit) for commit in story.commits]
        user = next(iter(versions[0]._histories))
        assert set(versions[0].history(user).items) <= set(versions[1].history(user).items)

    def test_leave_nothing_but_what_was_committed(self, story: Story) -> None:
        assert story.problems == [[], []]
        assert Log(story.root).refresh().active is None

    def test_versions_load_and_score_their_golden_requests(self, story: Story) -> None:
        for commit in story.commits:
            load_version(story.root, commit).check_golden()

    def test_every_row_is_counted_and_bad_input_is_set_aside(self, story: Story) -> None:
        first, second = story.commits
        assert [commit.num_rows for commit in story.commits] == story.num_rows
        assert [sum(commit.row_counts.values()) for commit in story.commits] == story.num_rows
        assert first.row_counts["quarantined"] == 2 and first.row_counts["duplicate"] == 1
        assert "quarantined" not in second.row_counts
        assert list(first.quarantined_files) == [UNREADABLE]
        assert "not a readable parquet file" in first.quarantined_files[UNREADABLE]
        refused = pl.read_parquet(
            story.root.read_bytes(f"quarantine/{first.update_id}/rows-{DAYS[0]}.parquet")
        )
        assert sorted(refused["reason"]) == ["no item_id", "no user_id"]
        assert any(UNREADABLE in line for line in story.lines)

    def test_no_raw_user_id_is_kept_or_printed(self, story: Story) -> None:
        assert story.raw_ids_on_the_way == [] and find_raw_ids(story.root) == []
        assert not any("user-" in line for line in story.lines)

    def test_every_reservation_is_charged_and_told(self, story: Story) -> None:
        state = Log(story.root).refresh()
        assert [status for *_, status in state.spends] == ["committed"] * 2
        for commit in story.commits:
            report = story.root.read_bytes(version_path(str(commit.version), "report.md")).decode()
            assert "User-level differential privacy" in report and NOT_PRIVATE not in report


def test_a_local_root_and_s3_are_left_alike(tell_once: Callable[[str], Story]) -> None:
    local, s3 = tell_once("local"), tell_once("s3")
    assert [outline(c) for c in local.commits] == [outline(c) for c in s3.commits]
