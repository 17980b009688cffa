"""A rotation carries every pseudonym forward, wholly or not at all, and draws nobody anew."""

from __future__ import annotations

import io
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from raysys import rotate
from raysys.config import Config, load_config
from raysys.errors import ArtifactError, ConfigError, LeaseHeldError
from raysys.ingest.history import HISTORY_SCHEMA
from raysys.ingest.pseudonym import Pseudonymizer, is_held_out, user_shard
from raysys.ingest.shard_state import load_held_out, load_histories, shard_path
from raysys.ledger.lease import Lease
from raysys.ledger.log import Log
from raysys.ledger.records import (
    PseudonymsRotated,
    UpdateStarted,
)
from raysys.registry.store import hash_state
from raysys.storage import Root
from raysys.storage.parquet import to_parquet
from tests.crashes import kill_before
from tests.helpers import FakeClock, committed, started
from tests.stub_steps import Steps
from tests.update_shop import (
    DAYS,
    contents,
    find_problems,
    raw_id,
    write_catalogue,
    write_day,
    write_shop,
)

JOB = Path(__file__).parents[2] / "jobs" / "rotate_key.py"
KEY, NEXT = b"0123456789abcdef", b"fedcba9876543210"
OLD, NEW = Pseudonymizer(KEY), Pseudonymizer(KEY, NEXT)
BASE = "u0001-aaaaaa"
USERS = [raw_id(number) for number in range(200)]


class Shop:
    """A root with one committed update of 200 users, made with the first of two keys."""

    def __init__(self, folder: Path, encoder: str) -> None:
        self.root = Root((folder / "root").as_uri())
        self.file = write_shop(folder, self.root, encoder)
        self.keys = folder / "key"
        self.folder, self._saved = folder / "root", folder / "saved"
        self.clock = FakeClock()
        self._write_state()
        start = started(BASE, user_key_id=OLD.key_id, partitions=())
        record = committed(start, artifacts=hash_state(self.root, BASE))
        log = Log(self.root)
        log.transact(lambda state: start)
        log.transact(lambda state: record)
        self.add_key()

    def add_key(self) -> None:
        self.keys.write_bytes(KEY + b"\n" + NEXT + b"\n")

    @property
    def config(self) -> Config:
        return load_config(self.file)

    def _write_state(self) -> None:
        for shard in range(2):
            name = shard_path(BASE, "histories", shard, 2)
            self.root.put(name, to_parquet(_of_shard(_histories(), shard)))
            name = shard_path(BASE, "pending", shard, 2)
            self.root.put(name, to_parquet(_of_shard(_pending(), shard)))
        self.root.put(f"state/{BASE}/items.parquet", to_parquet(pl.DataFrame({"item_id": ["i1"]})))
        self.root.put(f"state/{BASE}/items.json", b"{}")

    def rotate(self) -> PseudonymsRotated | None:
        self.clock.advance(3600.0)
        return rotate.rotate_key(self.config)

    def state_of(self, update_id: str, name: str) -> pl.DataFrame:
        files = self.root.list(f"state/{update_id}/{name}")
        return pl.concat(pl.read_parquet(io.BytesIO(self.root.read_bytes(f.path))) for f in files)

    def save(self) -> None:
        shutil.rmtree(self._saved, ignore_errors=True)
        shutil.copytree(self.folder, self._saved)

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self._saved, self.folder)


def _histories() -> pl.DataFrame:
    rows = [
        {"user": OLD.pseudonym(user), "item": item, "count": 1.0 + place, "decayed": 0.5,
         "first_ts": 1.0, "last_ts": 2.0 + place}
        for place, user in enumerate(USERS) for item in range(3)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=HISTORY_SCHEMA)


def _pending() -> pl.DataFrame:
    """Stands for whatever else an update keeps about users: some have no history yet."""
    names = [OLD.pseudonym(user) for user in (*USERS[:50], "newcomer")]
    return pl.DataFrame(
        {"user": names, "request_id": [f"n.{name}.mac" for name in names], "n": range(51)}
    )


def _of_shard(frame: pl.DataFrame, shard: int) -> pl.DataFrame:
    return frame.filter(user_shard(2) == shard)


@pytest.fixture
def shop(tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> Shop:
    shop = Shop(tmp_path, tiny_encoder)
    clock = shop.clock

    def lease(log: Log, **settings: Any) -> Lease:
        return Lease(log, clock=clock, monotonic=clock, sleep=clock.sleep, **settings)

    monkeypatch.setattr(rotate, "Lease", lease)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    return shop


def rotated(shop: Shop) -> PseudonymsRotated:
    record = shop.rotate()
    assert record is not None
    return record


class TestState:
    def test_every_users_rows_are_theirs_under_the_new_pseudonym(self, shop: Shop) -> None:
        record = rotated(shop)
        assert record.num_users == 201
        after = load_histories(shop.root, record.update_id)
        expected = _histories().with_columns(
            user=pl.Series([NEW.pseudonym(user) for user in USERS for _ in range(3)])
        )
        assert after.equals(expected.sort("user", "item"))

    def test_files_that_ingest_adds_are_carried_forward_by_their_column_user(
        self, shop: Shop
    ) -> None:
        record = rotated(shop)
        after = shop.state_of(record.update_id, "pending").sort("n")
        names = [NEW.pseudonym(user) for user in (*USERS[:50], "newcomer")]
        assert after["user"].to_list() == names
        assert after["request_id"].to_list() == [f"n.{name}.mac" for name in names]

    def test_each_shard_holds_its_own_users(self, shop: Shop) -> None:
        record = rotated(shop)
        for shard in range(2):
            data = shop.root.read_bytes(shard_path(record.update_id, "histories", shard, 2))
            frame = pl.read_parquet(io.BytesIO(data))
            assert len(frame) > 100 and _of_shard(frame, shard).equals(frame)

    def test_what_is_about_no_user_is_copied(self, shop: Shop) -> None:
        record = rotated(shop)
        for name in ("items.parquet", "items.json"):
            found = shop.root.read_bytes(f"state/{record.update_id}/{name}")
            assert found == shop.root.read_bytes(f"state/{BASE}/{name}")

    def test_no_old_pseudonym_is_in_the_new_state(self, shop: Shop) -> None:
        record = rotated(shop)
        old = {OLD.pseudonym(user) for user in USERS}

        def mentioned(update_id: str) -> set[str]:
            folders = shop.root.list_folders(f"state/{update_id}")
            text = "".join(shop.state_of(update_id, name).write_json() for name in folders)
            return {name for name in old if name in text}

        assert mentioned(BASE) == old  # the search finds what is there
        assert mentioned(record.update_id) == set()

    def test_nobody_who_was_trained_on_is_held_out_afterwards(self, shop: Shop) -> None:
        record = rotated(shop)
        after = load_held_out(shop.root, record.update_id)
        fraction = shop.config.ingest.holdout_fraction
        before = pl.DataFrame({"user": [OLD.pseudonym(user) for user in (*USERS, "newcomer")]})
        before = before.with_columns(held_out=is_held_out(fraction))
        carried = {NEW.translate(user, OLD.key_id): out for user, out in before.iter_rows()}
        assert dict(after.iter_rows()) == carried
        # A draw by the new pseudonym would have moved users.
        drawn = after.with_columns(anew=is_held_out(fraction))
        assert drawn.filter(pl.col("held_out") != pl.col("anew")).height > 20

    def test_a_second_rotation_keeps_the_first_draw(self, shop: Shop) -> None:
        first = load_held_out(shop.root, rotated(shop).update_id)
        shop.keys.write_bytes(b"\n".join([KEY, NEXT, b"a third key, also long"]))
        keys = Pseudonymizer.from_file(shop.keys)
        second = load_held_out(shop.root, rotated(shop).update_id)
        carried = {keys.translate(user, NEW.key_id): out for user, out in first.iter_rows()}
        assert dict(second.iter_rows()) == carried


class TestLedger:
    def test_the_next_update_starts_from_the_new_state_and_nothing_else_changes(
        self, shop: Shop
    ) -> None:
        before = Log(shop.root).refresh()
        record = rotated(shop)
        after = Log(shop.root).refresh()
        assert (after.head_state, after.user_key_id) == (record.update_id, NEW.key_id)
        assert after.rotations == (record,) and after.active is None
        assert record.base_state == BASE
        for name in ("committed", "versions", "spends", "consumed_files", "watermark",
                     "head_version", "stable"):  # fmt: skip
            assert getattr(after, name) == getattr(before, name), name
        assert find_problems(shop.root) == []

    def test_the_state_before_stays_for_the_versions_that_serve_with_it(self, shop: Shop) -> None:
        whole = contents(shop.root)
        rotated(shop)
        assert whole.items() <= contents(shop.root).items()

    def test_an_update_goes_on_from_it_with_the_new_key(
        self, shop: Shop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record, steps = rotated(shop), Steps(monkeypatch)
        write_catalogue(shop.root)
        write_day(shop.root, DAYS[1])
        commit = steps.update(shop.config)
        starts = [e.record for e in Log(shop.root).entries() if isinstance(e.record, UpdateStarted)]
        assert starts[-1].base_state == record.update_id
        assert commit.user_key_id == NEW.key_id
        state = Log(shop.root).refresh()
        assert state.head_state == commit.update_id and state.user_key_id == NEW.key_id
        assert [c.user_key_id for c in state.committed] == [OLD.key_id, NEW.key_id]

    def test_an_update_before_it_asks_for_it(
        self, shop: Shop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_catalogue(shop.root)
        write_day(shop.root, DAYS[1])
        whole = contents(shop.root)
        with pytest.raises(ConfigError, match=r"run jobs/rotate_key.py first"):
            Steps(monkeypatch).update(shop.config)
        assert contents(shop.root) == whole


class TestRefusals:
    def test_nothing_to_do_changes_nothing(self, shop: Shop) -> None:
        rotated(shop)
        whole, lines = contents(shop.root), []
        assert rotate.rotate_key(shop.config, lines.append) is None
        assert contents(shop.root) == whole
        assert lines == [f"the pseudonyms are of key {NEW.key_id} already: add a key first"]

    def test_a_root_without_an_update_has_nothing_to_rotate(self, shop: Shop) -> None:
        shop.root.delete_prefix("ledger")
        lines: list[str] = []
        assert rotate.rotate_key(shop.config, lines.append) is None
        assert lines == [f"no update is committed yet: the first takes key {NEW.key_id}"]

    def test_keys_without_the_one_in_use_are_refused(self, shop: Shop) -> None:
        shop.keys.write_bytes(NEXT)
        whole = contents(shop.root)
        with pytest.raises(ConfigError, match=f"made with key {OLD.key_id}; give the old key back"):
            shop.rotate()
        assert contents(shop.root) == whole

    def test_no_update_may_run_meanwhile(self, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        update = started("u0002-bbbbbb", user_key_id=OLD.key_id, partitions=())
        log = Log(shop.root, clock=shop.clock)
        with Lease(log, owner="host:2", duration_s=60, clock=shop.clock) as lease:
            lease.start(lambda state: update)
            monkeypatch.setattr(shop.clock, "sleep", lambda seconds: lease.renew())
            with pytest.raises(LeaseHeldError, match="u0002-bbbbbb is being run by host:2"):
                rotate.rotate_key(shop.config)

    def test_a_damaged_state_is_not_carried_forward(self, shop: Shop) -> None:
        shop.root.put(shard_path(BASE, "histories", 0, 2), to_parquet(_histories().head(1)))
        with pytest.raises(ArtifactError, match=r"histories/0000-of-0002.parquet has sha256"):
            shop.rotate()
        state = Log(shop.root).refresh()
        assert (state.head_state, state.user_key_id) == (BASE, OLD.key_id)
        assert [update.reason[:13] for update in state.abandoned] == ["ArtifactError"]

    def test_so_is_one_with_a_file_missing(self, shop: Shop) -> None:
        shop.root.delete_prefix(shard_path(BASE, "histories", 0, 2))
        with pytest.raises(ArtifactError, match=r"histories/0000-of-0002.parquet is missing"):
            shop.rotate()


class TestJob:
    def run(self, shop: Shop, patch: pytest.MonkeyPatch) -> int | str | None:
        patch.setattr(sys, "argv", [str(JOB), "--config", str(shop.file)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(JOB), run_name="__main__")
        return exit_info.value.code

    def test_it_says_what_it_did_without_a_cluster(
        self, shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(shop, monkeypatch) == 0
        printed = capsys.readouterr().out
        assert f"carries {BASE} to key {NEW.key_id}" in printed
        assert "201 users have new pseudonyms" in printed
        assert self.run(shop, monkeypatch) == 0

    def test_a_key_that_is_not_there_is_one_line_and_exit_code_1(
        self, shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = shop.file.read_text().replace("key_file: key", "key_env: RAYSYS_NO_SUCH_KEY")
        shop.file.write_text(text)
        assert self.run(shop, monkeypatch) == 1
        error = capsys.readouterr().err
        assert error.startswith("raysys: pseudonyms.key_env: ") and error.count("\n") == 1


def crashes(shop: Shop) -> Iterator[int]:
    """Kills a rotation before each of its changes in turn; yields with the root as that left it."""
    shop.save()
    num_changes = kill_before(None, shop.rotate)
    for change in range(num_changes):
        shop.restore()
        assert kill_before(change, shop.rotate) == change
        yield change


def first_problem(shop: Shop) -> str:
    for change in crashes(shop):
        state = Log(shop.root).refresh()
        done = state.user_key_id == NEW.key_id
        if (state.head_state == BASE) == done:
            return f"killed before change {change}: half done"
        shop.rotate()
        state = Log(shop.root).refresh()
        if (
            len(state.rotations) != 1
            or len(load_histories(shop.root, str(state.head_state))) != 600
        ):
            return f"killed before change {change}: not carried on"
        if problems := find_problems(shop.root):
            return f"killed before change {change}: {problems[0]}"
    return "none"


def test_a_killed_rotation_changed_nothing_or_is_done_and_runs_again(shop: Shop) -> None:
    assert first_problem(shop) == "none"


def test_what_a_killed_rotation_left_is_removed_by_the_next_update(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    write_catalogue(shop.root)
    write_day(shop.root, DAYS[1])
    seen = set()
    for _ in crashes(shop):
        state = Log(shop.root).refresh()
        seen.add((state.active is not None, len(shop.root.list_folders("state"))))
        shop.keys.write_bytes(KEY if state.user_key_id == OLD.key_id else KEY + b"\n" + NEXT)
        steps.update(shop.config)
        assert find_problems(shop.root) == []
        shop.add_key()
    assert {(True, 1), (True, 2)} <= seen


def never_clean_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rotate, "delete_orphans", lambda root, log: None)


def commit_early(patch: pytest.MonkeyPatch) -> None:
    """The record is written before the files that it names."""
    state_bytes, whole = rotate.state_bytes, {}

    def late(*args: Any) -> Any:
        whole.update(state_bytes(*args))
        return iter(())

    patch.setattr(rotate, "state_bytes", late)


@pytest.mark.parametrize(
    ("breaks", "problem"),
    [
        pytest.param(never_clean_up, "belongs to no committed update", id="never-clean-up"),
        pytest.param(commit_early, "not carried on", id="commit-without-files"),
    ],
)
def test_a_rotation_that_breaks_its_word_is_caught(
    breaks: Callable[[pytest.MonkeyPatch], None],
    problem: str,
    shop: Shop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breaks(monkeypatch)
    assert problem in first_problem(shop)
