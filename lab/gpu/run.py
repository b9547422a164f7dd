"""One run on a host with GPUs: its folder and results, its replicas, and the processes that send load."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from lab.bench import workloads
from lab.bench.peers import Target
from lab.bench.workloads import Client, Sizes, Workload, user
from lab.gpu import engines
from lab.gpu.engines import MAX_LENGTH, PORT, SHAPES, Engine
from lab.sim.dns import Dns
from lab.sim.load import Outcome, SteadyLoad, session, stream
from planner import speed
from stack.gateway import fleet_line

PROCESSES = 12  # that send the load: reading every token's event costs more than one core
PER_GPU = speed.CONCURRENT
START = time.monotonic()


def say(text: str) -> None:
    """Says something, with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f}] {text}", flush=True)


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
    """A workload from the clients of these numbers, in a process of its own; the requests that ended."""
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


class Fleet:
    """Engines as `Gateway` asks for them."""

    def __init__(self, every: Sequence[Engine], dns: Dns, gateway_host: str) -> None:
        self.every, self.dns, self.gateway_host, self.model = list(every), dns, gateway_host, every[0].name
        self.urls = [engine.url for engine in every]
        dns.names.update({f"vllm-{n}": engine.host for n, engine in enumerate(every)})

    def upstreams(self, names: Sequence[str] | None = None) -> str:
        """The fleet file: one line an engine, for all or those of `names`."""
        return "".join(fleet_line(name, PORT) + "\n" for name in names or [f"vllm-{n}" for n in range(len(self.every))])

    def target(self) -> Target:
        """The fleet as peers take it, on all CPUs."""
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
        """Starts a model on these GPUs; `settings` are the launcher's, `extra` vLLM's arguments."""
        path = self.work / "models" / model
        if not (path / "tokenizer_config.json").exists():
            engines.write_model(self.work / "models", model)
        if model in SHAPES:
            settings["MAX_MODEL_LEN"] = str(MAX_LENGTH)
        return Engine(next(self.hosts), gpus, path, self.work, settings, *extra)

    def ready(self, *every: Engine) -> None:
        """Returns when all of them answer."""
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
