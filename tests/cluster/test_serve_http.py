"""What HAProxy makes of a replica's refusals: statuses, headers and bodies arrive as they were."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray import serve

from raysys.rollout.controller import RolloutController
from raysys.serve.app import Ranker, RankerArgs
from raysys.storage import Root
from tests.fakes import load_fake
from tests.helpers import write_config

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def url(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A ranking application of a shop that has no version yet."""
    folder = tmp_path_factory.mktemp("shop")
    tokens = folder / "tokens"
    tokens.write_text(TOKEN)
    tokens.chmod(0o600)
    extra = "http:\n  token_file: tokens\n  max_body_bytes: 100000\n  retry_after_s: 7\n"
    config = str(write_config(folder, Root((folder / "root").as_uri()).uri, extra))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    controller = RolloutController.bind(config)  # type: ignore[attr-defined]
    application = Ranker.bind(RankerArgs(config=config), controller, load_fake)  # type: ignore[attr-defined]
    serve.run(application, name="raysys", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def test_refusals_pass_the_proxy_as_the_replica_made_them(url: str) -> None:
    rank, body = f"{url}/v1/rank", {"candidates": ["apple"]}
    with httpx.Client(timeout=30) as client:
        for response in (client.get(f"{url}/v1/readyz"), client.post(rank, json=body)):
            assert response.status_code == 503
            assert response.headers["Retry-After"] == "7"
            assert set(response.json()) == {"error"}
        for content in (b"x" * 200_000, iter([b"x" * 60_000] * 4)):
            response = client.post(rank, content=content, headers=JSON)
            assert response.status_code == 413, response.text
            assert "http.max_body_bytes" in response.json()["error"]
        response = client.post(f"{url}/v1/rollout/abort")
        assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert client.post(f"{url}/v1/rollout/abort", headers=headers).status_code == 409
        response = client.head(f"{url}/v1/healthz")
        assert (response.status_code, response.content) == (200, b"")
        assert client.get(f"{url}/docs").status_code == 200


JSON: dict[str, Any] = {"Content-Type": "application/json"}
