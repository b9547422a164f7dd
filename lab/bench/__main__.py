"""The comparison with other gateways: same replicas, same prompts, one run. Writes to docs/benchmarks.

make bench                               all parts on simulated replicas
make bench ARGS='--parts trace'          one part
make bench ARGS='--parts instructions --against 79edc65'   instructions of a request, beside another commit's
make bench ARGS='--parts hits --against 79edc65'           prefix hits, beside another commit's
make bench ARGS='--parts first-token'    the time to the first token, by the gateway and directly (needs the stack)
make bench ARGS='--parts fair-real'      fair shares on the stack's replicas (needs the stack)
make bench ARGS='--real'                 workloads on the running stack's replicas
make bench ARGS='--quick'                a look at every part; writes nothing
make bench ARGS='--seconds 30'           so long for each measurement

Without Docker: NGINX and NGINX_MODULES name an Nginx (lab/sim/gateway.py).
"""

import asyncio
import os
import random
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Annotated

import typer

from lab.bench import cost, fair, instructions, overhead, peers, reports, workloads
from lab.bench.peers import DESIGNS, OURS, PEERS, Start, Target
from lab.bench.real import run_fair_real, run_first_token, run_real
from lab.bench.reports import (
    LOADS,
    MEMORY,
    OVERHEAD,
    PICTURES,
    TRACE,
    console,
    overhead_report,
    publish,
    tell,
    trace_report,
    workloads_report,
)
from lab.bench.workloads import WORKLOADS, Cell, Sizes
from lab.report import table
from lab.sim.replicas import Replicas
from lab.stack import StackError

# of this gateway alone, without peers
OWN = ("fair", "cost")
PARTS = ("overhead", "workloads", "trace", "memory", *OWN)
# of the running stack, so not among those that `make bench` does alone
FIRST, FAIR_REAL = "first-token", "fair-real"
# needs valgrind; needs another commit
INSTRUCTIONS, HITS = "instructions", "hits"
EVERY_PART = ", ".join((*PARTS, FIRST, FAIR_REAL, INSTRUCTIONS, HITS))
# Fair shares: how many replicas, and whether clients ask them through the gateway.
FLEETS = ((2, False), (1, True), (2, True), (4, True))
REPLICAS = 4
CLIENTS = 32
RATE = 12.0  # requests a second of the trace
TRACE_SIZES = Sizes(answers=0.3)
app = typer.Typer(add_completion=False)


def run_overhead(chosen: dict[str, Start], rounds: int, seconds: float, seed: int, write: bool) -> None:
    """Measures what each peer costs, `rounds` times `seconds` for each size and each of two ways."""
    # The others are told by what they add to the replica itself, and by how often they go into this gateway.
    chosen = {name: PEERS[name] for name in ("direct", OURS)} | chosen
    found = overhead.measure(chosen, rounds, seconds, seed, tell)
    intro = OVERHEAD.format(connections=overhead.CONNECTIONS)
    publish("overhead.md", intro, overhead_report(found), seed, write, "![highest rate](overhead.svg)\n\n")


def one_peer(name: str, start: Start, proxy: str, names: Sequence[str], seed: int, seconds: float) -> dict[str, Cell]:
    """All workloads on one peer, `seconds` each, by their names; replicas and peer are new for each."""
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
    """Measures the workloads of these names on each peer, `seconds` each."""
    load, proxy = overhead.split_cpus()
    os.sched_setaffinity(0, load)
    best = ""
    if write:
        best = other_policy(proxy, seed, seconds / 2)
        chosen = chosen | {f"vllm-router, {best}": lambda target: peers.router(target, peers.VLLM_ROUTER, best)}
    found = {name: one_peer(name, start, proxy, names, seed, seconds) for name, start in chosen.items()}
    intro = LOADS.format(
        replicas=REPLICAS,
        shape=" ".join(workloads.SHAPE),
        clients=CLIENTS,
        seconds=seconds,
        designs=" and ".join(DESIGNS),
        best=best,
        others=", ".join(peers.OTHER_POLICIES),
    )
    publish("workloads.md", intro, workloads_report(found), seed, write, PICTURES)


def run_trace(chosen: dict[str, Start], seconds: float, seed: int, write: bool) -> None:
    """Measures the trace on each peer, `seconds` of it."""
    load, proxy = overhead.split_cpus()
    os.sched_setaffinity(0, load)
    # Replicas in turn are a row of their own, and vllm-router has a second policy that knows the load.
    chosen.pop("direct", None)
    chosen["vllm-router, power_of_two"] = lambda target: peers.router(target, peers.VLLM_ROUTER, "power_of_two")
    turns = workloads.trace(seed, seconds, RATE, TRACE_SIZES)
    found = {}
    for name, start in chosen.items():
        tell(f"{name}: trace")
        with Replicas(REPLICAS, *workloads.TRACE_SHAPE) as fleet:
            urls = [sim.url for sim in fleet]
            with start(Target(urls, fleet.model, proxy, fleet, CLIENTS)) as url:
                found[name] = asyncio.run(workloads.run_trace([url], urls, fleet.model, turns))
    intro = TRACE.format(replicas=REPLICAS, shape=" ".join(workloads.TRACE_SHAPE), seconds=seconds, rate=RATE)
    publish("trace.md", intro, trace_report(found), seed, write, "![TTFT, ms](trace-ttft.svg)\n\n")


def run_memory(requests: int, seed: int, write: bool) -> None:
    """Measures the gateway's memory over so many requests."""
    samples = overhead.memory(requests, seed, tell)
    rows = [[f"{sample.requests:,}", f"{sample.private:.1f}", f"{sample.shared:.1f}"] for sample in samples]
    report = table(["requests", "private, MiB", "shared, MiB"], rows)
    intro = MEMORY.format(requests=samples[-1].requests)
    publish("memory.md", intro, report, seed, write, "![memory](memory.svg)\n\n")


def run_fair(seeds: int, seconds: float, seed: int, write: bool) -> None:
    """Measures fair shares on fleets of several sizes, `seeds` times each, and without the gateway."""
    found = {}
    for count, through in FLEETS:
        name = f"{count} replica{'s' if count > 1 else ''}" + ("" if through else ", asked in turn")
        tell(f"fair: {name}")
        found[name] = fair.simulated(count, range(seed, seed + 10 * seeds, 10), seconds, through)
    where = f"Simulated replicas (`{' '.join(fair.SHAPE)}`), {seeds} runs of each"
    text = fair.intro("fair", where, fair.SIMULATED, fair.SIMULATED_CLIENTS)
    publish("fair.md", text, fair.report(found), seed, write, peers_too=False)


def run_cost(rounds: int, seconds: float, seed: int, write: bool) -> None:
    """Measures what keys, limits and metering cost."""
    tell("cost: a chunk of a stream")
    chunk = cost.chunk_us()
    report = cost.report(cost.measure(rounds, seconds, seed, tell), chunk)
    intro = cost.INTRO.format(rate=cost.RATE, rounds=rounds, seconds=seconds)
    publish("cost.md", intro, report, seed, write, peers_too=False)


def run_instructions(against: str, seed: int, write: bool) -> None:
    """Counts the instructions of a request, and beside them those of the gateway at another commit, if one is named."""
    found = {}
    for name, variant in instructions.variants().items():
        tell(f"instructions: {name}")
        found[name] = instructions.measure(variant, seed)
    if against:
        tell(f"instructions: {against}")
        with peers.gateway_at(against) as source:
            found[f"at {against}"] = instructions.measure(instructions.Variant(source), seed)
    intro = instructions.INTRO.format(
        against=f" --against {against}" if against else "",
        requests=instructions.REQUESTS,
        conversations=instructions.CONVERSATIONS,
    )
    publish("instructions.md", intro, instructions.report(found), seed, write, peers_too=False)


def run_hits(against: str, names: Sequence[str], seeds: int, seconds: float, seed: int, write: bool) -> None:
    """Measures the prefix hits of this gateway and of the one at another commit, on the same seeds."""
    load, proxy = overhead.split_cpus()
    os.sched_setaffinity(0, load)
    with peers.gateway_at(against) as source:
        starts: dict[str, Start] = {OURS: PEERS[OURS], f"at {against}": lambda target: peers.gateway(target, source)}
        found: dict[str, dict[str, list[float]]] = {name: {workload: [] for workload in names} for name in starts}
        for turn in range(seeds):
            for name, start in starts.items():
                for workload, cell in one_peer(name, start, proxy, names, seed + turn, seconds).items():
                    found[name][workload].append(cell.hit_rate)
    now, before = found.values()
    intro = reports.HITS.format(
        against=against,
        replicas=REPLICAS,
        shape=" ".join(workloads.SHAPE),
        clients=CLIENTS,
        seconds=seconds,
        seeds=seeds,
    )
    publish("hits.md", intro, reports.hits_report(now, before), seed, write, peers_too=False)


@app.command()
def main(
    parts: Annotated[str, typer.Option(help=f"Which parts, with commas between them: {EVERY_PART}.")] = ",".join(PARTS),
    real: Annotated[bool, typer.Option(help="The running stack's replicas in place of simulated ones.")] = False,
    quick: Annotated[bool, typer.Option(help="A look at everything; writes nothing.")] = False,
    only: Annotated[str, typer.Option(help="Only peers with one of these in their names, e.g. gateway,vllm.")] = "",
    workload: Annotated[str, typer.Option(help="Only workloads with this in their names.")] = "",
    against: Annotated[str, typer.Option(help="A commit to compare with, for instructions and hits.")] = "",
    seed: Annotated[int | None, typer.Option(help="Of all prompts; a new one by default.")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Of each measurement; by default overhead 3, workloads 10, trace 60, fair 3.5, cost 2.",
        ),
    ] = None,
) -> None:
    """Measures this gateway beside others and writes the tables."""
    wanted = parts.split(",")
    if unknown := set(wanted) - set(EVERY_PART.split(", ")):
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; there are {EVERY_PART}")
    for program, package in (("wrk", "wrk"), ("haproxy", "haproxy"), ("taskset", "util-linux")):
        if set(wanted) - {INSTRUCTIONS, HITS} and not shutil.which(
            program, path=f"{os.environ.get('PATH', '')}:/usr/sbin"
        ):
            console.print(f"{program} is missing: apt-get install {package}", style="red")
            raise typer.Exit(1)
    if set(wanted) - {*OWN, FAIR_REAL, INSTRUCTIONS, HITS} or real:
        tell("the peers' programs")
        peers.install()
    if HITS in wanted and not against:
        raise typer.BadParameter("hits: name a commit to compare with, by --against")
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
        if FAIR_REAL in wanted:
            run_fair_real(1 if quick else 2, 20 if quick else 60, seed, write)
        if "overhead" in wanted:
            run_overhead(chosen, 1 if quick else 2, seconds or (1 if quick else 3), seed, write)
            os.sched_setaffinity(0, affinity)
        if "workloads" in wanted:
            run_workloads(chosen | designs, names, seconds or (3 if quick else 10), seed, write)
            os.sched_setaffinity(0, affinity)
        if "trace" in wanted:
            run_trace(dict(chosen), seconds or (15 if quick else 60), seed, write)
            os.sched_setaffinity(0, affinity)
        if "memory" in wanted:
            run_memory(20_000 if quick else 1_000_000, seed, write)
            os.sched_setaffinity(0, affinity)
        if "fair" in wanted:
            run_fair(1 if quick else 5, seconds or 3.5, seed, write)
        if "cost" in wanted:
            run_cost(1 if quick else 7, seconds or (1 if quick else 2), seed, write)
        if INSTRUCTIONS in wanted:
            run_instructions(against, seed, write)
        if HITS in wanted:
            run_hits(against, names, 1 if quick else 5, seconds or (3 if quick else 10), seed, write)
            os.sched_setaffinity(0, affinity)
    except StackError as why:
        console.print(str(why), style="red", markup=False)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
