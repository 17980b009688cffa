"""The loop closes: what a version shows over HTTP, and what users do with it, trains the next one.

update -> version -> POST /v1/rank, /v1/feedback -> events/ -> update -> next version
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import ray
from fastapi.testclient import TestClient

from raysys.config import Config, load_config
from raysys.errors import EmptyPlanError
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.shard_state import load_histories
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted
from raysys.registry.store import load_version
from raysys.serve.api import create_api
from raysys.serve.app import RankerArgs, open_replica
from raysys.serve.metrics import METRICS, controller_metrics
from raysys.storage import Root
from raysys.update import run_update
from tests.fakes import FakeController
from tests.update_shop import (
    DAYS,
    find_problems,
    find_raw_ids,
    raw_id,
    write_catalogue,
    write_day,
    write_shop,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_USERS, NUM_SHOWN = 60, 3
SURFACE = "ads"
"""Other tests of the same Ray rank for other surfaces, so the totals of this one are ours."""
CANDIDATES = [f"i{n:02}" for n in range(0, 40, 8)]
NOON = datetime.datetime.fromisoformat(f"{DAYS[2]}T12:00:00+00:00").timestamp()
EXTRA = """
labels: {attribution_window_s: 3600.0}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    root: Root
    config: Config
    first: UpdateCommitted
    answers: list[dict[str, Any]]
    events: pl.DataFrame
    """All rows that the replica wrote."""
    second: UpdateCommitted
    series: str
    """What Ray's agent told Prometheus while the replica ran."""


@pytest.fixture(scope="module")
def story(ray_cluster: None, tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("shop")
    root = Root((folder / "root").as_uri())
    file = write_shop(folder, root, tiny_encoder)
    file.write_text(file.read_text() + EXTRA)
    config = load_config(file)
    write_catalogue(root)
    for day in DAYS[:2]:
        write_day(root, day)
    first = run_update(config)
    answers, series = serve_a_day(file, root, config)
    events = pl.concat(
        [
            pl.read_parquet(io.BytesIO(root.read_bytes(info.path)))
            for info in root.list(f"events/dt={DAYS[2]}")
        ]
    )
    second = run_update(config)
    return Story(
        root=root, config=config, first=first, answers=answers, events=events, second=second,
        series=series,
    )  # fmt: skip


def serve_a_day(file: Path, root: Root, config: Config) -> tuple[list[dict[str, Any]], str]:
    """Each user is shown a page, buys its first item and clicks its second; the click is sent
    twice."""
    args = RankerArgs(config=str(file), max_ts_age_s=1e10, feedback_interval_s=0.05)
    controller = FakeController()
    replica = open_replica(args, controller, load_version)
    report = controller_metrics(config, root)
    report(Log(root).refresh())
    with TestClient(create_api(replica, config.http)) as client:
        answers = [visit(client, number) for number in range(NUM_USERS)]
        return answers, scrape_until_all_is_told()


def visit(client: TestClient, number: int) -> dict[str, Any]:
    ts = NOON + number
    body = {
        "user_id": raw_id(number), "candidates": CANDIDATES, "k": NUM_SHOWN, "ts": ts,
        "surface": SURFACE,
    }  # fmt: skip
    response = client.post("/v1/rank", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    first, second, *_ = answer["ranking"]
    bought = {"event_type": "purchase", "item_id": first["item_id"], "rank": 1, "ts": ts + 60}
    clicked = {"event_type": "click", "item_id": second["item_id"], "rank": 2, "ts": ts + 30}
    for events in ([bought, clicked], [clicked]):
        sent = {"request_id": answer["request_id"], "events": events}
        assert client.post("/v1/feedback", json=sent).status_code == 200
    return answer


def scrape_until_all_is_told() -> str:
    """What Ray's agent exports, once the day's last feedback is in it: it reports now and then."""
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        if total("feedback_events", text) >= 3 * NUM_USERS:
            return text
        assert time.monotonic() < deadline, f"exported: {total('feedback_events', text)}"
        time.sleep(0.5)


def total(name: str, series: str) -> float:
    """Sum of a counter over its tags."""
    pattern = rf'^ray_raysys_{name}_total{{.*surface="{SURFACE}".*}} ([\d.eE+]+)$'
    return sum(map(float, re.findall(pattern, series, re.M)))


def test_the_version_that_answered_is_the_first_one(story: Story) -> None:
    assert {answer["version"] for answer in story.answers} == {story.first.version}
    assert set(story.events["version"]) == {story.first.version}
    assert set(story.events["propensity"]) == {1.0}


def test_the_next_update_reads_these_files_and_no_others(story: Story) -> None:
    (partition,) = story.second.partitions
    assert partition.key == f"events/dt={DAYS[2]}"
    written = {info.path for info in story.root.list(partition.key)}
    assert {file.path for file in partition.files} == written
    kinds = {Path(path).name.partition("-")[0] for path in written}
    assert kinds == {"impressions", "feedback"}
    assert story.second.num_rows == len(story.events) == NUM_USERS * (NUM_SHOWN + 3)


def test_what_was_sent_twice_counts_once(story: Story) -> None:
    assert story.second.row_counts["duplicate"] == NUM_USERS
    assert story.second.row_counts["impression"] == NUM_USERS * NUM_SHOWN
    assert story.second.row_counts["outcome"] == NUM_USERS * 2
    assert sum(story.second.row_counts.values()) == story.second.num_rows


def test_outcomes_are_attributed_to_what_was_shown_and_trained_on(story: Story) -> None:
    counts = story.second.label_counts
    assert {k: n for k, n in counts["outcomes"].items() if n} == {"attributed": 2 * NUM_USERS}
    shown = {k: n for k, n in counts["impressions"].items() if n}
    assert shown == {"with_outcome": NUM_SHOWN * NUM_USERS}
    requests = counts["requests"]
    assert requests["trained"] + requests["held_out"] == NUM_USERS
    assert requests["trained"] > requests["held_out"] > 0


def test_a_version_is_trained_on_top_and_the_users_histories_go_on(story: Story) -> None:
    assert story.second.base_version == story.first.version
    assert story.second.version is not None
    load_version(story.root, story.second).check_golden()
    chain = Pseudonymizer.from_config(story.config.pseudonyms)
    after = set(load_histories(story.root, story.second.update_id).select("user").to_series())
    assert {chain.pseudonym(raw_id(number)) for number in range(NUM_USERS)} <= after


def test_nothing_is_left_over_and_no_raw_id_is_anywhere(story: Story) -> None:
    assert find_problems(story.root) == [] and find_raw_ids(story.root) == []
    with pytest.raises(EmptyPlanError):
        run_update(story.config)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("ray_raysys_requests_total", {"version", "surface", "outcome"}),
        ("ray_raysys_request_latency_ms_bucket", {"version", "surface", "outcome", "le"}),
        ("ray_raysys_items_shown_total", {"version", "surface"}),
        ("ray_raysys_feedback_events_total", {"version", "surface", "outcome"}),
        ("ray_raysys_events_written_total", {"file"}),
        ("ray_raysys_rollout_weight_fraction", set()),
        ("ray_raysys_version_resident", {"version"}),
        ("ray_raysys_rollout_phase", {"phase"}),
        ("ray_raysys_rollout_step", set()),
        ("ray_raysys_privacy_epsilon_spent", set()),
        ("ray_raysys_privacy_epsilon_left", set()),
    ],
)
def test_ray_exports_the_names_and_labels_of_the_dashboard(
    story: Story, name: str, labels: set[str]
) -> None:
    own = {label for metric in METRICS.values() for label in metric.tags} | {"le"}
    found = re.findall(rf"^{name}(?:{{(.*)}})? [-+.\deE]+", story.series, re.M)
    assert found, f"{name} is not exported"
    for series in found:
        names = set(re.findall(r'(\w+)="', series))
        assert names & own == labels


def test_counters_have_the_totals_of_the_day(story: Story) -> None:
    totals = {name: total(name, story.series) for name in ("requests", "items_shown")}
    assert totals == {"requests": NUM_USERS, "items_shown": NUM_USERS * NUM_SHOWN}
    assert total("feedback_events", story.series) == NUM_USERS * 3
