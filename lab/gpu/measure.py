"""What is measured: the account of families of models, the route of a fleet, the planner's layouts; and all parts."""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

from lab.bench import peers, workloads
from lab.bench.peers import OURS, PEERS
from lab.bench.workloads import Sizes
from lab.gpu import fair, plans, sleep, turns
from lab.gpu.engines import QUICK, Engine
from lab.gpu.plans import Layout
from lab.gpu.run import PER_GPU, Fleet, Load, Run, alone, cpu_seconds
from lab.http import get
from lab.sim.gateway import Gateway
from lab.waiting import until

START_S = 240  # that an engine may take to start; the slowest so far took 200


# ---- families: one GPU each, started as the launcher starts them, with nothing compiled before

FAMILIES = ("Gemma-4-E4B", "Qwen3-Next-16-layers", "gpt-oss-20B", "Nemotron-H-8B")


def measure_families(run: Run) -> None:
    """As many at a time as there are GPUs."""
    for at in range(0, len(FAMILIES), len(run.gpus)):
        shapes = FAMILIES[at : at + len(run.gpus)]
        run.part(", ".join(shapes), 90, partial(measure_at_once, run, shapes))


def measure_at_once(run: Run, shapes: Sequence[str]) -> None:
    """Each shape on a GPU of its own."""
    try:
        for engine in [run.engine(shape, [gpu]) for shape, gpu in zip(shapes, run.gpus, strict=False)]:
            run.part(engine.name, 0, partial(measure_family, run, engine))
    finally:
        run.stop()


def measure_family(run: Run, engine: Engine) -> None:
    """What it said of its memory, and whether it answers."""
    try:
        run.ready(engine, START_S)
    finally:
        # the engine says it before the API server starts
        if "kv_tokens" in (facts := engine.facts()):
            run.keep("families", engine.name, value=facts)
    ask = {"model": engine.name, "prompt": "badego kilomu " * 50, "max_tokens": 16, "ignore_eos": True}
    header = {"content-type": "application/json"}
    answer = json.loads(get(engine.url + "/v1/completions", json.dumps(ask).encode(), timeout=60, headers=header))
    run.keep("families", engine.name, value=facts | {"answered": answer["usage"]["completion_tokens"]})


# ---- the route: a replica on every GPU

ROUTE_SHAPE = "Llama-8B"
ROUTE_SECONDS = 5.0
ROUND_ROBIN = "vllm-router, round_robin"
COMPARED: dict[str, peers.Start] = {
    OURS: PEERS[OURS],
    "vllm-router, cache_aware": PEERS["vllm-router, cache_aware"],
    ROUND_ROBIN: lambda target: peers.router(target, peers.VLLM_ROUTER, "round_robin"),
}
# Half as long as in the trace, so that the longest fits, and as many a GPU as keep it about half busy.
TRACE_SIZES, TRACE_RATE, TRACE_SECONDS = Sizes(tokens=0.5, answers=0.5), 5.0, 24.0
FAULT_CLIENTS, FAULT_SECONDS = 32, 6.0


def measure_route(run: Run) -> None:
    """Throughput, the trace beside vllm-router, and killed replicas."""
    every = [run.engine(ROUTE_SHAPE, [gpu], *QUICK) for gpu in run.gpus]
    fleet = Fleet(every, run.dns, run.gateway_host)
    try:
        for engine in every:
            run.ready(engine, START_S)
        run.keep("route", "memory", value=every[0].facts())
        run.loads([Load(fleet.urls, every, PER_GPU * len(every))], 1.0, Sizes())
        run.part("throughput", 30, partial(measure_throughput, run, fleet))
        run.part("trace", 50, partial(measure_trace, run, fleet))
        run.part("fault", 20, partial(measure_fault, run, fleet))
    finally:
        run.stop()


def measure_throughput(run: Run, fleet: Fleet) -> None:
    """One replica direct against all through the gateway with as many clients for each, in turn."""
    with Gateway(fleet) as gateway:
        gateway.wait_ready()
        processes = [gateway.master(), *gateway.workers()]
        behind = f"{len(fleet.every)} behind the gateway"
        for turn, (name, url, count) in itertools.product(
            (1, 2), (("one direct", fleet.urls[0], 1), (behind, gateway.url, len(fleet.every)))
        ):
            run.fresh()
            start, computed = time.monotonic(), cpu_seconds(processes)
            (cell,) = run.loads([Load([url], fleet.every, count * PER_GPU)], ROUTE_SECONDS, Sizes())
            cores = (cpu_seconds(processes) - computed) / (time.monotonic() - start)
            run.keep("route", "throughput", f"{name} {turn}", value=asdict(cell) | {"cores": cores})


def measure_trace(run: Run, fleet: Fleet) -> None:
    """The same trace through each system in turn."""
    run.fresh()
    turns = workloads.trace(run.seed, TRACE_SECONDS, TRACE_RATE * len(fleet.every), TRACE_SIZES)
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(start(fleet.target())) for name, start in COMPARED.items()}
        for name, url in urls.items():
            run.part(f"trace: {name}", 20, partial(measure_system, run, fleet, name, url, turns))


def measure_system(run: Run, fleet: Fleet, name: str, url: str, turns: list[workloads.Turn]) -> None:
    """The trace through one system."""
    run.keep("route", "trace", name, value=asdict(run.trace(url, fleet.every, turns)))


def measure_fault(run: Run, fleet: Fleet) -> None:
    """Replicas are killed under load through the gateway: two, or one where two are all."""
    victims = range(len(fleet.every))[-2 if len(fleet.every) > 2 else -1 :]
    with Gateway(fleet) as gateway:
        gateway.wait_ready()
        run.fresh()
        jobs = run.steady(gateway.url, fleet.model, FAULT_CLIENTS * len(fleet.every), FAULT_SECONDS)
        for number in victims:
            until(lambda: not fleet.every[number].idle(), "the load runs")  # noqa: B023 - called here
        time.sleep(FAULT_SECONDS / 3)
        killed = time.monotonic()
        for number in victims:
            fleet.every[number].kill()
            fleet.dns.names.pop(f"vllm-{number}")
        done = [outcome for job in jobs for outcome in job.result()]
    moved = [one for one in done if one.sent < killed < one.ended]
    run.keep("route", "fault", value={
        "replicas killed": len(victims),
        "requests": len(done),
        "complete": sum(one.done for one in done),
        "not begun and failed": sum(one.failed for one in done),
        "streams cut": sum(one.cut for one in done),
        "slowest first token of what was under way, ms": round(1000 * max(one.ttft for one in moved), 1),
    })  # fmt: skip


# ---- the planner's layouts

LAYOUT_SHAPES = ("Llama-70B", "GLM-4.5-Air-106B")
# A quarter of the reference request, in and out, so that many end in the time there is.
LAYOUT_SIZES, LAYOUT_SECONDS = Sizes(tokens=0.25, answers=0.25), 6.0


def measure_layouts(run: Run) -> None:
    """Those that the planner lists for this machine, the likeliest first, until the time is over."""
    for layouts in plans.rounds(plans.by_worth(run.machine, LAYOUT_SHAPES), len(run.gpus)):
        name = ", ".join(f"{one.shape} {one.name}" for one in layouts)
        run.part(name, 75, partial(measure_together, run, layouts))


def measure_together(run: Run, layouts: list[Layout]) -> None:
    """One replica of each layout, at the same time on GPUs of its own."""
    gpus = list(run.gpus)
    started: list[tuple[Layout, Engine]] = []
    try:
        for one in layouts:
            own, gpus = gpus[: one.gpus], gpus[one.gpus :]
            sizes = {"TENSOR_PARALLEL_SIZE": str(one.tp), "PIPELINE_PARALLEL_SIZE": str(one.pp)}
            started.append((one, run.engine(one.shape, own, *QUICK, **sizes)))
        up: list[tuple[Layout, Engine]] = []
        for one, engine in started:
            run.part(f"{one.shape} {one.name}", 0, partial(measure_alone, run, one, engine, up))
        if up:
            run.fresh()
            targets = [Load([engine.url], [engine], PER_GPU * one.gpus) for one, engine in up]
            cells = run.loads(targets, LAYOUT_SECONDS, LAYOUT_SIZES)
            for (one, _), cell in zip(up, cells, strict=True):
                run.keep("layouts", one.shape, one.name, "full", value=asdict(cell))
    finally:
        run.stop()


def measure_alone(run: Run, one: Layout, engine: Engine, up: list[tuple[Layout, Engine]]) -> None:
    """Its memory once it answers, and one request alone."""
    run.ready(engine, START_S)
    run.keep("layouts", one.shape, one.name, "layout", value={"tp": one.tp, "pp": one.pp, "replicas": one.replicas})
    run.keep("layouts", one.shape, one.name, "memory", value=engine.facts())
    run.keep("layouts", one.shape, one.name, "alone", value=asyncio.run(alone(engine.url, engine.name, 2, 32)))
    up.append((one, engine))


PARTS: dict[str, tuple[float, Callable[[Run], None]]] = {
    "families": (60, measure_families),
    "route": (120, measure_route),
    "layouts": (75, measure_layouts),
    "fair": (120, fair.measure),
    "sleep": (60, sleep.measure),
    "turns": (60, turns.measure),
}
# One GPU is enough for the others.
SEVERAL = {"route", "layouts"}
