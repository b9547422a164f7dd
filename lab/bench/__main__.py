"""The comparison with other gateways: same replicas, same prompts, one run. Writes to docs/benchmarks.

make bench                               overhead, workloads and memory, on simulated replicas
make bench ARGS='--parts workloads'      one part
make bench ARGS='--parts first-token'    the time to the first token, by the gateway and directly (needs the stack)
make bench ARGS='--real'                 workloads on the running stack's replicas
make bench ARGS='--quick'                a look at every part; writes nothing
"""

import asyncio
import json
import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from lab.bench import overhead, peers, workloads
from lab.bench.overhead import SIZES, Cost, quantile
from lab.bench.peers import DESIGNS, OURS, PEERS, Start, Target
from lab.bench.pictures import DOCS, draw
from lab.report import provenance, table
from lab.bench.workloads import WORKLOADS, Cell, Sizes
from lab.sim.gateway import nginx_version
from lab.sim.replicas import Replicas
from lab.stack import Stack, StackError, run
from stack.shell import ROOT

PARTS = ("overhead", "workloads", "memory")
# of the running stack, so not among those that `make bench` does alone
FIRST = "first-token"
EVERY_PART = ", ".join((*PARTS, FIRST))
REPLICAS = 4
CLIENTS = 32
REAL_CLIENTS = 4

OVERHEAD = """# What a gateway costs

Written by `make bench`. Two replicas that answer at once; the gateway on a core of its own, load and replicas on
another. Every request is a chat of 1, 10 or 100 KB, no two the same; {connections} connections by wrk for the highest
rate.
"""

RATES = """## Highest rate

Requests a second, and in brackets how many times that this gateway does.
"""

LATENCIES = """## Latency at a held rate

Milliseconds p50, p99 from when a request was due to its whole answer; in brackets what is added to the replica itself.
"""

LOADS = """# Workloads

Written by `make bench`. {replicas} simulated replicas (`{shape}`;
lab/sim/engine.py has their model of time), {clients} clients, {seconds:.0f} s each after a warm-up, new replicas and
a new gateway for each row. Direct: clients take the replicas in turn. {designs} are other
designs of this gateway's affinity. vllm-router's {best} is the best of {others}
in this run.
"""

MEMORY = """# The gateway's memory

Written by `make bench`. All workers together, over {requests:,} requests of 1 KB, no two the same, as fast as they go.
Shared is what they have in common: the zones, of fixed sizes, which fill up once.
"""

BY_BOTH_PATHS = """# The time to the first token

Written by `make bench ARGS='--parts first-token'`. {replicas} replicas of {model} in the running stack.
"""

REAL = """# On real replicas

Written by `make bench ARGS=--real`. {replicas} replicas of {model} on the CPU in the running stack, {clients} clients,
{seconds:.0f} s each. All of it shares one machine, so differences in speed between gateways that send requests to the
same replicas are noise; prefix hits are not.
"""

TTFT = """## Time to the first token

{count} requests by each path in turn, one at a time, from a container in the fleet's network. Milliseconds.

{table}
The gateway adds {added:.2f} ms at the median (the median of the differences of neighbours: {pairs:.2f} ms).
"""

app = typer.Typer(add_completion=False)
console = Console()


def tell(what: str) -> None:
    console.print(f"{datetime.now(UTC):%H:%M:%S} {what}", style="dim", highlight=False)


# Overhead


def overhead_report(found: dict[str, dict[str, Cost]]) -> str:
    ours = found[OURS]
    rates, latency = [], []
    for name, costs in found.items():
        cells = [f"{median(costs[size].rates):,.0f}" for size in SIZES]
        if name not in (OURS, "direct"):
            cells = [
                f"{cell} ({median(ours[size].rates) / median(costs[size].rates):.1f} x)"
                for cell, size in zip(cells, SIZES, strict=True)
            ]
        errors = sum(cost.errors for cost in costs.values())
        rates.append([name, *cells, str(errors)])
        row = [name, f"{overhead.held(name):.0f}"]
        for size in SIZES:
            base, cost = found["direct"][size], costs[size]
            p50, p99 = median(cost.p50_ms), median(cost.p99_ms)
            added = "" if name == "direct" else f" ({p50 - median(base.p50_ms):+.2f}, {p99 - median(base.p99_ms):+.2f})"
            row.append(f"{p50:.2f}, {p99:.2f}{added}")
        latency.append(row)
    sizes = list(SIZES)
    return f"""{RATES}
{table(["", *sizes, "errors"], rates)}
{LATENCIES}
{table(["", "requests/s", *sizes], latency)}"""


def run_overhead(chosen: dict[str, Start], rounds: int, seconds: float, seed: int, write: bool) -> None:
    # The others are told by what they add to the replica itself, and by how often they go into this gateway.
    chosen = {name: PEERS[name] for name in ("direct", OURS)} | chosen
    found = overhead.measure(chosen, rounds, seconds, seed, tell)
    report = overhead_report(found)
    console.print(Markdown(report))
    if write:
        intro = OVERHEAD.format(connections=overhead.CONNECTIONS)
        save("overhead.md", intro, seed, "![highest rate](overhead.svg)\n\n" + report)


# Workloads

HEAD = ["", "requests", "lost", "prefix hits", "TTFT p50", "p90", "p99", "tokens/s", "busiest / mean"]

PICTURES = """![TTFT p90, ms](workloads-ttft.svg)

![tokens/s](workloads-tokens.svg)

![prefix hits, %](workloads-hits.svg)
"""


def cell_row(name: str, cell: Cell) -> list[str]:
    waits = [f"{wait * 1000:.0f} ms" for wait in (cell.ttft_p50, cell.ttft_p90, cell.ttft_p99)]
    return [
        name,
        f"{cell.requests}",
        f"{cell.lost}",
        f"{cell.hit_rate:.1%}",
        *waits,
        f"{cell.tokens_per_s:.0f}",
        f"{cell.spread:.2f}",
    ]


def workloads_report(found: dict[str, dict[str, Cell]]) -> str:
    parts = []
    for workload in next(iter(found.values())):
        says = (WORKLOADS[workload].__doc__ or "").strip()
        rows = [cell_row(name, cells[workload]) for name, cells in found.items()]
        parts.append(f"## {workload[0].upper()}{workload[1:]}\n\n{says}\n\n{table(HEAD, rows)}")
    return "\n".join(parts)


def one_peer(name: str, start: Start, proxy: str, names: Sequence[str], seed: int, seconds: float) -> dict[str, Cell]:
    """All workloads on one peer; replicas and peer are new for each."""
    cells = {}
    for workload in names:
        tell(f"{name}: {workload}")
        with Replicas(REPLICAS, *workloads.SHAPE) as fleet:
            urls = [sim.url for sim in fleet]
            with start(Target(urls, fleet.model, proxy, fleet, CLIENTS)) as url:
                ask = urls if name == "direct" else [url]
                cells[workload] = asyncio.run(
                    workloads.run(ask, urls, fleet.model, workload, seed, CLIENTS, seconds, Sizes())
                )
    return cells


def other_policy(proxy: str, seed: int, seconds: float) -> str:
    """vllm-router's best policy beside cache_aware: the most tokens a second on chats."""
    rates = {}
    for policy in peers.OTHER_POLICIES:

        def start(target: Target, policy: str = policy) -> AbstractContextManager[str]:
            return peers.router(target, peers.VLLM_ROUTER, policy)

        cells = one_peer(f"vllm-router, {policy}", start, proxy, ["many-turn chats"], seed, seconds)
        rates[policy] = cells["many-turn chats"].tokens_per_s
    return max(rates, key=lambda policy: rates[policy])


def run_workloads(chosen: dict[str, Start], names: Sequence[str], seconds: float, seed: int, write: bool) -> None:
    load, proxy = overhead.split_cpus()
    os.sched_setaffinity(0, load)
    best = ""
    if write:
        best = other_policy(proxy, seed, seconds / 2)
        chosen = chosen | {f"vllm-router, {best}": lambda target: peers.router(target, peers.VLLM_ROUTER, best)}
    found = {name: one_peer(name, start, proxy, names, seed, seconds) for name, start in chosen.items()}
    report = workloads_report(found)
    console.print(Markdown(report))
    if write:
        others = ", ".join(peers.OTHER_POLICIES)
        shape = " ".join(workloads.SHAPE)
        known = {"replicas": REPLICAS, "shape": shape, "clients": CLIENTS, "seconds": seconds, "best": best}
        intro = LOADS.format(**known, others=others, designs=" and ".join(DESIGNS))
        save("workloads.md", intro, seed, f"{PICTURES}\n{report}")


# Memory


def run_memory(requests: int, seed: int, write: bool) -> None:
    samples = overhead.memory(requests, seed, tell)
    rows = [[f"{sample.requests:,}", f"{sample.private:.1f}", f"{sample.shared:.1f}"] for sample in samples]
    report = table(["requests", "private, MiB", "shared, MiB"], rows)
    console.print(Markdown(report))
    if write:
        intro = MEMORY.format(requests=samples[-1].requests)
        save("memory.md", intro, seed, "![memory](memory.svg)\n\n" + report)


# The running stack


def replica_addresses(stack: Stack) -> dict[str, str]:
    """The address in the fleet's network of the gateway and of each replica."""
    template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    found = {}
    for service in ("gateway", *stack.states()):
        container = run("docker", "compose", "ps", "--quiet", service).strip()
        found[service] = run("docker", "inspect", "--format", template, container).strip()
    return found


def run_real(chosen: dict[str, Start], workload: str, seconds: float, seed: int, write: bool) -> None:
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
            if name == OURS:
                found[name][workload] = asyncio.run(
                    workloads.run([gateway], urls, stack.model, workload, mine, REAL_CLIENTS, seconds, sizes)
                )
            else:
                with start(Target(urls, stack.model, cpus)) as url:
                    ask = urls if name == "direct" else [url]
                    found[name][workload] = asyncio.run(
                        workloads.run(ask, urls, stack.model, workload, mine, REAL_CLIENTS, seconds, sizes)
                    )
    report = workloads_report(found)
    console.print(Markdown(report))
    if write:
        intro = REAL.format(replicas=len(urls), model=stack.model, clients=REAL_CLIENTS, seconds=seconds)
        save("real.md", intro, seed, report)


def run_first_token(count: int, seed: int, write: bool) -> None:
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
    console.print(Markdown(report))
    if write:
        save("first-token.md", BY_BOTH_PATHS.format(replicas=len(addresses), model=stack.model), seed, report)


def first_token(stack: Stack, gateway: str, urls: Sequence[str], count: int) -> dict[str, list[float]]:
    """Milliseconds to the first token by both paths, asked from inside the fleet's network."""
    replica = next(iter(stack.states()))
    container = run("docker", "compose", "ps", "--quiet", replica).strip()
    network = run(
        "docker", "inspect", "--format", "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}", container
    )
    image = run("docker", "inspect", "--format", "{{.Image}}", container)
    command = [
        "docker",
        "run",
        "--rm",
        "--interactive",
        "--network",
        network.strip(),
        "--entrypoint",
        "python3",
        image.strip(),
    ]
    script = (ROOT / "lab" / "bench" / "first_token.py").read_text()
    done = subprocess.run([*command, "-", gateway, str(count), *urls], input=script, capture_output=True, text=True)
    if done.returncode:
        raise StackError(f"first_token.py: {done.stderr[-500:]}")
    took: dict[str, list[float]] = json.loads(done.stdout)
    return took


def save(name: str, intro: str, seed: int, report: str) -> None:
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / name).write_text(f"{intro}\n{provenance([nginx_version(), *peers.versions()], seed)}\n{report}")
    draw(name)
    console.print(f"written: docs/benchmarks/{name}", highlight=False)


@app.command()
def main(
    parts: Annotated[str, typer.Option(help=f"Which parts, with commas between them: {EVERY_PART}.")] = ",".join(PARTS),
    real: Annotated[bool, typer.Option(help="The running stack's replicas in place of simulated ones.")] = False,
    quick: Annotated[bool, typer.Option(help="A look at everything; writes nothing.")] = False,
    only: Annotated[str, typer.Option(help="Only peers with one of these in their names, e.g. gateway,vllm.")] = "",
    workload: Annotated[str, typer.Option(help="Only workloads with this in their names.")] = "",
    seed: Annotated[int | None, typer.Option(help="Of all prompts; a new one by default.")] = None,
) -> None:
    """Measures this gateway beside others and writes the tables."""
    wanted = parts.split(",")
    if unknown := set(wanted) - {*PARTS, FIRST}:
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; there are {EVERY_PART}")
    for program, package in (("wrk", "wrk"), ("haproxy", "haproxy"), ("taskset", "util-linux")):
        if not shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
            console.print(f"{program} is missing: apt-get install {package}", style="red")
            raise typer.Exit(1)
    tell("the peers' programs")
    peers.install()
    seed = random.randrange(10**9) if seed is None else seed
    chosen, designs = (
        {name: start for name, start in group.items() if any(part in name for part in only.split(","))}
        for group in (PEERS, DESIGNS)
    )
    names = [name for name in WORKLOADS if workload in name]
    write = not (quick or only or workload)
    affinity = os.sched_getaffinity(0)
    try:
        if real:
            run_real(chosen, workload, 5 if quick else 12, seed, write)
            return
        if FIRST in wanted:
            run_first_token(20 if quick else 200, seed, write)
        if "overhead" in wanted:
            run_overhead(chosen, 1 if quick else 2, 1 if quick else 3, seed, write)
            os.sched_setaffinity(0, affinity)
        if "workloads" in wanted:
            run_workloads(chosen | designs, names, 3 if quick else 10, seed, write)
            os.sched_setaffinity(0, affinity)
        if "memory" in wanted:
            run_memory(20_000 if quick else 1_000_000, seed, write)
    except StackError as why:
        console.print(str(why), style="red", markup=False)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
