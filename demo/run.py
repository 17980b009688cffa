"""The whole loop on a real shop, on this machine: `make demo`.

    import -> update job (version 1) -> four weekly update jobs -> Serve -> canary at 20 %
      -> replay of the next week's baskets -> promoted or rolled back -> build/demo/summary.json

It goes through the doors that production uses: `ray job submit`, `serve deploy`, HTTP, `raysys`.
No figure is arranged: a version that the gate holds back is in the table as held.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import secrets
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import yaml
from cluster import DemoError, LocalCluster, stop_on_sigterm
from replay import Answer, Visit, plan_visits, rank_body, replay

from raysys.config import Config, load_config
from raysys.errors import RaysysError
from raysys.ingest.completejourney import load_transactions
from raysys.ingest.stats import load_item_state
from raysys.ledger.log import Log
from raysys.ledger.records import UpdateCommitted
from raysys.ledger.state import State
from raysys.privacy.accounting import statement
from raysys.privacy.budget import report_budget
from raysys.storage import Root

REPO = Path(__file__).resolve().parent.parent
FOLDER = REPO / "build" / "demo"
FIRST_DAY = datetime.date(2017, 1, 2)
BOOTSTRAP_WEEKS = 6
NUM_INCREMENTS = 4
VERDICT_TIMEOUT_S = 360.0


def main() -> int:
    """Runs the demo. Returns 0 when every step worked, whatever the gate and the canary said."""
    began = time.monotonic()
    config_path = prepare()
    stop_on_sigterm()
    try:
        with LocalCluster(FOLDER) as cluster:
            say(began, "a Ray head is up: token auth, dashboard and Serve on loopback")
            seconds = [
                run_update(cluster, config_path, week, began) for week in range(NUM_INCREMENTS + 1)
            ]
            rollout, answers = roll_out(cluster, config_path, began)
            curl = show_curl(cluster, config_path)
    except (DemoError, RaysysError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    config = load_config(config_path)
    state = Log(Root(config.root)).refresh()
    summary = {
        "updates": summarise_updates(state, config, seconds),
        "rollout": rollout,
        "epsilon_statement": statement(config.privacy.delta),
        "seconds": round(time.monotonic() - began, 1),
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_summary(summary, answers, curl)
    return 0


def prepare() -> Path:
    """Empties build/demo and writes the shop's config and key. Returns the config's path."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    (FOLDER / "user.key").write_text(secrets.token_hex(32))
    (FOLDER / "user.key").chmod(0o600)
    template = (REPO / "demo" / "shop.yaml").read_text()
    path = FOLDER / "shop.yaml"
    path.write_text(template.replace("root: ROOT", f"root: {(FOLDER / 'shop').as_uri()}"))
    return path


def run_update(cluster: LocalCluster, config_path: Path, week: int, began: float) -> float:
    """Imports what is new and submits one update. Returns the seconds that the job took."""
    first, last = days_of(week)
    name = "bootstrap" if week == 0 else f"week {week}"
    say(began, f"{name}: {first} to {last} land in events/, then an update job")
    root = load_config(config_path).root
    days = ["--root", root, "--first", str(first), "--last", str(last)]
    cluster.run(f"import-{week}", [str(REPO / "jobs" / "import_completejourney.py"), *days])
    start = time.monotonic()
    cluster.submit(
        f"update-{week}", [str(REPO / "jobs" / "update.py"), "--config", str(config_path)]
    )
    return round(time.monotonic() - start, 1)


def days_of(week: int) -> tuple[datetime.date, datetime.date]:
    """Returns the first and last day of update number `week`; 0 is the bootstrap.

    >>> [str(day) for day in days_of(1)]
    ['2017-02-13', '2017-02-19']
    """
    if week == 0:
        return FIRST_DAY, FIRST_DAY + datetime.timedelta(days=7 * BOOTSTRAP_WEEKS - 1)
    first = FIRST_DAY + datetime.timedelta(days=7 * (BOOTSTRAP_WEEKS + week - 1))
    return first, first + datetime.timedelta(days=6)


def roll_out(
    cluster: LocalCluster, config_path: Path, began: float
) -> tuple[dict[str, Any], list[Answer]]:
    """Serves, starts a canary of the newest version, replays a week, waits for the verdict."""
    config = load_config(config_path)
    log = Log(Root(config.root))
    state = log.refresh()
    if state.stable is None:
        raise DemoError("the gate held every version back, so there is nothing to serve")
    say(began, f"serving {state.stable} behind HAProxy at {cluster.url}")
    cluster.deploy(serve_config(cluster, config_path))
    if state.head_version == state.stable:
        say(began, "the gate held every later version back: no canary to try")
        return no_rollout(config), []
    assert state.head_version is not None
    cluster.raysys("rollout", "start", state.head_version, "--config", str(config_path))
    wait_for_canary(cluster, state.head_version)
    visits = next_week(config, state)
    share = f"{config.rollout.weight_fraction:.0%} of the households"
    say(began, f"canary {state.head_version} answers {share}; replaying the next week")
    answers = replay(
        cluster.url,
        visits,
        is_canary_running=lambda: log.refresh().canary is not None,
        on_progress=lambda done: done % 500 == 0 and say(began, f"{done:,} baskets replayed"),
    )
    state = wait_for_verdict(log, began)
    return summarise_rollout(config, state, answers), answers


def serve_config(cluster: LocalCluster, config_path: Path) -> dict[str, Any]:
    """Returns serve_configs/ranker.yaml with this config file, on loopback, one replica."""
    config: dict[str, Any] = yaml.safe_load((REPO / "serve_configs" / "ranker.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": cluster.http_port}
    (application,) = config["applications"]
    # The replayed week is of 2017.
    application["args"] = {"config": str(config_path), "max_ts_age_s": 1.0e9}
    for deployment in application["deployments"]:
        # A replica a node is for clusters: here is one node.
        deployment.pop("max_replicas_per_node", None)
        deployment["num_replicas"] = 1
    return config


def next_week(config: Config, state: State) -> list[Visit]:
    """Returns the visits of the week after the last one that was trained on."""
    assert state.head_state is not None
    first, last = days_of(NUM_INCREMENTS + 1)
    rows = load_transactions().with_columns(day=pl.col("ts").dt.date())
    catalogue = load_item_state(Root(config.root), state.head_state).catalogue["item_id"].to_list()
    past = rows.filter(pl.col("day").is_between(FIRST_DAY, first, closed="left"))
    return plan_visits(past, rows.filter(pl.col("day").is_between(first, last)), catalogue)


def wait_for_canary(cluster: LocalCluster, version: str) -> None:
    """Waits until the canary is loaded; until then its users would get the stable version."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        resident = httpx.get(f"{cluster.url}/v1/versions", timeout=10).json()
        if any(row["version"] == version for row in resident["versions"]):
            return
        time.sleep(0.3)
    raise DemoError(f"canary {version} was not loaded in 60 s; see {cluster.logs}")


def wait_for_verdict(log: Log, began: float) -> State:
    """Waits for the controller, which looks every few seconds and has a deadline of its own."""
    if log.refresh().canary is not None:
        say(began, "all baskets replayed; the analysis is not conclusive yet")
    deadline = time.monotonic() + VERDICT_TIMEOUT_S
    while (state := log.refresh()).canary is not None:
        if time.monotonic() > deadline:
            raise DemoError(f"no verdict in {VERDICT_TIMEOUT_S:.0f} s")
        time.sleep(1)
    return state


def summarise_updates(state: State, config: Config, seconds: list[float]) -> list[dict[str, Any]]:
    """Returns one row for each update, in order."""
    budget = report_budget(state, config.privacy)
    spent = {update.update_id: update.epsilon_cumulative for update in budget.updates}
    return [
        summarise_update(record, spent.get(record.update_id), config, took)
        for record, took in zip(state.committed, seconds, strict=True)
    ]


def summarise_update(
    record: UpdateCommitted, spent: float | None, config: Config, seconds: float
) -> dict[str, Any]:
    """Returns the figures of one update."""
    return {
        "update_id": record.update_id,
        "version": record.version,
        "partitions": [partition.key for partition in record.partitions],
        "rows": record.num_rows,
        "users": record.num_users,
        "epsilon_spent": spent,
        "epsilon_left": None if spent is None else config.privacy.epsilon_total - spent,
        "ndcg10_before": record.metrics["before"]["ndcg10"]["mean"],
        "ndcg10_after": record.metrics["after"]["ndcg10"]["mean"],
        "verdict": record.verdict,
        "reason": record.reason,
        "seconds": seconds,
    }


def summarise_rollout(config: Config, state: State, answers: list[Answer]) -> dict[str, Any]:
    """Returns the figures of the rollout.

    The split draws households, not requests, and the requests of one are not independent. So its
    share is observed on the first request of each household under the canary: that count, and no
    other, is binomial.
    """
    assert state.rollout is not None
    during = [answer for answer in answers if answer.during_canary and answer.version]
    stable = state.rollout.previous if state.rollout.phase == "promoted" else state.rollout.stable
    firsts = {answer.user_id: answer for answer in reversed(during)}.values()
    return {
        "weight_fraction": config.rollout.weight_fraction,
        "observed_fraction": canary_share(list(firsts), stable),
        "requests": len(firsts),
        "observed_fraction_all": canary_share(during, stable),
        "requests_all": len(during),
        "failed": sum(answer.version is None for answer in answers),
        "verdict": state.rollout.phase,
        "reason": state.rollout.reason,
    }


def canary_share(answers: list[Answer], stable: str | None) -> float | None:
    """Returns the share of answers that another version than stable gave."""
    if not answers:
        return None
    return sum(answer.version != stable for answer in answers) / len(answers)


def no_rollout(config: Config) -> dict[str, Any]:
    """Returns the figures where no version was there to try."""
    return {
        "weight_fraction": config.rollout.weight_fraction,
        "observed_fraction": None,
        "requests": 0,
        "failed": 0,
        "verdict": "none",
        "reason": "the gate held every version after the first back",
    }


def show_curl(cluster: LocalCluster, config_path: Path) -> tuple[str, str]:
    """Returns a curl line for a real household and what it answers."""
    config = load_config(config_path)
    visit = next_week(config, Log(Root(config.root)).refresh())[0]
    body = rank_body(dataclasses.replace(visit, candidates=visit.candidates[:6])) | {"k": 3}
    answer = httpx.post(f"{cluster.url}/v1/rank", json=body, timeout=30)
    line = (
        f"curl -s {cluster.url}/v1/rank -H 'content-type: application/json' -d '{json.dumps(body)}'"
    )
    (FOLDER / "curl.txt").write_text(line + "\n")
    return line, answer.text


def print_summary(summary: dict[str, Any], answers: list[Answer], curl: tuple[str, str]) -> None:
    """Prints the table, the split, the verdict and the curl line."""
    head = f"{'version':<13} {'days':>4} {'rows':>8} {'users':>6} {'epsilon':>8} {'left':>6} "
    print(f"\n{head}{'NDCG@10 before':>15} {'after':>7} {'seconds':>8}  gate")
    for row in summary["updates"]:
        print(
            f"{row['version'] or 'held':<13} {len(row['partitions']):>4} {row['rows']:>8,} "
            f"{row['users']:>6,} {row['epsilon_spent']:>8.3f} {row['epsilon_left']:>6.3f} "
            f"{row['ndcg10_before']:>15.4f} {row['ndcg10_after']:>7.4f} {row['seconds']:>8.1f}  "
            f"{row['verdict']}: {row['reason']}"
        )
    print(f"epsilon: {summary['epsilon_statement']}")
    rollout = summary["rollout"]
    if rollout["requests"]:
        print(
            f"\nsplit: {rollout['observed_fraction']:.3f} of {rollout['requests']:,} households "
            f"went to the canary, {rollout['weight_fraction']:g} was configured "
            f"({rollout['observed_fraction_all']:.3f} of their {rollout['requests_all']:,} "
            f"requests); {rollout['failed']} of {len(answers):,} requests failed"
        )
        print_conversion([answer for answer in answers if answer.during_canary])
    print(f"canary {rollout['verdict']}: {rollout['reason']}")
    print(f"\n{curl[0]}\n{curl[1]}")
    print(f"\nAll figures: build/demo/summary.json ({summary['seconds']:.0f} s). "
          "`make serve` brings it up to play with.")  # fmt: skip


def print_conversion(answers: list[Answer]) -> None:
    """Prints the share of shown rankings from which something was bought, by version."""
    frame = pl.DataFrame(
        {"version": [a.version for a in answers], "converted": [a.converted for a in answers]}
    ).drop_nulls()
    for row in (
        frame.group_by("version")
        .agg(pl.len(), pl.col("converted").mean())
        .sort("version")
        .iter_rows()
    ):
        print(f"{row[0]}: {row[1]:,} baskets, {row[2]:.3f} bought something of the 10 shown")


def say(began: float, text: str) -> None:
    """Prints a line with the time so far."""
    print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
