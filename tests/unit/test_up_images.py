"""Where `make up` takes base images from: a registry where one answers, packages where none does, and no third way."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stack import images
from stack.compose import Build, Config, Service
from stack.console import Problem
from stack.shell import ROOT, Say, work

NGINX = "docker.io/library/nginx:1"
PROMETHEUS = "docker.io/prom/prometheus:v3"
CPU = "docker.io/vllm/vllm-openai-cpu:v0"
GPU = "docker.io/vllm/vllm-openai:v0"


def build(**args: str) -> Build:
    return Build(context=Path(), args=args)


BUILDS = {
    "gateway": build(BASE=NGINX),
    "prometheus": build(BASE=PROMETHEUS),
    "replica": build(BASE=CPU, GPU_BASE=GPU, DEVICE="cpu"),
}
ON_GPUS = {"replica-gpu": build(BASE=CPU, GPU_BASE=GPU, DEVICE="gpu")}


@dataclass
class World:
    """What this machine and the registry have, and what was asked of the registry."""

    here: set[str] = field(default_factory=set)
    registry: set[str] = field(default_factory=set)
    pulled: list[str] = field(default_factory=list)

    def present(self, image: str) -> bool:
        return image in self.here

    def pull(self, image: str, _: Say) -> bool:
        self.pulled.append(image)
        return image in self.registry

    def build_stand_ins(self, stand_ins: Mapping[str, images.DebianBase], _: Say) -> dict[str, str]:
        return {image: f"packages:{base.name}" for image, base in stand_ins.items()}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    for name in ("present", "pull", "build_stand_ins"):
        monkeypatch.setattr(images, name, getattr(world, name))
    return world


@pytest.mark.parametrize("mode", ["auto", "registry"])
def test_a_registry_that_answers_gives_the_official_images(world: World, mode: images.Mode) -> None:
    world.registry = {NGINX, PROMETHEUS, CPU}
    expected = {"gateway": NGINX, "prometheus": PROMETHEUS, "replica": CPU}
    assert images.choose_bases(BUILDS, mode, print) == (expected, True)


def test_an_official_image_that_is_here_is_not_asked_for(world: World) -> None:
    world.here = {NGINX, PROMETHEUS, CPU}
    images.choose_bases(BUILDS, "registry", print)
    assert world.pulled == []


def test_without_a_registry_all_are_built_from_packages_after_one_try(world: World) -> None:
    bases, registry_answers = images.choose_bases(BUILDS, "auto", print)
    assert bases == {
        "gateway": "packages:gateway",
        "prometheus": "packages:prometheus",
        "replica": "packages:python",
    }
    assert not registry_answers
    assert world.pulled == [NGINX]


def test_packages_can_be_asked_for_in_spite_of_a_registry(world: World) -> None:
    world.here = world.registry = {NGINX, PROMETHEUS, CPU}
    bases, _ = images.choose_bases(BUILDS, "packages", print)
    assert set(bases.values()) == {"packages:gateway", "packages:prometheus", "packages:python"}
    assert world.pulled == []


def test_a_registry_that_was_asked_for_and_does_not_answer_is_a_problem(world: World) -> None:
    with pytest.raises(Problem, match=rf"{NGINX} is not on this machine, and no registry gives it: .* IMAGES=auto"):
        images.choose_bases(BUILDS, "registry", print)
    assert world.pulled == [NGINX]


def test_on_gpus_the_replica_is_built_over_the_gpu_image(world: World) -> None:
    world.registry = {GPU}
    assert images.choose_bases(ON_GPUS, "auto", print)[0] == {"replica-gpu": GPU}


def test_the_gpu_image_has_no_stand_in(world: World) -> None:
    with pytest.raises(Problem, match=rf"{GPU} is not on this machine, and no registry gives it: .* GPU=off"):
        images.choose_bases(ON_GPUS, "auto", print)
    assert world.pulled == [GPU]


def test_the_gpu_image_that_was_loaded_is_taken_without_a_registry(world: World) -> None:
    world.here = {GPU}
    bases, _ = images.choose_bases({**BUILDS, **ON_GPUS}, "packages", print)
    assert bases["replica-gpu"] == GPU


@pytest.mark.parametrize(
    ("base", "mode", "stays"),
    [
        pytest.param(NGINX, "auto", True, id="the pinned official image"),
        pytest.param(NGINX, "packages", False, id="packages are wanted"),
        pytest.param(NGINX + ".1", "auto", False, id="another pin"),
        pytest.param(images.GATEWAY.tag, "auto", True, id="the stand-in"),
        pytest.param(images.GATEWAY.tag, "registry", False, id="a registry is wanted"),
        pytest.param("vllm-fleet/base-gateway:old", "auto", False, id="another recipe"),
    ],
)
def test_an_image_stays_over_its_base_while_that_is_what_is_asked_for(
    base: str, mode: images.Mode, stays: bool
) -> None:
    assert images.may_stay(base, build(BASE=NGINX), mode) is stays


def test_the_gpu_image_stays_over_the_official_one_whatever_is_asked_for() -> None:
    gpu = ON_GPUS["replica-gpu"]
    assert images.may_stay(GPU, gpu, "packages")
    assert not images.may_stay(CPU, gpu, "auto")


@dataclass
class Docker(World):
    """A World whose images have labels; `built` are those that were built, with their base."""

    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    built: dict[str, str] = field(default_factory=dict)

    def present(self, image: str) -> bool:
        return image in self.here or image in self.labels

    def label_of(self, image: str, label: str) -> str | None:
        return self.labels[image].get(label, "") if image in self.labels else None

    def build_over(self, base: str, image: str, *_: object) -> bool:
        self.built[image] = base
        return True


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch) -> Docker:
    docker = Docker()
    for name in ("present", "pull", "build_stand_ins", "label_of", "build_over"):
        monkeypatch.setattr(images, name, getattr(docker, name))
    return docker


@pytest.fixture
def gateway(tmp_path: Path) -> Config:
    """A stack of a gateway alone, whose Dockerfile lies in a folder of the test."""
    (tmp_path / "Dockerfile").write_text("ARG BASE\nFROM ${BASE}\n")
    (tmp_path / "code.py").write_text("one = 1\n")
    service = Service(image="gateway", build=Build(context=tmp_path, args={"BASE": NGINX}))
    return Config.model_validate({"services": {"gateway": service}, "x-pins": {}})


def labels(config: Config, base: str = NGINX) -> dict[str, str]:
    """Those of the gateway's image as it is built now."""
    build = config.services["gateway"].build
    assert build
    return {images.BASE_LABEL: base, images.RECIPE_LABEL: images.recipe(build)}


def test_an_image_of_this_checkout_stays_where_its_base_is_gone(docker: Docker, gateway: Config) -> None:
    """As on a host that a bundle was carried to, whatever base it was built over; settings beside it may differ."""
    for base in (NGINX, images.GATEWAY.tag):
        docker.labels = {"gateway": labels(gateway, base)}
        (context(gateway) / "default.conf").write_text("a setting")
        assert images.bring(gateway, "auto", print) == "all there"
    assert (docker.built, docker.pulled) == ({}, [])


def context(config: Config) -> Path:
    build = config.services["gateway"].build
    assert build
    return build.context


@pytest.mark.parametrize("change", ["Dockerfile", "code.py"])
def test_an_update_is_built_where_the_base_is_gone(docker: Docker, gateway: Config, change: str) -> None:
    docker.labels = {"gateway": labels(gateway)}
    with (context(gateway) / change).open("a") as file:
        file.write("# changed\n")
    docker.registry = {NGINX}
    assert images.bring(gateway, "auto", print) == f"gateway built over {NGINX}"
    assert docker.pulled == [NGINX]


def test_an_update_that_cannot_be_built_is_a_problem_not_passed_over(docker: Docker, gateway: Config) -> None:
    docker.labels = {"gateway": labels(gateway) | {images.RECIPE_LABEL: "old"}}
    with pytest.raises(Problem, match=rf"gateway: out of date, and cannot be built anew: {NGINX} is not"):
        images.bring(gateway, "registry", print)


def test_an_image_of_unknown_origin_is_taken_as_it_is(docker: Docker, gateway: Config) -> None:
    docker.labels = {"gateway": {}}
    assert images.bring(gateway, "auto", print) == "all there"


def test_all_that_an_image_copies_is_part_of_its_recipe_or_mounted_over_it() -> None:
    mounted = (ROOT / "docker-compose.yml").read_text()
    for folder in ("vllm", "nginx", "prometheus"):
        lines = re.findall(r"^(?:COPY|ADD) (?:--\S+ )*(.*)", (ROOT / folder / "Dockerfile").read_text(), re.MULTILINE)
        for name in (name for line in lines for name in line.split()[:-1]):
            assert name.endswith(".py") or f"./{folder}/{name}:" in mounted


def test_a_program_that_says_nothing_in_time_is_ended() -> None:
    with pytest.raises(Problem, match=r"sleep 60 … failed: it said nothing: try again"):
        work(["sleep", "60"], print, fix="try again", first_line_within=0.2)


def test_a_program_that_fails_is_quoted_with_its_last_line() -> None:
    heard: list[str] = []
    with pytest.raises(Problem, match=r"failed: disk is full: make room .*up\.log"):
        work(["sh", "-c", "echo one; echo disk is full; exit 3"], heard.append, fix="make room")
    assert heard == ["one\n", "disk is full\n"]


def test_an_import_that_ends_early_is_a_problem_not_a_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: what packs the file system learns that nobody reads it any more."""
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\nexit 1\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(images, "LOG", ROOT / ".cache" / "import-test.log")
    monkeypatch.setattr(images, "as_root", lambda *_: ["timeout", "20", "cat", "/dev/zero"])
    began = time.monotonic()
    with pytest.raises(Problem, match="could not be built from Debian's packages"):
        images.build_debian(images.PROMETHEUS, print)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("official", "installed", "said"),
    [
        ("docker.io/library/nginx:1.30.6", "1.30.6-1+b2", ""),
        ("docker.io/library/nginx:1.30.6", "1.30.7-1", "Debian has nginx 1.30.7 today, not 1.30.6 as"),
        ("docker.io/prom/prometheus:v3.5.3", "3.5.3+ds-2", ""),
        ("docker.io/prom/prometheus:v3.5.3", "3.6.0+ds-1", "Debian has prometheus 3.6.0 today, not 3.5.3 as"),
    ],
)
def test_a_package_of_another_version_than_the_pin_is_told(
    monkeypatch: pytest.MonkeyPatch, official: str, installed: str, said: str
) -> None:
    monkeypatch.setattr(images, "ask", lambda *args: subprocess.CompletedProcess(args, 0, installed, ""))
    stand_in = images.stand_in_for(official)
    assert stand_in
    assert images.other_version(official, stand_in.tag).startswith(said)
    assert bool(images.other_version(official, stand_in.tag)) is bool(said)
    # what came from a registry is what the pin names
    assert images.other_version(official, official) == ""


def test_make_up_names_both_versions(
    docker: Docker, gateway: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "other_version", lambda official, base: f"{base} is not {official}")
    images.bring(gateway, "packages", print)
    assert f"gateway: packages:gateway is not {NGINX}" in capsys.readouterr().out
