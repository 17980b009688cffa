"""A local Ray head as production has it: token auth, job submission, Serve behind HAProxy.

    with LocalCluster(folder) as cluster:
        cluster.submit("update-1", ["jobs/update.py", "--config", "shop.yaml"])
        cluster.deploy(serve_config)

Everything listens on loopback. The processes that it started end with the block, and no others.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import yaml

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
HTTP_PORT = 8000
# Free ones, since another Ray may run on this machine.
PORTS = ("port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
SHOWN_PREFIXES = ("[update]", "[train]", "raysys:")


class DemoError(Exception):
    """A step of the demo did not succeed; says where the log is."""


class LocalCluster:
    """One Ray head, from `ray start` to its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.dashboard = f"http://127.0.0.1:{_free_port()}"
        self.http_port = HTTP_PORT if _is_free(HTTP_PORT) else _free_port()
        self._env = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": self.dashboard,
            "RAY_USAGE_STATS_ENABLED": "0",
            # A head that is its own only node has nobody to hand its work to.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        if sys.platform == "linux":
            self._env |= {
                "RAY_SERVE_ENABLE_HA_PROXY": "1",
                "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
                "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
                "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
                "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
            }
        self._head: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the ranking endpoints answer."""
        return f"http://127.0.0.1:{self.http_port}"

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        env = {key: value for key, value in self._env.items() if key != "RAY_ADDRESS"}
        command = [
            str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            *(f"--{name}={_free_port()}" for name in PORTS), "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard.rpartition(':')[2]}", "--include-dashboard=true",
            f"--object-store-memory={1_000_000_000}", "--disable-usage-stats",
        ]  # fmt: skip
        with (self.logs / "ray.log").open("wb") as log:
            # A session of its own, so that its end takes every process it started along.
            self._head = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait("the Ray head", self._dashboard_answers)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def submit(self, name: str, entrypoint: Sequence[str]) -> None:
        """Submits a job as production does and follows it to its end.

        Raises:
          DemoError: The job failed.
        """
        command = [str(BIN / "ray"), "job", "submit", "--", "python", *entrypoint]
        self._follow(name, command)

    def run(self, name: str, script: Sequence[str]) -> None:
        """Runs a script of ours outside of the cluster.

        Raises:
          DemoError: It failed.
        """
        self._follow(name, [sys.executable, *script])

    def deploy(self, config: dict[str, Any]) -> None:
        """Deploys a Serve config file, and waits until a version answers.

        Raises:
          DemoError: It did not become ready.
        """
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        self._follow(
            "serve", [str(BIN / "serve"), "deploy", str(path), "--address", self.dashboard]
        )
        self._wait("the Serve application", lambda: _answers(f"{self.url}/v1/readyz"))

    def write_environment(self) -> Path:
        """Writes a file to be sourced by who wants to submit jobs to this cluster."""
        path = self.folder / "env.sh"
        path.touch(mode=0o600)
        names = ("PATH", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
        path.write_text("".join(f"export {name}={self._env[name]!r}\n" for name in names))
        return path

    def raysys(self, *arguments: str) -> str:
        """Runs the command line and returns what it printed.

        Raises:
          DemoError: It refused.
        """
        done = subprocess.run(
            [str(BIN / "raysys"), *arguments], env=self._env, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise DemoError(f"raysys {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _follow(self, name: str, command: Sequence[str]) -> None:
        path = self.logs / f"{name}.log"
        with path.open("w") as log:
            process = subprocess.Popen(
                command, env=self._env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                _show(line)
        if process.wait() != 0:
            tail = "".join(path.read_text().splitlines(keepends=True)[-15:])
            raise DemoError(f"{name} failed ({process.returncode}); all of it in {path}:\n{tail}")

    def _dashboard_answers(self) -> bool:
        assert self._head is not None
        if self._head.poll() is not None:
            tail = (self.logs / "ray.log").read_text()[-2000:]
            raise DemoError(f"the Ray head ended with {self._head.returncode}:\n{tail}")
        headers = {"Authorization": f"Bearer {self._env['RAY_AUTH_TOKEN']}"}
        return _answers(f"{self.dashboard}/api/version", headers)

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if time.monotonic() > deadline:
                raise DemoError(f"{what} was not ready in {START_TIMEOUT_S:.0f} s; see {self.logs}")
            time.sleep(0.3)

    def _stop(self) -> None:
        if self._head is None:
            return
        session = self._head.pid
        self._head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._head.wait(STOP_TIMEOUT_S)
        # Ray gives its workers process groups of their own; what they all share is the session.
        left = [process for process in psutil.process_iter() if _session(process) == session]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(left, STOP_TIMEOUT_S)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._head.wait()


def stop_on_sigterm() -> None:
    """Makes SIGTERM end the program as Ctrl-C does, so that the cluster is stopped with it."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def _show(line: str) -> None:
    start = min((line.find(p) for p in SHOWN_PREFIXES if p in line), default=-1)
    if start >= 0:
        print(f"    {line[start:].rstrip()}", flush=True)


def _answers(url: str, headers: dict[str, str] | None = None) -> bool:
    try:
        return httpx.get(url, headers=headers, timeout=5).is_success
    except httpx.TransportError:
        return False


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
