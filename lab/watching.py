"""What watching costs: how many series there are, and how much of a core each look at them takes.

    PYTHONPATH=.:scripts .venv/bin/python -m lab.watching    # beside the running stack

The gateway is the real one, over simulated replicas, after a load that touches every label. A replica's metrics are
those of the real engine in the running stack; tests/recorded/replica.prom keeps them. Writes its figures to
docs/benchmarks/watching.md; tests/gateway/test_watching.py holds the series against BUDGET.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from access.keys import KeyStore
from access.store import Secrets
from lab.http import get
from lab.report import DOCS, provenance, table
from lab.sim.gateway import Gateway, nginx_version
from lab.sim.replicas import Replicas
from lab.stack import Stack, run
from lab.waiting import until
from stack.prometheus import Prometheus
from stack.shell import ROOT

RECORDED = ROOT / "tests" / "recorded" / "replica.prom"
REPLICAS, KEYS, MODELS = 8, 100, ("model-a", "model-b", "model-c")
# Series that a part may have, with room for some more metrics: one replica, the gateway, and all of the fleet above.
BUDGET = {"replica": 1100, "gateway": 4500, "fleet": 13_300}
# Simulated replicas that take no time worth waiting for, and have a prefix cache.
SHAPE = ("--step-ms", "1", "--prefill-ms", "0.001")
# Answers of a replica that a client sees as they are.
STATUSES = (400, 404, 413, 422, 429)
AGAIN = "a prompt that comes again " * 200
SCRAPES = 200
SCRAPE_INTERVAL_S, LOOK_INTERVAL_S = 5, 1
IDLE_S = 10
INTRO = """# What watching costs

Written by `python -m lab.watching`. A series is one line that Prometheus keeps. The gateway stands before {replicas}
simulated replicas with {models} models, after a load by {keys} keys that reaches every replica, with every way to
choose one and every status. A replica's metrics are those of the real engine in the running stack, after requests to
each of its APIs. `tests/gateway/test_watching.py` holds the budget.
"""
GROWTH = """A replica's series grow with the paths that it was asked at and the statuses that it gave, the gateway's
with the keys, and with the end users that they name. The largest of the gateway, and of a replica:
"""
COST = """
## What a look takes

Time of the processor for one look, the mean of {scrapes}, less what the process took without it. Prometheus reads every
part each {scrape} s. The gateway itself looks at each replica each {look} s, at its metrics and its health.
"""


@dataclass(frozen=True)
class Look:
    """A kind of look: its name, how often it comes (s), and the processor's milliseconds for one."""

    name: str
    every_s: float
    cpu_ms: float

    @property
    def share(self) -> float:
        """Of a core."""
        return self.cpu_ms / 1000 / self.every_s


def by_metric(exposition: str) -> Counter[str]:
    """How many series each metric of an exposition has; a histogram's parts count as its own."""
    names = (re.match(r"[\w:]+", line) for line in exposition.splitlines() if line and not line.startswith("#"))
    return Counter(re.sub(r"_(bucket|sum|count)$", "", name[0]) for name in names if name)


@contextlib.contextmanager
def busy_gateway() -> Iterator[Gateway]:
    """A gateway whose metrics have every label that this fleet's requests can give them."""
    with tempfile.TemporaryDirectory() as folder:
        store = KeyStore(Secrets(Path(folder)))
        admin = store.create("admin", role="admin")
        keys = {name: store.create(name) for name in (f"key-{number}" for number in range(KEYS))}
        files = {"secrets/keys.json": Secrets(Path(folder)).keys.read_bytes()}
    fleet = Replicas(REPLICAS, *SHAPE, model=MODELS[0])
    groups: dict[str, list[str]] = {model: [] for model in MODELS}
    for number, sim in enumerate(fleet.all):
        model = MODELS[number % len(MODELS)]
        sim.args[sim.args.index("--model") + 1] = model
        groups[model].append(sim.name)
    with fleet, Gateway(fleet, files=files, key=admin) as gateway:
        gateway.wait_ready()
        turns = max(map(len, groups.values()))
        for turn in range(turns):
            # one replica of each model is left, so it is known where a request goes
            open_now = {names[turn % len(names)] for names in groups.values()}
            for sim in fleet:
                gateway.admin("DELETE" if sim.name in open_now else "PUT", f"/replicas/{sim.name}/drain")
            wanted = {sim.name: "ready" if sim.name in open_now else "draining" for sim in fleet}
            gateway.wait_states(wanted)
            touch(gateway, fleet, keys)
        for sim in fleet:
            gateway.admin("DELETE", f"/replicas/{sim.name}/drain")
        gateway.wait_ready()
        yield gateway


def touch(gateway: Gateway, fleet: Replicas, keys: Mapping[str, str]) -> None:
    """A request of each key for each model; of one key also with each way to be routed and each status."""
    with httpx.Client(base_url=gateway.url, timeout=60) as client, ThreadPoolExecutor(8) as pool:

        def ask(key: str, model: str, text: str, **headers: str) -> int:
            body = {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": text}]}
            sent = {"Authorization": f"Bearer {key}", **headers}
            return client.post("/v1/chat/completions", json=body, headers=sent).status_code

        # twice, so that the second one has cached tokens
        all_of_them = [(key, model, AGAIN) for key in keys.values() for model in MODELS] * 2
        statuses = list(pool.map(lambda one: ask(*one), all_of_them))
        if set(statuses) != {200}:
            raise RuntimeError(f"the load was refused: {Counter(statuses)}")
        first = next(iter(keys.values()))
        for status in (200, *STATUSES):
            for sim in fleet:
                sim.fault("status" if status != 200 else None, status=status)
            for model in MODELS:
                for text in (secrets.token_hex(8), AGAIN, AGAIN):
                    ask(first, model, text)
                for _ in range(2):
                    ask(first, model, secrets.token_hex(8), **{"X-Session-Id": f"session of {model}"})
        for sim in fleet:
            sim.fault()


def cpu_s(processes: list[psutil.Process]) -> float:
    """Seconds that these processes and their children have computed."""
    total = 0.0
    for process in processes:
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                total += times.user + times.system
    return total


def cost(
    look: Callable[[], object], processes: list[psutil.Process], looks: int = SCRAPES, idle_s: float = IDLE_S
) -> float:
    """Milliseconds of the processor that these processes take for each of `looks` looks; `look` makes them all.

    What they take without any is measured over `idle_s` seconds before, and taken off.
    """

    def taken(work: Callable[[], object]) -> tuple[float, float]:
        before, began = cpu_s(processes), time.monotonic()
        work()
        return cpu_s(processes) - before, time.monotonic() - began

    idle, rested_s = taken(lambda: time.sleep(idle_s))
    busy, busy_s = taken(look)
    return max(0.0, busy - idle / rested_s * busy_s) / looks * 1000


def container_process(stack: Stack, service: str) -> list[psutil.Process]:
    """The first process of a service's container."""
    ident = stack.compose("ps", "--quiet", service).strip()
    return [psutil.Process(int(run("docker", "inspect", "--format", "{{.State.Pid}}", ident)))]


def from_gateway(stack: Stack, url: str, times: int) -> None:
    """Asks for an address of the fleet's network so many times, over one connection as Prometheus does."""
    asked = f'for i in $(seq {times}); do echo "url={url}"; echo output=/dev/null; done | curl --silent --fail -K -'
    stack.compose("exec", "-T", "gateway", "sh", "-c", asked)


def record(stack: Stack, replica: str) -> str:
    """A replica's metrics after requests of every kind, written to RECORDED without their help texts."""
    base = {"model": stack.model, "max_tokens": 2}
    messages = {**base, "messages": [{"role": "user", "content": "Where is Paris?"}]}
    kinds: list[tuple[str, dict[str, object]]] = [
        ("/v1/chat/completions", messages),
        ("/v1/chat/completions", {**messages, "stream": True}),
        ("/v1/chat/completions", {**messages, "temperature": -1}),
        ("/v1/completions", {**base, "prompt": "Paris"}),
        ("/v1/responses", {"model": stack.model, "max_output_tokens": 16, "input": "Where is Paris?"}),
        ("/v1/messages", messages),
        ("/tokenize", {"model": stack.model, "prompt": "Paris"}),
        ("/v1/embeddings", {"model": stack.model, "input": "Paris"}),
    ]
    for _ in range(len(stack.replicas())):
        for path, body in kinds:
            httpx.post(f"{stack.url}{path}", json=body, timeout=120)
    curl = ("curl", "--silent", "--fail", f"http://{replica}:9464/metrics")
    text = stack.compose("exec", "-T", "gateway", *curl)
    kept = "".join(line + "\n" for line in text.splitlines() if not line.startswith("# HELP"))
    RECORDED.parent.mkdir(parents=True, exist_ok=True)
    RECORDED.write_text(kept)
    return kept


def series_table(gateway: str, replica: str) -> str:
    """Series of each part and of the fleet, beside what they may be."""
    own, one = by_metric(gateway).total(), by_metric(replica).total()
    rows = [
        ["one replica", f"{one:,}", f"{BUDGET['replica']:,}"],
        [f"the gateway, {REPLICAS} replicas, {KEYS} keys, {len(MODELS)} models", f"{own:,}", f"{BUDGET['gateway']:,}"],
        [f"the fleet: the gateway and {REPLICAS} replicas", f"{own + REPLICAS * one:,}", f"{BUDGET['fleet']:,}"],
    ]
    parts = ["## Series\n", table(["", "series", "budget"], rows), GROWTH]
    for text in (gateway, replica):
        largest = [[name, f"{count:,}"] for name, count in by_metric(text).most_common(5)]
        parts.append(table(["metric", "series"], largest))
    return "\n".join(parts)


def measure(stack: Stack) -> tuple[str, list[Look], str]:
    """The gateway's metrics, what each look takes, and what Prometheus itself takes, in words."""
    replica = next(iter(stack.replicas()))
    process = container_process(stack, replica)
    looks = []
    for name, port, path, every in (
        ("Prometheus at a replica", 9464, "/metrics", SCRAPE_INTERVAL_S),
        ("the gateway at a replica: metrics", 8000, "/metrics", LOOK_INTERVAL_S),
        ("the gateway at a replica: health", 8000, "/health", LOOK_INTERVAL_S),
    ):
        url = f"http://{replica}:{port}{path}"
        looks.append(Look(name, every, cost(lambda url=url: from_gateway(stack, url, SCRAPES), process)))  # type: ignore[misc]
    with busy_gateway() as gateway:
        until(lambda: b"gateway_tokens_total{" in get(f"{gateway.metrics_url}/metrics"), "all is counted")
        text = get(f"{gateway.metrics_url}/metrics").decode()
        workers = [psutil.Process(pid) for pid in gateway.workers()]

        def scrape() -> None:
            with httpx.Client() as client:
                for _ in range(SCRAPES):
                    client.get(f"{gateway.metrics_url}/metrics")

        looks.append(Look("Prometheus at the gateway", SCRAPE_INTERVAL_S, cost(scrape, workers)))
    return text, looks, prometheus_itself(stack)


def prometheus_itself(stack: Stack) -> str:
    """What the stack's own Prometheus takes and keeps, in a sentence."""
    asked = Prometheus(stack.prometheus_url, timeout_s=10)

    def number(query: str) -> float:
        return sum(value for _, value in asked.vector(query))

    cores = number('rate(process_cpu_seconds_total{job="prometheus"}[5m])')
    memory = number('process_resident_memory_bytes{job="prometheus"}') / 2**20
    series = number("prometheus_tsdb_head_series")
    return (
        f"The running stack's Prometheus, with {len(stack.replicas())} replicas: {series:,.0f} series in memory,"
        f" {memory:.0f} MiB, {cores:.2%} of a core over five minutes.\n"
    )


def looks_table(looks: list[Look]) -> str:
    """What each look takes, and all looks at a replica together."""
    rows = [[one.name, f"{one.cpu_ms:.1f} ms", f"{one.every_s:g} s", f"{one.share:.2%}"] for one in looks]
    at_replica = sum(one.share for one in looks if "at a replica" in one.name)
    return table(
        ["", "one look", "every", "of a core"], [*rows, ["all looks at a replica", "", "", f"{at_replica:.2%}"]]
    )


def main() -> None:
    """Measures, and writes the page."""
    stack = Stack.find()
    recorded = record(stack, next(iter(stack.replicas())))
    text, looks, itself = measure(stack)
    intro = INTRO.format(replicas=REPLICAS, models=len(MODELS), keys=KEYS)
    costs = COST.format(scrapes=SCRAPES, scrape=SCRAPE_INTERVAL_S, look=LOOK_INTERVAL_S)
    versions = [nginx_version(), f"model {stack.model}"]
    parts = [intro, provenance(versions), series_table(text, recorded), costs, looks_table(looks), itself]
    (DOCS / "watching.md").write_text("\n".join(parts).replace("\n\n\n", "\n\n"))
    print(json.dumps({"series": by_metric(text).total(), "looks": {one.name: one.share for one in looks}}))


if __name__ == "__main__":
    main()
