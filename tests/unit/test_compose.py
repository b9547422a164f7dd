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
WEBUI = ROOT / "docker-compose.webui.yml"
RAY, RAY_GPU = ROOT / "docker-compose.ray.yml", ROOT / "docker-compose.ray-gpu.yml"
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


PROFILES = {
    "tokens": "tokens",
    "hardware": "node-exporter",
    "traces": "traces",
    "alerts": "alertmanager",
    "autoscaler": "autoscaler",
    "triton": "triton",
    "triton-canary": "triton-canary",
    "webui": "webui",
}
# The switch has Docker's socket, whose owner is root: tests/gateway/test_switch.py holds it to three requests.
IN_NETWORKS = {"autoscaler": {"fleet", "switch"}, "switch": {"switch"}, "webui": {"webui"}}


@pytest.mark.parametrize("name", ["gateway", *REPLICAS, "prometheus", "grafana", *PROFILES.values(), "switch"])
def test_every_service_is_confined_checked_and_bounded(name: str) -> None:
    service = compose(BASE, settings={"COMPOSE_PROFILES": ",".join(PROFILES)})["services"][name]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["restart"] == "unless-stopped"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert name == "switch" or not service["user"].startswith(("0", "root"))
    assert int(service["mem_limit"]) > 0
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert set(service["networks"]) == IN_NETWORKS.get(name, {"fleet"})


def test_each_kind_of_container_has_a_user_of_its_own() -> None:
    """Whoever gets out of one owns no file of another. Replicas and Triton share their caches."""
    services = compose(BASE, settings={"COMPOSE_PROFILES": "*"})["services"]
    folders: dict[str, set[str]] = {}
    for service in services.values():
        # below are users of the official images
        if 10000 <= int(service["user"].partition(":")[0]) < 65534:
            build = service["build"]
            file = Path(build["context"], build.get("dockerfile", "Dockerfile"))
            assert f"\nUSER {service['user']}\n" in file.read_text()
            folders.setdefault(service["user"], set()).add(file.parent.name)
    assert len(folders) > 3
    assert [sorted(names) for names in folders.values() if len(names) > 1] == [["triton", "vllm"]]


def test_the_gateway_makes_the_autoscalers_folder_for_its_user() -> None:
    """The gateway is there first, and a volume takes over whose folder it is."""
    autoscaler, gateway = ((ROOT / name / "Dockerfile").read_text() for name in ("autoscaler", "nginx"))
    (user,) = re.findall(r"^USER (.*)$", autoscaler, re.MULTILINE)
    assert f"chown {user} /var/lib/autoscaler" in autoscaler
    assert f"chown {user} /var/lib/autoscaler" in gateway


def test_no_registry_is_asked_for_an_image_that_is_built_here(services: dict[str, Any]) -> None:
    """Without a policy Compose pulls the name before it builds."""
    built = {name for name, service in services.items() if "build" in service}
    assert built == {"gateway", "prometheus", *REPLICAS}
    assert {name for name, service in services.items() if service.get("pull_policy") == "never"} == built


def test_open_webui_reaches_the_gateway_and_nothing_else() -> None:
    """Its network has no way out, and nobody but the gateway is in it."""
    profiles = {"COMPOSE_PROFILES": ",".join(PROFILES)}
    plain, opened = compose(BASE, settings=profiles), compose(BASE, WEBUI, settings=profiles)
    assert {"webui", "tokens"} <= set(compose(BASE, settings={"COMPOSE_PROFILES": "webui"})["services"])
    assert opened["networks"]["webui"]["internal"] is True
    assert [name for name, one in opened["services"].items() if "webui" in one["networks"]] == ["gateway", "webui"]
    assert set(opened["services"]["gateway"]["networks"]) == {"fleet", "webui"}
    assert not opened["services"]["webui"].get("ports")
    # nobody who does not want it meets it
    assert plain["services"]["gateway"] == compose(BASE)["services"]["gateway"]
    assert "webui" not in compose(BASE)["networks"]


@pytest.mark.parametrize(
    ("settings", "files", "port"),
    [
        ({}, (WEBUI,), ("127.0.0.1", "8080", 8090)),
        ({"WEBUI_PORT": "3001", "BIND_ADDRESS": "0.0.0.0"}, (WEBUI,), ("0.0.0.0", "3001", 8090)),
        ({"HTTPS_PORT": "443"}, (TLS, WEBUI), ("127.0.0.1", "8080", 18090)),
    ],
)
def test_open_webui_has_a_port_of_the_gateway_where_the_gateway_is_published(
    settings: dict[str, str], files: tuple[Path, ...], port: tuple[str, str, int]
) -> None:
    ports = compose(BASE, *files, settings=settings)["services"]["gateway"]["ports"]
    assert (ports[-1]["host_ip"], ports[-1]["published"], ports[-1]["target"]) == port
    listens = re.findall(r"^listen (\d+)( ssl)?", (ROOT / "nginx/host/webui.conf").read_text(), re.MULTILINE)
    assert (str(port[2]), " ssl" if "HTTPS_PORT" in settings else "") in listens


def test_only_the_gateway_is_published_beyond_loopback_and_only_when_asked() -> None:
    def published(config: dict[str, Any]) -> dict[str, set[str]]:
        ports = {name: service.get("ports", []) for name, service in config["services"].items()}
        return {name: {port["host_ip"] for port in own} for name, own in ports.items() if own}

    loopback = {"gateway": {"127.0.0.1"}, "prometheus": {"127.0.0.1"}, "grafana": {"127.0.0.1"}}
    assert published(compose(BASE)) == loopback
    profile = {"COMPOSE_PROFILES": "traces"}
    assert published(compose(BASE, settings=profile)) == loopback | {"traces": {"127.0.0.1"}}
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
    config = compose(BASE, settings=users | {"COMPOSE_PROFILES": "tokens,alerts,webui"})
    mounts = {
        (name, Path(volume["source"]).relative_to(ROOT), volume["target"], volume.get("read_only"))
        for name, service in config["services"].items()
        for volume in service.get("volumes", ())
        if "secrets" in volume["source"]
    }
    assert mounts == {
        ("gateway", Path("secrets/gateway"), "/etc/fleet/secrets", True),
        ("tokens", Path("secrets/tokens"), "/etc/fleet/secrets", True),
        ("webui", Path("secrets/webui"), "/etc/fleet/secrets", True),
        ("alertmanager", Path("secrets/alertmanager"), "/etc/fleet/secrets", True),
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
    assert kept["gateway"] == {"/var/cache/bodies", "/var/lib/fleet", "/var/lib/autoscaler"}
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
    assert {name for name, value in environment.items() if value} == {"DRAIN_SECONDS", "HF_ENDPOINT"}


def test_traces_go_to_their_store_only_where_they_are_made() -> None:
    """Another share of them is another setting of the gateway alone: no replica restarts for it."""
    made = [compose(BASE, settings={"TRACE_SAMPLE": share})["services"] for share in ("", "0.1", "0.5")]
    replicas = [services["vllm-0"]["environment"]["TRACES_URL"] for services in made]
    assert replicas == ["", *["http://traces:4318/v1/traces"] * 2]
    assert made[1]["vllm-0"] == made[2]["vllm-0"]
    assert made[1]["gateway"] != made[2]["gateway"]


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
    # Compose itself knows what the project is called
    assert example == read - {"COMPOSE_PROJECT_NAME"} | NOT_FOR_COMPOSE


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


PACKAGES = ("vllm", "tokens", "traces", "autoscaler", "triton", "triton-gpu")


def test_every_image_is_pinned_in_one_place() -> None:
    pins = yaml.safe_load(BASE.read_text())["x-pins"]
    packages = [pin for name in PACKAGES for pin in pins.pop(f"{name}-packages").split()]
    assert [package for package in packages if not re.search(r"==\d+(\.\w+)+$", package)] == []
    assert re.fullmatch(r"[0-9a-f]{40}", pins.pop("model-revision"))
    triton = yaml.safe_load(BASE.read_text())["x-pins"]["triton-packages"]
    on_gpus = re.fullmatch(r"nvcr\.io/nvidia/tritonserver:(\d\d\.\d\d)-vllm-python-py3", pins.pop("triton"))[1]  # type: ignore[index]
    assert [
        image
        for image in pins.values()
        if not re.search(r":v?\d+\.\d+\.\d+(-slim|-\d+\.\d+\.\d+-ubuntu22\.04)?$", image)
    ] == []
    assert pins["triton-image"].split(":")[1] == triton.split()[0].removeprefix("nvidia-pytriton==")
    assert GPU.read_text().count(f"vllm-fleet/triton:{on_gpus}-gpu") == 1
    assert pins["replica-image"] == f"vllm-fleet/replica:{pins['vllm-cpu'].split(':v')[1]}"
    assert pins["vllm-gpu"].split(":")[1] == pins["vllm-cpu"].split(":")[1]
    assert pins["gateway-image"].split(":")[1] == pins["nginx"].split(":")[1]
    assert pins["prometheus-image"].split(":")[1] == pins["prometheus"].split(":v")[1]
    assert (
        pins["traces-image"].split(":")[1]
        == yaml.safe_load(BASE.read_text())["x-pins"]["traces-packages"].split("==")[1]
    )
    assert pins["webui-image"].split(":")[1] == pins["webui"].split(":v")[1]
    assert f"open-webui=={pins['webui'].split(':v')[1]}" in (ROOT / "images/webui/requirements.txt").read_text().split()
    assert pins["tokens-image"].split(":")[1] == pins["python"].split(":")[1].removesuffix("-slim")
    assert pins["autoscaler-image"].split(":")[1] == pins["tokens-image"].split(":")[1]
    assert pins["node-exporter-image"].split(":")[1] == pins["node-exporter"].split(":v")[1]
    assert GPU.read_text().count(pins["dcgm-exporter"]) == 1
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


def test_the_exporters_are_there_by_profile_and_see_the_host_read_only() -> None:
    """Neither is published, and whatever they mount of the host they can only read."""
    names = {"node-exporter", "dcgm-exporter"}
    assert not names & set(compose(BASE, GPU)["services"])
    services = compose(BASE, GPU, settings={"COMPOSE_PROFILES": "hardware"})["services"]
    for name in names:
        assert not services[name].get("ports")
        assert all(volume["read_only"] for volume in services[name]["volumes"])
        assert services[name]["cap_drop"] == ["ALL"]
        assert int(services[name]["mem_limit"]) > 0
    assert not services["node-exporter"].get("pid")
    assert devices(services["dcgm-exporter"])[0]["count"] == -1


def test_the_gpus_figures_that_are_shown_are_collected() -> None:
    """prometheus/gpus.csv names each field that the recorded metrics have, and no other."""
    rows = [row.split(",") for row in (ROOT / "prometheus/gpus.csv").read_text().splitlines() if row[0] != "#"]
    assert all(len(row) == 3 for row in rows)
    recorded = json.loads((ROOT / "grafana/metrics.json").read_text())["elsewhere"]
    assert {row[0] for row in rows} == {name for name in recorded if name.startswith("DCGM_")}


def test_what_only_a_profile_starts_is_scraped_by_the_name_of_its_service() -> None:
    """A name that no service has would never be found. Triton's port is the one that it is started with."""
    config = yaml.safe_load((ROOT / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    asked = {job["job_name"]: one for job in config for one in job.get("dns_sd_configs", ())}
    services = compose(BASE, GPU, settings={"COMPOSE_PROFILES": "*"})["services"]
    by_profile = {name for name, service in services.items() if service.get("profiles")}
    assert asked.keys() == {"autoscaler", "triton", "host", "gpus"}
    assert {name for one in asked.values() for name in one["names"]} <= by_profile
    assert f"--metrics-port={asked['triton']['port']}" in (ROOT / "triton/start.py").read_text()


def test_triton_is_there_by_profile_and_has_what_its_engines_share_with_the_replicas() -> None:
    """Its models and caches are theirs; of their settings it has all that an engine takes, and nothing is published."""
    assert "triton" not in compose(BASE)["services"]
    for files, device in ((BASE,), "cpu"), ((BASE, GPU), "gpu"):
        services = compose(*files, settings={"COMPOSE_PROFILES": "triton,triton-canary"})["services"]
        for name in ("triton", "triton-canary"):
            triton, replica = services[name], services["vllm-0"]
            assert not triton.get("ports")
            assert triton["build"]["args"]["DEVICE"] == device
            assert Service.model_validate(triton).on_gpus == (device == "gpu")
            caches = {one["target"]: one["source"] for one in replica["volumes"]}
            assert caches.items() <= {one["target"]: one["source"] for one in triton["volumes"]}.items()
            engine = (
                launch.Settings.model_fields.keys() - launch.OTHERWISE - {"tool_call_parser", "max_num_queued_reqs"}
            )
            assert {one.upper() for one in engine} | {"MODEL", "CPU_THREADS", "KV_CACHE_GB"} <= triton[
                "environment"
            ].keys()


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


@pytest.mark.parametrize("ignore", sorted(ROOT.glob("*/.dockerignore")), ids=lambda path: str(path.parent.name))
def test_what_an_image_copies_is_sent_to_its_build(ignore: Path) -> None:
    sent = {line.removeprefix("!") for line in ignore.read_text().splitlines() if line.startswith("!")}
    copies = re.findall(r"^COPY (?:--\S+ )*(.*) \S+$", ignore.with_name("Dockerfile").read_text(), re.MULTILINE)
    assert copies
    assert {name for line in copies for name in line.split()} <= sent


def test_the_example_of_models_on_demand_gives_two_models_one_gpu(tmp_path: Path) -> None:
    """docs/models-on-demand.md, laid over the files that a host with GPUs starts, with the `.env` that it shows."""
    page = (ROOT / "docs" / "models-on-demand.md").read_text()
    env, override, *_ = re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "override.yml").write_text(override)
    settings = dict(line.split("=", 1) for line in env.splitlines())
    services = compose(BASE, GPU, tmp_path / "override.yml", settings=settings)["services"]
    replicas = [services[name] for name in REPLICAS]
    assert [devices(one)[0]["device_ids"] for one in replicas] == [["0"]] * 2
    assert [(one["environment"]["SLEEP_LEVEL"], one["environment"]["SHARED_GPUS"]) for one in replicas] == [
        ("1", "0")
    ] * 2
    assert len({one["environment"]["MODEL"] for one in replicas}) == 2
    assert {name: it["condition"] for name, it in replicas[1]["depends_on"].items()} == {
        "gateway": "service_healthy", "vllm-0": "service_healthy",
    }  # fmt: skip


def test_a_ray_node_has_every_setting_of_a_replica() -> None:
    """And its image lies over the replica's, with what is added pinned."""
    replica = compose(BASE)["services"]["vllm-0"]["environment"]
    pins, base = (yaml.safe_load(file.read_text())["x-pins"] for file in (RAY, BASE))
    assert pins["replica"] == base["replica-image"]
    assert [pin for pin in pins["ray-packages"].split() if not re.search(r"==\d+(\.\w+)+$", pin)] == []
    for files, suffix in (((RAY,), ""), ((RAY, RAY_GPU), "-gpu")):
        services = compose(*files)["services"]
        assert set(services) == {"ray-head", "ray-worker"}
        for service in services.values():
            assert set(replica) - set(service["environment"]) == {"TRACES_URL"}
            assert service["build"]["args"]["BASE"] == pins["replica"] + suffix
            assert service["image"] == pins["ray-image"] + suffix
            assert service["cap_drop"] == ["ALL"]
            assert not [
                volume for volume in service["volumes"] if "/secrets" in volume["target"] and not volume["read_only"]
            ]
