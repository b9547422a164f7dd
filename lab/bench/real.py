"""The parts that measure on the running stack."""

import asyncio
import json
import os
import random
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median

from lab.bench import workloads
from lab.bench.fair import FLOOD, QUIET, Mix, Shares, intro, report, shares
from lab.bench.overhead import quantile
from lab.bench.peers import OURS, Start, Target
from lab.bench.reports import BY_BOTH_PATHS, REAL, TTFT, publish, tell, workloads_report
from lab.bench.workloads import Cell, Sizes
from lab.http import KEY
from lab.report import table
from lab.sim.dns import Dns
from lab.sim.gateway import Gateway
from lab.sim.keys import keyed
from lab.stack import Stack, StackError, run
from stack.gateway import fleet_line
from stack.shell import ROOT

REAL_CLIENTS = 4


def replica_addresses(stack: Stack) -> dict[str, str]:
    """The address in the fleet's network of the gateway and of each replica."""
    template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    found = {}
    for service in ("gateway", *stack.states()):
        container = run("docker", "compose", "ps", "--quiet", service).strip()
        found[service] = run("docker", "inspect", "--format", template, container).strip()
    return found


def run_real(chosen: dict[str, Start], workload: str, seconds: float, seed: int, write: bool) -> None:
    """Measures the workloads with `workload` in their names on the running stack's replicas, `seconds` each."""
    stack = Stack.find()
    addresses = replica_addresses(stack)
    gateway = f"http://{addresses.pop('gateway')}:80"
    urls = [f"http://{address}:8000" for address in addresses.values()]
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    sizes = Sizes(tokens=0.1, answers=0.3, shared=0.4)
    names = [name for name in ("many-turn chats", "shared system prompts", "random prompts") if workload in name]
    found: dict[str, dict[str, Cell]] = {}
    for turn, (name, start) in enumerate(chosen.items()):
        if name == "LiteLLM":
            continue
        found[name] = {}
        for workload in names:
            tell(f"{name}: {workload}")
            # Real caches cannot be emptied between peers: each has prompts of its own, of the same kind.
            mine = seed + turn
            with nullcontext(gateway) if name == OURS else start(Target(urls, stack.model, cpus)) as url:
                ask = urls if name == "direct" else [url]
                found[name][workload] = asyncio.run(
                    workloads.run(ask, urls, stack.model, workload, mine, REAL_CLIENTS, seconds, sizes)
                )
    intro = REAL.format(replicas=len(urls), model=stack.model, clients=REAL_CLIENTS, seconds=seconds)
    publish("real.md", intro, workloads_report(found), seed, write)


class Beside:
    """The running stack's replicas, for a gateway of the lab's own beside the stack's."""

    def __init__(self, stack: Stack) -> None:
        self.gateway_host = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}.1"
        self.dns = Dns(self.gateway_host)
        addresses = replica_addresses(stack)
        addresses.pop("gateway")
        self.dns.names.update(addresses)
        self.urls = [f"http://{address}:8000" for address in addresses.values()]

    def upstreams(self, names: Sequence[str] | None = None) -> str:
        """The fleet file: one line a replica, for all replicas or those of `names`."""
        return "".join(fleet_line(name, 8000) + "\n" for name in names or self.dns.names)


# A replica on a CPU makes some twelve tokens a second.
REAL_MIX = Mix(prompts=(60,), answer=4, pause=0.5, flood_prompt=150, flood_answer=32, patience=300)
REAL_FLOOD = 12


def fair_shares(stack: Stack, seed: int, seconds: float) -> Shares:
    """A quiet key's waits on the stack's replicas, alone and beside a flood, behind a gateway that asks for keys."""
    keys, files = keyed({QUIET: {}, FLOOD: {}, "lab": {"role": "admin"}})
    fleet = Beside(stack)
    try:
        with Gateway(fleet, files=files, key=keys["lab"]) as gateway:
            gateway.wait_ready(60)
            return asyncio.run(
                shares([gateway.url], fleet.urls, stack.model, keys, REAL_MIX, seed, seconds, REAL_FLOOD)
            )
    finally:
        fleet.dns.close()


def run_fair_real(rounds: int, seconds: float, seed: int, write: bool) -> None:
    """Measures fair shares on the running stack's replicas."""
    stack = Stack.find()
    tell("fair shares on the stack's replicas")
    found = [fair_shares(stack, seed + 10 * turn, seconds) for turn in range(rounds)]
    where = f"The running stack's {len(stack.states())} replicas of {stack.model} on the CPU"
    text = intro("fair-real", where, REAL_MIX, REAL_FLOOD)
    publish("fair-real.md", text, report({"the stack": found}), seed, write, peers_too=False)


def run_first_token(count: int, seed: int, write: bool) -> None:
    """Measures the time to the first token of `count` requests through the gateway, and as many directly."""
    tell(f"time to the first token, {count} by each path")
    stack = Stack.find()
    addresses = replica_addresses(stack)
    gateway = f"http://{addresses.pop('gateway')}:80"
    took = first_token(stack, gateway, [f"http://{address}:8000" for address in addresses.values()], count)
    direct, through = median(took["direct"]), median(took["gateway"])
    rows = [
        [path, f"{median(values):.1f}", f"{quantile(values, 0.9):.1f}", f"{quantile(values, 0.99):.1f}"]
        for path, values in took.items()
    ]
    pairs = [late - early for early, late in zip(took["direct"], took["gateway"], strict=True)]
    first = table(["", "p50", "p90", "p99"], rows)
    report = TTFT.format(count=count, table=first, added=through - direct, pairs=median(pairs))
    publish("first-token.md", BY_BOTH_PATHS.format(replicas=len(addresses), model=stack.model), report, seed, write)


def first_token(stack: Stack, gateway: str, urls: Sequence[str], count: int) -> dict[str, list[float]]:
    """Milliseconds to the first token by both paths, asked from inside the fleet's network."""
    replica = next(iter(stack.states()))
    container = run("docker", "compose", "ps", "--quiet", replica).strip()
    network = run(
        "docker", "inspect", "--format", "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}", container
    )
    image = run("docker", "inspect", "--format", "{{.Image}}", container)
    # By its name, so that it stands in no list of processes.
    options = f"--rm --interactive --env {KEY} --network {network.strip()} --entrypoint python3 {image.strip()}"
    command = ["docker", "run", *options.split(), "-", gateway, str(count), *urls]
    script = (ROOT / "lab" / "bench" / "first_token.py").read_text()
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    if done.returncode:
        raise StackError(f"first_token.py: {done.stderr[-500:]}")
    took: dict[str, list[float]] = json.loads(done.stdout)
    return took
