"""Brings up what `make demo` trained: the ranking endpoints on loopback, until Ctrl-C."""

from __future__ import annotations

import signal
import sys

from cluster import DemoError, LocalCluster
from run import FOLDER, serve_config


def main() -> int:
    """Serves until interrupted."""
    config_path = FOLDER / "shop.yaml"
    if not config_path.exists():
        print("demo: build/demo/shop.yaml is missing; run `make demo` first", file=sys.stderr)
        return 1
    try:
        with LocalCluster(FOLDER) as cluster:
            cluster.deploy(serve_config(cluster, config_path))
            print(f"Serving at {cluster.url} (API: {cluster.url}/docs); Ctrl-C ends it.")
            if (FOLDER / "curl.txt").exists():
                print((FOLDER / "curl.txt").read_text())
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
