"""Measures the planner and the gateway on two real GPUs, and writes the report.

    python -m lab.gpu run --out DIR --work DIR    on the host with the GPUs, vLLM, and Nginx at $NGINX, $NGINX_MODULES
    python -m lab.gpu report DIR/gpu.json         writes docs/benchmarks/gpu.md from what was measured

Models are shapes with random weights, so nothing has to be fetched. What is measured is written after each step: a run
that is cut off keeps what it has."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
import yaml

from lab.bench import peers, workloads
from lab.bench.peers import OURS, PEERS, Target
from lab.bench.report import table
from lab.bench.workloads import WORKLOADS, Cell, Client, Sizes, Workload, user
from lab.gpu import engines
from lab.gpu.engines import MAX_LENGTH, PORT, SHAPES, TP_SAFE, Engine
from lab.http import get
from lab.sim.dns import Dns
from lab.sim.gateway import Gateway, nginx_version
from lab.sim.load import Outcome, SteadyLoad, session, stream
from lab.waiting import until
from planner import choose, memory, speed
from planner.choose import Wish
from planner.config import read_model
from planner.machine import GIB, Machine
from planner.memory import Settings
from planner.model import Model
from planner.nvml import read_machine
from stack.gateway import fleet_line
from stack.shell import ROOT

REPORT = ROOT / "docs" / "benchmarks" / "gpu.md"
PROCESSES = 12  # that send the load: reading every token's event costs more than one core
PER_GPU = speed.CONCURRENT
START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f}] {text}", flush=True)


# ---- load


PLAIN = Sizes()


def reference(rng: random.Random, _: random.Random, sizes: Sizes) -> Client:
    """The request that plans are compared by."""
    while True:
        yield [user(sizes.prompt(rng, speed.PROMPT))], sizes.answer(rng, speed.ANSWER)


# What the workloads are here: longer, as these replicas are faster. The documents of the KV pressure make 250k tokens.
SIZES = Sizes(tokens=2.5, answers=1.5)
KV_GB = 26  # 212,992 tokens of the 8B shape: less than the documents, and more than half of them


def drive(urls: Sequence[str], model: str, workload: Workload, seed: int, clients: range, seconds: float,
          sizes: Sizes) -> list[Outcome]:  # fmt: skip
    return asyncio.run(workloads.drive(urls, model, workload, seed, clients, seconds, sizes))


def steady(url: str, model: str, clients: int, seed: int, seconds: float) -> list[Outcome]:
    """Requests of the reference size until `seconds` are over, each brought to its end."""

    async def load() -> list[Outcome]:
        async with SteadyLoad(url, model, clients, speed.PROMPT, speed.ANSWER, 60.0, 1, seed=seed) as steady:
            await asyncio.sleep(seconds)
        return steady.outcomes

    return asyncio.run(load())


async def in_turn(urls: Sequence[str], model: str, count: int, answer: int) -> list[list[Outcome]]:
    """One request at a time, to each url in turn, over connections that stay open; the first of each is left out."""
    found: list[list[Outcome]] = [[] for _ in urls]
    asks = reference(random.Random(), random.Random(), Sizes())
    async with contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(session()) for _ in urls]
        for _ in range(count + 1):
            for one, url, outcomes in zip(sessions, urls, found, strict=True):
                messages, _tokens = next(asks)
                body = {"model": model, "messages": messages, "max_tokens": answer, "ignore_eos": True}
                outcomes.append(await stream(one, url, body, 60))
    return [outcomes[1:] for outcomes in found]


def alone(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Milliseconds of requests that were alone: to the first token, and from one to the next."""
    gaps = [(one.last - one.first) / (one.tokens - 1) for one in outcomes if one.first and one.last and one.tokens > 1]
    return {"ttft_ms": 1000 * median(one.ttft for one in outcomes), "tpot_ms": 1000 * median(gaps)}


# ---- the run


class Fleet:
    """Engines as `Gateway` asks for them."""

    def __init__(self, every: Sequence[Engine], dns: Dns, gateway_host: str) -> None:
        self.every, self.dns, self.gateway_host, self.model = list(every), dns, gateway_host, every[0].name
        self.urls = [engine.url for engine in every]
        dns.names.update({f"vllm-{n}": engine.host for n, engine in enumerate(every)})

    def upstreams(self, names: Sequence[str] | None = None) -> str:
        return "".join(fleet_line(name, PORT) + "\n" for name in names or [f"vllm-{n}" for n in range(len(self.every))])

    def target(self) -> Target:
        cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        return Target(self.urls, self.model, cpus, self)


class Run:
    """One run: its folder, the results so far and the processes that send load."""

    def __init__(self, out: Path, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "gpu.json"
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        engines.prepare()
        self.pool = ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn"))
        for _ in range(PROCESSES):
            self.pool.submit(time.sleep, 1)  # so that each process is there before anything is timed
        self.seed = random.randrange(10**9)
        net = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        self.hosts = (f"{net}.{number}" for number in range(10, 250))
        self.gateway_host = f"{net}.1"
        self.dns = Dns(self.gateway_host)

    def engine(self, model: str, gpus: Sequence[int], *extra: str, **settings: str) -> Engine:
        path = self.work / "models" / model
        if not (path / "tokenizer_config.json").exists():
            engines.write_model(self.work / "models", model)
        if model in SHAPES:
            settings["MAX_MODEL_LEN"] = str(MAX_LENGTH)
        return Engine(next(self.hosts), gpus, path, self.work, settings, *extra)

    def ready(self, *every: Engine) -> None:
        for engine in every:
            engine.wait()
            say(f"{engine.name} on GPUs {engine.gpus} ready {time.monotonic() - engine.started:.0f} s after its start")

    def keep(self, *path: str, value: Any) -> None:
        """Puts a result where it belongs and writes all of them."""
        at = self.results
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")
        say(f"{' '.join(path)}: {json.dumps(value)[:400]}")

    def part(self, name: str, step: Callable[[], None]) -> None:
        """One part of the run; the others go on when it fails."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 - the run reports it and goes on
            traceback.print_exc()
            self.keep("failures", name, value=f"{type(error).__name__}: {error}"[:800])

    def load(self, urls: Sequence[str], replicas: Sequence[Engine], clients: int, seconds: float,
             workload: Workload = reference, sizes: Sizes = PLAIN) -> dict[str, Any]:  # fmt: skip
        """A workload for `seconds`, after half of that to warm up; clients take the urls in turn."""
        turned = [[*urls[n % len(urls) :], *urls[: n % len(urls)]] for n in range(PROCESSES)]
        driving: list[Future[list[Outcome]]] = [
            self.pool.submit(drive, turned[n], replicas[0].name, workload, self.seed, range(n, clients, PROCESSES),
                             1.5 * seconds, sizes)
            for n in range(PROCESSES)
        ]  # fmt: skip
        time.sleep(seconds / 2)
        metrics = [engine.url for engine in replicas]
        before = workloads.counters(metrics)
        time.sleep(max(0.0, before.at + seconds - 0.1 - time.monotonic()))
        after = workloads.counters(metrics)
        outcomes = [outcome for one in driving for outcome in one.result()]
        return asdict(workloads.cell(outcomes, before, after))

    def fresh(self) -> None:
        """New prompts: those that were sent before are in the caches."""
        self.seed += 1


# ---- the planner


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
    async with session() as one:
        return await stream(one, url, body, 60)


def measure_preset(run: Run, name: str, engine: Engine) -> None:
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
    for model in BY_FILES:
        path = run.work / "models" / model
        until((path / "model.safetensors").exists, f"weights of {model} are written", 120)


app = typer.Typer(add_completion=False, help=__doc__)
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


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json; results that are in it stay.")],
    work: Annotated[Path, typer.Option(help="Folder for models and logs.")],
    parts: Annotated[
        str, typer.Option(help="Which, by commas; a shape's layout as 8B:tp2; presets: each starts and answers.")
    ] = ",".join(PARTS),
) -> None:
    """Measure on this host's first two GPUs."""
    bench = Run(out, work)
    machine = read_machine()
    bench.keep("machine", value=machine.model_dump(mode="json"))
    bench.keep("versions", value={
        **{name: version(name) for name in ("vllm", "torch", "vllm-router", "bitsandbytes")},
        "nginx": nginx_version().removeprefix("nginx/"),
    })  # fmt: skip
    # `timeout` sends SIGTERM: engines are ended then too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))
    writing = subprocess.Popen([sys.executable, "-m", "lab.gpu", "weights", str(work / "models")])
    try:
        for name in parts.split(","):
            when, start = f"{datetime.now(UTC):%Y-%m-%d %H:%M}", time.monotonic()
            bench.part(name, partial(measure, bench, name))
            bench.keep("parts", name, value={"when": when, "seconds": round(time.monotonic() - start)})
    finally:
        writing.kill()
        bench.pool.shutdown(cancel_futures=True)
        bench.dns.close()
    say("done")


@app.command(hidden=True)
def weights(models: Path) -> None:
    """Random weights for the models that are quantized from files, in a process of its own."""
    for model in BY_FILES:
        engines.write_weights(engines.write_model(models, model))


# ---- the report

PLANNER_NOTE = """\
Predictions are those of the planner as it is now; its constants were fitted on the 1.5B and 8B shapes in an earlier
run, 32B is the test of the fit. `used` is what the driver says of the fullest GPU. Speeds are those of {prompt} tokens
in and {answer} out: tokens/s with {most} requests at once on both GPUs, ms of one such request alone.
"""


def planner_model(shape: str) -> Model:
    return read_model(SHAPES[shape], shape)


def off(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.1f} %"


def report_shapes(results: dict[str, Any], machine: Machine) -> str:
    """Predicted against measured, and the plan that the planner would have chosen against the best measured."""
    rows, ranks = [], []
    fresh = machine.model_copy(
        update={"gpus": tuple(gpu.model_copy(update={"free": gpu.total}) for gpu in machine.gpus)}
    )
    for shape in SHAPES:
        layouts, model, gpu = results["shapes"].get(shape, {}), planner_model(shape), fresh.gpus[0]
        for one in LAYOUTS.values():
            if not (said := layouts.get(one.name, {}).get("memory")):
                continue
            account = memory.account(model, gpu, one.tp, one.pp, MAX_LENGTH, Settings.default(gpu))
            rows.append([
                f"{shape}, {one.name}", f"{account.kv_tokens:,}", f"{said['kv_tokens']:,.0f}",
                off(account.kv_tokens, said["kv_tokens"]), f"{account.weights / GIB:.2f}", f"{said['weights']:.2f}",
                f"{account.used / GIB:.1f}", f"{max(said['used']):.1f}", off(account.used / GIB, max(said["used"])),
                f"{said['init_s']:.0f}, {said['compile_s']:.0f}" if "init_s" in said else "",
            ])  # fmt: skip
        for goal in ("throughput", "latency"):
            plan = choose.choose(fresh, model, Wish(goal=goal, context=MAX_LENGTH, quantization="none"))
            measured = {
                one.name: found["full"]["tokens_per_s"] if goal == "throughput"
                else found["alone"]["ttft_ms"] + speed.ANSWER * found["alone"]["tpot_ms"]
                for one in LAYOUTS.values() if "full" in (found := layouts.get(one.name, {}))
            }  # fmt: skip
            if len(measured) < 2:
                continue
            best = (max if goal == "throughput" else min)(measured, key=lambda layout: measured[layout])
            unit = "tokens/s" if goal == "throughput" else "ms"
            others = ", ".join(f"{layout}: {value:,.0f} {unit}" for layout, value in measured.items())
            ranks.append([shape, goal, plan.layout, best, "yes" if plan.layout == best else "no", others])
    head = ["", "KV tokens predicted", "reported", "off", "weights GiB predicted", "reported", "used GiB predicted",
            "measured", "off", "s to start, of it compiling"]  # fmt: skip
    text = table(head, rows) + "\n"
    return text + table(["shape", "goal", "planned", "measured best", "the same", "measured"], ranks)


def cell_row(name: str, cell: Cell) -> list[str]:
    return [name, f"{100 * cell.hit_rate:.1f} %", f"{1000 * cell.ttft_p50:.0f}", f"{1000 * cell.ttft_p90:.0f}",
            f"{1000 * cell.ttft_p99:.0f}", f"{cell.tokens_per_s:,.0f}", f"{cell.requests}", f"{cell.lost}"]  # fmt: skip


CELL = ["", "prefix hits", "TTFT p50 ms", "p90", "p99", "tokens/s", "requests", "lost"]


def report_gateway(found: dict[str, Any]) -> str:
    text = ""
    if rows := found.get("throughput"):
        text += f"### Two replicas behind the gateway, {PER_GPU} clients a replica\n\n" + table(
            CELL, [cell_row(name, Cell(**one)) for name, one in rows.items()]
        )
        direct, through = ([one["tokens_per_s"] for name, one in rows.items() if part in name]
                           for part in ("one direct", "gateway"))  # fmt: skip
        text += f"\nTwo behind the gateway give {sum(through) / sum(direct):.2f} × one direct.\n\n"
    if rows := found.get("alone"):
        text += "### One request at a time\n\n" + table(
            ["", "TTFT p50 ms", "added (median of neighbours) ms", "ms a token"],
            [[name, f"{one['ttft_ms']:.2f}", f"{one['added_ms']:+.2f}", f"{one['tpot_ms']:.3f}"]
             for name, one in rows.items()],
        ) + "\n"  # fmt: skip
    if rows := found.get("workloads"):
        text += f"### Workloads of `make bench`, {CLIENTS} clients, {WORKLOAD_SECONDS:.0f} s each after a warm-up\n\n"
        text += "![TTFT p90, ms](gpu-ttft.svg)\n\n![tokens/s](gpu-tokens.svg)\n\n"
        for workload, systems in rows.items():
            text += f"**{workload}**\n\n"
            text += table(CELL, [cell_row(name, Cell(**one)) for name, one in systems.items()]) + "\n"
    if one := found.get("kill"):
        text += "### A replica killed under load\n\n"
        text += table(["", ""], [[key, str(value)] for key, value in one.items()]) + "\n"
    return text


def report_presets(found: dict[str, Any]) -> str:
    rows = []
    for name, one in found.items():
        answered = f"a vector of {one['vector']}" if "vector" in one else "a chat" if one["chat"] else "no"
        drafted = f"{one['drafted']:.0f}" if one.get("drafted") else ""
        rows.append([name, answered, f"{one.get('kv_tokens', 0):,.0f}", drafted])
    return table(["", "answered", "KV tokens in 10 GiB", "tokens drafted"], rows)


@app.command()
def report(results: Path) -> None:
    """Write docs/benchmarks/gpu.md from measured results, predictions by the planner as it is now."""
    from lab.bench.pictures import draw  # noqa: PLC0415 - a GPU host has no matplotlib

    found = json.loads(results.read_text())
    machine = Machine.model_validate(found["machine"])
    versions = found["versions"]
    gpus = f"{len(machine.gpus)} × {machine.gpus[0].name}"
    parts = ", ".join(f"{name} at {one['when']} in {one['seconds']} s" for name, one in found["parts"].items())
    seconds = sum(one["seconds"] for one in found["parts"].values())
    link = f"{machine.links[0].kind}, {machine.links[0].gb_s:g} GB/s one way"
    text = f"""# On real GPUs

Written by `python -m lab.gpu report` from [gpu.json](gpu.json): shapes with random weights, so speeds are real and
answers are not. Replicas start as the launcher starts them.

- machine: {gpus} ({link}), {machine.cpu_cores} cores, driver {machine.driver}
- versions: {", ".join(f"{name} {value}" for name, value in versions.items())}
- parts (UTC): {parts}; together {seconds / 60:.0f} minutes

"""
    if "shapes" in found:
        note = PLANNER_NOTE.format(prompt=speed.PROMPT, answer=speed.ANSWER, most=2 * PER_GPU)
        text += f"## The planner\n\n{note}\n{report_shapes(found, machine)}\n"
    if "gateway" in found:
        text += f"## The gateway, {GATEWAY_SHAPE} shape\n\n"
        text += report_gateway(found["gateway"])
    if rows := found.get("quantized"):
        text += f"## 4-bit weights, {QUANTIZED_SHAPE} shape on one GPU\n\n" + table(
            ["", "weights GiB", "KV tokens", "tokens/s alone", "TTFT alone ms", "tokens/s, 64 at once"],
            [
                [name, f"{one['memory']['weights']:.2f}", f"{one['memory']['kv_tokens']:,.0f}",
                 f"{1000 / one['alone']['tpot_ms']:.0f}", f"{one['alone']['ttft_ms']:.1f}",
                 f"{one['full']['tokens_per_s']:,.0f}"]
                for name, one in rows.items() if "full" in one
            ],
        ) + "\n"  # fmt: skip
    if rows := found.get("presets"):
        text += (
            "## Presets\n\nAll at the same time, each with 10 GiB of KV cache, started by the launcher from its file; "
        )
        text += "the models have the right shape and format.\n\n" + report_presets(rows) + "\n"
    if failures := found.get("failures"):
        text += "## What is missing\n\n" + "".join(f"- {name}: {why}\n" for name, why in failures.items())
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(text.rstrip() + "\n")
    (REPORT.parent / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(REPORT.name)
    print(f"wrote {REPORT.relative_to(ROOT)}")


if __name__ == "__main__":
    app()
