"""What an update refuses before Ray is started, and what it says of privacy and builds upon."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raysys import update
from raysys.cli import app
from raysys.config import load_config
from raysys.ingest.pipeline import Ingested, IngestJob
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted, UpdateStarted, UserGroup
from raysys.ledger.verify import verify
from raysys.privacy import kept
from raysys.privacy.accounting import statement
from raysys.privacy.statement import NOT_PRIVATE
from raysys.registry.version import version_path
from raysys.rollout.state import abort, promote, start
from raysys.storage import Root
from tests.stub_steps import Steps
from tests.update_shop import (
    DAYS,
    contents,
    find_problems,
    write_catalogue,
    write_day,
    write_shop,
)

JOB = Path(__file__).parents[2] / "jobs" / "update.py"


class Shop:
    """A shop with a catalogue and one new day, and the update job's command line."""

    def __init__(self, folder: Path, encoder: str, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.root = Root((folder / "root").as_uri())
        self.encoder = encoder
        self.config = write_shop(folder, self.root, encoder)
        self._patch = patch
        write_catalogue(self.root)
        write_day(self.root, DAYS[0])

    def configure(self, **changes: Any) -> None:
        self.config = write_shop(self.folder, self.root, self.encoder, **changes)

    def append(self, line: str) -> None:
        self.config.write_text(f"{self.config.read_text()}{line}\n")

    def run_job(self) -> int | str | None:
        """Runs jobs/update.py in this process, where starting Ray is an error."""
        self._patch.setattr(sys, "argv", [str(JOB), "--config", str(self.config)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(JOB), run_name="__main__")
        return exit_info.value.code

    def commit(self, steps: Steps) -> UpdateCommitted:
        return steps.update(load_config(self.config))


@pytest.fixture
def shop(tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, tiny_encoder, monkeypatch)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


class TestJob:
    """One line on standard error and exit code 1, without Ray, and nothing read or changed."""

    def refuse(self, shop: Shop, capsys: pytest.CaptureFixture[str]) -> str:
        reads: list[str] = []
        whole, read_bytes = contents(shop.root), Root.read_bytes

        def record(root: Root, path: str) -> bytes:
            reads.append(path)
            return read_bytes(root, path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Root, "read_bytes", record)
            assert shop.run_job() == 1
        assert [path for path in reads if not path.startswith("ledger/")] == []
        assert contents(shop.root) == whole
        printed, error = capsys.readouterr()
        assert printed == "" and error.startswith("raysys: ") and error.count("\n") == 1
        return error

    def test_an_unknown_key_is_named(self, shop: Shop, capsys: Any) -> None:
        shop.append("trian: {num_steps: 3}")
        assert "trian: unknown key; did you mean train?" in self.refuse(shop, capsys)

    def test_a_config_that_is_not_there_is_named(self, shop: Shop, capsys: Any) -> None:
        shop.config = shop.folder / "none.yaml"
        assert "none.yaml cannot be read" in self.refuse(shop, capsys)

    def test_a_file_in_the_place_of_the_root_is_named(self, shop: Shop, capsys: Any) -> None:
        (shop.folder / "file").write_text("in the way")
        shop.config = write_shop(shop.folder, Root((shop.folder / "file").as_uri()), shop.encoder)
        assert f"root file://{shop.folder}/file: cannot write" in self.refuse(shop, capsys)

    def test_a_pseudonym_key_that_is_not_there_is_named(self, shop: Shop, capsys: Any) -> None:
        (shop.folder / "key").unlink()
        assert "pseudonyms.key_file" in self.refuse(shop, capsys)

    def test_an_encoder_without_weights_is_named(self, shop: Shop, capsys: Any) -> None:
        (shop.folder / "bare").mkdir()
        shop.config = write_shop(shop.folder, shop.root, str(shop.folder / "bare"))
        assert "bare has no model.safetensors" in self.refuse(shop, capsys)

    def test_a_shop_without_events_is_told_where_to_write(self, shop: Shop, capsys: Any) -> None:
        shop.root.delete_prefix("events")
        assert "write parquet files to events/dt=YYYY-MM-DD/" in self.refuse(shop, capsys)

    def test_a_shop_without_a_catalogue_spends_nothing(self, shop: Shop, capsys: Any) -> None:
        shop.root.delete_prefix("items")
        assert "the catalogue is empty" in self.refuse(shop, capsys)

    def test_a_budget_that_does_not_suffice_is_told_in_numbers(
        self, shop: Shop, capsys: Any
    ) -> None:
        shop.configure(epsilon_total=0.1)
        assert "of privacy.epsilon_total 0.1 (spent 0.000" in self.refuse(shop, capsys)

    def test_nothing_new_is_told_with_the_day_it_reaches(
        self, shop: Shop, steps: Steps, capsys: Any
    ) -> None:
        shop.commit(steps)
        assert f"all consumed up to {DAYS[0]}; 0 still open" in self.refuse(shop, capsys)

    def test_late_files_are_named(self, shop: Shop, steps: Steps, capsys: Any) -> None:
        shop.commit(steps)
        write_day(shop.root, DAYS[0], name="late.parquet")
        assert f"{DAYS[0]}/late.parquet came after update u0001-" in self.refuse(shop, capsys)

    def test_another_pseudonym_key_is_told(self, shop: Shop, steps: Steps, capsys: Any) -> None:
        shop.commit(steps)
        write_day(shop.root, DAYS[1])
        (shop.folder / "key").write_bytes(b"fedcba9876543210")
        assert "give the old key back" in self.refuse(shop, capsys)

    def test_an_update_that_nothing_stands_against_starts_ray(self, shop: Shop) -> None:
        """The negative control of all above: here a job that is not refused fails."""
        with pytest.raises(AssertionError, match="a unit test started Ray"):
            runpy.run_path(str(JOB))["update"](load_config(shop.config))
        assert list(Log(shop.root).entries()) == []


class TestSetAside:
    def test_what_the_plan_leaves_out_is_recorded_listed_and_asked_about_once(
        self, shop: Shop, steps: Steps
    ) -> None:
        shop.commit(steps)
        late = f"events/dt={DAYS[0]}/late.parquet"
        write_day(shop.root, DAYS[0], name="late.parquet")
        write_day(shop.root, DAYS[1])
        shop.append("partitions: {late_files: quarantine}")
        record = shop.commit(steps)
        assert [(aside.path, aside.kind) for aside in record.set_aside] == [(late, "late")]
        listed = json.loads(shop.root.read_bytes(f"quarantine/{record.update_id}/files.json"))
        first = Log(shop.root).refresh().committed[0].update_id
        reason = f"late: came after update {first} consumed events/dt={DAYS[0]}"
        assert listed == {late: reason}

        shop.configure()
        write_day(shop.root, DAYS[2])
        assert shop.commit(steps).set_aside == ()
        assert find_problems(shop.root) == []


class TestPrivacyStatement:
    def commit(self, shop: Shop, steps: Steps, day: str, *, private: bool) -> str:
        write_day(shop.root, day)
        shop.configure(private=json.dumps(private))
        record = shop.commit(steps)
        assert record.version is not None and record.private == private
        return shop.root.read_bytes(version_path(record.version, "report.md")).decode()

    def told(self, shop: Shop, command: str) -> tuple[str, Any]:
        runs = [[command, "--config", str(shop.config), *flags] for flags in ([], ["--json"])]
        text, body = (CliRunner().invoke(app, run).output for run in runs)
        return text, json.loads(body)

    def test_after_one_public_update_no_later_one_is_called_private(
        self, shop: Shop, steps: Steps
    ) -> None:
        reports = [self.commit(shop, steps, day, private=day != DAYS[1]) for day in DAYS[:3]]
        assert [NOT_PRIVATE in report for report in reports] == [False, True, True]
        assert ["epsilon" in report for report in reports] == [True, False, False]
        for command in ("status", "budget", "versions"):
            text, _ = self.told(shop, command)
            assert f"{NOT_PRIVATE} Updates: u0002-" in text
        assert self.told(shop, "status")[1]["private"] is False
        assert self.told(shop, "budget")[1]["private"] is False
        assert len(Log(shop.root).refresh().spends) == 2

    def test_private_updates_are_called_so(self, shop: Shop, steps: Steps) -> None:
        reports = [self.commit(shop, steps, day, private=True) for day in DAYS[:2]]
        assert not any(NOT_PRIVATE in report for report in reports)
        assert NOT_PRIVATE not in self.told(shop, "status")[0] + self.told(shop, "budget")[0]
        assert self.told(shop, "budget")[1]["private"] is True


class TestBudget:
    def test_each_start_names_what_was_kept_of_the_updates_before_it(
        self, shop: Shop, steps: Steps, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(update, "keep", kept.keep)
        for day in DAYS[:3]:
            write_day(shop.root, day)
            shop.commit(steps)
        records = [entry.record for entry in Log(shop.root).entries()]
        starts = [record for record in records if isinstance(record, UpdateStarted)]
        assert [s.kept_loss and s.kept_loss.num_updates for s in starts] == [None, 1, 2]
        assert verify(shop.root).ignored == () and find_problems(shop.root) == []
        state = Log(shop.root).refresh()
        kept.forget()
        found = [kept.life_so_far(root, state).epsilon(1e-4) for root in (shop.root, None)]
        assert found[0] == found[1] > 0

    def test_cohorts_take_turns_and_each_update_ingests_its_own(
        self, shop: Shop, steps: Steps, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        groups: list[UserGroup | None] = []

        def ingest(job: IngestJob, item_files: Any) -> Ingested:
            groups.append(job.group)
            return steps.ingest(job, item_files)

        monkeypatch.setattr(update, "ingest", ingest)
        for day in DAYS[:3]:
            write_day(shop.root, day)
            config = load_config(shop.config)
            privacy = dataclasses.replace(config.privacy, cohorts=2)
            steps.update(dataclasses.replace(config, privacy=privacy))
        assert [group.index for group in groups if group] == [0, 1, 0]
        spends = Log(shop.root).refresh().spends
        assert [spend.group for _, spend, _ in spends] == groups

    def test_the_log_tells_epsilon_with_what_it_is_about(self, shop: Shop, steps: Steps) -> None:
        told: list[str] = []
        update.run_update(load_config(shop.config), told.append)
        (line,) = (line for line in told if "epsilon" in line)
        assert line == f"epsilon is 0.010 of 50 with this update ({statement(1e-4)})"


def _promote(shop: Shop) -> None:
    Log(shop.root).transact(lambda state: promote(state, actor="operator", reason="good"))


def _roll_back(shop: Shop) -> None:
    Log(shop.root).transact(lambda state: abort(state, actor="operator", reason="bad"))


@pytest.mark.parametrize(
    ("end", "base"), [(_promote, 2), (_roll_back, 0)], ids=["promoted", "rolled-back"]
)
def test_an_update_builds_on_no_rolled_back_version_nor_on_what_was_built_on_one(
    shop: Shop, steps: Steps, end: Callable[[Shop], None], base: int
) -> None:
    commits = [shop.commit(steps)]
    write_day(shop.root, DAYS[1])
    commits.append(shop.commit(steps))
    on_trial = str(commits[1].version)
    Log(shop.root).transact(lambda s: start(s, on_trial, weight_fraction=0.5, actor="operator"))
    write_day(shop.root, DAYS[2])
    commits.append(shop.commit(steps))
    assert commits[2].base_version == on_trial
    end(shop)

    write_day(shop.root, DAYS[3])
    after = shop.commit(steps)
    assert after.base_version == commits[base].version
    # What was consumed stays so, and histories go on from the last commit.
    assert [partition.key for partition in after.partitions] == [f"events/dt={DAYS[3]}"]
    starts = [e.record for e in Log(shop.root).entries() if isinstance(e.record, UpdateStarted)]
    assert starts[-1].base_state == commits[2].update_id
