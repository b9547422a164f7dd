"""What a further replica costs the gateway: its workers' time for a request and for the looks, with up to 256."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

from lab.bench.instant import InstantReplicas
from lab.bench.overhead import cpus_text
from lab.sim.gateway import Gateway
from lab.sim.load import session
from stack.gateway import fleet_line

COUNTS = (2, 64, 256)
CLIENTS, REQUESTS = 16, 3200
IDLE_S = 5.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
READY_S = 60.0


@dataclass
class Growth:
    """With so many replicas and gateways: a worker's milliseconds for a request, and its share of a core when idle."""

    replicas: int
    gateways: int
    request_ms: float
    idle: float


def cpu(gateway: Gateway) -> float:
    """Seconds of CPU that all workers have used."""
    used = 0.0
    for pid in gateway.workers():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) * TICK_S
    return used


async def ask(url: str) -> None:
    """Sends REQUESTS chats of 1 KB, none like another."""

    async def client(number: int) -> None:
        for n in range(REQUESTS // CLIENTS):
            content = f"{number} {n} " + "x" * 900
            body = {"model": "sim", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
            async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()

    async with session() as http:
        await asyncio.gather(*map(client, range(CLIENTS)))


def measure(replicas: int, gateways: int) -> Growth:
    """One row. All replicas are one Nginx that answers at once."""
    with InstantReplicas(1, cpus_text(os.sched_getaffinity(0))) as fleet:
        names = [f"vllm-{number}" for number in range(replicas)]
        fleet.dns.names |= dict.fromkeys(names, fleet.all[0].host)
        lines = "".join(fleet_line(name, fleet.port) + "\n" for name in names)
        with Gateway(fleet, lines, {"GATEWAYS": str(gateways)}) as gateway:
            gateway.wait_ready(READY_S)
            asyncio.run(ask(gateway.url))  # opens the connections
            start, began = cpu(gateway), time.monotonic()
            time.sleep(IDLE_S)
            idle = (cpu(gateway) - start) / (time.monotonic() - began)
            start, began = cpu(gateway), time.monotonic()
            asyncio.run(ask(gateway.url))
            used = cpu(gateway) - start - idle * (time.monotonic() - began)
    return Growth(replicas, gateways, used / REQUESTS * 1000, idle)


def rows() -> list[list[str]]:
    """A table's rows: replicas, and for one gateway and for two the time a request; the share of a core when idle."""
    found = []
    for count in COUNTS:
        one, two = measure(count, 1), measure(count, 2)
        found.append([str(count), f"{one.request_ms:.2f} ms", f"{two.request_ms:.2f} ms", f"{one.idle:.1%}"])
    return found
