"""What is measured on two GPUs: the planner's layouts, 4-bit weights, the gateway, the presets."""

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import yaml

from lab.bench import peers, workloads
from lab.bench.peers import OURS, PEERS, Target
from lab.bench.workloads import WORKLOADS, user
from lab.gpu import engines
from lab.gpu.engines import TP_SAFE, Engine
from lab.gpu.run import KV_GB, PER_GPU, PROCESSES, SIZES, Fleet, Run, alone, in_turn, steady
from lab.http import get
from lab.sim.gateway import Gateway
from lab.sim.load import Outcome, session, stream
from lab.waiting import until
from planner import speed
from stack.shell import ROOT


@dataclass(frozen=True)
class Layout:
    """A way to use two GPUs, by the planner's name of it."""

    name: str
    tp: int
    pp: int
    gpus: list[list[int]]
    extra: tuple[str, ...] = ()


LAYOUTS = {
    "tp1": Layout("2 × tp 1", 1, 1, [[0], [1]]),
    "tp2": Layout("1 × tp 2", 2, 1, [[0, 1]], TP_SAFE),
    "pp2": Layout("1 × tp 1 × pp 2", 1, 2, [[0, 1]]),
}
# Seconds of the load: a few answers of each client.
SECONDS = {"1.5B": 4.0, "8B": 6.0, "32B": 12.0}


def measure_layout(run: Run, shape: str, key: str) -> None:
    """Memory and speed of one way to use two GPUs."""
    layout = LAYOUTS[key]
    sizes = {"TENSOR_PARALLEL_SIZE": str(layout.tp), "PIPELINE_PARALLEL_SIZE": str(layout.pp)}
    every = [run.engine(shape, gpus, *layout.extra, **sizes) for gpus in layout.gpus]
    try:
        run.ready(*every)
        run.keep("shapes", shape, layout.name, "memory", value=every[0].facts())
        measure_speed(run, shape, layout, every)
        if (shape, key) == (QUANTIZED_SHAPE, "tp1"):
            measure_weights(run, "bf16", every[0])
    finally:
        for engine in every:
            engine.stop()


def measure_speed(run: Run, shape: str, layout: Layout, every: list[Engine]) -> None:
    """A layout's speed: one request alone, then 256 at once."""
    urls = [engine.url for engine in every]
    run.load(urls, every, 2 * PER_GPU, 1.0)
    (found,) = asyncio.run(in_turn(urls[:1], shape, 4, speed.ANSWER))
    run.keep("shapes", shape, layout.name, "alone", value=alone(found))
    run.fresh()
    run.keep("shapes", shape, layout.name, "full", value=run.load(urls, every, 2 * PER_GPU, SECONDS[shape]))


QUANTIZED_SHAPE = "1.5B"


def measure_weights(run: Run, name: str, engine: Engine) -> None:
    """One engine's memory and speed, to be compared with the same model in other weights."""
    run.keep("quantized", name, "memory", value=engine.facts())
    (found,) = asyncio.run(in_turn([engine.url], engine.name, 8, speed.ANSWER))
    run.keep("quantized", name, "alone", value=alone(found))
    run.fresh()
    run.keep("quantized", name, "full", value=run.load([engine.url], [engine], 64, 4.0))


def measure_quantized(run: Run) -> None:
    """4-bit weights on one GPU; beside it, what one replica of the gateway's shape has for itself."""
    wait_for_weights(run)
    four = run.engine(QUANTIZED_SHAPE, [0], QUANTIZATION="bitsandbytes")
    other = run.engine(GATEWAY_SHAPE, [1])
    try:
        run.ready(other, four)
        run.keep("shapes", GATEWAY_SHAPE, LAYOUTS["tp1"].name, "memory", value=other.facts())
        measure_weights(run, "bitsandbytes 4-bit", four)
    finally:
        four.stop()
        other.stop()


# ---- the gateway

GATEWAY_SHAPE = "8B"
COMPARED = ("Nginx, round robin", "Nginx, least_conn", OURS, "vllm-router, cache_aware")
CLIENTS = 64  # of the workloads
WORKLOAD_SECONDS = 3.0


def measure_gateway(run: Run) -> None:
    """Two replicas behind the gateway: throughput, added latency, workloads beside peers, and a kill."""
    every = [run.engine(GATEWAY_SHAPE, [gpu], KV_CACHE_GB=str(KV_GB)) for gpu in (0, 1)]
    fleet = Fleet(every, run.dns, run.gateway_host)
    try:
        run.ready(*every)
        measure_speed(run, GATEWAY_SHAPE, LAYOUTS["tp1"], every)
        run.part("throughput", lambda: measure_throughput(run, fleet))
        run.part("added latency", lambda: measure_added_latency(run, fleet))
        run.part("workloads", lambda: measure_workloads(run, fleet))
        run.part("kill", lambda: measure_kill(run, fleet))
    finally:
        for engine in every:
            engine.stop()


def measure_throughput(run: Run, fleet: Fleet) -> None:
    """One replica direct against two through the gateway with twice the clients, in turn."""
    with peers.gateway(fleet.target()) as url:
        for turn in ("1", "2"):
            for name, urls, count in (("one direct", fleet.urls[:1], 1), ("two behind the gateway", [url], 2)):
                run.fresh()
                cell = run.load(urls, fleet.every, count * PER_GPU, SECONDS[GATEWAY_SHAPE])
                run.keep("gateway", "throughput", f"{name} {turn}", value=cell)


def measure_added_latency(run: Run, fleet: Fleet) -> None:
    """One request at a time to one replica: direct, through plain Nginx, and through the gateway."""
    one = Target(fleet.urls[:1], fleet.model, fleet.target().cpus)
    only = fleet.upstreams(["vllm-0"])
    with Gateway(fleet, only) as gateway, peers.nginx(one, "") as plain:
        gateway.wait_ready()
        found = asyncio.run(in_turn([fleet.urls[0], plain, gateway.url], fleet.model, 60, 16))
    for name, outcomes in zip(("direct", "plain Nginx", OURS), found, strict=True):
        pairs = [1000 * (one.ttft - direct.ttft) for one, direct in zip(outcomes, found[0], strict=True)]
        run.keep("gateway", "alone", name, value=alone(outcomes) | {"added_ms": median(pairs)})


def measure_workloads(run: Run, fleet: Fleet) -> None:
    """All workloads on each system in turn, with empty caches and the same prompts."""
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(PEERS[name](fleet.target())) for name in COMPARED}
        for workload, client in WORKLOADS.items():
            run.fresh()
            for name, url in urls.items():
                for engine in fleet.every:
                    engine.forget()
                cell = run.load([url], fleet.every, CLIENTS, WORKLOAD_SECONDS, client, SIZES)
                run.keep("gateway", "workloads", workload, name, value=cell)


def measure_kill(run: Run, fleet: Fleet) -> None:
    """One replica is killed under load through the gateway."""
    with Gateway(fleet) as gateway:
        gateway.wait_ready()
        run.fresh()
        share = CLIENTS // PROCESSES
        jobs = [run.pool.submit(steady, gateway.url, fleet.model, share, run.seed + n, 7.0) for n in range(PROCESSES)]
        until(lambda: not fleet.every[1].idle(), "the load runs")
        time.sleep(3)
        killed = time.monotonic()
        fleet.every[1].kill()
        fleet.dns.names.pop("vllm-1")
        done = [outcome for job in jobs for outcome in job.result()]
    moved = [one for one in done if one.sent < killed < one.ended]
    run.keep("gateway", "kill", value={
        "requests": len(done),
        "complete": sum(one.done for one in done),
        "not begun and failed": sum(one.failed for one in done),
        "streams cut": sum(one.cut for one in done),
        "slowest first token of what was under way, ms": round(1000 * max(one.ttft for one in moved), 1),
    })  # fmt: skip


# ---- presets


def measure_presets(run: Run) -> None:
    """Every preset as the launcher starts it, all at the same time, and what it answers."""
    wait_for_weights(run)
    started: dict[str, Engine] = {}
    try:
        for number, path in enumerate(sorted((ROOT / "presets").glob("*.yaml"))):
            settings = {name: str(value) for name, value in yaml.safe_load(path.read_text())["settings"].items()}
            model = settings.pop("MODEL")
            if "SPECULATIVE_CONFIG" in settings and "model" in (guess := json.loads(settings["SPECULATIVE_CONFIG"])):
                guess["model"] = str(engines.write_model(run.work / "models", guess["model"]))
                settings["SPECULATIVE_CONFIG"] = json.dumps(guess)
            room = {"KV_CACHE_GB": "10", "GPU_MEMORY_UTILIZATION": "0.05"}
            started[path.stem] = run.engine(model, [number % 2], **room, **settings)
        for name, engine in started.items():
            run.part(f"presets:{name}", partial(measure_preset, run, name, engine))
    finally:
        for engine in started.values():
            engine.kill()


async def chat(url: str, body: dict[str, Any]) -> Outcome:
    """One streamed chat."""
    async with session() as one:
        return await stream(one, url, body, 60)


def measure_preset(run: Run, name: str, engine: Engine) -> None:
    """Whether one preset starts and answers, and its memory."""
    run.ready(engine)
    found = engine.facts()
    if name == "embeddings":
        body = {"model": engine.name, "input": "badego kilomu"}
        data = json.loads(get(engine.url + "/v1/embeddings", json.dumps(body).encode(), timeout=60,
                              headers={"content-type": "application/json"}))  # fmt: skip
        found["vector"] = len(data["data"][0]["embedding"])
    else:
        ask: dict[str, Any] = {
            "model": engine.name,
            "messages": [user("badego kilomu " * 100)],
            "max_tokens": 64,
            "ignore_eos": True,
        }
        found["chat"] = asyncio.run(chat(engine.url, ask)).done
        found["drafted"] = workloads.totals(engine.url).get("vllm:spec_decode_num_draft_tokens_total", 0.0)
    run.keep("presets", name, value=found)


BY_FILES = ("1.5B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")  # what bitsandbytes quantizes


def wait_for_weights(run: Run) -> None:
    """Returns when the files that bitsandbytes quantizes are written."""
    for model in BY_FILES:
        path = run.work / "models" / model
        until((path / "model.safetensors").exists, f"weights of {model} are written", 120)


PARTS = ("gateway", "8B", "quantized", "1.5B", "32B")


def measure(run: Run, name: str) -> None:
    """One part, or a shape's layout as 8B:tp2."""
    shape, _, key = name.partition(":")
    if name == "gateway":
        measure_gateway(run)
    elif name == "quantized":
        measure_quantized(run)
    elif name == "presets":
        measure_presets(run)
    else:
        # the gateway's replicas are 2 × tp 1 of its shape
        for one in [key] if key else [one for one in LAYOUTS if (shape, one) != (GATEWAY_SHAPE, "tp1")]:
            run.part(f"{shape}:{one}", partial(measure_layout, run, shape, one))
