"""The Compose files, as `docker compose config` reads them. Needs the Compose plugin, no engine."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.replica_gpus import dump_compose, gpu_service
from stack.compose import Service
from stack.shell import ROOT
from vllm import launch

BASE = ROOT / "docker-compose.yml"
GPU = ROOT / "docker-compose.gpu.yml"
TLS = ROOT / "docker-compose.tls.yml"
REPLICAS = ("vllm-0", "vllm-1")
# The host's commands read these themselves.
NOT_FOR_COMPOSE = {"IMAGES", "GPU", "HF_TOKEN_FILE", "USER_LIST", "JWT_KEY", "ACCESS_TOKEN_EXPIRE_MINUTES"}


def compose(*files: Path, settings: dict[str, str] | None = None, env_file: Path = Path(os.devnull)) -> dict[str, Any]:
    """The merged configuration of these files. Only the given settings count, not the .env of this checkout."""
    options = [part for file in files for part in ("--file", file)]
    command = ["docker", "compose", "--project-directory", ROOT, "--env-file", env_file, *options]
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [*command, "config", "--format", "json"],
        env=clean | (settings or {}),
        text=True,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    config: dict[str, Any] = json.loads(done.stdout)
    return config


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services without a GPU and without settings."""
    found: dict[str, Any] = compose(BASE)["services"]
    return found


def devices(service: dict[str, Any]) -> list[dict[str, Any]]:
    """The GPU reservations of a service."""
    reservations: list[dict[str, Any]] = service["deploy"]["resources"]["reservations"]["devices"]
    return reservations


def fleet(gpus: int) -> dict[str, Any]:
    """What `make plan` writes for two replicas with so many GPUs each."""
    ids = [[str(first + gpu) for gpu in range(gpus)] for first in (0, gpus)]
    return {"services": {name: gpu_service(own, gpus) for name, own in zip(REPLICAS, ids, strict=True)}}


def test_the_parts_are_there(services: dict[str, Any]) -> None:
    assert set(services) == {"gateway", *REPLICAS, "prometheus", "grafana"}


@pytest.mark.parametrize("name", ["gateway", *REPLICAS, "prometheus", "grafana", "tokens"])
def test_every_service_is_confined_checked_and_bounded(name: str) -> None:
    service = compose(BASE, settings={"COMPOSE_PROFILES": "tokens"})["services"][name]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["restart"] == "unless-stopped"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service["user"].startswith(("0", "root"))
    assert int(service["mem_limit"]) > 0
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert set(service["networks"]) == {"fleet"}


def test_no_registry_is_asked_for_an_image_that_is_built_here(services: dict[str, Any]) -> None:
    """Without a policy Compose pulls the name before it builds."""
    built = {name for name, service in services.items() if "build" in service}
    assert built == {"gateway", "prometheus", *REPLICAS}
    assert {name for name, service in services.items() if service.get("pull_policy") == "never"} == built


def test_only_the_gateway_is_published_beyond_loopback_and_only_when_asked() -> None:
    def published(config: dict[str, Any]) -> dict[str, set[str]]:
        ports = {name: service.get("ports", []) for name, service in config["services"].items()}
        return {name: {port["host_ip"] for port in own} for name, own in ports.items() if own}

    loopback = {"gateway": {"127.0.0.1"}, "prometheus": {"127.0.0.1"}, "grafana": {"127.0.0.1"}}
    assert published(compose(BASE)) == loopback
    assert published(compose(BASE, settings={"BIND_ADDRESS": "0.0.0.0"})) == loopback | {"gateway": {"0.0.0.0"}}
    assert published(compose(BASE, settings={"BIND_ADDRESS": "[::1]"})) == loopback | {"gateway": {"::1"}}


@pytest.mark.parametrize(("files", "port", "starts"), [((), "", True), ((), "443", False), ((TLS,), "443", True)])
def test_https_without_its_file_starts_no_gateway(files: tuple[Path, ...], port: str, starts: bool) -> None:
    """Plain `docker compose up` reads HTTPS_PORT too, and would publish plain HTTP."""
    environment = compose(BASE, *files, settings={"HTTPS_PORT": port})["services"]["gateway"]["environment"]
    given = {name: value for name, value in environment.items() if value is not None}
    command = ["/bin/sh", str(ROOT / "nginx" / "start.sh"), "true"]
    done = subprocess.run(command, env=given, text=True, capture_output=True, check=False)
    assert (done.returncode == 0) == starts
    assert ("HTTPS_PORT is set, but docker-compose.tls.yml" in done.stderr) != starts


def test_who_sees_which_secrets() -> None:
    """The gateway sees hashes and public keys, the token service users and private keys, and nobody else anything."""
    users = {"USER_LIST": "A", "A_USERNAME": "alice", "A_HASHED_PASSWORD": "planted-1", "JWT_KEY": "planted-2"}
    config = compose(BASE, settings=users | {"COMPOSE_PROFILES": "tokens"})
    mounts = {
        (name, Path(volume["source"]).relative_to(ROOT), volume["target"], volume.get("read_only"))
        for name, service in config["services"].items()
        for volume in service.get("volumes", ())
        if "secrets" in volume["source"]
    }
    assert mounts == {
        ("gateway", Path("secrets/gateway"), "/etc/fleet/secrets", True),
        ("tokens", Path("secrets/tokens"), "/etc/fleet/secrets", True),
    }
    assert not config["services"]["tokens"].get("ports")
    # neither in an environment, which `docker inspect` shows, nor anywhere else
    assert "planted" not in json.dumps(config)


def test_the_token_service_has_the_packages_that_its_tests_have() -> None:
    pins = yaml.safe_load(BASE.read_text())["x-pins"]["tokens-packages"].split()
    project = (ROOT / "pyproject.toml").read_text()
    assert [pin for pin in pins if f'"{pin}"' not in project] == []


def test_without_the_gpu_file_no_replica_is_on_gpus(services: dict[str, Any]) -> None:
    assert not any(Service.model_validate(services[name]).on_gpus for name in REPLICAS)


def test_one_dead_replica_keeps_nothing_from_starting(services: dict[str, Any]) -> None:
    waits = {name: set(service.get("depends_on", {})) for name, service in services.items()}
    assert [name for name, others in waits.items() if others & set(REPLICAS)] == []


def test_what_is_dear_to_make_again_is_kept(services: dict[str, Any]) -> None:
    kept = {
        name: {volume["target"] for volume in service["volumes"] if volume["type"] == "volume"}
        for name, service in services.items()
    }
    assert kept["vllm-0"] == kept["vllm-1"] == {"/cache/hub", "/cache/compiled"}
    assert kept["gateway"] == {"/var/cache/bodies", "/var/lib/fleet"}
    assert kept["prometheus"] == {"/prometheus"}
    assert kept["grafana"] == {"/var/lib/grafana"}


def test_a_stop_waits_longer_than_the_drain() -> None:
    config = compose(BASE, settings={"DRAIN_SECONDS": "90"})["services"]
    assert config["vllm-0"]["environment"]["DRAIN_SECONDS"] == "90"
    assert {config[name]["stop_grace_period"] for name in ("gateway", *REPLICAS)} == {"2m0s"}


def test_every_setting_of_the_launcher_reaches_it_from_the_env_file(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    names = [name.upper() for name in launch.Settings.model_fields]
    env_file.write_text("".join(f"{name}=1{number}\n" for number, name in enumerate(names)))
    environment = compose(BASE, env_file=env_file)["services"]["vllm-1"]["environment"]
    assert {name: environment[name] for name in names} == {name: f"1{number}" for number, name in enumerate(names)}


def test_a_setting_that_is_not_set_does_not_reach_the_container(services: dict[str, Any]) -> None:
    environment = services["vllm-0"]["environment"]
    assert {name for name, value in environment.items() if value is not None} == {"DRAIN_SECONDS", "HF_ENDPOINT"}


def test_a_mirror_of_the_hub_reaches_the_replicas_and_a_token_reaches_nothing() -> None:
    mirror = "https://mirror.example"
    config = compose(BASE, settings={"HF_ENDPOINT": mirror, "HF_TOKEN_FILE": "/token", "HF_TOKEN": "secret"})
    assert {config["services"][name]["environment"]["HF_ENDPOINT"] for name in REPLICAS} == {mirror}
    assert "TOKEN" not in json.dumps(config).upper().replace("TOKENS", "")
    empty = compose(BASE, settings={"HF_ENDPOINT": ""})["services"]["vllm-0"]["environment"]
    assert empty["HF_ENDPOINT"] == "https://huggingface.co"


def test_the_example_names_every_setting_that_is_read_and_no_other() -> None:
    example = set(re.findall(r"^#([A-Z][A-Z0-9_]*)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    files = "".join(path.read_text() for path in ROOT.glob("docker-compose*.yml"))
    read = set(re.findall(r"(?<!\$)\$\{([A-Z0-9_]+)", files)) | set(
        re.findall(r"^ {4,6}([A-Z][A-Z0-9_]*):$", files, re.MULTILINE)
    )
    assert example == read | NOT_FOR_COMPOSE


def test_the_example_changes_nothing_as_it_stands() -> None:
    assert compose(BASE, env_file=ROOT / ".env.example") == compose(BASE)


def test_another_replica_is_three_lines(tmp_path: Path, services: dict[str, Any]) -> None:
    text = BASE.read_text()
    three = "  vllm-2:\n    <<: *replica\n    hostname: vllm-2.fleet\n\n"
    bigger = tmp_path / "docker-compose.yml"
    bigger.write_text(text.replace("  prometheus:\n    <<:", f"{three}  prometheus:\n    <<:"))
    added = compose(bigger)["services"]["vllm-2"]
    assert added.pop("hostname") == "vllm-2.fleet"
    assert added == {key: value for key, value in services["vllm-1"].items() if key != "hostname"}


def test_no_replica_shares_its_name_with_what_runs_beside_it(services: dict[str, Any]) -> None:
    """Docker answers for a hostname too, and `docker compose run` gives its container the service's."""
    assert {services[name]["hostname"] for name in REPLICAS} == {f"{name}.fleet" for name in REPLICAS}


def test_every_image_is_pinned_in_one_place() -> None:
    pins = yaml.safe_load(BASE.read_text())["x-pins"]
    packages = [*pins.pop("vllm-packages").split(), *pins.pop("tokens-packages").split()]
    assert [package for package in packages if not re.search(r"==\d+(\.\w+)+$", package)] == []
    assert re.fullmatch(r"[0-9a-f]{40}", pins.pop("model-revision"))
    assert [image for image in pins.values() if not re.search(r":v?\d+\.\d+\.\d+(-slim)?$", image)] == []
    assert pins["replica-image"] == f"vllm-fleet/replica:{pins['vllm-cpu'].split(':v')[1]}"
    assert pins["vllm-gpu"].split(":")[1] == pins["vllm-cpu"].split(":")[1]
    assert pins["gateway-image"].split(":")[1] == pins["nginx"].split(":")[1]
    assert pins["prometheus-image"].split(":")[1] == pins["prometheus"].split(":v")[1]
    assert pins["tokens-image"].split(":")[1] == pins["python"].split(":")[1].removesuffix("-slim")
    assert f"{pins['replica-image']}-gpu" == gpu_service(["0"], 1)["image"]


def test_the_gpu_file_pins_each_replica_to_its_own_gpu() -> None:
    config = compose(BASE, GPU)["services"]
    assert {name: devices(config[name]) for name in REPLICAS} == {
        name: [{"driver": "nvidia", "device_ids": [str(number)], "capabilities": ["gpu"]}]
        for number, name in enumerate(REPLICAS)
    }
    for name in REPLICAS:
        assert Service.model_validate(config[name]).on_gpus
        assert config[name]["build"]["args"]["DEVICE"] == "gpu"
        assert config[name]["environment"]["TENSOR_PARALLEL_SIZE"] == "1"
        mounts = {volume["target"]: Path(volume["source"]).name for volume in config[name]["volumes"]}
        assert mounts["/etc/vllm/engine.yaml"] == "engine.gpu.yaml"


def test_the_gpu_file_says_what_the_planner_would_say(tmp_path: Path) -> None:
    override = tmp_path / "override.yml"
    override.write_text(dump_compose(fleet(1)))
    by_file, by_plan = compose(BASE, GPU)["services"], compose(BASE, override)["services"]
    for name in REPLICAS:
        assert by_plan[name]["environment"].pop("PIPELINE_PARALLEL_SIZE") == "1"
        by_file[name]["environment"].pop("PIPELINE_PARALLEL_SIZE")
        assert by_plan[name] == by_file[name]


@pytest.mark.parametrize("over_the_gpu_file", [False, True])
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_each_replica_has_exactly_one_reservation_with_its_gpus(
    tmp_path: Path, gpus: int, over_the_gpu_file: bool
) -> None:
    override = tmp_path / "override.yml"
    override.write_text(dump_compose(fleet(gpus)))
    config = compose(BASE, *([GPU] if over_the_gpu_file else []), override)["services"]
    for number, name in enumerate(REPLICAS):
        (reservation,) = devices(config[name])
        assert reservation["device_ids"] == [str(number * gpus + gpu) for gpu in range(gpus)]
        assert config[name]["environment"]["TENSOR_PARALLEL_SIZE"] == str(gpus)


@pytest.mark.parametrize(
    ("ids", "tp", "pp"), [(["0"], 2, 1), (["0", "0"], 2, 1), (["0", "1", "2"], 2, 1), (["0", "1"], 2, 2)]
)
def test_gpus_that_do_not_match_the_workers_are_refused(ids: list[str], tp: int, pp: int) -> None:
    with pytest.raises(ValueError, match="different GPUs"):
        gpu_service(ids, tp, pp)


def test_nccl_is_left_alone_unless_set() -> None:
    names = {"NCCL_SOCKET_IFNAME": "eth1", "NCCL_P2P_DISABLE": "1", "NCCL_DEBUG": "INFO"}
    plain = compose(BASE, GPU)["services"]["vllm-0"]["environment"]
    assert {plain[name] for name in names} == {None}
    chosen = compose(BASE, GPU, settings=names)["services"]["vllm-0"]["environment"]
    assert {name: chosen[name] for name in names} == names
