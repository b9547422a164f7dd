"""What this host has of ports, memory, disk and GPUs, looked up and handed to the checks. Nothing here changes it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path

import psutil

from models import served
from planner import render
from stack import checks, docker, images, settings
from stack.compose import ACME_FILE, GPU_FILE, OVERRIDE, TLS_FILE, WEBUI_FILE, Build, Compose, Config, running
from stack.shell import ask


def published_ports() -> set[int]:
    """The ports of this host that the stack's running containers publish."""
    return {int(port) for port in re.findall(r":(\d+)->", running("{{.Ports}}"))}


def check_ports(wanted: settings.Settings, own: set[int], *, joined: bool = False) -> str:
    """A Problem where a port that the stack publishes is taken by something else. `joined`: where the gateway is on
    another host."""
    sockets = psutil.net_connections("tcp")
    taken = [socket.laddr[:2] for socket in sockets if socket.laddr and socket.status == psutil.CONN_LISTEN]
    ports = {
        "HTTP_PORT": (wanted.bind_address, wanted.http_port),
        **({"HTTPS_PORT": (wanted.bind_address, wanted.https_port)} if wanted.https_port else {}),
        **({"WEBUI_PORT": (wanted.bind_address, wanted.webui_port)} if profile("webui") else {}),
        "GRAFANA_PORT": (ip_address("127.0.0.1"), wanted.grafana_port),
        "PROMETHEUS_PORT": (ip_address("127.0.0.1"), wanted.prometheus_port),
        **({"TRACES_PORT": (ip_address("127.0.0.1"), wanted.traces_port)} if wanted.trace_sample is not None else {}),
    }
    if joined:
        ports = {"LINK_PORT": (ip_address("0.0.0.0"), wanted.link_port)}
    checks.ports_differ(ports)
    for name, (address, port) in ports.items():
        if port not in own:
            checks.port_is_free(name, address, port, taken)
    return ", ".join(str(port) for _, port in ports.values())


def check_memory(config: Config, names: Sequence[str] = ()) -> str:
    """A Problem where the replicas of these names, by default all, do not fit into the memory that is
    free, with Triton where it runs."""
    memory = psutil.virtual_memory()
    replicas = [config.services[name] for name in names or config.replicas]
    engines = [*replicas, *(config.services[name] for name in config.tritons)]
    asleep = sum(map(served.asleep, replicas))
    checks.memory_suffices(memory.available, memory.total, [served.memory(one) for one in engines], asleep)
    return f"{memory.available / checks.GIB:.1f} of {memory.total / checks.GIB:.1f} GiB free"


def docker_folder() -> Path:
    """Where Docker keeps images, volumes and logs; the nearest folder above that this user can see."""
    folder = Path(ask("docker", "info", "--format", "{{.DockerRootDir}}").stdout.strip() or "/var/lib")
    while not folder.is_dir():
        folder = folder.parent
    return folder


def check_disk(missing: Iterable[Build]) -> str:
    """A Problem where Docker's disk has no room for the images that are to be built."""
    folder = docker_folder()
    free = shutil.disk_usage(folder).free
    checks.disk_suffices(free, sum(checks.DISK[images.kind(build)] for build in missing), folder)
    return f"{free / checks.GIB:.0f} GiB free under {folder}"


def listed_gpus() -> str:
    """What `nvidia-smi` lists, a line a GPU and a line a MIG slice; nothing where there is no driver."""
    listed = ask("nvidia-smi", "--list-gpus")
    return listed.stdout if listed.returncode == 0 else ""


def choose_gpus(wanted: settings.Settings) -> tuple[bool, str]:
    """Whether the GPU file is added, and why."""
    override = read_override() if OVERRIDE.exists() else "none"
    return checks.gpu_choice(wanted.gpu, checks.gpus_listed(listed_gpus()), override, toolkit=docker.gpu_toolkit())


def read_override() -> checks.Override:
    """What the override file makes of the replicas. A person's may be about something else."""
    config = Compose().config()
    if on_gpus := [config.services[name] for name in config.replicas if config.services[name].on_gpus]:
        whole = all(one.build is None or images.kind(one.build) == "gpu" for one in on_gpus)
        return "gpu" if whole else "pins"
    return "cpu" if render.is_signed(OVERRIDE) else "none"


def further_files(wanted: settings.Settings, *, gpu: bool) -> list[str]:
    """The Compose files that belong to docker-compose.yml by these settings."""
    files = [*[GPU_FILE] * gpu, *[TLS_FILE] * bool(wanted.https_port), *[ACME_FILE] * bool(wanted.https_domain)]
    return [*files, *[WEBUI_FILE] * profile("webui")]


def profile(name: str) -> bool:
    """Whether COMPOSE_PROFILES names this profile."""
    named = {one.strip() for one in (settings.value_of("COMPOSE_PROFILES") or "").split(",")}
    return bool(named & {name, "*"})


def check_profiles(compose: Compose) -> None:
    """A Problem where COMPOSE_PROFILES names a profile that no service has."""
    profiles = compose.ask("config", "--profiles").split()
    checks.profiles_are_known(settings.value_of("COMPOSE_PROFILES") or "", profiles)


def check_pins(config: Config) -> None:
    """A Problem where a replica is pinned to a GPU that is not there."""
    replicas = [config.services[name] for name in config.replicas]
    if pinned := {gpu for replica in replicas for gpu in replica.gpus}:
        checks.gpus_are_there(pinned, listed_gpus(), served.of_replica(replicas[0])[0])
