"""Looks at this host: its settings, Docker, the Compose files, ports, memory, disks and GPUs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import psutil
import pynvml

from diagnosis import gpus
from diagnosis.findings import Found
from diagnosis.seen import DOCKER_S, PROJECT, Seen, containers
from models import served
from planner.nvml import read_machine
from stack import access, autoscaling, checks, docker, host, hours, images, settings
from stack.checks import GIB
from stack.compose import ACME_FILE, REPLICAS_FILE, TLS_FILE, WEBUI_FILE, Compose, running_files
from stack.console import Problem
from stack.gateway import check_named
from stack.shell import ROOT

# Below it something fails soon, whatever takes the room.
LEAST_DISK = 2 * GIB
LEAST_MEMORY = GIB // 4
# docker-compose.yml: five files of 20 MB for each container
LOGS_OF_ONE = 100 * 10**6
# Prometheus' units of its retention size: powers of two
UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40, "PB": 2**50, "EB": 2**60}
MIB = 2**20


def look_at_settings(seen: Seen, found: Found) -> str:
    """`.env` and the environment, as `make up` reads them."""
    seen.wanted = settings.as_far_as_readable()
    # others want to know since when
    seen.ask_prometheus()
    if wrong := settings.mistakes():
        for problem in wrong:
            found.wrong(".env", problem.what, problem.fix)
        return ""
    seen.has.add("settings")
    found.check(".env", settings.check_private)
    found.check(".env", hours.check, seen.wanted.awake)
    found.check(".env", access.check_environment)
    return ".env" if settings.ENV_FILE.exists() else "the defaults; .env.example lists them"


def look_at_docker(seen: Seen, found: Found) -> str:
    """The engine, its plugins, and the stack's containers."""
    version, error = docker.docker_version(DOCKER_S)
    if version is None:
        # rights that are missing have a cure of their own
        found.check("Docker", checks.docker_answers, error)
        if not found.all:
            said = error.strip().splitlines()[-1:] or ["it says nothing"]
            found.wrong("Docker", f"the engine does not answer: {said[0]}", "`make up` starts it")
        return ""
    seen.has.add("docker")
    words = found.check("Docker", docker.check) or ""
    for name in docker.PLUGINS:
        if f"no {name} yet" in words:
            found.wrong("Docker", f"its plugin {name} is missing", "`make up` installs it")
    try:
        project = settings.value_of("COMPOSE_PROJECT_NAME") or PROJECT
    except Problem:  # it is told already
        project = PROJECT
    seen.containers = containers(project)
    if seen.containers:
        seen.has.add("stack")
        elsewhere = {
            folder
            for container in seen.containers.values()
            if (folder := container.labels.get("com.docker.compose.project.working_dir")) and Path(folder) != ROOT
        }
        for folder in elsewhere:
            what = f"the stack that runs was started from {folder}, not from this checkout"
            found.note("stack", what, f"look from there: cd {folder} && make doctor")
    return words


def look_at_files(seen: Seen, found: Found) -> str:
    """The Compose files, the profiles, and the gateway's list of the fleet."""
    if any(container.runs for container in seen.containers.values()):
        files = running_files()
        for file, needed, name in (
            (TLS_FILE, seen.wanted.https_port, "HTTPS_PORT"),
            (ACME_FILE, seen.wanted.https_domain, "HTTPS_DOMAIN"),
            (WEBUI_FILE, host.profile("webui"), "COMPOSE_PROFILES"),
        ):
            if needed and file not in files:
                found.wrong(name, f"it asks for {file}, but the stack runs without that", "`make up` adds it")
    else:
        files = host.further_files(seen.wanted, gpu=host.choose_gpus(seen.wanted)[0])
        files += [REPLICAS_FILE] * (ROOT / REPLICAS_FILE).exists()
    seen.compose = Compose(*files)
    config = seen.compose.config()
    seen.config = config
    seen.has.add("files")
    found.check("COMPOSE_PROFILES", host.check_profiles, seen.compose)
    if "autoscaler" in config.services:
        found.check("autoscaler", autoscaling.check, settings.with_users(), config)
    found.check("gateway", check_named, config)
    if config.services.get("tokens"):
        found.check("tokens", access.check_users)
    return f"{len(config.replicas)} replicas, {len(config.services) - len(config.replicas)} other services"


def look_at_ports(seen: Seen, found: Found) -> str:
    """The ports that the stack publishes: free, or its own."""
    return found.check("ports", host.check_ports, seen.wanted, host.published_ports()) or ""


def look_at_memory(seen: Seen, found: Found) -> str:
    """Whether the replicas fit, or, where they run, whether anything is left."""
    memory = psutil.virtual_memory()
    if "files" in seen.has and not any(seen.containers[name].runs for name in seen.replicas if name in seen.containers):
        return host.check_memory(seen.config)
    if memory.available < LEAST_MEMORY:
        what = f"only {memory.available / MIB:.0f} MiB of this host's memory are free: the kernel may end a replica"
        found.wrong("memory", what, "stop other programs, or let `make plan` plan a smaller fleet")
    return f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"


def look_at_disks(seen: Seen, found: Found) -> str:
    """Whether there is room for images, and for what metrics, bodies and logs may still take."""
    folders = {"models": served.MODELS if served.MODELS.is_dir() else ROOT}
    missing = images.without_base(seen.config, seen.wanted.images) if {"docker", "files"} <= seen.has else {}
    if "docker" in seen.has:
        folders["Docker"] = host.docker_folder()
        if missing:
            found.check("disk", host.check_disk, missing.values())
    words = {}
    for name, folder in folders.items():
        usage = shutil.disk_usage(folder)
        words[usage.total, usage.free] = f"{usage.free / GIB:.0f} GiB free under {folder}"
        if usage.free < LEAST_DISK:
            what = f"{usage.free / GIB:.1f} GiB are free under {folder}"
            found.wrong("disk", what, "make room: `docker system df` and `du -sh models/*` show what takes it")
        elif name == "Docker" and seen.containers and (grows := growth(seen)) > usage.free:
            what = (
                f"{usage.free / GIB:.1f} GiB are free under {folder}, and metrics, long requests and logs may still"
                f" take {grows / GIB:.1f}"
            )
            found.note("disk", what, "make room, or set a smaller PROMETHEUS_MAX_SIZE or GATEWAY_BODIES_MB")
    return ", ".join(words.values())


def growth(seen: Seen) -> int:
    """Bytes that the running stack may still take of Docker's disk, within the limits that are set for it."""
    room = seen.wanted.gateway_bodies_mb * MIB + LOGS_OF_ONE * len(seen.containers)
    try:
        limit = size(seen.prometheus.ask("status/flags").get("storage.tsdb.retention.size", ""))
        parts = "prometheus_tsdb_storage_blocks_bytes|prometheus_tsdb_wal_storage_size_bytes"
        kept = sum(value for _, value in seen.prometheus.vector(f'{{__name__=~"{parts}"}}'))
    except Problem:
        return room
    return room + max(0, limit - int(kept))


def size(text: str) -> int:
    """Bytes of a size as Prometheus writes it: 5GB, 512MiB; 0 where it is none."""
    match = re.fullmatch(r"(\d+)([KMGTPE]?)i?B", text)
    return int(match[1]) * UNITS[f"{match[2]}B"] if match else 0


def look_at_gpus(seen: Seen, found: Found) -> str:
    """GPUs, their driver, and whether the replicas' pins fit them. None is fine."""
    machine = read_machine()
    words = found.check("GPU", host.choose_gpus, seen.wanted) if {"settings", "docker"} <= seen.has else None
    if "files" in seen.has:
        found.check("GPU", host.check_pins, seen.config)
    if not machine.gpus:
        return words[1] if words else "none"
    try:
        gpus.look(found)
    except pynvml.NVMLError as error:
        found.wrong("GPU", f"the driver does not tell how the GPUs are: {error}", "see `nvidia-smi`")
    names = ", ".join(dict.fromkeys(gpu.name for gpu in machine.gpus))
    return f"{len(machine.gpus)} × {names}, driver {machine.driver}"
