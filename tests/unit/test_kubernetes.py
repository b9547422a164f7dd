"""deploy/kubernetes against what Compose runs, and against the types of what extends Kubernetes."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.kubernetes import check
from stack.shell import ROOT
from tests.gateway.sdks import NODE, NPM
from tests.unit.test_compose import BASE, GPU, compose

HERE = ROOT / "deploy" / "kubernetes"
# Settings that are no variable of a container there, and where each has its place.
ELSEWHERE = {
    "HTTP_PORT": "base/gateway.yaml",
    "REPLICA_MEMORY": "base/replicas.yaml",
    "REPLICA_SHM": "base/replicas.yaml",
    "HTTPS_PORT": "components/route/route.yaml",
    "HTTPS_DOMAIN": "components/route/route.yaml",
    "MIN_REPLICAS": "components/autoscaling/autoscaling.yaml",
    "MAX_REPLICAS": "components/autoscaling/autoscaling.yaml",
    "REPLICAS_TIMETABLE": "components/autoscaling/autoscaling.yaml",
    "TZ": "components/autoscaling/autoscaling.yaml",
}
# What no pod of these manifests takes part in: `make up`'s own, and the other containers'.
NOT_THERE = {
    "ACME_EMAIL", "ACME_SERVER", "USER_LIST", "JWT_KEY", "ACCESS_TOKEN_EXPIRE_MINUTES", "HF_TOKEN_FILE", "GRAFANA_PORT",
    "RAY_HEAD", "HOST_ADDRESS", "RAY_SERVES", "RAY_MEMORY", "GLOO_SOCKET_IFNAME", "SERVE_MIN_REPLICAS",
    "SERVE_MAX_REPLICAS", "SERVE_TARGET_REQUESTS",
    "PROMETHEUS_PORT", "TRACE_SAMPLE", "TRACES_PORT", "PROMETHEUS_RETENTION", "PROMETHEUS_MAX_SIZE", "IMAGES", "GPU",
    "LINK_PORT", "TRITON_REPOSITORY", "TRITON_CANARY_REPOSITORY",
    "TRITON_MEMORY", "TRITON_GPU", "AWS_ENDPOINT_URL", "AWS_REGION", "WEBUI_PORT",
}  # fmt: skip

Objects = dict[tuple[str, str], dict[str, Any]]


def objects(overlay: str) -> Objects:
    """An overlay's objects by kind and name, without the hash that kustomize adds to a ConfigMap's."""
    named = {(item["kind"], item["metadata"]["name"]): item for item in check.built(HERE / overlay)}
    return {
        (kind, re.sub(r"-[0-9a-z]{10}$", "", name) if kind == "ConfigMap" else name): it
        for (kind, name), it in named.items()
    }


@pytest.fixture(scope="module")
def base() -> Objects:
    return objects("base")


@pytest.fixture(scope="module")
def everything() -> Objects:
    return objects("several-nodes")


def pod(items: Objects, kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = items[kind, name]["spec"]["template"]["spec"]
    return found


PODS = [("Deployment", "gateway"), ("StatefulSet", "vllm"), ("Deployment", "tokens")]


@pytest.mark.parametrize("overlay", [path.name for path in check.OVERLAYS])
def test_every_overlay_builds(overlay: str) -> None:
    assert (("RayService", "vllm-ray") if overlay == "ray" else ("StatefulSet", "vllm")) in objects(overlay)


def test_ray_pods_are_pods_that_the_strictest_level_takes() -> None:
    items = objects("ray")
    cluster = items["RayService", "vllm-ray"]["spec"]["rayClusterConfig"]
    image = yaml.safe_load((ROOT / "docker-compose.ray.yml").read_text())["x-pins"]["ray-image"]
    assert cluster["authOptions"] == {"mode": "token"}
    # in the head's pod too
    autoscaler = cluster["autoscalerOptions"]["securityContext"]
    assert autoscaler == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert f":{cluster['rayVersion']}" == image[image.index(":") :]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        (container,) = spec["containers"]
        assert container["image"].endswith(f"{image}-gpu")
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert group["template"]["metadata"]["labels"]["app"] == "vllm-ray"
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        for name in (container["envFrom"][0]["configMapRef"]["name"], spec["volumes"][0]["configMap"]["name"]):
            assert ("ConfigMap", name[:-11]) in items
    route = items["HTTPRoute", "vllm-ray"]["spec"]["rules"][0]
    assert route["timeouts"] == {"request": "1h", "backendRequest": "1h"}


def test_a_misspelt_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    item = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"selektor": {}}}
    monkeypatch.setattr(check, "built", lambda _: [item])
    assert check.complaints(HERE / "base") == [
        "base: Service/x, at spec: Additional properties are not allowed ('selektor' was unexpected)"
    ]


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("rayVersion", "rayversion", "at spec.rayClusterConfig.rayversion: Extra inputs are not permitted"),
        ("maxReplicas", "maxReplica", "at spec.rayClusterConfig.workerGroupSpecs.0.maxReplica: Extra inputs"),
        ("readinessProbe", "readynessProbe", "('readynessProbe' was unexpected)"),
        ('"num-cpus": "0"', '"num-cpus": 0', "rayStartParams.num-cpus: Input should be a valid string"),
        ('"minReplicas": 2', '"minReplicas": 5', "gpus: replicas is not between minReplicas and maxReplicas"),
    ],
)
def test_a_mistake_in_a_ray_service_is_found(right: str, wrong: str, said: str) -> None:
    spec = objects("ray")["RayService", "vllm-ray"]["spec"]
    assert check.ray_complaints(spec) == []
    broken = json.dumps(spec).replace(right, wrong)
    assert broken != json.dumps(spec)
    assert any(said in line for line in check.ray_complaints(json.loads(broken)))


@pytest.mark.parametrize(("kind", "name"), PODS)
def test_a_pod_may_do_nothing_that_the_strictest_level_forbids(kind: str, name: str, everything: Objects) -> None:
    spec = pod(everything, kind, name)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec["automountServiceAccountToken"]
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
    allowed = {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
    assert {kind for volume in spec["volumes"] for kind in volume if kind != "name"} <= allowed


def test_every_setting_has_one_place() -> None:
    settings = re.findall(r"^#?([A-Z][A-Z0-9_]*)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    places = [
        name for file in ("gateway.env", "replica.env")
        for name in re.findall(r"^#?([A-Z][A-Z0-9_]*)=", (HERE / "base" / file).read_text(), re.MULTILINE)
    ]  # fmt: skip
    assert sorted([*places, *ELSEWHERE, *NOT_THERE]) == sorted(settings)


def test_a_commented_line_has_the_default_of_compose() -> None:
    examples = (ROOT / ".env.example").read_text()
    for file in ("base/gateway.env", "base/replica.env", "ray/ray.env"):
        for line in re.findall(r"^#[A-Z][A-Z0-9_]*=.*$", (HERE / file).read_text(), re.MULTILINE):
            assert f"\n{line}\n" in examples


def test_the_gateway_reads_the_files_that_compose_mounts(base: Objects) -> None:
    mounts = {}
    spec = pod(base, "Deployment", "gateway")
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for mount in spec["containers"][0]["volumeMounts"]:
        name = volumes[mount["name"]].get("configMap", {}).get("name")
        if not name:
            continue
        data = base["ConfigMap", re.sub(r"-[0-9a-z]{10}$", "", name)]["data"]
        if "subPath" in mount:
            mounts[mount["mountPath"]] = data[mount["subPath"]]
        else:
            mounts |= {f"{mount['mountPath']}/{file}": text for file, text in data.items()}
    own = {"/etc/nginx/fleet/fleet.conf", "/etc/nginx/host/names.conf"}
    skipped = {"Dockerfile", "kustomization.yaml", "fleet/default.conf", "host/names.conf"}
    there = {path for path in (ROOT / "nginx").rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(ROOT / "nginx")): path.read_text() for path in there}
    assert {path: text for path, text in mounts.items() if path not in own} == {
        f"/etc/nginx/{path}": text
        for path, text in wanted.items()
        if path not in skipped and not path.startswith("link/")
    }
    assert own <= set(mounts)


@pytest.mark.parametrize("overlay", ["base", "several-nodes"])
def test_the_gateway_knows_every_replica_that_there_may_be(overlay: str) -> None:
    items = objects(overlay)
    service = items["StatefulSet", "vllm"]["spec"]
    scaler = items.get(("ScaledObject", "vllm"))
    assert ("replicas" in service) != bool(scaler)
    most = scaler["spec"]["maxReplicaCount"] if scaler else service["replicas"]
    fleet = items["ConfigMap", "gateway-fleet"]["data"]["fleet.conf"]
    found = re.findall(r"^upstream (\S+) .* server (\S+):8000 resolve;", fleet, re.MULTILINE)
    names = [f"vllm-{number}" for number in range(most)]
    assert found == [(name, f"{name}.{service['serviceName']}.vllm-fleet.svc.cluster.local") for name in names]


def test_images_and_sizes_are_those_of_compose(base: Objects, everything: Objects) -> None:
    services = compose(BASE, settings={"COMPOSE_PROFILES": "tokens"})["services"]
    pins = yaml.safe_load(BASE.read_text())["x-pins"]
    gateway, replica = (pod(base, *which)["containers"][0] for which in PODS[:2])
    assert gateway["image"] == pins["nginx"]
    assert replica["image"] == services["vllm-0"]["image"]
    on_gpus = compose(BASE, GPU)["services"]["vllm-0"]
    tag = pod(everything, "StatefulSet", "vllm")["containers"][0]["image"].rpartition(":")[2]
    assert tag == on_gpus["image"].rpartition(":")[2]
    for kind, name, service in ((*PODS[0], "gateway"), (*PODS[1], "vllm-0"), (*PODS[2], "tokens")):
        spec = pod(everything if name == "tokens" else base, kind, name)
        user = spec["securityContext"]
        assert f"{user['runAsUser']}:{user['runAsGroup']}" == services[service]["user"]
        number, unit = re.fullmatch(r"(\d+)([MG])i", spec["containers"][0]["resources"]["limits"]["memory"]).groups()  # type: ignore[union-attr]
        assert int(number) * 2 ** {"M": 20, "G": 30}[unit] == int(services[service]["mem_limit"])


def test_a_pod_gets_the_time_to_drain(base: Objects) -> None:
    drain = int(base["ConfigMap", "replica-settings"]["data"]["DRAIN_SECONDS"])
    assert {pod(base, *which)["terminationGracePeriodSeconds"] for which in PODS[:2]} == {drain + 30}


def test_nothing_is_reached_but_what_is_named(everything: Objects) -> None:
    policies = {name: item["spec"] for (kind, name), item in everything.items() if kind == "NetworkPolicy"}
    assert policies["deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ports = {
        (name, rule["ports"][0]["port"]): rule.get("from", "anyone")
        for name, policy in policies.items() for rule in policy.get("ingress", [])
    }  # fmt: skip
    gateway = [{"podSelector": {"matchLabels": {"app": "gateway"}}}]
    monitoring = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert ports == {
        ("gateway", "http"): "anyone", ("vllm", "http"): gateway, ("tokens", "http"): gateway,
        ("monitoring", "metrics"): monitoring,
    }  # fmt: skip


def test_what_extends_kubernetes_fits_its_types(everything: Objects, tmp_path: Path) -> None:
    """tsc finds fields that are misspelt and values of a wrong type."""
    types = {
        "ServiceMonitor": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1",
        "ScaledObject": "@kubernetes-models/keda/keda.sh/v1alpha1",
        "HTTPRoute": "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1",
    }
    packages = ["typescript@5.9.3", "@kubernetes-models/prometheus-operator@6.0.0", "@kubernetes-models/keda@2.0.0"]
    packages.append("@kubernetes-models/gateway-api@2.0.0")
    install = [str(NODE), str(NPM), "install", "--silent", "--no-audit", "--no-fund", *packages]
    done = subprocess.run([*install, f"--prefix={tmp_path}"], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip("npm cannot fetch the types of what extends Kubernetes: is its registry reachable?")
    foreign = [item for (kind, _), item in everything.items() if kind in types]
    assert {item["kind"] for item in foreign} == set(types)

    def said(items: list[dict[str, Any]]) -> str:
        lines = [f"import type {{ I{kind} }} from '{package}';" for kind, package in types.items()]
        lines += [f"export const it{n}: I{it['kind']} = {json.dumps(it)};" for n, it in enumerate(items)]
        (tmp_path / "check.ts").write_text("\n".join(lines))
        tsc = [str(NODE), str(tmp_path / "node_modules/typescript/bin/tsc"), "--noEmit", "--skipLibCheck", "--strict"]
        module = ["--module", "nodenext", "--moduleResolution", "nodenext"]
        command = [*tsc, *module, str(tmp_path / "check.ts")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout

    assert said(foreign) == ""
    broken = json.loads(
        json.dumps(foreign).replace('"targetLabel"', '"targetLable"').replace("pollingInterval", "polling")
    )
    assert "targetLable" in (complaint := said(broken))
    assert "polling" in complaint
