"""Whole updates on a real Ray: on a local root and on S3, killed, refused, held, not private."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
import ray
from typer.testing import CliRunner

from raysys.cli import app
from raysys.config import load_config
from raysys.errors import LeaseHeldError, PartitionChangedError, ReplayMismatchError
from raysys.evaluate.report import NOT_PRIVATE
from raysys.ingest.shard_state import load_histories
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.ledger.records import LeaseRenewed, StepsPermitted, UpdateCommitted, UpdateStarted
from raysys.registry.recipe import Recipe
from raysys.registry.store import load_version
from raysys.registry.version import version_path
from raysys.replay import replay
from raysys.storage import Root
from raysys.update import run_update
from tests.helpers import file_uses, started
from tests.update_shop import (
    DAYS,
    RAW_ID_MARK,
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
LEASE_S = 4.0
"""Where a second updater must see the first one renew, on a machine that is busy."""
NUM_STEPS = 500
"""Some seconds of training, to be killed in."""
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


def histories(root: Root, commit: UpdateCommitted) -> set[tuple[str, int]]:
    """Which user bought which item, as the update left it."""
    return set(load_histories(root, commit.update_id).select("user", "item").iter_rows())


def tell(root: Root, folder: Path, encoder: str) -> Story:
    config = load_config(write_shop(folder, root, encoder, vanished_files="quarantine"))
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
    assert len(find_problems(root)) == len(LEFT_BEHIND)
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
        gone = [f"events/dt={day}/a.parquet" for day in DAYS[:2]]
        assert [(aside.kind, aside.path) for aside in second.set_aside] == [
            ("vanished", path) for path in gone
        ]

    def test_the_second_starts_from_the_first(self, story: Story) -> None:
        first, second = story.commits
        assert first.base_version is None and second.base_version == first.version
        assert histories(story.root, first) < histories(story.root, second)

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
        refused = {k: n for k, n in first.row_counts.items() if k.startswith("quarantined")}
        assert refused == {"quarantined: no item_id": 1, "quarantined: no user_id": 1}
        assert first.row_counts["duplicate"] == 1
        assert not any(name.startswith("quarantined") for name in second.row_counts)
        assert list(first.quarantined_files) == [UNREADABLE]
        assert "not a readable parquet file" in first.quarantined_files[UNREADABLE]
        rows = pl.read_parquet(
            story.root.read_bytes(f"quarantine/{first.update_id}/rows-000000-0000.parquet")
        )
        assert sorted(rows["reason"]) == ["no item_id", "no user_id"]
        assert set(rows["path"]) == {f"events/dt={DAYS[0]}/a.parquet"}
        assert any(UNREADABLE in line for line in story.lines)

    def test_a_version_is_replayed_from_what_it_read_to_the_same_examples(
        self, story: Story, tmp_path: Path, tiny_encoder: str
    ) -> None:
        first, second = story.commits
        config = load_config(write_shop(tmp_path, story.root, tiny_encoder))
        before = contents(story.root)
        done = replay(config, str(second.version))
        assert (done.update_id, done.weights) == (second.update_id, False)
        assert done.num_examples > 0 and contents(story.root) == before
        with pytest.raises(PartitionChangedError, match=f"{DAYS[0]}/a.parquet vanished"):
            replay(config, first.update_id)

    def test_a_replay_that_comes_out_otherwise_is_refused(
        self, story: Story, tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = load_config(write_shop(tmp_path, story.root, tiny_encoder))
        version = str(story.commits[1].version)
        honest = Recipe.load

        def other_cap(root: Root, commit: UpdateCommitted) -> Recipe:
            recipe = honest(root, commit)
            recipe.config["ingest"]["max_positives"] = 1
            return recipe

        monkeypatch.setattr(Recipe, "load", other_cap)
        with pytest.raises(ReplayMismatchError, match=r"examples/0000\.arrow came out with sha256"):
            replay(config, version)
        assert story.root.list("replays") == []

    def test_no_raw_user_id_is_kept_or_printed(self, story: Story) -> None:
        assert story.raw_ids_on_the_way == [] and find_raw_ids(story.root) == []
        assert RAW_ID_MARK not in "\n".join(story.lines)

    def test_every_reservation_is_charged_and_told(self, story: Story) -> None:
        state = Log(story.root).refresh()
        assert [status for *_, status in state.spends] == ["committed"] * 2
        for commit in story.commits:
            report = story.root.read_bytes(version_path(str(commit.version), "report.md")).decode()
            assert "User-level differential privacy" in report and NOT_PRIVATE not in report


def test_a_local_root_and_s3_are_left_alike(tell_once: Callable[[str], Story]) -> None:
    local, s3 = tell_once("local"), tell_once("s3")
    assert [outline(c) for c in local.commits] == [outline(c) for c in s3.commits]


@pytest.mark.parametrize(
    ("name", "data"),
    {
        "note.json": raw_id(7).encode(),
        f"user={raw_id(7)}/empty.json": b"",
        "compressed.parquet": parquet(pl.DataFrame({"user": [raw_id(7)] * 1000})),
    }.items(),
    ids=["bytes", "path", "compressed"],
)
def test_a_raw_user_id_would_be_found(local_root: Root, name: str, data: bytes) -> None:
    local_root.put(f"events/dt={DAYS[0]}/{name}", data)
    assert find_raw_ids(local_root) == []
    local_root.put(f"state/u0001-aaaaaa/{name}", data)
    assert find_raw_ids(local_root) == [f"state/u0001-aaaaaa/{name}"]


@contextmanager
def update_job(config: Path) -> Iterator[subprocess.Popen[str]]:
    """The job as `ray job submit` starts it: its own process, which joins the running Ray."""
    address = ray.get_runtime_context().gcs_address
    job = subprocess.Popen(
        [sys.executable, "jobs/update.py", "--config", str(config)],
        cwd=REPOSITORY,
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield job
    finally:
        job.kill()
        job.communicate()


def test_a_second_job_is_refused_while_one_runs(
    local_root: Root, tmp_path: Path, tiny_encoder: str
) -> None:
    config = write_shop(tmp_path, local_root, tiny_encoder, lease_s=LEASE_S)
    write_catalogue(local_root)
    write_day(local_root, DAYS[0])
    with Lease(Log(local_root), owner="elsewhere:1", duration_s=LEASE_S) as lease:
        lease.start(lambda state: started("u0001-aaaaaa"))
        before = without_ledger(local_root)
        with update_job(config) as job:
            printed, _ = job.communicate(timeout=120)
        lease.check()
        assert job.returncode == 75
        own = [line for line in printed.splitlines() if line.startswith("raysys:")]
        assert len(own) == 1 and "Traceback" not in printed
        assert own[0].startswith("raysys: update u0001-aaaaaa is being run by elsewhere:1 (renewed")
        assert without_ledger(local_root) == before
        assert only_renewals_since_the_start(local_root)


def without_ledger(root: Root) -> dict[str, bytes]:
    return {path: data for path, data in contents(root).items() if not path.startswith("ledger/")}


def only_renewals_since_the_start(root: Root, *others: type) -> bool:
    first, *rest = [entry.record for entry in Log(root).entries()]
    allowed = (LeaseRenewed, *others)
    return isinstance(first, UpdateStarted) and all(isinstance(r, allowed) for r in rest)


def test_an_update_killed_in_training_is_taken_over_held_and_built_upon(
    local_root: Root, tmp_path: Path, tiny_encoder: str
) -> None:
    """One story, since an update takes seconds."""
    root = local_root
    held = {"num_steps": NUM_STEPS, "min_holdout_users": 1_000_000, "lease_s": LEASE_S}
    config = write_shop(tmp_path, root, tiny_encoder, **held)
    write_catalogue(root)
    for day in DAYS[:2]:
        write_day(root, day)

    # A second updater is refused. Then comes kill -9, in the middle of training.
    with update_job(config) as job:
        printed = read_until(job, "reads 2 new partitions")
        with pytest.raises(LeaseHeldError):
            run_update(load_config(config))
        printed += read_until(job, f"step 10 of {NUM_STEPS}")
        os.kill(job.pid, signal.SIGKILL)
        printed += job.communicate(timeout=30)[0]
    assert f"step {NUM_STEPS} of {NUM_STEPS}" not in printed and RAW_ID_MARK not in printed
    assert only_renewals_since_the_start(root, StepsPermitted)
    dead = Log(root).refresh().active
    assert dead is not None and dead.started.reserved is not None
    assert 10 <= dead.permitted_steps <= NUM_STEPS
    assert any(f"staging/{dead.update_id}" in problem for problem in find_problems(root))

    # The same command again reads the same, and leaves nothing of the dead one but its charge.
    first = run_update(load_config(config))
    assert find_problems(root) == [] and find_raw_ids(root) == []
    assert first.partitions == dead.started.partitions
    assert [partition.key for partition in first.partitions] == [f"events/dt={d}" for d in DAYS[:2]]
    state = Log(root).refresh()
    # Workers may have taken one more block before they noticed that the driver was gone.
    (_, charged, _), _ = state.spends
    assert dead.permitted_steps <= charged.num_steps <= NUM_STEPS
    assert [(name, status) for name, _, status in state.spends] == [
        (dead.update_id, "abandoned"),
        (first.update_id, "committed"),
    ]

    # The gate held it back: no version, but what it read stays read and known.
    assert first.version is None and first.verdict == "held"
    assert "gate.min_holdout_users is 1000000" in first.reason
    assert root.list("versions") == [] and state.head_state == first.update_id
    assert all(path.startswith(f"state/{first.update_id}/") for path in first.artifacts)

    # The next one starts from that state, and here without privacy.
    write_day(root, DAYS[2])
    second = run_update(load_config(write_shop(tmp_path, root, tiny_encoder, private="false")))
    assert find_problems(root) == [] and find_raw_ids(root) == []
    assert [partition.key for partition in second.partitions] == [f"events/dt={DAYS[2]}"]
    assert second.base_version is None and second.version is not None
    assert histories(root, first) < histories(root, second)
    load_version(root, second).check_golden()
    assert second.spent is None and Log(root).refresh().spends == state.spends
    assert NOT_PRIVATE in root.read_bytes(version_path(second.version, "report.md")).decode()

    # Without privacy all draws have a seed, so the weights can be made again too.
    assert replay(load_config(config), second.version).weights
    write_shop(tmp_path, root, tiny_encoder)
    for command in ("status", "budget"):
        told = CliRunner().invoke(app, [command, "--config", str(config)]).output
        assert f"{NOT_PRIVATE} Updates: {second.update_id}" in told


def read_until(job: subprocess.Popen[str], mark: str) -> str:
    assert job.stdout is not None
    lines = []
    for line in job.stdout:
        lines.append(line)
        if mark in line:
            return "".join(lines)
    raise AssertionError(f"the job ended without {mark!r}:\n{''.join(lines)}")
