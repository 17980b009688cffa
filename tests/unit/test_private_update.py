"""With `evaluate.private`, exact figures of evaluation are nowhere once an update has committed.

A whole update but for training: real ingest, scores, noise, gate, record and report.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from raysys import update
from raysys.cli import app
from raysys.config import load_config
from raysys.evaluate import compare as comparing
from raysys.evaluate.calibrate import Fit
from raysys.evaluate.gate import judge
from raysys.evaluate.metrics import METRIC_NAMES
from raysys.evaluate.odds import EVENTS
from raysys.evaluate.private import Array, Figures, Release
from raysys.ingest.example_set import ExampleSet
from raysys.ingest.pipeline import examples_path
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted, UpdateStarted
from raysys.storage import Root
from raysys.train.loop import TrainJob
from raysys.train.trainer import TrainOutput
from tests import tiny_shop
from tests.stub_steps import Steps, ingest_in_a_row, permit_all_steps
from tests.update_shop import DAYS, contents, write_catalogue, write_day, write_shop

NOISE = 0.5
COMMANDS = (["budget"], ["budget", "--explain"], ["versions"], ["status"], ["ledger", "list"])


@dataclasses.dataclass
class Ran:
    """An update, what it measured and everything that it left."""

    record: UpdateCommitted
    reserved: UpdateStarted
    figures: list[Figures]
    told: str

    @property
    def exact(self) -> dict[str, float]:
        """The means that were measured, by arm and metric."""
        joined = {
            name: np.concatenate([getattr(part, name) for part in self.figures])
            for name in ("held_out", "before", "after")
        }
        held = joined["held_out"]
        before, after = joined["before"][held], joined["after"][held]
        arms = {"before": before, "after": after, "difference": after - before,
                "prequential": joined["before"]}  # fmt: skip
        return {
            f"{arm} {name}": float(values[:, i].mean())
            for arm, values in arms.items()
            for i, name in enumerate(METRIC_NAMES)
        }

    @property
    def base_rate(self) -> float:
        """How often held-out users take an item, exactly."""
        rates = np.concatenate([part.odds.rate[part.held_out] for part in self.figures])
        return float(rates[:, EVENTS.index("taken")].mean())

    @property
    def num_held_out(self) -> int:
        return sum(int(part.held_out.sum()) for part in self.figures)

    def found(self) -> list[str]:
        """Exact figures, to 6 digits, in anything that the update left or said."""
        return [
            what
            for what, value in self.exact.items()
            if value != round(value, 1) and f"{abs(value):.8f}"[:-2] in self.told
        ]


class Shop:
    """Runs one update of a shop, in one process."""

    def __init__(self, folder: Path, encoder: str, patch: pytest.MonkeyPatch) -> None:
        self.root = Root((folder / "root").as_uri())
        self.folder, self.encoder, self.patch = folder, encoder, patch
        self.steps = Steps(patch)
        ingest_in_a_row(patch)
        patch.setattr(update, "compare", comparing.compare)
        patch.setattr(update, "train", self.train)
        patch.setattr(comparing.ray, "put", lambda value: value)
        patch.setattr(comparing.ray, "get", lambda value: value)
        patch.setattr(comparing, "run_tasks", lambda task, rows, **_: [
            json.loads(json.dumps(task(row))) for row in rows
        ])  # fmt: skip
        write_catalogue(self.root)
        for day in DAYS[:2]:
            write_day(self.root, day)

    def train(
        self, job: TrainJob, texts: list[str], *, root: Root, update_id: str, **rest: Any
    ) -> TrainOutput:
        """Stands in for training: other weights."""
        permit_all_steps(job, root, update_id)
        rng = np.random.default_rng(3)
        text = rng.normal(size=(len(texts), 16)).astype(np.float32)
        shard = ExampleSet.from_bytes(root.read_bytes(examples_path(update_id, 0)))
        assert len(shard.user), "there was something to train on"
        return TrainOutput(
            head=tiny_shop.random_head(seed=7), adapter={}, adapted_modules=("dense",),
            adapted_weights={"dense": np.zeros((2, 2), np.float32)}, text_before=text,
            text_after=text,
        )  # fmt: skip

    def run(self, *, private: bool) -> Ran:
        config = write_shop(self.folder, self.root, self.encoder, min_holdout_users=1)
        chosen = f"evaluate: {{private: {json.dumps(private)}, noise_multiplier: {NOISE}, "
        config.write_text(config.read_text().replace("evaluate: {", chosen))
        figures: list[Figures] = []
        measure = comparing.measure

        def watched(*args: Any) -> Figures:
            figures.append(measure(*args))
            return figures[-1]

        self.patch.setattr(comparing, "measure", watched)
        lines: list[str] = []
        record = update.run_update(load_config(config), lines.append)
        left = [data.decode("latin-1") for data in contents(self.root).values()]
        runs = [[*c, "--config", str(config), *f] for c in COMMANDS for f in ([], ["--json"])]
        outputs = [CliRunner().invoke(app, run).output for run in runs]
        starts = [e.record for e in Log(self.root).entries() if isinstance(e.record, UpdateStarted)]
        return Ran(record=record, reserved=starts[-1], figures=figures,
                   told="\n".join([*lines, *left, *outputs]))  # fmt: skip


@pytest.fixture
def shop(tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, tiny_encoder, monkeypatch)


def test_exact_figures_are_nowhere_and_the_release_is_charged(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noise(release: Release, total: Array) -> Array:
        # Fixed, so that a noised number of users cannot be the exact one by chance.
        std = release.noise_multiplier * release.l2_sensitivity
        return total + std * np.where(np.arange(len(total)) % 2, -3.0, 3.0)

    monkeypatch.setattr(Release, "noise", noise)
    ran = shop.run(private=True)
    assert ran.record.version is not None, "there is a report to look through"
    assert ran.found() == []
    metrics = ran.record.metrics
    assert metrics["private"] is True
    assert metrics["num_holdout_users"] != ran.num_held_out
    assert metrics["calibration"]["num_users"] != ran.num_held_out
    assert metrics["calibration"]["base_rate"] != pytest.approx(ran.base_rate, rel=1e-3)
    assert metrics["calibration"]["expected_error"] is None
    assert f"on {ran.num_held_out} users" not in ran.told
    assert f"Held-out users ({ran.num_held_out})" not in ran.told
    assert f"on about {metrics['num_holdout_users']} users" in ran.record.reason
    for spend in (ran.reserved.reserved, ran.record.spent):
        assert spend is not None
        assert (spend.num_evaluations, spend.evaluation_noise_multiplier) == (1, NOISE)


def test_without_it_they_are_in_the_record_the_report_and_the_reason(shop: Shop) -> None:
    """The negative control: the same search finds what is there."""
    ran = shop.run(private=False)
    assert len(ran.found()) >= len(METRIC_NAMES)
    assert ran.record.metrics["num_holdout_users"] == ran.num_held_out
    assert ran.record.metrics["calibration"]["base_rate"] == pytest.approx(ran.base_rate)
    assert ran.record.metrics["calibration"]["expected_error"] > 0
    assert f"on {ran.num_held_out} users" in ran.told
    assert f"Held-out users ({ran.num_held_out})" in ran.told
    assert ran.record.spent is not None and ran.record.spent.num_evaluations == 0


def test_record_and_verdict_are_made_of_what_was_noised_once(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[Array] = []
    noise = Release.noise

    def watched(release: Release, total: Array) -> Array:
        released.append(noise(release, total))
        return released[-1]

    fitted: list[tuple[Any, ...]] = []
    fit = Release.fit

    def watched_fit(release: Release, *args: Any) -> Fit | None:
        fitted.append(args)
        return fit(release, *args)

    monkeypatch.setattr(Release, "noise", watched)
    monkeypatch.setattr(Release, "fit", watched_fit)
    record = shop.run(private=True).record
    (noised,), ((read, center, reference),) = released, fitted
    assert read is noised
    config = load_config(shop.folder / "shop.yaml")
    release = Release.of(config.evaluate, "taken", tiny_shop.NUM_ITEMS)
    again = dataclasses.replace(
        release.comparison(noised), calibration=fit(release, noised, center, reference)
    )
    assert again.calibration is not None
    assert record.metrics == update._without_nan(dataclasses.asdict(again))
    decision = judge(again, config.gate)
    assert (record.verdict, record.reason) == (decision.verdict, decision.reason)
