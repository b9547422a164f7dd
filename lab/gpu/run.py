"""One run on a host with GPUs: its time and results, its replicas, and the processes that send load."""

import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lab.bench import workloads
from lab.bench.peers import Target
from lab.bench.workloads import Cell, Client, Sizes, Turn, Workload, user
from lab.gpu import engines
from lab.gpu.engines import MAX_LENGTH, PORT, Engine
from lab.sim.dns import Dns
from lab.sim.load import Outcome, SteadyLoad, session, stream
from planner import speed
from planner.machine import Machine
from stack.gateway import fleet_line

SENDERS = 6  # processes a GPU that send the load: reading every token's event costs more than one core
PER_GPU = speed.CONCURRENT
START = time.monotonic()


def say(text: str) -> None:
    """Says something, with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f}] {text}", flush=True)


def reference(rng: random.Random, _: random.Random, sizes: Sizes) -> Client:
    """The request that plans are compared by."""
    while True:
        yield [user(sizes.prompt(rng, speed.PROMPT))], sizes.answer(rng, speed.ANSWER)


def drive(urls: Sequence[str], model: str, workload: Workload, seed: int, clients: Iterable[int], seconds: float,
          sizes: Sizes) -> list[Outcome]:  # fmt: skip
    """A workload from the clients of these numbers, in a process of its own; the requests that ended."""
    return asyncio.run(workloads.drive(urls, model, workload, seed, clients, seconds, sizes))


def replay(urls: Sequence[str], model: str, turns: Sequence[Turn], start: float) -> list[Outcome]:
    """Some conversations of a trace, in a process of its own."""
    return asyncio.run(workloads.replay(urls, model, turns, start))


def steady(url: str, model: str, clients: int, seed: int, seconds: float) -> list[Outcome]:
    """Requests of the reference size until `seconds` are over, each brought to its end."""

    async def load() -> list[Outcome]:
        async with SteadyLoad(url, model, clients, speed.PROMPT, speed.ANSWER, 60.0, 1, seed=seed) as steady:
            await asyncio.sleep(seconds)
        return steady.outcomes

    return asyncio.run(load())


async def alone(url: str, model: str, count: int, answer: int, warm: int = 1) -> dict[str, float]:
    """`count` requests of the reference size, one after the other, and `warm` ahead of them that do not count: the
    milliseconds to the first token, and from one to the next."""
    asks = reference(random.Random(), random.Random(), Sizes())
    outcomes = []
    async with session() as connection:
        for _ in range(count + warm):
            messages, _tokens = next(asks)
            body = {"model": model, "messages": messages, "max_tokens": answer, "ignore_eos": True}
            outcomes.append(await stream(connection, url, body, 60))
    met = outcomes[warm:]
    gaps = [(one.last - one.first) / (one.tokens - 1) for one in met if one.first and one.last and one.tokens > 1]
    return {"ttft_ms": 1000 * median(one.ttft for one in met), "tpot_ms": 1000 * median(gaps)}


def strict(value: Any) -> Any:
    """The same in strict JSON: what there is no number for is null."""
    if isinstance(value, dict):
        return {key: strict(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cpu_seconds(processes: Iterable[int]) -> float:
    """What these processes have computed so far."""
    ticks = 0
    for pid in processes:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


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


@dataclass
class Load:
    """Where clients ask, the engines that answer them, and how many clients there are."""

    urls: Sequence[str]
    replicas: Sequence[Engine]
    clients: int


class Run:
    """One run of at most `seconds`: its folder, the results so far and the processes that send load."""

    def __init__(self, machine: Machine, out: Path, work: Path, seconds: float) -> None:
        self.machine, self.work, self.end = machine, work, time.monotonic() + seconds
        self.gpus = [gpu.index for gpu in machine.gpus]
        work.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "gpu.json"
        self.results: dict[str, Any] = {}
        engines.prepare()
        self.senders = SENDERS * len(self.gpus)
        self.pool = ProcessPoolExecutor(self.senders, mp_context=multiprocessing.get_context("spawn"))
        self.models = {shape: self.pool.submit(engines.write_model, work / "models", shape) for shape in engines.SHAPES}
        for _ in range(self.senders):
            self.pool.submit(time.sleep, 1)  # so that each process is there before anything is timed
        self.seed = random.randrange(10**9)
        net = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        self.hosts = (f"{net}.{number}" for number in range(10, 250))
        self.gateway_host = f"{net}.1"
        self.dns = Dns(self.gateway_host)
        self.started: list[Engine] = []

    def left(self) -> float:
        """Seconds until it has to be over."""
        return self.end - time.monotonic()

    def engine(self, shape: str, gpus: Sequence[int], *extra: str, **settings: str) -> Engine:
        """Starts a shape on these GPUs; `settings` are the launcher's, `extra` vLLM's arguments."""
        settings["MAX_MODEL_LEN"] = str(MAX_LENGTH)
        engine = Engine(next(self.hosts), gpus, self.models[shape].result(), self.work, settings, *extra)
        self.started.append(engine)
        return engine

    def ready(self, engine: Engine, within_s: float) -> None:
        """Returns when it answers; TimeoutError or RuntimeError where it does not."""
        engine.wait(max(1.0, min(within_s, self.left())))
        say(f"{engine.name} on GPUs {engine.gpus} ready {time.monotonic() - engine.started:.0f} s after its start")

    def stop(self) -> None:
        """Ends all engines that run."""
        for engine in self.started:
            engine.kill()
        for engine in self.started:
            engine.stop()
        self.started.clear()

    def keep(self, *path: str, value: Any) -> None:
        """Puts a result where it belongs and writes all of them."""
        at = self.results
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value = strict(value)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1, allow_nan=False) + "\n")
        partial.rename(self.path)
        say(f"{' '.join(path)}: {json.dumps(value)[:300]}")

    def part(self, name: str, needs_s: float, step: Callable[[], None]) -> None:
        """One part of the run. It is left out where less time is left than it needs; others go on when it fails."""
        if self.left() < needs_s:
            self.keep("failures", name, value="left out: the time was over")
            return
        try:
            step()
        except Exception as error:  # noqa: BLE001 - the run reports it and goes on
            traceback.print_exc()
            self.keep("failures", name, value=f"{type(error).__name__}: {error}"[:800])

    def fresh(self) -> None:
        """New prompts: those that were sent before are in the caches."""
        self.seed += 1

    def loads(self, targets: Sequence[Load], seconds: float, sizes: Sizes) -> list[Cell]:
        """Requests of the reference size, scaled, to all targets at the same time for `seconds`, after half of that to
        warm up; the clients of a target take its urls in turn."""
        senders = self.senders // len(targets)
        driving: list[list[Future[list[Outcome]]]] = [
            [
                self.pool.submit(drive, turned(one.urls, n), one.replicas[0].name, reference, self.seed,
                                 range(n, one.clients, senders), 1.5 * seconds, sizes)
                for n in range(senders)
            ]
            for one in targets
        ]  # fmt: skip
        time.sleep(seconds / 2)
        metrics = [[engine.url for engine in one.replicas] for one in targets]
        before = [workloads.counters(urls) for urls in metrics]
        time.sleep(max(0.0, before[0].at + seconds - 0.1 - time.monotonic()))
        after = [workloads.counters(urls) for urls in metrics]
        outcomes = [[outcome for one in jobs for outcome in one.result()] for jobs in driving]
        return [workloads.cell(*one) for one in zip(outcomes, before, after, strict=True)]

    def trace(self, url: str, replicas: Sequence[Engine], turns: Sequence[Turn]) -> Cell:
        """A trace to one url, with empty caches; what is due in its first third warms up."""
        for engine in replicas:
            engine.forget()
        start = time.monotonic() + 1
        parts = [[turn for turn in turns if turn.talk % self.senders == n] for n in range(self.senders)]
        jobs = [self.pool.submit(replay, [url], replicas[0].name, part, start) for part in parts if part]
        metrics = [engine.url for engine in replicas]
        time.sleep(start + turns[-1].due / 3 - time.monotonic())
        before = workloads.counters(metrics)
        outcomes = [outcome for job in jobs for outcome in job.result()]
        return workloads.cell(outcomes, before, workloads.counters(metrics))

    def steady(self, url: str, model: str, clients: int, seconds: float) -> list[Future[list[Outcome]]]:
        """Starts `clients` clients that ask until `seconds` are over, each request brought to its end."""
        share = math.ceil(clients / self.senders)
        return [self.pool.submit(steady, url, model, share, self.seed + n, seconds) for n in range(self.senders)]

    def close(self) -> None:
        """Ends what runs."""
        with contextlib.suppress(TimeoutError):
            self.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.dns.close()


def turned(urls: Sequence[str], by: int) -> list[str]:
    """The urls, beginning with another one."""
    at = by % len(urls)
    return [*urls[at:], *urls[:at]]
