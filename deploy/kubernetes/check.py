"""Builds every overlay and holds each object against the schema of its kind; `make lint` runs it.

    PYTHONPATH=scripts .venv/bin/python deploy/kubernetes/check.py

The schemas are Kubernetes' own, of the version below, and the strict ones: a field that they do not know is an error.
What extends Kubernetes (Gateway API, Prometheus' operator, KEDA) has none here: tests/unit/test_kubernetes.py holds it
against the types of npm's packages. No package has KubeRay's: `RayService` below has the fields that are used here, as
its API reference has them, and the pods in it have Kubernetes' own schema.
"""

import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from stack.console import Problem
from stack.images import debian_mirror
from stack.shell import CACHE, ask

HERE = Path(__file__).parent
OVERLAYS = sorted(path.parent for path in HERE.glob("*/kustomization.yaml"))
VERSION = "1.37"
FOREIGN = ("gateway.networking.k8s.io/", "monitoring.coreos.com/", "keda.sh/", "ray.io/")


class Fields(BaseModel):
    """Data with no other fields than these, which are written inCamels."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Auth(Fields):
    """Since KubeRay 1.5.1."""

    mode: Literal["token"]


class Autoscaler(Fields):
    """The container that the operator puts beside the head's."""

    security_context: dict[str, Any]


class Head(Fields):
    """The head's pod."""

    ray_start_params: dict[str, str]
    template: dict[str, Any]


class Workers(Head):
    """Pods of workers."""

    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int


class RayCluster(Fields):
    """What the operator makes."""

    ray_version: str
    auth_options: Auth
    enable_in_tree_autoscaling: bool
    autoscaler_options: Autoscaler
    head_group_spec: Head
    worker_group_specs: list[Workers]


class RayService(Fields):
    """KubeRay's, of which a cluster's definition has many more fields."""

    serve_config_v2: str
    ray_cluster_config: RayCluster


def kustomize() -> list[str]:
    """The command that builds a folder: kustomize, kubectl's, or the one out of Debian's package, kept in .cache."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    kept = CACHE / "kustomize" / "usr" / "bin" / "kustomize"
    if not kept.exists():
        mirror = debian_mirror()
        make = ["mmdebstrap", "--quiet", "--variant=extract", '--aptopt=Acquire::Check-Valid-Until "false"']
        make += ["--include=kustomize", "forky", str(CACHE / "kustomize")]
        done = ask(*make, *([f"deb {mirror} forky main"] if mirror else []), timeout=300)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["mmdebstrap failed"])[-1]
            raise Problem(f"kustomize is not here, and Debian's package cannot be had: {said}", "install kustomize")
    return [str(kept), "build"]


def built(overlay: Path) -> list[dict[str, Any]]:
    """The objects of an overlay. A Problem where it cannot be built."""
    done = ask(*kustomize(), str(overlay))
    if done.returncode:
        raise Problem(f"{overlay.name} cannot be built: {done.stderr.strip()}", "mend its kustomization.yaml")
    return list(yaml.safe_load_all(done.stdout))


def ray_complaints(spec: dict[str, Any]) -> list[str]:
    """What is wrong with a RayService, a line each."""
    try:
        cluster = RayService.model_validate(spec).ray_cluster_config
    except ValidationError as errors:
        return [f"at spec.{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in errors.errors()]
    wrong = [
        f"{group.group_name}: replicas is not between minReplicas and maxReplicas"
        for group in cluster.worker_group_specs
        if not 0 <= group.min_replicas <= group.replicas <= group.max_replicas
    ]
    groups: list[tuple[str, Head]] = [("its head", cluster.head_group_spec)]
    groups += [(group.group_name, group) for group in cluster.worker_group_specs]
    for name, group in groups:
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "ray"}, "template": group.template}
        try:
            kubernetes_validate.validate(template, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            wrong.append(f"{name}, at {'.'.join(map(str, error.path))}: {error.message}")
    return wrong


def complaints(overlay: Path) -> list[str]:
    """What is wrong with an overlay, a line each."""
    wrong = []
    for item in built(overlay):
        name = f"{overlay.name}: {item['kind']}/{item['metadata']['name']}"
        if item["kind"] == "RayService":
            wrong += [f"{name}, {line}" for line in ray_complaints(item["spec"])]
        if item["apiVersion"].startswith(FOREIGN):
            continue
        try:
            kubernetes_validate.validate(item, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            wrong.append(f"{name}, at {'.'.join(map(str, error.path)) or 'its top'}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError:
            wrong.append(f"{name}: Kubernetes {VERSION} has no {item['kind']} in {item['apiVersion']}")
    return wrong


def main() -> int:
    """Checks all overlays; 1 where anything is wrong."""
    try:
        wrong = [line for overlay in OVERLAYS for line in complaints(overlay)]
    except Problem as problem:
        wrong = [str(problem)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
