"""A host's part in a Ray cluster: looks at what has to be right, starts Ray's node, and on the head what is served.

    node.py worker     a host that works for the head
    node.py serve      the head, with the Serve application of application.py
    node.py replica    the head, with one `vllm serve` over the GPUs of all hosts: a replica for the gateway

RAY_HEAD is the head's address and HOST_ADDRESS this host's, both in the network that joins the hosts. Each mistake
gives one line that says what is wrong, where, and what to do; then the exit status is 2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

if TYPE_CHECKING:
    from ray import application
    from vllm import launch
else:
    # they lie beside this file in the image
    import application
    import launch

TOKEN = Path("/etc/fleet/secrets/ray/token")
PORT = 6379
# So that a firewall can name them: Ray picks others anew at each start.
NODE_MANAGER_PORT, OBJECT_MANAGER_PORT = 6380, 6381
# beside vLLM's own, which `replica` has on the head
METRICS_PORT = 9465
WORKER_PORTS = (10002, 10999)
# Ray's address of one host is that of another where both say localhost.
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
ANSWERS_WITHIN_S = 3
SAY_EVERY_S = 30


@dataclass(frozen=True)
class Node:
    """A host of the cluster, as Ray's head knows it."""

    address: str
    vllm: str
    gpus: int
    ports: tuple[int, ...]


def interface_mistakes(environment: Mapping[str, str], interfaces: Mapping[str, Iterable[str]]) -> list[str]:
    """What is wrong with this host's addresses, a line each. `interfaces`: the addresses of each one that is here."""
    lines = []
    for name in ("RAY_HEAD", "HOST_ADDRESS"):
        value = environment.get(name, "")
        try:
            address = ipaddress.ip_address(value)
        except ValueError:
            said = f"is {value!r}" if value else "is not set"
            lines.append(f".env: {name} {said}; it must be an address in the network that joins the hosts")
            continue
        if address.is_loopback or address.is_unspecified:
            lines.append(f".env: {name} is {value}, which is another host on each host; name one that others reach")
    own = environment.get("HOST_ADDRESS", "")
    here = {address: name for name, addresses in interfaces.items() for address in addresses}
    if not lines and own not in here:
        there = ", ".join(sorted(here)) or "none"
        lines.append(f".env: HOST_ADDRESS is {own}, but this host has {there}; name one of those")
    for name in INTERFACES:
        value = environment.get(name, "")
        # NCCL takes several, beginnings, and with ^ all others; only a plain name can be looked up
        if value and value.replace("-", "").replace(".", "").replace("_", "").isalnum():
            matching = [found for found in interfaces if found.startswith(value)]
            if not matching:
                lines.append(f".env: {name} is {value}, but this host has {', '.join(sorted(interfaces))}")
            elif not lines and not any(own in interfaces[found] for found in matching):
                lines.append(f".env: {name} is {value}, but {own} (HOST_ADDRESS) is on {here[own]}: name that one")
    return lines


def reaches(address: str, port: int) -> bool:
    """Whether something takes connections there."""
    try:
        with socket.create_connection((address, port), timeout=ANSWERS_WITHIN_S):
            return True
    except OSError:
        return False


def token_mistake(path: Path) -> str | None:
    """What is wrong with the secret that lets a node into the cluster; None where nothing is."""
    fix = "on the head: openssl rand -hex 32 > secrets/ray/token, then carry the same file to each host"
    try:
        token = path.read_text().strip()
    except OSError as error:
        return f"secrets/ray/token: cannot be read ({error.strerror}); {fix}"
    return None if len(token) >= 32 else f"secrets/ray/token: has {len(token)} characters, less than 32; {fix}"


def cluster_mistakes(nodes: list[Node], own_vllm: str, unreachable: Iterable[tuple[str, int]]) -> list[str]:
    """What keeps the cluster from serving and no waiting will mend, a line each."""
    lines = [
        f"{node.address} has vLLM {node.vllm or 'unknown'}, the head {own_vllm}: bring one of them up to date"
        for node in nodes
        if node.vllm != own_vllm
    ]
    lines += [
        f"{address}: port {port} does not answer from here; open {PORT} to {OBJECT_MANAGER_PORT} and {WORKER_PORTS[0]} "
        f"to {WORKER_PORTS[1]} between the hosts, and NCCL's own ports"
        for address, port in unreachable
    ]
    return lines


def missing_gpus(nodes: list[Node], needed: int) -> str | None:
    """In words, how many GPUs are missing; None where there are enough."""
    there = sum(node.gpus for node in nodes)
    if there >= needed:
        return None
    hosts = ", ".join(f"{node.address}: {node.gpus}" for node in nodes)
    return (
        f"TENSOR_PARALLEL_SIZE times PIPELINE_PARALLEL_SIZE is {needed}, and the hosts have {there} GPUs ({hosts}); "
        "waiting for more: run the worker's command on another host, or make the sizes smaller"
    )


def vllm_version() -> str:
    """The version of vLLM that this image has."""
    return importlib.metadata.version("vllm")


def start_ray(head: bool, environment: dict[str, str]) -> None:
    """Starts Ray's node in the background. Raises SettingsError where it does not start."""
    ray = shutil.which("ray") or "ray"
    ports = [f"--node-manager-port={NODE_MANAGER_PORT}", f"--object-manager-port={OBJECT_MANAGER_PORT}"]
    ports += [f"--min-worker-port={WORKER_PORTS[0]}", f"--max-worker-port={WORKER_PORTS[1]}"]
    place = (
        ["--head", f"--port={PORT}", "--include-dashboard=false"]
        if head
        else [f"--address={environment['RAY_HEAD']}:{PORT}"]
    )
    command = [ray, "start", *place, f"--node-ip-address={environment['HOST_ADDRESS']}", *ports]
    command.append(f"--metrics-export-port={METRICS_PORT}")
    command += [f"--labels=vllm={vllm_version().replace('+', '-')}", "--disable-usage-stats"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        why = next((line for line in reversed(said) if "ersion" in line or "rror" in line), said[-1] if said else "")
        raise launch.SettingsError(f"Ray did not start here: {why.strip()}")


def nodes_of(ray: Any) -> list[Node]:
    """The hosts that are in the cluster now."""
    return [
        Node(
            address=node["NodeManagerAddress"],
            vllm=node.get("Labels", {}).get("vllm", ""),
            gpus=int(node["Resources"].get("GPU", 0)),
            ports=(node["NodeManagerPort"], node["ObjectManagerPort"]),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def wait_for_hosts(needed: int) -> None:
    """Returns when the cluster has the GPUs that are needed. Raises SettingsError where no waiting will help."""
    ray = import_module("ray")
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    said_at = -float(SAY_EVERY_S)
    try:
        while True:
            nodes = nodes_of(ray)
            silent = [(node.address, port) for node in nodes for port in node.ports if not reaches(node.address, port)]
            if lines := cluster_mistakes(nodes, vllm_version().replace("+", "-"), silent):
                raise launch.SettingsError("\n".join(lines))
            missing = missing_gpus(nodes, needed)
            if missing is None:
                return
            if time.monotonic() - said_at >= SAY_EVERY_S:
                print(f"node: {missing}", file=sys.stderr, flush=True)
                said_at = time.monotonic()
            time.sleep(1)
    finally:
        ray.shutdown()


def prepared(environment: dict[str, str]) -> dict[str, str]:
    """The environment for all that runs here. Raises SettingsError with a line for each mistake."""
    found = psutil.net_if_addrs()
    families = {socket.AF_INET, socket.AF_INET6}
    interfaces = {name: [it.address for it in addresses if it.family in families] for name, addresses in found.items()}
    lines = interface_mistakes(environment, interfaces)
    if token := token_mistake(TOKEN):
        lines.append(token)
    if lines:
        raise launch.SettingsError("\n".join(lines))
    own = environment["HOST_ADDRESS"]
    # Gloo takes the interface of the host's own name, which often is loopback; NCCL looks for itself and may be told.
    gloo = environment.get("GLOO_SOCKET_IFNAME") or next(name for name in interfaces if own in interfaces[name])
    unset = {name for name in launch.NCCL_NAMES if not environment.get(name)}
    kept = {name: value for name, value in environment.items() if name not in unset}
    home = str(launch.CACHE / "ray")
    return kept | {
        # Without it whoever reaches the head's port runs what they like on all hosts.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(TOKEN),
        "VLLM_HOST_IP": own,
        "GLOO_SOCKET_IFNAME": gloo,
        # Without it vLLM starts a cluster of its own, and waits in it for GPUs.
        "RAY_ADDRESS": f"{environment['RAY_HEAD']}:{PORT}",
        # What is compiled is kept, as a replica's is.
        "HOME": home,
        "TORCHINDUCTOR_CACHE_DIR": f"{home}/torchinductor",
    }


def wait_for_head(head: str, own: str) -> None:
    """Returns when the head takes connections; says what it waits for."""
    said_at = -float(SAY_EVERY_S)
    while not reaches(head, PORT):
        if time.monotonic() - said_at >= SAY_EVERY_S:
            print(
                f"node: RAY_HEAD {head}: port {PORT} does not answer from {own}; waiting for it: start the head, and "
                "let the hosts reach each other's ports",
                file=sys.stderr,
                flush=True,
            )
            said_at = time.monotonic()
        time.sleep(1)


def worker(environment: dict[str, str]) -> NoReturn:
    """Joins the head and stays. Raises SettingsError where it cannot, or where the head is gone."""
    head, own = environment["RAY_HEAD"], environment["HOST_ADDRESS"]
    wait_for_head(head, own)
    start_ray(False, environment)
    print(f"node: {own} works for {head}", file=sys.stderr, flush=True)
    while any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"])):
        time.sleep(2)
    raise launch.SettingsError(f"Ray's node here has ended: it lost {head}, or was told to; it starts anew")


def head(what: str, environment: dict[str, str]) -> NoReturn:
    """Starts the head, waits for the hosts, and becomes what serves."""
    if environment["RAY_HEAD"] != environment["HOST_ADDRESS"]:
        raise launch.SettingsError(
            f".env: RAY_HEAD is {environment['RAY_HEAD']}, but the head is to run on {environment['HOST_ADDRESS']} "
            "(HOST_ADDRESS); make them the same here"
        )
    if what == "replica" and environment.get("FLEET_DEVICE") != "gpu":
        raise launch.SettingsError(
            ".env: RAY_SERVES is replica, but vLLM goes over several hosts on GPUs only; "
            "add docker-compose.ray-gpu.yml, or set RAY_SERVES=serve"
        )
    if what == "serve":
        application.configuration(environment)
    settings, model, template = launch.check(environment, over_hosts=True)
    start_ray(True, environment)
    if environment.get("FLEET_DEVICE") == "gpu":
        wait_for_hosts(settings.tensor_parallel_size * settings.pipeline_parallel_size)
    if what == "serve":
        script = Path(application.__file__)
        os.execve(sys.executable, [sys.executable, str(script)], environment)  # noqa: S606 - no shell is wanted
    command = launch.serve_command(settings, model, template, environment.get("TRACES_URL", ""))
    command += ["--distributed-executor-backend", "ray", "--middleware", "near.Near"]
    own = launch.process_environment(settings, environment, "vllm-ray")
    launch.become_vllm(command, own)


def main(arguments: list[str]) -> int:
    """Becomes this host's part, or returns an exit status."""
    parser = argparse.ArgumentParser(description="A host's part in a Ray cluster, from the environment.")
    parser.add_argument("part", choices=["worker", "serve", "replica"])
    part = parser.parse_args(arguments).part
    try:
        environment = prepared(dict(os.environ))
        os.environ |= environment
        Path(environment["HOME"]).mkdir(parents=True, exist_ok=True)
        if part == "worker":
            worker(environment)
        head(part, environment)
    except launch.SettingsError as error:
        for line in str(error).splitlines():
            print(f"node: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
