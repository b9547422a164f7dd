"""What a gateway itself costs: the highest rate through it, and the latency it adds at a rate that is held."""

import asyncio
import gc
import math
import os
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from lab.bench.instant import InstantReplicas
from lab.bench.peers import Start, Target
from lab.sim.gateway import Gateway
from lab.sim.load import session, text

SIZES = {"1 KB": 1_000, "10 KB": 10_000, "100 KB": 100_000}
CONNECTIONS = 16
SCRIPT = Path(__file__).with_name("post.lua")


@dataclass
class Cost:
    """One peer at one body size: requests a second, and milliseconds at the held rate; a value a round."""

    rates: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    errors: int = 0


def highest_rate(url: str, size: int, seconds: float, seed: int, key: str = "") -> tuple[float, int, int]:
    """Requests a second of wrk with 16 connections, requests in all, and how many were not answered with 2xx."""
    env = {**os.environ, "BODY_BYTES": str(size), "SEED": str(seed), "KEY": key}
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "-s", str(SCRIPT), f"{url}/v1/chat/completions"]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    wrong = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    lost = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", out)
    errors = int(wrong[1]) if wrong else 0
    errors += sum(map(int, lost.groups())) if lost else 0
    total = re.search(r"(\d+) requests in", out)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", out)
    assert total
    assert rate
    return float(rate[1]), int(total[1]), errors


async def held_rate(url: str, size: int, rate: float, seconds: float, seed: int, key: str = "") -> list[float]:
    """Milliseconds from when each request was due to its whole answer, at `rate` requests a second; inf: an error."""
    rng = random.Random(seed)
    head = '{"model":"sim","messages":[{"role":"user","content":"'
    fill = text(rng, size // 4)
    took: list[float] = []
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    async def one(client: aiohttp.ClientSession, number: int, due: float) -> None:
        own = f"{number} {rng.random()} "
        body = head + own + fill[len(own) + len(head) + 20 :] + '"}],"max_tokens":1}'
        async with client.post(url + "/v1/chat/completions", data=body, headers=headers) as answer:
            await answer.read()
        took.append((time.perf_counter() - due) * 1000 if answer.ok else math.inf)

    async with session() as client:
        # The first second opens the connections and is not counted.
        warm, count = int(rate), int(rate * seconds)
        start = time.perf_counter()
        tasks: list[asyncio.Task[None]] = []
        for number in range(warm + count):
            due = start + number / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(client, number, due)))
        await asyncio.gather(*tasks)
    return took[warm:]


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def measure(
    peers: Mapping[str, Start], rounds: int, seconds: float, seed: int, tell: Callable[[str], None]
) -> dict[str, dict[str, Cost]]:
    """All `peers` at all sizes, `rounds` times, so that each meets the machine at several moments."""
    found: dict[str, dict[str, Cost]] = {name: {size: Cost() for size in SIZES} for name in peers}
    load, proxy = split_cpus()
    os.sched_setaffinity(0, load)
    with InstantReplicas(2, cpus_text(load)) as fleet:
        target = Target([sim.url for sim in fleet], fleet.model, proxy, fleet)
        for turn in range(rounds):
            for name, start in peers.items():
                # One worker of it answers some forty requests a second: once is enough, and its rate must be held low.
                slow = name == "LiteLLM"
                if slow and turn:
                    continue
                with start(target) as url:
                    for label, size in SIZES.items():
                        tell(f"round {turn + 1} of {rounds}: {name}, {label}")
                        cost = found[name][label]
                        rate, _, errors = highest_rate(url, size, seconds, seed + turn)
                        cost.rates.append(rate)
                        cost.errors += errors
                        gc.disable()
                        took = asyncio.run(held_rate(url, size, held(name), seconds, seed + turn))
                        gc.enable()
                        cost.errors += took.count(math.inf)
                        cost.p50_ms.append(statistics.median(took))
                        cost.p99_ms.append(quantile(took, 0.99))
    return found


def held(name: str) -> float:
    """The held rate of a peer, in requests a second."""
    return 10.0 if name == "LiteLLM" else 400.0


def split_cpus() -> tuple[set[int], str]:
    """The CPUs of load and replicas, and that of the gateway: the first of this process's own."""
    cpus = sorted(os.sched_getaffinity(0))
    return set(cpus[1:] or cpus), str(cpus[0])


def cpus_text(cpus: set[int]) -> str:
    """CPUs as taskset and Docker take them: "0,2"."""
    return ",".join(map(str, sorted(cpus)))


@dataclass
class Sample:
    """The memory of all of the gateway's workers after so many requests, in MiB."""

    requests: int
    private: float
    shared: float


def memory(requests: int, seed: int, tell: Callable[[str], None]) -> list[Sample]:
    """The gateway's memory over `requests` requests of 1 KB, none like another, in some twenty samples."""
    load, proxy = split_cpus()
    os.sched_setaffinity(0, load)
    samples: list[Sample] = []
    with InstantReplicas(2, cpus_text(load)) as fleet:
        target = Target([sim.url for sim in fleet], fleet.model, proxy, fleet)
        assert target.fleet
        with Gateway(target.fleet, cpus=proxy) as gateway:
            gateway.wait_ready()
            done, turn = 0, 0
            samples.append(Sample(0, *resident(gateway.workers())))
            rate, total, errors = highest_rate(gateway.url, 1_000, 1, seed)
            done += total
            piece = max(1.0, requests / rate / 20)
            while done < requests:
                turn += 1
                _, total, wrong = highest_rate(gateway.url, 1_000, piece, seed + turn)
                done += total
                errors += wrong
                samples.append(Sample(done, *resident(gateway.workers())))
                tell(f"{done} requests, {samples[-1].private:.1f} MiB private, {errors} errors")
    if errors:
        raise RuntimeError(f"{errors} of {done} requests failed")
    return samples


def resident(pids: list[int]) -> tuple[float, float]:
    """MiB resident in all processes together: private, and shared (counted once)."""
    private, shared = 0.0, 0.0
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        found = {name: int(value) / 1024 for name, value in re.findall(r"(Rss\w+):\s+(\d+) kB", status)}
        private += found["RssAnon"]
        shared = max(shared, found["RssShmem"])
    return private, shared
