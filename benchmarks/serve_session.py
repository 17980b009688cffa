"""A Ray session of its own that serves a shop on loopback, until its standard input ends.

    python serve_session.py CONFIG PORT [NUM_REPLICAS]    # prints a line when a version answers

Whether HAProxy or Ray's own proxy stands before the replica is decided by the environment, as in
production: `RAY_SERVE_ENABLE_HA_PROXY`.
"""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request

import ray
from ray import serve

from raysys.rollout.controller import RolloutController
from raysys.serve.app import Ranker, RankerArgs

START_TIMEOUT_S = 120.0


def main() -> None:
    """Serves the shop of a config."""
    config, port = sys.argv[1], int(sys.argv[2])
    num_replicas = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000,
        log_to_driver=False, logging_level="error",
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        # The shop's requests are of 2017.
        args = RankerArgs(config=config, max_ts_age_s=1e9)
        controller = RolloutController.bind(config)
        ranker = Ranker.options(num_replicas=num_replicas).bind(args, controller)
        serve.run(ranker, name="raysys", route_prefix="/")
        _wait(f"http://127.0.0.1:{port}/v1/readyz")
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        ray.shutdown()


def _wait(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main()
