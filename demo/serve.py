"""Brings up what `make demo` trained: the ranking endpoints on loopback, until Ctrl-C."""

from __future__ import annotations

import re
import signal
import sys

from cluster import DemoError, LocalCluster, stop_on_sigterm
from run import FOLDER, serve_config


def main() -> int:
    """Serves until interrupted."""
    config_path = FOLDER / "shop.yaml"
    if not config_path.exists():
        print("demo: build/demo/shop.yaml is missing; run `make demo` first", file=sys.stderr)
        return 1
    stop_on_sigterm()
    try:
        with LocalCluster(FOLDER) as cluster:
            cluster.deploy(serve_config(cluster, config_path))
            print(f"Serving at {cluster.url} (API: {cluster.url}/docs); Ctrl-C ends it.")
            print(f"In another shell: source {cluster.write_environment()}")
            if (curl := FOLDER / "curl.txt").exists():
                # Port 8000 may be taken this time, or may have been when the demo ran.
                line = re.sub(r"http://127\.0\.0\.1:\d+", cluster.url, curl.read_text())
                curl.write_text(line)
                print(line, flush=True)
            signal.pause()
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
