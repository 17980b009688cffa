"""Measures `/v1/rank` of 100 candidates over HTTP, against bare uvicorn and Ray's default proxy.

    python benchmarks/serve.py           # five minutes; the last line is one JSON object
    python benchmarks/serve.py --quick   # a minute, to see that it runs

One machine and one run: raysys behind HAProxy, raysys behind Ray's default proxy, and the same
scorer behind bare FastAPI on uvicorn are up at the same time, one replica or process each, and are
loaded in turn, several times over. What is compared is the median over the rounds, so a machine
that is busy for a while is busy for all of them. The client is an open loop in a process of its
own (`open_loop`): latency counts from when a request should have been sent.

`p50_ms` and `p99_ms`: 100 requests a second, no query. `p50_query_ms`: each request has a query
that no request had before, so the encoder runs for each; `p50_query_cached_ms`: all have been asked
before. `ratio_vs_*`: more is better, 1 is as good. Against bare and default proxy it is a ratio of
requests a second of a closed loop of 16 connections; against the cross-encoder, which scores 100
pairs of query and text with the MiniLM architecture and its weights under a random head, it is its
time over `p50_query_ms`. `canary_*_ratio`: a canary answers half of the users, over nothing on
trial. `swap_worst_over_p99`: a new version goes from start to stable under load; the slowest
request of that time over the p99 of the load without a swap, `steady_worst_over_p99` the same where
nothing was swapped. `failed`: all requests of the run that were not answered with 200.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cross_encoder
import psutil
from open_loop import Answer, Load, percentile, run
from shop_versions import NOW, Shop, write_shop

from raysys.ledger.log import Log
from raysys.rollout.state import abort, promote, start

FOLDER = Path(__file__).parent
RATE_PER_S = 100.0
NUM_CANDIDATES = 100
NUM_CONNECTIONS = 16
START_TIMEOUT_S = 180.0
ACTOR = "benchmark"
NEVER_DECIDES = "rollout:\n  weight_fraction: 0.5\n  min_requests: 1000000000\n"
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
}


class Arm:
    """A server that runs, and all that it was ever asked."""

    def __init__(self, port: int, process: subprocess.Popen[str]) -> None:
        self.port = port
        self.process = process
        self.answers: list[Answer] = []

    def open(self, bodies: Sequence[str], seconds: float) -> list[Answer]:
        """Asks `RATE_PER_S` times a second."""
        return self._run(bodies, round(RATE_PER_S * seconds), rate_per_s=RATE_PER_S)

    def closed(self, bodies: Sequence[str], num_requests: int) -> float:
        """Asks as fast as it answers; returns requests a second."""
        answers = self._run(bodies, num_requests, num_connections=NUM_CONNECTIONS)
        return len(answers) / max(answer.ended for answer in answers)

    def rss_bytes(self) -> int:
        """Resident memory of the replica."""
        (replica,) = [
            child
            for child in self.process_family()
            if child.name().startswith("ray::ServeRepl") and "Ranker" in "".join(child.cmdline())
        ]
        return int(replica.memory_info().rss)

    def process_family(self) -> list[psutil.Process]:
        """What the server started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def _run(self, bodies: Sequence[str], num_requests: int, **how: Any) -> list[Answer]:
        load = Load(
            host="127.0.0.1", port=self.port, path="/v1/rank", bodies=bodies,
            num_requests=num_requests, **how,
        )  # fmt: skip
        answers = run(load)
        self.answers += answers
        return answers


def main() -> None:
    """Runs all, prints each figure as it comes and all of them as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Short rounds, and fewer.")
    quick = parser.parse_args().quick
    num_rounds, seconds, num_closed = (1, 3.0, 500) if quick else (4, 6.0, 3000)
    with tempfile.TemporaryDirectory() as name:
        shop = write_shop(Path(name), num_versions=3, extra_config=NEVER_DECIDES)
        bodies = Bodies(shop)
        with (
            served(shop, HAPROXY) as ours,
            served(shop, {}) as default,
            bare(shop) as plain,
        ):
            arms = {"ours": ours, "bare": plain, "default_proxy": default}
            for arm in arms.values():
                arm.closed(bodies.plain(), 300)
            figures = compare(arms, bodies, num_rounds, seconds, num_closed)
            report(figures, canary(ours, shop, bodies, num_rounds, seconds))
            report(figures, swap(ours, shop, bodies, 2 * seconds))
            answers = [answer for arm in arms.values() for answer in arm.answers]
        pairs = [(bodies.new_query(), text) for text in shop.texts[:NUM_CANDIDATES]]
        cross_ms = cross_encoder.median_ms(pairs, num_repeats=2 if quick else 5)
    report(
        figures,
        {
            "cross_encoder_ms": cross_ms,
            "ratio_vs_cross_encoder": cross_ms / figures["p50_query_ms"],
            "client_lag_p99_ms": percentile([a.lag_ms for a in answers], 99),
            "failed": sum(not answer.ok for answer in answers),
            "requests": len(answers),
            "cores": os.cpu_count(),
        },
    )
    print(json.dumps({"cross_encoder": cross_encoder.WHAT, **figures}))


def report(figures: dict[str, Any], new: dict[str, float]) -> None:
    """Prints figures and adds them to the others."""
    rounded = {name: round(value, 4) for name, value in new.items()}
    print(json.dumps(rounded), flush=True)
    figures |= rounded


class Bodies:
    """Requests of real users with random candidates; no query of `new_query` comes twice."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._rng = random.Random(0)
        self._num_queries = 0
        self.cached = [self._body(query=self.new_query()) for _ in range(50)]

    def plain(self, num: int = 1000) -> list[str]:
        return [self._body() for _ in range(num)]

    def queries(self, num: int) -> list[str]:
        return [self._body(query=self.new_query()) for _ in range(num)]

    def new_query(self) -> str:
        self._num_queries += 1
        words = self._rng.choice(self._shop.texts).lower().replace(",", "").split()[:3]
        return " ".join([*words, str(self._num_queries)])

    def _body(self, **more: str) -> str:
        body = {
            "user_id": self._rng.choice(self._shop.user_ids),
            "candidates": self._rng.sample(self._shop.item_ids, NUM_CANDIDATES),
            "ts": NOW,
            **more,
        }
        return json.dumps(body)


def compare(
    arms: dict[str, Arm], bodies: Bodies, num_rounds: int, seconds: float, num_closed: int
) -> dict[str, Any]:
    """Loads all arms in turn, round after round."""
    figures: dict[str, Any] = {}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    latencies: dict[str, list[float]] = {}

    def measure(name: str, arm: Arm, what: list[str]) -> None:
        answered = [answer.latency_ms for answer in arm.open(what, seconds) if answer.ok]
        latencies.setdefault(name, []).extend(answered)

    arms["ours"].open(bodies.cached, 1.0)
    for _ in range(num_rounds):
        for name, arm in arms.items():
            measure(name, arm, bodies.plain())
            rates[name].append(arm.closed(bodies.plain(), num_closed))
        measure("query", arms["ours"], bodies.queries(round(RATE_PER_S * seconds)))
        measure("query_cached", arms["ours"], bodies.cached)
    report(figures, {f"{name}_p50_ms": percentile(v, 50) for name, v in latencies.items()})
    report(figures, {f"{name}_p99_ms": percentile(v, 99) for name, v in latencies.items()})
    for place in ("50", "99"):
        figures[f"p{place}_ms"] = figures.pop(f"ours_p{place}_ms")
        for name in ("query", "query_cached"):
            figures[f"p{place}_{name}_ms"] = figures.pop(f"{name}_p{place}_ms")
    report(figures, {f"{name}_per_s": statistics.median(v) for name, v in rates.items()})
    for name in ("bare", "default_proxy"):
        ratios = [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
        report(figures, {f"ratio_vs_{name}": statistics.median(ratios)})
    return figures


def canary(
    arm: Arm, shop: Shop, bodies: Bodies, num_rounds: int, seconds: float
) -> dict[str, float]:
    """Compares half of the users on a canary with nothing on trial, in turn."""
    log, name = Log(shop.root), shop.versions[1]
    ratios, memory = [], []
    for _ in range(num_rounds):
        off = arm.open(bodies.plain(), seconds)
        rss = arm.rss_bytes()
        log.transact(lambda state: start(state, name, weight_fraction=0.5, actor=ACTOR))
        wait_for(arm, lambda: name in resident(arm))
        time.sleep(1.0)
        on = arm.open(bodies.plain(), seconds)
        share = sum(answer.version == name for answer in on) / len(on)
        assert 0.3 < share < 0.7, f"the canary answered {share:.0%} of the requests"
        memory.append(arm.rss_bytes() / rss)
        log.transact(lambda state: abort(state, actor=ACTOR, reason="next round"))
        wait_for(arm, lambda: name not in resident(arm))
        ratios.append(p50(on) / p50(off))
    # What an aborted canary took is not given back to the system, so the first time counts.
    return {"canary_latency_ratio": statistics.median(ratios), "canary_memory_ratio": memory[0]}


def p50(answers: Sequence[Answer]) -> float:
    """Returns the median latency of those that were answered."""
    return percentile([answer.latency_ms for answer in answers if answer.ok], 50)


def swap(arm: Arm, shop: Shop, bodies: Bodies, seconds: float) -> dict[str, float]:
    """Has a version become stable under load."""
    log, name = Log(shop.root), shop.versions[2]
    steady = [answer.latency_ms for answer in arm.open(bodies.plain(), seconds)]
    p99 = percentile(steady, 99)

    def change() -> None:
        time.sleep(1.0)
        log.transact(lambda state: start(state, name, weight_fraction=0.5, actor=ACTOR))
        wait_for(arm, lambda: name in resident(arm))
        log.transact(lambda state: promote(state, actor=ACTOR, reason="swap"))

    thread = threading.Thread(target=change)
    thread.start()
    answers = arm.open(bodies.plain(), seconds)
    thread.join()
    assert answers[-1].version == name, "the swap did not reach the replica in time"
    return {
        "swap_worst_over_p99": max(answer.latency_ms for answer in answers) / p99,
        "swap_p99_ms": percentile([answer.latency_ms for answer in answers], 99),
        "steady_worst_over_p99": max(steady) / p99,
        "steady_p99_ms": p99,
    }


def resident(arm: Arm) -> set[str]:
    """Returns the versions in the replica's memory."""
    with urllib.request.urlopen(f"http://127.0.0.1:{arm.port}/v1/versions", timeout=5) as answer:
        return {version["version"] for version in json.load(answer)["versions"]}


def wait_for(arm: Arm, check: Any, timeout_s: float = 60.0) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "the replica did not follow the ledger"
        time.sleep(0.1)


@contextlib.contextmanager
def served(shop: Shop, mode: dict[str, str], num_replicas: int = 1) -> Iterator[Arm]:
    """The shop's application on one Ray session."""
    port = free_port()
    script = [str(FOLDER / "serve_session.py"), str(shop.config), str(port), str(num_replicas)]
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        **mode,
    }
    with started(script, env) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"no version answers on port {port}: see above")
        yield Arm(port, process)


@contextlib.contextmanager
def bare(shop: Shop) -> Iterator[Arm]:
    """The same scorer on bare uvicorn."""
    port = free_port()
    script = [str(FOLDER / "bare_ranker.py"), str(shop.config), str(port)]
    with started(script, {}) as process:
        wait_for_port(port, process)
        yield Arm(port, process)


@contextlib.contextmanager
def started(script: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A Python process that ends with its standard input, or is ended."""
    process = subprocess.Popen(
        [sys.executable, *script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | env,
    )
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        assert process.stdin is not None
        process.stdin.close()
        if "serve_session" not in script[0]:
            process.terminate()
        # Ray ends what it started; what is left, such as HAProxy, would go on without it.
        for left in psutil.wait_procs(family, timeout=20)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait(20)


def wait_for_port(port: int, process: subprocess.Popen[str]) -> None:
    """Waits until someone listens."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def free_port() -> int:
    """Returns a port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
