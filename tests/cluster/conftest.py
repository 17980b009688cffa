"""One local Ray for the session, started as production starts it."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator

import pytest


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# Ray reads these when it is imported, and passes them to the processes it starts. pytest imports
# this file before any test beside it. The ports of HAProxy itself are fixed otherwise, and a demo
# that runs on the same machine has them.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
os.environ.setdefault("RAY_SERVE_HAPROXY_RETRY_ON", "conn-failure empty-response")
os.environ.setdefault("RAY_SERVE_HAPROXY_METRICS_PORT", _free_port())
os.environ.setdefault("RAY_SERVE_HAPROXY_STATS_PORT", _free_port())
os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray Train looks that often whether a step of starting or stopping is done.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


@pytest.fixture(scope="session")
def ray_cluster(s3_root: str) -> Iterator[None]:
    """A local Ray, in which tasks and actors take fractions of two CPUs.

    It comes after the S3 server, whose address its workers inherit from this process.
    """
    import ray
    import ray.data

    port = _free_port()
    with pytest.MonkeyPatch.context() as patch:
        # Ray Train's clean-up after a killed driver asks the dashboard's API, and would otherwise
        # ask that of any other Ray on this machine.
        patch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")
        ray.init(
            address="local",  # never one that happens to run on this machine
            num_cpus=2,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=int(port),
            object_store_memory=200_000_000,
            log_to_driver=False,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            yield
        finally:
            ray.shutdown()
