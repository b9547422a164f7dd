"""How many replicas there are: `make up ARGS='--replicas N'` writes it down, and it stays so.

docker-compose.replicas.yml   the replicas that are more than the Compose files have, or that they have and are left out
nginx/fleet/replicas.conf     the gateway's lines of the former
nginx/fleet/left-out          the names of the latter

All three are away where the Compose files' own number is wanted. A planned fleet keeps its files in fleet/.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from planner.replica_gpus import dump_compose, gpu_service
from stack.compose import REPLICAS_FILE, Compose, Config, is_replica
from stack.console import Problem, Step
from stack.gateway import Gateway, fleet_folder, fleet_line
from stack.hosts import make_file
from stack.shell import ROOT, wait_for

BASE = "docker-compose.yml"


def number(name: str) -> int:
    """A replica's number."""
    return int(name.rpartition("-")[2])


def names(wanted: int, own: Sequence[str], taken: Collection[str]) -> list[str]:
    """The names of so many replicas: the first of those that the files have, then new ones that nobody has `taken`."""
    found = sorted(own, key=number)[:wanted]
    free = (f"vllm-{count}" for count in range(wanted + len(own) + len(taken)))
    new = [name for name in free if name not in own and name not in taken]
    return found + new[: wanted - len(found)]


def further_gpus(config: Config, more: int, gpus: int) -> list[list[str]]:
    """The GPUs of each of so many further replicas: as many each as the first one has, of those that none has.

    A Problem where this host, with so many GPUs, does not have them.
    """
    replicas = [config.services[name] for name in config.replicas]
    held = {gpu for replica in replicas for gpu in replica.gpus}
    size = len(replicas[0].gpus)
    free = [str(count) for count in range(gpus) if str(count) not in held]
    if len(free) < more * size:
        total = len(replicas) + more
        raise Problem(
            f"{total} replicas need {total * size} GPUs, and this host has {gpus}",
            f"ask for {len(replicas) + len(free) // size}, or plan replicas that share memory better (`make plan`)",
        )
    return [free[at * size : (at + 1) * size] for at in range(more)]


def write(wanted: int, config: Config, taken: Collection[str], gpus: int) -> None:
    """Makes docker-compose.replicas.yml ask for so many replicas. A Problem where there cannot be so many.

    `config` is the stack without it, `taken` are names of replicas elsewhere, `gpus` is how many this host has.
    """
    own = config.replicas
    if wanted > len(own) and config.planned:
        raise Problem(
            f"the fleet is planned for {len(own)} replicas, not {wanted}",
            f"plan it again, with the same options and --replicas {wanted} (docs/guide.md#stop-update-look)",
        )
    chosen = names(wanted, own, taken)
    new = [name for name in chosen if name not in own]
    on_gpus = bool(own) and config.services[own[0]].on_gpus
    pinned = further_gpus(config, len(new), gpus) if on_gpus else [[] for _ in new]
    services: dict[str, Any] = {}
    for name, ids in zip(new, pinned, strict=True):
        services[name] = {"extends": {"file": BASE, "service": "vllm-0"}, "hostname": f"{name}.fleet"}
        services[name] |= gpu_service(ids, len(ids)) if ids else {}
    left_out = [name for name in own if name not in chosen]
    text = dump_compose({"services": services}).replace("services: {}", "services:") if services or left_out else ""
    text += "".join(f"  {name}: !reset null\n" for name in left_out)
    head = "# Written by `make up`, as --replicas asked, and taken away when that is the Compose files' own number.\n"
    make_file(ROOT / REPLICAS_FILE, head + text if text else "")


def lay_out_fleet(config: Config, own: Collection[str]) -> None:
    """Makes the gateway's fleet files say which replicas `config` has. `own` are those of the Compose files alone."""
    folder = fleet_folder(config)
    more = [name for name in sorted(config.replicas, key=number) if name not in own]
    make_file(folder / "replicas.conf", "".join(fleet_line(name) + "\n" for name in more))
    out = sorted(set(own) - set(config.replicas), key=number)
    make_file(folder / "left-out", "".join(f"{name}\n" for name in out))


def surplus(compose: Compose, config: Config) -> list[str]:
    """The replicas that run and are not in `config` any more."""
    return [
        name
        for name, container in compose.containers().items()
        if is_replica(name) and name not in config.services and container.state == "running"
    ]


def drain(gateway: Gateway, leaving: Sequence[str], within_s: float, shown: Step) -> None:
    """Returns when these replicas have nothing in flight. A Problem after so many seconds; all is then as before."""

    def idle() -> bool:
        left = {name: gateway.replica(name).in_flight or 0 for name in leaving}
        shown.say(", ".join(f"{name}: {count} requests left" for name, count in left.items()))
        return not any(left.values())

    for name in leaving:
        gateway.drain(name)
    if not wait_for(idle, within_s):
        for name in leaving:
            gateway.undrain(name)
        raise Problem(
            f"{', '.join(leaving)} still had requests after {within_s:.0f} s, and nothing was changed",
            "run it again when there is less to do, or raise DRAIN_SECONDS in .env",
        )
