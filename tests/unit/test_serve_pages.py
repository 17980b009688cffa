"""The pages of the API's documentation need no other host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from raysys.storage import Root
from tests.fakes import FakeReplica

PAGES = ["/docs", "/redoc"]


@pytest.fixture
def client(local_root: Root) -> Iterator[TestClient]:
    with FakeReplica(local_root, {}).client() as client:
        yield client


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "spec-url")]


def links(page: str) -> list[str]:
    """All that a browser would load, of tags and of the script that starts the page."""
    parser = _Links()
    parser.feed(page)
    return parser.found + re.findall(r"url: '([^']*)'", page)


def other_hosts(page: str) -> list[str]:
    return [link for link in links(page) if not re.match(r"/[^/]", link)]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_and_all_that_it_loads_come_from_the_replica(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert len(links(response.text)) >= 3
    assert other_hosts(response.text) == []
    assert "//" not in re.sub(r"<!--.*?-->", "", response.text, flags=re.DOTALL)
    for link in links(response.text):
        assert client.get(link).status_code == 200, link
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self';") and "http" not in policy


@pytest.mark.parametrize("path", PAGES)
def test_pages_of_fastapi_itself_are_told_apart(path: str) -> None:
    """Negative control: those load from a CDN."""
    page = TestClient(FastAPI()).get(path).text
    assert other_hosts(page) != []


def test_nothing_beside_the_assets_is_served(client: TestClient) -> None:
    for path in ("/docs-assets/", "/docs-assets/nothing.js", "/docs-assets/..%2f__init__.py"):
        response = client.get(path)
        assert response.status_code == 404, path
