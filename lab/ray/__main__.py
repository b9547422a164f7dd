"""What Ray does on two hosts of this machine: begin, a host lost, and whole again.

    python -m lab.ray                  all of it, in about 15 minutes on two cores; writes docs/benchmarks/ray.md
    python -m lab.ray --only serve     one part, printed only

`make ray` and `make up` have built the images. Exit 3 where the memory does not suffice.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from access.keys import KeyStore
from access.store import Secrets
from lab.ray.cluster import CHAT, FREE_GB, HEAD, PROJECT, WORKER, Cluster, Serves, cluster, free_gb, gateway_before
from lab.report import DOCS, provenance, table
from lab.sim.gateway import Gateway, nginx_version
from lab.waiting import until
from stack.shell import ROOT

HOST = "127.0.99.3"
CLIENTS = 4
LONGEST_S = 900
INTRO = """# Ray on two hosts

Written by `python -m lab.ray`. A host is a container with a network of its own, and counts two cores for Ray. The model
is SmolLM2-135M, on CPUs. Memory is what Docker counts for the container. [docs/ray.md](../ray.md) says what the parts
are.
"""
PARTS = {
    "serve": f"""## `serve`: a Serve replica on each host, the gateway before both

{CLIENTS} clients of the gateway ask all the time, 8 tokens each. The host without the head is killed, and started a
minute later, when they have stopped.
""",
    "replica": """## `replica`: one model over both hosts, tp = 3

A client asks for 300 tokens, and meanwhile the host without the head is lost.
""",
}

console = Console(highlight=False)
app = typer.Typer(add_completion=False)
Rows = list[list[str]]


def took(began: float) -> str:
    """Seconds since then."""
    return f"{time.monotonic() - began:.0f} s"


def memory(hosts: Cluster, service: str) -> str:
    """What a host's container takes."""
    container = hosts.compose("ps", "--quiet", service).stdout.strip()
    stats = ["docker", "stats", "--no-stream", "--format={{.MemUsage}}", container]
    return subprocess.run(stats, capture_output=True, text=True, check=True).stdout.partition("/")[0].strip()


class Clients:
    """Ask at the gateway until told to stop; keep when each request began and ended, and its status."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._headers = url, {"Authorization": f"Bearer {key}"}
        self._enough = threading.Event()
        self.found: list[tuple[float, float, int]] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with httpx.Client(timeout=300, headers=self._headers) as client:
            while not self._enough.is_set():
                began = time.monotonic()
                try:
                    status = client.post(f"{self._url}/v1/chat/completions", json=CHAT).status_code
                except httpx.HTTPError:
                    status = 0
                self.found.append((began, time.monotonic(), status))
                if status != httpx.codes.OK:
                    # a refusal is quick: no flood of them
                    self._enough.wait(0.2)

    def stop(self) -> None:
        """Returns when the last has its answer."""
        self._enough.set()
        for thread in self._threads:
            thread.join()


def loss(hosts: Cluster, gateway: Gateway, key: str) -> Rows:
    """A host killed under load, and back."""
    clients = Clients(gateway.url, key)
    try:
        until(lambda: len(clients.found) >= 5 * CLIENTS, "some are answered", LONGEST_S)
        killed = time.monotonic()
        hosts.compose("kill", "ray-worker")
        until(lambda: time.monotonic() - killed > 60, "a minute has passed", 70)
    finally:
        clients.stop()
    back = time.monotonic()
    hosts.compose("start", "ray-worker")
    until(hosts.whole, "the service is whole", LONGEST_S)
    rows = []
    for name, kept in (
        ("requests that ran when the host was killed", [it for it in clients.found if it[0] < killed <= it[1]]),
        ("requests of the minute after it", [it for it in clients.found if it[0] >= killed]),
    ):
        good = sum(status == httpx.codes.OK for *_, status in kept)
        slowest = max((ended - began for began, ended, _ in kept), default=0)
        rows.append([name, f"{good} of {len(kept)} answered, the slowest after {slowest:.1f} s"])
    return [*rows, ["from the host's start to a replica on each again", took(back)]]


def revoked(gateway: Gateway, keys: KeyStore, folder: Path) -> str:
    """How long a revoked key is still taken by one of the fronts."""
    urls = (f"http://{HEAD}:8000", f"http://{WORKER}:8000", gateway.url)
    key = keys.create("revoked")

    def said(status: int) -> bool:
        headers = {"Authorization": f"Bearer {key}"}
        return all(httpx.get(f"{url}/v1/models", headers=headers).status_code == status for url in urls)

    gateway.write_secret("keys.json", (folder / "gateway" / "keys.json").read_text())
    until(lambda: said(200), "the key is taken", 10)
    began = time.monotonic()
    keys.revoke("revoked")
    gateway.write_secret("keys.json", (folder / "gateway" / "keys.json").read_text())
    until(lambda: said(401), "the key is refused", 10)
    return f"{time.monotonic() - began:.1f} s"


def serve(folder: Path) -> Rows:
    """The rows of the part `serve`."""
    keys = KeyStore(Secrets(folder))
    admin = keys.create("lab", role="admin")
    began = time.monotonic()
    with cluster("serve", folder) as hosts:
        until(hosts.whole, "a replica stands on each host", LONGEST_S)
        rows = [["from nothing to a replica on each host", took(began)]]
        with gateway_before(folder, HOST, admin) as gateway:
            gateway.wait_ready(60)
            rows += [
                ["memory of the head's host, a replica on it", memory(hosts, "ray-head")],
                ["memory of the other host, a replica on it", memory(hosts, "ray-worker")],
                ["a revoked key is refused by Serve and by the gateway after", revoked(gateway, keys, folder)],
                *loss(hosts, gateway, admin),
            ]
    return rows


def lost(hosts: Cluster, what: str, lose: list[str], bring_back: list[str]) -> Rows:
    """A host lost while a request runs, by one command, and back by another."""
    ended: dict[str, str] = {}

    def ask() -> None:
        began = time.monotonic()
        status = hosts.answer(max_tokens=300, ignore_eos=True)
        ended[status or "cut"] = took(began)

    client = threading.Thread(target=ask)
    client.start()
    running = ["exec", "-T", "ray-head", "curl", "--silent", "http://127.0.0.1:8000/metrics"]
    until(
        lambda: re.search(r"^vllm:num_requests_running\{.*\} 1", hosts.compose(*running).stdout, re.MULTILINE),
        "the request runs",
        60,
    )
    gone, before = time.monotonic(), hosts.log().count("hosts have 1 GPUs")
    subprocess.run(lose, check=True, capture_output=True)
    client.join()
    noticed = took(gone)
    until(lambda: hosts.log().count("hosts have 1 GPUs") > before, "the head waits for the host", LONGEST_S)
    waits = took(gone)
    back = time.monotonic()
    subprocess.run(bring_back, check=True, capture_output=True)
    until(lambda: hosts.answer() == "200", "the model answers again", LONGEST_S)
    (status,) = ended
    return [
        [f"{what}: what runs ends with", f"{status} after {noticed}"],
        [f"{what}: the head has begun anew and waits after", waits],
        [f"{what}: from the host's return to an answer", took(back)],
    ]


def replica(folder: Path) -> Rows:
    """The rows of the part `replica`."""
    began = time.monotonic()
    with cluster("replica", folder) as hosts:
        until(lambda: hosts.answer() == "200", "the model over both hosts answers", LONGEST_S)
        rows = [["from nothing to an answer", took(began)]]
        container = hosts.compose("ps", "--quiet", "ray-worker").stdout.strip()
        network = f"{PROJECT}_default"
        rows += lost(hosts, "killed", ["docker", "kill", container], ["docker", "start", container])
        cut = ["docker", "network", "disconnect", network, container]
        mend = ["docker", "network", "connect", f"--ip={WORKER}", network, container]
        return rows + lost(hosts, "cable cut", cut, mend)


@app.command()
def main(only: Annotated[str, typer.Option(help="One part: serve or replica.")] = "") -> None:
    """Measures, prints, and writes the page when all parts were measured."""
    parts: dict[Serves, str] = {}
    both: list[tuple[Serves, Callable[[Path], Rows]]] = [("serve", serve), ("replica", replica)]
    for name, measure in both:
        if only in ("", name):
            if free_gb() < FREE_GB[name]:
                console.print(f"two hosts of Ray need {FREE_GB[name]} GB of memory, and {free_gb():.1f} are free")
                raise typer.Exit(3)
            with tempfile.TemporaryDirectory() as folder:
                parts[name] = table(["what", "measured"], measure(Path(folder) / "secrets"))
            console.print(parts[name])
    if not only:
        pins = (ROOT / "docker-compose.ray.yml").read_text()
        ray = re.findall(r"ray\[serve\]==\S+|vllm-fleet/replica:\S+", pins)
        body = "\n".join(f"{PARTS[name]}\n{text}" for name, text in parts.items())
        (DOCS / "ray.md").write_text(f"{INTRO}\n{provenance([nginx_version(), *ray])}\n{body}")
        console.print("written: docs/benchmarks/ray.md")


if __name__ == "__main__":
    app()
