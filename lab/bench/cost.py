"""What keys, limits and metering cost together: this gateway with all of them beside one with none.

All gateways run at once and take short turns, so that each meets the machine at the same moments. A difference is that
of neighbours in one round. The CPU time of the gateway's workers says the same as the highest rate, and other programs
of the machine hardly change it.
"""

import asyncio
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from lab.bench.instant import InstantReplicas
from lab.bench.overhead import cpus_text, held_rate, highest_rate, split_cpus
from lab.http import get
from lab.report import table
from lab.sim.gateway import Gateway
from lab.sim.keys import keyed
from stack.shell import ROOT

NEITHER, METERED, ALL = "none of them", "metering", "metering, a key, and all of its limits"
# usage.js, but for what a request goes through.
NO_METERING = b"""
import usage from './metering.js';
export default Object.assign({}, usage, { wanted: () => '', many: () => '', events: (r, bytes) => bytes, piece() {},
    used: () => null, record() {} });
"""
LIMITS = dict.fromkeys(
    ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "tokens_per_month", "parallel_requests",
     "prompt_tokens", "body_bytes", "max_tokens", "n"), 10**12,
)  # fmt: skip
SIZES = {"1 KB": 1_000, "10 KB": 10_000}
RATE = 400.0
PORT = 8089
CHUNKS = 100_000  # in one request

INTRO = """# What keys, limits and metering cost

Written by `make bench ARGS='--parts cost'`. Two replicas that answer at once, the gateway on a core of its own, chats
of 1 and 10 KB. The highest rate is wrk's with 16 connections, CPU time that of the gateway's workers for a request
at that rate, the latency that at {rate:.0f} requests/s, from when a request was due to its whole answer. All three
gateways run at once and take turns of {seconds:g} s, {rounds} rounds. Each figure is the median of its rounds. In
brackets: the median of the differences to the first row in the same round, and the least and the most of them.

The aim: all together take at most a tenth of the highest rate, add less than 0.3 ms at the median, and take less than
2 µs for a chunk of a stream.
"""


@dataclass
class Cost:
    """One gateway at one size of body: requests a second, the workers' microseconds for each, and milliseconds to the
    whole answer at the held rate; a value a round. `failed` requests in all."""

    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    failed: int = 0


def cpu_seconds(pids: Sequence[int]) -> float:
    """Seconds that these processes have run on a CPU."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) / 1e9


def measure(rounds: int, seconds: float, seed: int, tell: Callable[[str], None]) -> dict[str, dict[str, Cost]]:
    """Each gateway at each size, `rounds` times `seconds`."""
    load, proxy = split_cpus()
    os.sched_setaffinity(0, load)
    keys, keyed_files = keyed({"load": {"limits": LIMITS}, "lab": {"role": "admin"}})
    metering = (ROOT / "nginx" / "njs" / "usage.js").read_bytes()
    files: Mapping[str, Mapping[str, bytes]] = {
        NEITHER: {"njs/usage.js": NO_METERING, "njs/metering.js": metering}, METERED: {}, ALL: keyed_files,
    }  # fmt: skip
    names = list(files)
    found = {name: {size: Cost() for size in SIZES} for name in names}
    gateways = {}
    with ExitStack() as stack:
        for name in names:
            fleet = stack.enter_context(InstantReplicas(2, cpus_text(load)))
            gateway = Gateway(fleet, files=files[name], cpus=proxy, key=keys["lab"] if name == ALL else "")
            gateways[name] = stack.enter_context(gateway)
            gateway.wait_ready()
        for turn in range(rounds):
            for label, size in SIZES.items():
                tell(f"round {turn + 1} of {rounds}: {label}")
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    key = keys["load"] if name == ALL else ""
                    one_turn(found[name][label], gateways[name], size, seconds, seed + turn, key)
    return found


def one_turn(cost: Cost, gateway: Gateway, size: int, seconds: float, seed: int, key: str) -> None:
    """Adds one turn of this gateway to its costs."""
    workers = gateway.workers()
    before = cpu_seconds(workers)
    rate, total, failed = highest_rate(gateway.url, size, seconds, seed, key)
    cost.rates.append(rate)
    cost.cpu_us.append(1e6 * (cpu_seconds(workers) - before) / total)
    gc.disable()
    took = asyncio.run(held_rate(gateway.url, size, RATE, seconds, seed, key))
    gc.enable()
    cost.p50_ms.append(median(took))
    cost.failed += failed + took.count(float("inf"))


def chunk_us(rounds: int = 10) -> float:
    """Microseconds of a worker's CPU that metering one chunk of a stream takes, the least of some rounds."""
    load, proxy = split_cpus()
    with InstantReplicas(1, cpus_text(load)) as fleet:
        where = f"listen {fleet.gateway_host}:{PORT}; location / {{ js_content cost.meter; }}"
        server = f"js_import cost from cost.js; server {{ {where} }}"
        script = Path(__file__).with_name("cost.js").read_bytes()
        files = {"fleet/cost.conf": server.encode(), "njs/cost.js": script}
        with Gateway(fleet, files=files, cpus=proxy) as gateway:
            workers = gateway.workers()

            def one() -> float:
                before = cpu_seconds(workers)
                get(f"http://{fleet.gateway_host}:{PORT}/?{CHUNKS}", timeout=60)
                return cpu_seconds(workers) - before

            return min(one() for _ in range(rounds)) * 1e6 / CHUNKS


def report(found: Mapping[str, Mapping[str, Cost]], chunk: float) -> str:
    """A table for each size, and what all together cost."""
    parts, sums = [], []
    for label in SIZES:
        base = found[NEITHER][label]
        rows = []
        for name, costs in found.items():
            cost = costs[label]
            cells = [f"{median(cost.rates):,.0f}", f"{median(cost.cpu_us):.0f}", f"{median(cost.p50_ms):.2f}"]
            if name != NEITHER:
                less = between([one / other - 1 for one, other in zip(cost.rates, base.rates, strict=True)], "+.1%")
                cpu = between([one / other - 1 for one, other in zip(cost.cpu_us, base.cpu_us, strict=True)], "+.1%")
                more = between([one - other for one, other in zip(cost.p50_ms, base.p50_ms, strict=True)], "+.2f")
                cells = [f"{cell} ({change})" for cell, change in zip(cells, (less, cpu, more), strict=True)]
            rows.append([name, *cells, str(cost.failed)])
        heads = ["", "requests/s", "CPU µs a request", "p50 ms", "failed"]
        parts.append(f"## Chats of {label}\n\n{table(heads, rows)}")
        every = found[ALL][label]
        share = 1 - median(one / other for one, other in zip(every.rates, base.rates, strict=True))
        added = median(one - other for one, other in zip(every.p50_ms, base.p50_ms, strict=True))
        sums.append(
            f"At {label} all together take {share:.1%} of the highest rate and add {added:.2f} ms at the median."
        )
    sums.append(f"Metering one chunk of a stream takes {chunk:.2f} µs of a worker's time.")
    return "\n".join(parts) + "\n" + "\n".join(sums) + "\n"


def between(changes: Sequence[float], form: str) -> str:
    """The median, the least and the most of some changes."""
    middle, least, most = (format(value, form) for value in (median(changes), min(changes), max(changes)))
    return f"{middle}; {least} to {most}"
