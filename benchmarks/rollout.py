"""Measures how rollouts end: simulated ones by the hundred, and how soon an abort is everywhere.

    python benchmarks/rollout.py            # five minutes; the last line is one JSON object
    python benchmarks/rollout.py --num 20   # a minute, to see that it runs

*Simulated* (`simulated_rollouts`): 200 rollouts of each kind go through the real `judge` and
`decide`, look by look. `false_rollback_fraction`: of canaries like stable, those not promoted.
`detected_fraction`: of canaries whose click rate is a fifth lower, those proven to be worse, after
`median_requests_to_detect` requests of both versions together. Likewise of canaries that answer
badly ten times as often (5 % instead of 0.5 %), and of those that are five times slower.

*Real*: two replicas behind HAProxy under 100 requests a second, half of them the canary's. An
operator aborts by command line, several times over. `abort_s` is the longest time from the ledger
record to the last answer of a canary, whichever replica gave it; `failed` counts the requests that
were not answered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import simulated_rollouts
from open_loop import Answer, Load, send_all
from serve import HAPROXY, NEVER_DECIDES, RATE_PER_S, Arm, Bodies, served
from shop_versions import Shop, write_shop
from simulated_rollouts import CONFIG, Look

from raysys.ledger.log import Log
from raysys.rollout.analysis import judge
from raysys.rollout.policy import decide
from raysys.rollout.state import start

NUM_ROLLOUTS = 200
NUM_ABORTS = 4
LOAD_S = 12.0
FAULTS = {
    "detected": {"ctr_factor": 0.8},
    "erring_detected": {"bad_factor": 10.0},
    "slow_detected": {"median_latency_ms": 15.0, "latency_factor": 5.0},
}
_OUTCOMES = {"rollback": "failed", "advance": "successful", "wait": "inconclusive"}


def main() -> None:
    """Runs all, prints each figure as it comes and all of them as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=NUM_ROLLOUTS, help="Rollouts of each kind.")
    num = parser.parse_args().num
    figures: dict[str, Any] = {"num_rollouts": num, **simulate(num)}
    with tempfile.TemporaryDirectory() as name:
        shop = write_shop(Path(name), extra_config=NEVER_DECIDES)
        with served(shop, HAPROXY, num_replicas=2) as arm:
            figures |= aborts(arm, shop, NUM_ABORTS)
    print(json.dumps(figures))


def verdict(look: Look) -> str:
    """What the controller would do on one look, by the words of the analysis."""
    decision = decide(
        judge(*look, CONFIG), phase="canary", step=CONFIG.plan[1], step_s=0.0, config=CONFIG
    )
    return _OUTCOMES[decision.kind]


def simulate(num: int) -> dict[str, float]:
    """Runs `num` rollouts of each kind."""
    equal = simulated_rollouts.run(num, verdict=verdict)
    figures = {
        "false_rollback_fraction": equal.rolled_back_fraction,
        "median_requests_to_promote": equal.median_requests,
    }
    print(json.dumps(figures), flush=True)
    for name, changes in FAULTS.items():
        found = simulated_rollouts.run(num, verdict=verdict, **changes)
        new = {
            f"{name}_fraction": found.failed_fraction,
            f"median_requests_to_{name.replace('detected', 'detect')}": found.median_requests,
        }
        print(json.dumps(new), flush=True)
        figures |= new
    return figures


def aborts(arm: Arm, shop: Shop, num_aborts: int) -> dict[str, float]:
    """Aborts canaries under load."""
    log, canary, bodies = Log(shop.root), shop.versions[1], Bodies(shop)
    # The first load meets replicas that were not asked yet.
    arm.open(bodies.plain(), 2.0)
    delays, answers = [], []
    for _ in range(num_aborts):
        with load_in_background(arm, bodies) as load:
            log.transact(lambda state: start(state, canary, weight_fraction=0.5, actor="benchmark"))
            time.sleep(LOAD_S / 2)
            abort_by_command_line(shop)
        aborted_at = log.refresh().rollout_changed_at
        assert aborted_at is not None
        by_canary = [answer.ended for answer in load.answers if answer.version == canary]
        assert len(by_canary) > RATE_PER_S, "the canary did not answer its share"
        delays.append(load.started_at + max(by_canary) - aborted_at)
        answers += load.answers
    figures = {
        "abort_s": round(max(delays), 3),
        "abort_median_s": round(statistics.median(delays), 3),
        "failed": sum(not answer.ok for answer in answers),
        "requests": len(answers),
    }
    print(json.dumps(figures), flush=True)
    return figures


def abort_by_command_line(shop: Shop) -> None:
    """As an operator does it."""
    raysys = Path(sys.executable).parent / "raysys"
    command = [str(raysys), "rollout", "abort", "--config", str(shop.config)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)


class load_in_background(contextlib.AbstractContextManager["load_in_background"]):
    """Asks for `LOAD_S`, and is left once all is answered."""

    def __init__(self, arm: Arm, bodies: Bodies) -> None:
        self.answers: list[Answer] = []
        self.started_at = 0.0
        self._load = Load(
            host="127.0.0.1", port=arm.port, path="/v1/rank", bodies=bodies.plain(),
            num_requests=round(RATE_PER_S * LOAD_S), rate_per_s=RATE_PER_S,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> load_in_background:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.join()

    def _run(self) -> None:
        self.started_at = time.time()
        self.answers = asyncio.run(send_all(self._load))


if __name__ == "__main__":
    main()
