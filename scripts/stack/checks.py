"""What has to be true of this machine before anything is changed on it. Each check takes what was found and decides."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import combinations
from pathlib import Path
from typing import Literal

from stack.console import Problem

Version = tuple[int, ...]
Address = IPv4Address | IPv6Address
Choice = Literal["auto", "on", "off"]
# docker-compose.override.yml: it says nothing of GPUs (or is not there), is a plan for the CPU, gives replicas GPUs and
# the image for them, or gives them GPUs and leaves the image to docker-compose.gpu.yml
Override = Literal["none", "cpu", "gpu", "pins"]

# What another host may be called.
HOST = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")

# The oldest that the stack was run with, and what it needs of them.
OLDEST_DOCKER: Version = (20, 10)  # BuildKit's bind mounts; unprivileged users may open port 80 in a container
OLDEST_COMPOSE: Version = (2, 24, 4)  # the tag `!override`
OLDEST_BUILDX: Version = (0, 13)

GIB = 2**30
# Measured: a replica of the default model holds 2.9 GiB on a CPU, of which 1 is its KV cache and 0.25 its weights; the
# gateway, Prometheus and Grafana hold 0.5 GiB together.
MEMORY_OF_VLLM = int(1.9 * GIB)
MEMORY_OF_THE_REST = GIB // 2
# What an image takes with the layers that it is built in: a replica's (with its model), and one of the rest.
DISK: dict[Literal["cpu", "gpu", "traces", "webui", "rest"], int] = {
    "cpu": 11 * GIB,
    "gpu": 44 * GIB,
    "traces": 3 * GIB,
    "webui": 6 * GIB,
    "rest": GIB // 2,
}


def version(text: str) -> Version | None:
    """The first version number in a program's output: 'Docker Compose version v2.40.3-3' is (2, 40, 3)."""
    match = re.search(r"\d+(?:\.\d+)+", text)
    return tuple(int(part) for part in match.group().split(".")) if match else None


def dotted(number: Version) -> str:
    """A version as people write it."""
    return ".".join(map(str, number))


def recent_enough(what: str, found: Version, oldest: Version, fix: str) -> None:
    """A Problem where `found` is older than `oldest`."""
    if found < oldest:
        raise Problem(f"{what} {dotted(found)} is too old: {dotted(oldest)} or newer is needed", fix)


def docker_answers(error: str) -> None:
    """A Problem where starting Docker would not help, by what its client says of an engine that does not answer."""
    if "permission denied" in error.lower():
        raise Problem(
            "no rights on the Docker socket",
            "`sudo usermod -aG docker $USER`, log in again, and run `make up` again (or run it as root)",
        )


def memory_suffices(available: int, total: int, replicas: Collection[int], asleep: int = 0) -> None:
    """A Problem where the replicas, with so many bytes each, do not fit into the available memory (bytes). `asleep` of
    all these are weights of replicas that sleep."""
    needed = sum(replicas) + MEMORY_OF_THE_REST
    if available < needed:
        of_these = f" ({asleep / GIB:.1f} for the weights of those that sleep)" if asleep else ""
        raise Problem(
            f"too little memory: {len(replicas)} replicas and the rest need {needed / GIB:.1f} GiB{of_these}, "
            f"{available / GIB:.1f} of {total / GIB:.1f} GiB are free",
            "stop other programs, or "
            + ("set SLEEP_LEVEL=2, which keeps no weights" if asleep else "let `make plan` plan a fleet that fits"),
        )


def disk_suffices(free: int, needed: int, folder: Path) -> None:
    """A Problem where a folder's disk has less free than needed (bytes)."""
    if free < needed:
        raise Problem(
            f"too little disk: {free / GIB:.1f} GiB are free under {folder}, {needed / GIB:.1f} GiB are needed",
            "make room (`docker system prune` drops images that nothing uses) and run `make up` again",
        )


def meet(one: Address, other: Address) -> bool:
    """Whether two sockets on these addresses could not have the same port."""
    # all of IPv4's addresses are none of IPv6's; those of IPv6 are, by default, IPv4's too
    return one == other or any(
        wide.is_unspecified and wide.version >= narrow.version for wide, narrow in ((one, other), (other, one))
    )


def ports_differ(ports: Mapping[str, tuple[Address, int]]) -> None:
    """A Problem where two settings, by name with address and port, want the same port."""
    for (first, (address, port)), (second, (other, number)) in combinations(ports.items(), 2):
        if port == number and meet(address, other):
            raise Problem(f"{first} and {second} are both {port}", "set one of them to another port in .env")


def profiles_are_known(wanted: str, known: Collection[str]) -> None:
    """A Problem where COMPOSE_PROFILES, with commas between, names a profile that no service of the stack has."""
    for profile in filter(None, map(str.strip, wanted.split(","))):
        if profile != "*" and profile not in known:
            there = ", ".join(sorted(known)) or "none"
            raise Problem(
                f"COMPOSE_PROFILES names {profile}, which no service has",
                f"correct it in .env; the profiles are: {there}",
            )


def traces_have_a_store(*, wanted: bool, there: bool) -> None:
    """A Problem where TRACE_SAMPLE asks for traces and the service that takes them is not there, or the other way."""
    if wanted and not there:
        raise Problem("TRACE_SAMPLE is set, but nothing takes the traces", "add traces to COMPOSE_PROFILES in .env")
    if there and not wanted:
        raise Problem("the profile traces has a store of traces, but none are made", "set TRACE_SAMPLE=0.1 in .env")


def triton_is_built(there: Mapping[str, bool]) -> None:
    """A Problem where a service that runs Triton has no image; `there` says which have one."""
    for name in (name for name, present in there.items() if not present):
        raise Problem(f"{name} has no image on this machine yet", "run `make triton` once, which builds it")


def port_is_free(name: str, address: Address, port: int, taken: Iterable[tuple[str, int]]) -> None:
    """A Problem where a socket already listens on this port, on the same address or on all of them.

    `name` is the port's setting, `taken` the addresses and ports of the listening sockets.
    """
    for host, number in taken:
        other = ip_address(host)
        if number == port and meet(address, getattr(other, "ipv4_mapped", None) or other):
            raise Problem(
                f"port {port} ({name}) is taken by another program",
                f"stop it (`ss -ltnp 'sport = :{port}'` as root names it), or set {name} in .env to a free port",
            )


def gpus_listed(nvidia_smi_list: str) -> int:
    """How many GPUs `nvidia-smi --list-gpus` names; their MIG slices stand on lines of their own, further in."""
    return len(re.findall(r"^GPU \d", nvidia_smi_list, re.MULTILINE))


def gpus_are_there(pinned: Collection[str], nvidia_smi_list: str, model: str) -> None:
    """A Problem where replicas are pinned, by number, to GPUs that this host does not have or that MIG has cut up."""
    gpus = gpus_listed(nvidia_smi_list)
    missing = sorted((number for number in pinned if number.isdigit() and int(number) >= gpus), key=int)
    if missing:
        what = f"replicas are pinned to GPU {', '.join(missing)}, but this host has {gpus}, counted from 0"
    elif re.search(r"^\s+MIG ", nvidia_smi_list, re.MULTILINE) and any(map(str.isdigit, pinned)):
        what = "replicas are pinned to whole GPUs, but MIG has cut those of this host into slices"
    else:
        return
    raise Problem(what, f"plan the fleet for this host (`make plan ARGS={model}`), or set GPU=off in .env")


def gpu_choice(wanted: Choice, gpus: int, override: Override, *, toolkit: bool) -> tuple[bool, str]:
    """Whether to add docker-compose.gpu.yml, and the reason in words.

    `gpus`: how many the driver lists; `toolkit`: whether Docker can give them to containers.
    """
    file = "docker-compose.override.yml"
    on_gpus = override in ("gpu", "pins")
    if wanted == "off":
        if on_gpus:
            fix = f"remove {file} (`make plan` writes it again), or take GPU=off out of .env"
            raise Problem(f"GPU=off, but {file} puts the replicas on GPUs", fix)
        return False, "GPU=off: the replicas run on the CPU"
    who, otherwise = ("GPU=on", "set GPU=off") if wanted == "on" else (file, f"remove {file}")
    needed = wanted == "on" or on_gpus
    if needed and not gpus:
        fix = f"install the driver until `nvidia-smi -L` lists one, or {otherwise}"
        raise Problem(f"{who} asks for GPUs, but there is no NVIDIA driver with a GPU", fix)
    install = "install nvidia-container-toolkit, run `nvidia-ctk runtime configure --runtime=docker`, restart Docker"
    if needed and not toolkit:
        raise Problem(f"{who} asks for GPUs, but Docker has no NVIDIA container toolkit", f"{install}, or {otherwise}")
    if override == "gpu" and wanted == "auto":
        return False, f"{file} decides: the replicas run on GPUs"
    if override == "cpu" and wanted == "auto":
        hint = "; GPU=on in .env adds docker-compose.gpu.yml" if gpus and toolkit else ""
        return False, f"{file} decides: the replicas run on the CPU{hint}"
    if gpus and not toolkit:
        return False, f"{gpus} GPUs, but Docker cannot use them; on the CPU. For the GPUs: {install}"
    if gpus:
        return True, f"{gpus} NVIDIA GPUs: docker-compose.gpu.yml is added (GPU=off in .env prevents it)"
    return False, "none: the replicas run on the CPU"


def host_has_a_name(name: str) -> None:
    """A Problem where no host can be called so."""
    if not HOST.fullmatch(name):
        raise Problem(f"{name} is no name for a host", "write up to 32 small letters, digits and - between: gpu-b")
