"""The command line: what it shows, what it refuses, and that a refusal changes nothing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import PoissonSampledDpEvent
from typer.testing import CliRunner, Result

import raysys.doctor
from raysys.cli import app
from raysys.errors import ConfigError, StorageUnavailableError
from raysys.ingest.groups import cohort_group
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ledger.log import Log
from raysys.ledger.records import Record, SelectionSpend, StepsPermitted
from raysys.privacy import budget
from raysys.privacy.accounting import statement
from raysys.privacy.composed import Composed
from raysys.rollout.state import advance
from raysys.storage import Root
from tests.helpers import SPEND, abandoned, committed, partition, started, write_config
from tests.update_shop import contents

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
METRICS = {"before": {"ndcg10": {"mean": 0.3}}, "after": {"ndcg10": {"mean": 0.3125}}}
FIRST = started("u0001-aaaaaa", partitions=(partition("2017-03-01"), partition("2017-03-02")))
SECOND = started("u0002-bbbbbb", partitions=(partition("2017-03-03"),), base_version="v0001-aaaaaa")
THIRD = started("u0003-cccccc", partitions=(partition("2017-03-04"),))
TWO_VERSIONS: tuple[Record, ...] = (
    FIRST,
    committed(FIRST, metrics=METRICS),
    SECOND,
    committed(SECOND, metrics=METRICS),
)


@pytest.fixture
def config(tmp_path: Path, root: Root) -> Path:
    return write_config(tmp_path, root.uri)


@pytest.fixture
def local_config(tmp_path: Path, local_root: Root) -> Path:
    return write_config(tmp_path, local_root.uri)


def append(root: Root, *records: Record) -> None:
    log = Log(root)
    for record in records:
        log.transact(lambda state, record=record: record)  # type: ignore[misc]


def run(config: Path, *args: str) -> Result:
    return CliRunner().invoke(app, [*args, "--config", str(config)])


def text(config: Path, *args: str) -> str:
    result = run(config, *args)
    assert result.exit_code == 0, result.output
    return result.stdout


def body(config: Path, *args: str) -> dict[str, Any]:
    """The one JSON object that the command prints."""
    found = json.loads(text(config, *args, "--json"))
    assert isinstance(found, dict)
    return found


def refusal(config: Path, *args: str, exit_code: int = 1) -> str:
    """The one line of a refused command."""
    result = run(config, *args)
    assert result.exit_code == exit_code and result.stdout == ""
    assert result.stderr.startswith("raysys: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


class TestStatus:
    def test_of_an_empty_root_is_all_none(self, config: Path) -> None:
        found = body(config, "status")
        assert found["num_records"] == 0 and found["active"] is None
        assert found["rollout"]["stable"] is None
        assert "newest none" in text(config, "status")

    def test_tells_versions_watermark_and_rollout(self, config: Path, root: Root) -> None:
        append(root, *TWO_VERSIONS, THIRD, abandoned("u0003-cccccc"))
        found = body(config, "status")
        assert (found["num_committed"], found["num_abandoned"], found["num_versions"]) == (2, 1, 2)
        assert found["num_partitions"] == 3 and found["watermark"] == "2017-03-03"
        assert found["head_version"] == "v0002-bbbbbb" and found["private"] is True
        assert found["rollout"]["stable"] == "v0001-aaaaaa"
        shown = text(config, "status")
        assert "2 committed, 1 abandoned, 3 partitions up to 2017-03-03" in shown
        assert "stable     v0001-aaaaaa" in shown and "NOT PRIVATE" not in shown

    def test_tells_who_runs_an_update(self, local_config: Path, local_root: Root) -> None:
        append(local_root, FIRST)
        active = body(local_config, "status")["active"]
        assert active["update_id"] == "u0001-aaaaaa" and active["owner"] == "host:1"
        assert "running    u0001-aaaaaa by host:1, lease expired" in text(local_config, "status")

    def test_says_not_private_of_an_update_without_privacy(
        self, local_config: Path, local_root: Root
    ) -> None:
        public = started(private=False, reserved=None)
        append(local_root, public, committed(public))
        assert body(local_config, "status")["private"] is False
        for command in ("status", "budget", "versions"):
            assert "NOT PRIVATE" in text(local_config, command)
            assert "Updates: u0001-aaaaaa" in text(local_config, command)


@pytest.fixture
def counted_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composes by counting steps: the accountant has tests of its own, and takes seconds."""

    def count(self: Composed, delta: float) -> float:
        ran = self.everyone[None].ran.items()
        steps = [num for event, num in ran if isinstance(event, PoissonSampledDpEvent)]
        return float(sum(steps)) / 10

    monkeypatch.setattr(Composed, "epsilon", count)
    monkeypatch.setattr(budget, "_alone", budget._alone.__wrapped__)
    monkeypatch.setattr("raysys.privacy.calibrate.updates_paid", lambda config: 7)


@pytest.mark.usefixtures("counted_epsilon")
class TestPlan:
    DAYS = ("events/dt=2017-03-01", "events/dt=2017-03-02", "events/dt=2017-03-03/hour=05")

    @pytest.fixture
    def shop(self, local_root: Root) -> Root:
        """A root with three partitions and a catalogue that nobody has read."""
        for key in self.DAYS:
            local_root.put(f"{key}/a.parquet", b"x" * 10)
        local_root.put("items/a.parquet", b"")
        return local_root

    def test_shows_what_is_new_and_changes_nothing(self, config: Path, root: Root) -> None:
        for day, size in (("2017-03-01", 10), ("2017-03-02", 20)):
            root.put(f"events/dt={day}/a.parquet", b"x" * size)
        root.put("items/a.parquet", b"")
        before = contents(root)
        found = body(config, "plan")
        assert [p["key"] for p in found["partitions"]] == list(self.DAYS[:2])
        assert found["size_bytes"] == 30 and found["item_files"] == ["items/a.parquet"]
        assert found["base_version"] is None and found["watermark"] == "2017-03-02"
        assert found["set_aside"] == [] and found["refusal"] is None
        shown = text(config, "plan")
        assert "2 partitions and 1 item files are new (30 bytes), 0 partitions still" in shown
        assert "starts     from a head set by hand and no state" in shown
        assert contents(root) == before

    def test_shows_from_where_the_update_starts_and_what_it_sets_aside(
        self, tmp_path: Path, shop: Root
    ) -> None:
        extra = "partitions: {rewritten_files: quarantine, vanished_files: quarantine}\n"
        config = write_config(tmp_path, shop.uri, extra)
        first = dataclasses.replace(
            FIRST, user_key_id=Pseudonymizer.from_file(tmp_path / "key").key_id
        )
        append(shop, first, committed(first))
        shop.delete_prefix("events/dt=2017-03-02/a.parquet")
        shop.put("events/dt=2017-03-02/_SUCCESS", b"")
        found = body(config, "plan")
        assert [p["key"] for p in found["partitions"]] == ["events/dt=2017-03-03/hour=05"]
        assert [(a["path"], a["kind"]) for a in found["set_aside"]] == [
            ("events/dt=2017-03-01/a.parquet", "rewritten"),
            ("events/dt=2017-03-02/a.parquet", "vanished"),
        ]
        assert (found["watermark_now"], found["watermark"]) == ("2017-03-02", "2017-03-03T05")
        shown = text(config, "plan")
        assert "from v0001-aaaaaa and the state of u0001-aaaaaa" in shown
        assert "set aside  events/dt=2017-03-02/a.parquet: is gone after update" in shown

    def test_shows_what_is_left_for_later_updates(self, tmp_path: Path, shop: Root) -> None:
        config = write_config(tmp_path, shop.uri, "partitions: {max_partitions: 1}\n")
        assert body(config, "plan")["num_left"] == 2
        assert "0 partitions still open, 2 left for later updates" in text(config, "plan")

    def test_shows_what_the_update_would_spend(self, local_config: Path, shop: Root) -> None:
        append(shop, SECOND, abandoned("u0002-bbbbbb"))
        found = body(local_config, "plan")
        assert found["spend"]["num_steps"] == 40 and found["spend"]["num_count_releases"] == 1
        privacy = found["privacy"]
        assert (privacy["epsilon_spent"], privacy["epsilon_alone"]) == (1.5, 4.0)
        assert (privacy["epsilon_after"], privacy["epsilon_left"]) == (5.5, 2.5)
        shown = text(local_config, "plan")
        assert "epsilon 4.000 alone, from 1.500 to 5.500 of 8, 2.500 left" in shown
        assert "unit: a user; neighbours: add or remove one user; delta 0.0001" in shown

    def test_tells_noise_cohort_and_how_long_the_budget_lasts(
        self, tmp_path: Path, shop: Root
    ) -> None:
        extra = "privacy: {noise_multiplier: 3, horizon: 20, cohorts: 4}\n"
        config = write_config(tmp_path, shop.uri, extra)
        append(shop, SECOND, abandoned("u0002-bbbbbb"))
        shown, key_id = text(config, "plan"), Pseudonymizer.from_file(tmp_path / "key").key_id
        assert f"users      of group cohorts/4/{key_id}:1" in shown
        assert "noise      3, as configured: epsilon_total 8 pays for 7 updates" in shown
        assert "privacy.horizon is 20" in shown
        assert "lasts      for 1 updates like this one, it included" in shown
        privacy = body(config, "plan")["privacy"]
        assert privacy["updates_left"] == 1 and privacy["noise"].startswith("3, as configured")

    @pytest.mark.parametrize("command", ["plan", "budget", "status", "versions"])
    def test_no_privacy_figure_is_printed_without_what_it_is_about(
        self, tmp_path: Path, shop: Root, command: str
    ) -> None:
        append(shop, SECOND, abandoned("u0002-bbbbbb"))
        config = write_config(tmp_path, shop.uri)
        about = statement(1e-4)
        for shown in (text(config, command), json.dumps(body(config, command))):
            assert ("epsilon" in shown) == (command in ("plan", "budget"))
            assert about in shown or "epsilon" not in shown
        refused = write_config(tmp_path, shop.uri, "privacy: {epsilon_total: 3}\n")
        assert about in run(refused, "plan").stderr

    def test_says_not_private_where_privacy_is_off(self, tmp_path: Path, shop: Root) -> None:
        config = write_config(tmp_path, shop.uri, "privacy: {enabled: false}\n")
        assert "NOT PRIVATE" in text(config, "plan")
        assert body(config, "plan")["privacy"] is None

    @pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
    @pytest.mark.parametrize("cause", ["budget", "key", "catalogue", "targets"])
    def test_ends_as_the_update_would_if_that_would_be_refused(
        self, tmp_path: Path, shop: Root, tiny_encoder: str, cause: str, as_json: bool
    ) -> None:
        extra = "privacy: {epsilon_total: 3}\n" if cause == "budget" else ""
        config = write_config(tmp_path, shop.uri, extra)
        if cause == "key":
            append(shop, THIRD, committed(THIRD))
            config = write_config(tmp_path, shop.uri, "partitions: {vanished_files: quarantine}\n")
        if cause == "catalogue":
            shop.delete_prefix("items")
        if cause == "targets":
            model = f"model: {{encoder: {tiny_encoder}, target_modules: [q_proj]}}\n"
            config = write_config(tmp_path, shop.uri, model)
        before = contents(shop)
        result = run(config, "plan", *(["--json"] if as_json else []))
        message = {
            "budget": "this update would bring epsilon to 4.000 of privacy.epsilon_total 3 ",
            "key": "pseudonyms: the keys given are 7ecd1ca3, but the histories below",
            "catalogue": "the catalogue is empty (no item files): write item rows below",
            "targets": "model.target_modules: no module q_proj; ",
        }[cause]
        assert result.exit_code == 1 and result.stderr.startswith(f"raysys: {message}")
        assert result.stderr.count("\n") == 1 and "events/dt=2017-03-02" in result.stdout
        if as_json:
            assert json.loads(result.stdout)["refusal"].startswith(message)
        assert contents(shop) == before

    def test_without_anything_new_is_one_line(self, config: Path, root: Root) -> None:
        assert "write parquet files to events/dt=YYYY-MM-DD/" in refusal(config, "plan")
        assert root.list("") == []

    def test_of_a_misnamed_folder_names_it(self, local_config: Path, local_root: Root) -> None:
        local_root.put("events/march/a.parquet", b"")
        assert "folder events/march" in refusal(local_config, "plan")

    def test_of_a_changed_partition_is_the_updates_refusal(
        self, local_config: Path, shop: Root
    ) -> None:
        append(shop, FIRST, committed(FIRST))
        assert "a.parquet (and 1 more) was written anew" in refusal(local_config, "plan")

    def test_imports_neither_ray_nor_torch(self, local_config: Path, shop: Root) -> None:
        program = (
            "import sys; from raysys.cli import app; app(standalone_mode=False); "
            "print(sorted({'ray', 'torch'} & sys.modules.keys()))"
        )
        command = [sys.executable, "-c", program, "plan", "--config", str(local_config)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        assert ended.stdout.splitlines()[-1] == "[]"


@pytest.mark.usefixtures("counted_epsilon")
class TestBudget:
    def test_states_unit_relation_delta_and_accountant_even_before_the_first_update(
        self, local_config: Path
    ) -> None:
        shown = text(local_config, "budget")
        assert "unit: a user; neighbours: add or remove one user; delta 0.0001" in shown
        assert "accountant: PLD" in shown and "epsilon 0.000 of 8 spent, 8.000 left" in shown

    def test_lists_each_update_with_its_share(self, local_config: Path, local_root: Root) -> None:
        cheap = dataclasses.replace(SPEND, num_steps=5)
        append(local_root, FIRST, committed(FIRST, spent=cheap), SECOND)
        found = body(local_config, "budget")
        assert [(u["update_id"], u["status"], u["epsilon_alone"]) for u in found["updates"]] == [
            ("u0001-aaaaaa", "committed", 0.5),
            ("u0002-bbbbbb", "reserved", 1.5),
        ]
        assert found["epsilon_spent"] == 2.0 and found["epsilon_left"] == 6.0
        assert found["updates_left"] == 4 and found["private"] is True
        assert found["unit"] == "user" and found["accountant"] and found["statement"]

    def test_tells_users_steps_that_may_have_run_and_selections(
        self, local_config: Path, local_root: Root
    ) -> None:
        trials = SelectionSpend(
            method="compose", num_steps=5, sampling_prob=0.25, noise_multiplier=4.0,
            score_noise_multiplier=10.0, num_trials=3, mean_trials=3.0, shape=0.0, delta=0.0,
        )  # fmt: skip
        spend = dataclasses.replace(
            SPEND, group=cohort_group(8, "key", 3), selection=trials, num_evaluations=1
        )
        first = dataclasses.replace(FIRST, reserved=spend, permits_steps=True)
        second = dataclasses.replace(SECOND, permits_steps=True)
        permits = [
            StepsPermitted(update_id=start.update_id, num_steps=num)
            for start, num in ((first, 4), (second, 7))
        ]
        append(local_root, first, permits[0], abandoned("u0001-aaaaaa"), second, permits[1])
        dead, running = body(local_config, "budget")["updates"]
        assert (dead["num_steps"], dead["group"]) == (4, "cohorts/8/key:3")
        assert dead["selection"] == "compose: 3 trials of 5 steps, noise 4"
        assert (dead["num_evaluations"], running["num_steps"], running["group"]) == (1, 15, None)
        lines = text(local_config, "budget").splitlines()
        assert "4 may have run" in lines[1] and "1 + 1 evaluations" in lines[1]
        assert "15 reserved, 7 may have run" in lines[2] and "  all  " in lines[2]

    def test_says_not_private_where_privacy_is_off(self, tmp_path: Path, local_root: Root) -> None:
        config = write_config(tmp_path, local_root.uri, "privacy:\n  enabled: false\n")
        assert "NOT PRIVATE" in text(config, "budget")
        assert body(config, "budget")["private"] is False


class TestVersions:
    def test_lists_versions_with_role_and_metrics(self, config: Path, root: Root) -> None:
        append(root, *TWO_VERSIONS)
        first, second = body(config, "versions")["versions"]
        assert first["version"] == "v0001-aaaaaa" and first["role"] == "stable"
        assert first["partitions"] == ["events/dt=2017-03-01", "events/dt=2017-03-02"]
        assert first["ndcg10_before"] == 0.3 and first["ndcg10_after"] == 0.3125
        assert second["base_version"] == "v0001-aaaaaa" and second["role"] is None
        shown = text(config, "versions")
        assert "2017-03-01..2017-03-02 (2)" in shown and "0.3125" in shown

    def test_spans_hours_as_days(self, local_config: Path, local_root: Root) -> None:
        hours = tuple(partition(f"2017-03-01T{hour}") for hour in ("05", "06"))
        first = dataclasses.replace(FIRST, partitions=(*hours, partition("2017-02-28")))
        append(local_root, first, committed(first))
        assert "2017-02-28..2017-03-01T06 (3)" in text(local_config, "versions")

    def test_lists_a_held_update_with_its_reason(
        self, local_config: Path, local_root: Root
    ) -> None:
        append(local_root, FIRST, committed(FIRST, version=None))
        (held,) = body(local_config, "versions")["versions"]
        assert held["version"] is None and held["ndcg10_after"] is None
        assert "u0001-aaaaaa held: the gate held it back" in text(local_config, "versions")


class TestRollout:
    def test_goes_from_start_to_promoted(self, config: Path, root: Root) -> None:
        append(root, *TWO_VERSIONS)
        canary = body(config, "rollout", "start", "v0002-bbbbbb", "--weight", "0.3")
        assert canary["phase"] == "canary" and canary["weight_fraction"] == 0.3
        shown = body(config, "rollout", "status")
        shown["waits_for"] = canary["waits_for"]  # tells the seconds that are left
        assert shown == canary
        assert "canary     v0002-bbbbbb with 30.00% of users" in text(config, "rollout", "status")
        done = body(config, "rollout", "promote", "--reason", "looks good")
        assert done["stable"] == "v0002-bbbbbb" and done["previous"] == "v0001-aaaaaa"
        assert done["reason"] == "looks good" and done["actor"] == "operator" and done["at"]
        assert Log(root).refresh().stable == "v0002-bbbbbb"

    def test_takes_the_weight_of_the_config(self, tmp_path: Path, local_root: Root) -> None:
        config = write_config(tmp_path, local_root.uri, "rollout:\n  weight_fraction: 0.05\n")
        append(local_root, *TWO_VERSIONS)
        assert body(config, "rollout", "start", "v0002-bbbbbb")["weight_fraction"] == 0.05

    def test_an_abort_leaves_stable_alone(self, local_config: Path, local_root: Root) -> None:
        append(local_root, *TWO_VERSIONS)
        text(local_config, "rollout", "start", "v0002-bbbbbb")
        shown = text(local_config, "rollout", "abort")
        assert "stable     v0001-aaaaaa" in shown and "rolled_back by operator" in shown

    def test_steps_pauses_and_approval_are_shown_and_steered(
        self, tmp_path: Path, local_root: Root
    ) -> None:
        steps = "[{set_weight: 0.05}, {analysis: {}}, {set_weight: 0.5}, {pause: {}}]"
        rules = f"rollout:\n  require_approval: true\n  steps: {steps}\n"
        config = write_config(tmp_path, local_root.uri, rules)
        append(local_root, *TWO_VERSIONS)
        body(config, "rollout", "start", "v0002-bbbbbb")
        shown = text(config, "rollout", "status")
        assert "at         step 2 of 4, analysis: waits for evidence, for 86" in shown
        paused = body(config, "rollout", "pause", "--reason", "a sale is on")
        assert (paused["phase"], paused["reason"]) == ("paused", "a sale is on")
        assert "cannot pause: rollout r0001" in refusal(config, "rollout", "pause")
        assert body(config, "rollout", "resume")["phase"] == "canary"
        assert "cannot resume: rollout r0001" in refusal(config, "rollout", "resume")
        Log(local_root).transact(lambda s: advance(s, actor="controller", reason="good"))
        assert "step 4 of 4, pause until resumed" in text(config, "status")
        done = body(config, "rollout", "resume")
        assert (done["phase"], done["doing"]) == ("paused", "all steps done")
        assert done["waits_for"] == "approval by `raysys rollout resume`"
        assert body(config, "rollout", "resume")["phase"] == "promoted"
        assert body(config, "rollout", "status")["step"] is None

    def test_a_file_that_changes_meanwhile_changes_nothing_for_a_running_rollout(
        self, tmp_path: Path, local_root: Root
    ) -> None:
        append(local_root, *TWO_VERSIONS)
        config = write_config(tmp_path, local_root.uri, "")
        body(config, "rollout", "start", "v0002-bbbbbb")
        steps = "[{set_weight: 0.05}, {pause: {}}, {analysis: {}}]"
        config = write_config(tmp_path, local_root.uri, f"rollout:\n  steps: {steps}\n")
        assert body(config, "rollout", "status")["num_steps"] == 2

    def test_status_without_any_rollout_names_the_first_version(
        self, local_config: Path, local_root: Root
    ) -> None:
        append(local_root, *TWO_VERSIONS)
        found = body(local_config, "rollout", "status")
        assert found["phase"] is None and found["stable"] == "v0001-aaaaaa" and found["at"] is None

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            pytest.param(("start", "v0009-ffffff"), "no version 'v0009-ffffff'", id="unknown"),
            pytest.param(("start", "v0001-aaaaaa"), "is stable already", id="stable"),
            pytest.param(("start", "v0002-bbbbbb", "--weight", "2"), "(0, 1), got 2", id="weight"),
            pytest.param(("promote",), "cannot promote: there is no rollout", id="promote"),
            pytest.param(("abort",), "cannot abort: there is no rollout", id="abort"),
            pytest.param(("pause",), "cannot pause: there is no rollout", id="pause"),
            pytest.param(("resume",), "cannot resume: there is no rollout", id="resume"),
        ],
    )
    def test_what_cannot_be_is_one_line_and_writes_nothing(
        self, local_config: Path, local_root: Root, args: tuple[str, ...], message: str
    ) -> None:
        append(local_root, *TWO_VERSIONS)
        before = local_root.list("")
        assert message in refusal(local_config, "rollout", *args)
        assert local_root.list("") == before


COMMANDS = [
    ("plan",),
    ("status",),
    ("budget",),
    ("versions",),
    ("rollout", "status"),
    ("rollout", "start", "v0001-aaaaaa"),
    ("rollout", "pause"),
    ("rollout", "resume"),
    ("rollout", "promote"),
    ("rollout", "abort"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
class TestBadInput:
    def test_an_unknown_config_key_is_named(
        self, tmp_path: Path, local_root: Root, command: tuple[str, ...]
    ) -> None:
        config = write_config(tmp_path, local_root.uri, "privacy:\n  epsilon: 8\n")
        message = refusal(config, *command)
        assert "privacy.epsilon: unknown key; did you mean privacy.epsilon_total?" in message
        assert not (tmp_path / "root").exists()

    def test_a_file_in_the_place_of_the_root_is_named(
        self, tmp_path: Path, command: tuple[str, ...]
    ) -> None:
        (tmp_path / "file").write_text("mine")
        config = write_config(tmp_path, (tmp_path / "file").as_uri())
        assert "must be a folder" in refusal(config, *command)
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_corrupt_ledger_is_named(
        self, local_config: Path, local_root: Root, command: tuple[str, ...]
    ) -> None:
        local_root.put(f"ledger/{1:020d}.json", b"{")
        assert "ledger record 1 cannot be read" in refusal(local_config, *command)

    def test_a_silent_store_asks_for_a_retry_by_its_exit_code(
        self, local_config: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
    ) -> None:
        def silent(root: Root, folder: str, after: str = "") -> None:
            raise StorageUnavailableError("no answer")

        monkeypatch.setattr(Root, "list_names", silent)
        assert refusal(local_config, *command, exit_code=75) == "raysys: no answer\n"


def test_an_absent_config_file_is_named(tmp_path: Path) -> None:
    assert "none.yaml cannot be read" in refusal(tmp_path / "none.yaml", "status")


def test_a_missing_option_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 2 and "--config" in result.stderr


def test_the_console_script_ends_with_the_exit_code_of_the_error(tmp_path: Path) -> None:
    config = write_config(tmp_path, (tmp_path / "root").as_uri())
    program = "from raysys.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", program, "rollout", "promote", "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr == "raysys: cannot promote: there is no rollout yet; start one first\n"


class TestDoctor:
    @pytest.fixture(autouse=True)
    def _no_encoder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hashing the real one would import torch, which takes seconds."""
        monkeypatch.setattr(raysys.doctor, "_encoder", lambda shop: "stands for the encoder")

    def test_of_a_fit_machine_is_all_ok(self, config: Path, root: Root) -> None:
        result = run(config, "doctor")
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        assert all(line.startswith("ok") for line in lines)
        names = ["config", "root", "key", "encoder", "privacy", "python", "ray", "torch", "haproxy"]
        assert [line.split()[1] for line in lines] == names
        assert root.list("") == []

    def test_fails_where_the_budget_does_not_last_for_the_horizon(
        self, tmp_path: Path, local_root: Root, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("raysys.privacy.calibrate.updates_paid", lambda config: 7)
        for horizon, exit_code in ((7, 0), (8, 1)):
            extra = f"privacy: {{noise_multiplier: 3, horizon: {horizon}}}\n"
            result = run(write_config(tmp_path, local_root.uri, extra), "doctor")
            assert result.exit_code == exit_code, result.output
            assert "epsilon_total 8 pays for 7 updates" in result.stdout
            assert statement(1e-4) in result.stdout
            assert ("leave privacy.noise_multiplier out" in result.stdout) == bool(exit_code)

    @pytest.fixture
    def broken(self, tmp_path: Path) -> Path:
        """A config whose root is a file and whose key file is gone."""
        (tmp_path / "file").write_text("mine")
        config = write_config(tmp_path, (tmp_path / "file").as_uri())
        (tmp_path / "key").unlink()
        return config

    def test_names_every_failure_with_its_remedy_and_exits_1(self, broken: Path) -> None:
        result = run(broken, "doctor")
        assert result.exit_code == 1 and "Traceback" not in result.output
        failed = [line for line in result.stdout.splitlines() if line.startswith("fail")]
        assert len(failed) == 2
        assert "must be a folder" in failed[0] and "openssl rand -hex 32" in failed[1]

    def test_prints_one_object_with_json(self, broken: Path) -> None:
        result = run(broken, "doctor", "--json")
        found = json.loads(result.stdout)
        assert result.exit_code == 1 and found["ok"] is False
        assert [c["name"] for c in found["checks"] if not c["ok"]] == ["root", "key"]

    def test_of_a_bad_config_still_looks_at_the_machine(self, tmp_path: Path) -> None:
        result = run(tmp_path / "none.yaml", "doctor")
        assert result.exit_code == 1
        assert [line.split()[:2] for line in result.stdout.splitlines()] == [
            ["fail", "config"],
            *[["ok", name] for name in ("python", "ray", "torch", "haproxy")],
        ]

    def test_finds_another_pseudonym_key_than_the_histories_have(
        self, local_config: Path, local_root: Root
    ) -> None:
        append(local_root, FIRST, committed(FIRST))
        assert "were made with key key" in run(local_config, "doctor").stdout

    def test_finds_a_key_that_waits_for_its_rotation(
        self, local_config: Path, local_root: Root
    ) -> None:
        first = dataclasses.replace(FIRST, user_key_id="7ecd1ca3")
        append(local_root, first, committed(first))
        assert "/key holds key 7ecd1ca3" in run(local_config, "doctor").stdout
        with (local_config.parent / "key").open("a") as file:
            file.write("\nfedcba9876543210\n")
        assert "run jobs/rotate_key.py first" in run(local_config, "doctor").stdout

    def test_finds_the_key_in_the_environment_and_never_shows_it(
        self, local_config: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = local_config.read_text().replace("key_file: key", "key_env: SHOP_USER_KEY")
        local_config.write_text(text)
        assert (
            "the environment variable SHOP_USER_KEY is not set"
            in run(local_config, "doctor").stdout
        )
        monkeypatch.setenv("SHOP_USER_KEY", "0123456789abcdef")
        told = run(local_config, "doctor").stdout
        assert "environment variable SHOP_USER_KEY holds key 7ecd1ca3" in told
        assert "0123456789abcdef" not in told

    def test_finds_a_version_that_is_not_supported(
        self, local_config: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
        shown = run(local_config, "doctor").stdout
        assert "ray 1.0, expected >=2.60,<2.61; run `make setup`" in shown

    def test_finds_a_haproxy_that_does_not_run(
        self, local_config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(tmp_path / "none"))
        assert "HAProxy does not run" in run(local_config, "doctor").stdout

    def test_passes_on_what_the_encoder_says(
        self, local_config: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing(shop: object) -> str:
            raise ConfigError("model.encoder: x is neither a folder nor a hub id")

        monkeypatch.setattr(raysys.doctor, "_encoder", missing)
        shown = run(local_config, "doctor").stdout
        assert "fail  encoder   model.encoder: x is neither a folder nor a hub id" in shown

    def test_supports_what_pyproject_supports(self) -> None:
        project = tomllib.loads(PYPROJECT.read_text())["project"]
        wanted = {name: spec for name, spec in raysys.doctor.SUPPORTED.items() if name != "python"}
        assert project["requires-python"] == raysys.doctor.SUPPORTED["python"]
        for name, spec in wanted.items():
            assert any(d.startswith(name) and d.endswith(spec) for d in project["dependencies"])
