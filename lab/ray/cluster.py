"""A Ray cluster of two hosts for tests and measurements, with what it serves: `serve` or `replica` (docs/ray.md).

vLLM's platform for CPUs knows one host; cpu_hosts/ is one for several. All else is what runs on GPUs: the same nodes,
looks, executor and launcher.
"""

import csv
import json
import os
import secrets as random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from lab.http import answers, get
from lab.sim.dns import Dns
from lab.sim.gateway import Gateway
from models.served import PACKAGED
from ray_front import fleet_file, key_file
from stack.shell import ROOT

HEAD, WORKER = "172.31.77.2", "172.31.77.3"
PROJECT = "vllm-fleet-lab-ray"
HERE = Path(__file__).parent
CHAT = {"model": PACKAGED, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
# Serve with a replica on each host, or one model over both.
FREE_GB = {"serve": 10, "replica": 8}

Serves = Literal["serve", "replica"]


@dataclass
class Cluster:
    """Both hosts, begun."""

    files: list[str]
    env: dict[str, str] = field(repr=False)

    def compose(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`docker compose` for them."""
        command = ["docker", "compose", f"--project-name={PROJECT}", "--env-file=/dev/null", *self.files, *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=300)

    def standing(self) -> int:
        """How many Serve replicas the head's proxy has that can answer."""
        try:
            text = get(f"http://{HEAD}:8404/stats;csv").decode()
        except OSError:
            return 0
        rows = csv.DictReader(text.lstrip("# ").splitlines())
        mine = [row for row in rows if row["pxname"] == "http-vllm" and row["svname"].startswith("SERVE_REPLICA")]
        return sum(row["status"].startswith("UP") for row in mine)

    def whole(self) -> bool:
        """Whether a replica stands for each host, and each host lets clients in."""
        return self.standing() == 2 and all(healthy(host) for host in (HEAD, WORKER))

    def answer(self, **changes: object) -> str:
        """The status of a chat with `replica`, from the head's own host; '' where it does not answer."""
        # A look into the container takes time from what loads there; from elsewhere the port only refuses.
        if not answers(f"http://{HEAD}:8000/health"):
            return ""
        curl = ["curl", "--silent", "--max-time", "120", "--output", "/dev/null", "--write-out", "%{http_code}"]
        body = ["--header", "Content-Type: application/json", "--data", json.dumps({**CHAT, **changes})]
        asked = self.compose("exec", "-T", "ray-head", *curl, *body, "http://127.0.0.1:8000/v1/chat/completions")
        return asked.stdout.strip() if asked.returncode == 0 else ""

    def log(self) -> str:
        """What the head said."""
        return self.compose("logs", "ray-head").stdout


def free_gb() -> float:
    """The memory that is free, in GiB."""
    return psutil.virtual_memory().available / 2**30


def healthy(host: str) -> bool:
    """Whether Serve on this host has a replica that can answer."""
    try:
        get(f"http://{host}:8000/health")
    except OSError:
        return False
    return True


@contextmanager
def cluster(serves: Serves, secrets: Path) -> Iterator[Cluster]:
    """Both hosts, as long as the context lasts; they may still load. `secrets`: a folder laid out as secrets/ is, which
    also gets the cluster's secret."""
    for name in ("ray", "gateway", "tokens"):
        (secrets / name).mkdir(parents=True, exist_ok=True)
    (secrets / "ray" / "token").write_text(random.token_hex(32))
    models = (ROOT / "models" / PACKAGED).resolve().parents[1]
    env = {name: os.environ[name] for name in ("PATH", "HOME")}
    env |= {"LAB_MODELS": str(models), "LAB_SECRETS": str(secrets), "KV_CACHE_GB": "0.3", "RAY_SERVES": serves}
    env |= {"SERVE_MIN_REPLICAS": "2", "SERVE_MAX_REPLICAS": "2"} if serves == "serve" else {}
    names = ["docker-compose.ray.yml", "lab/ray/hosts.yml", *(["lab/ray/gpus.yml"] if serves == "replica" else [])]
    made = Cluster([f"--file={name}" for name in names], env)
    try:
        up = made.compose("up", "--detach")
        assert up.returncode == 0, up.stderr
        yield made
    finally:
        made.compose("down", "--volumes", "--timeout=3")


@dataclass
class Fronts:
    """Serve on both hosts, as a gateway of the lab sees it."""

    gateway_host: str
    dns: Dns

    def upstreams(self, _names: object = None) -> str:
        """The fleet file that `make ray-front` writes."""
        return fleet_file([HEAD, WORKER], self.gateway_host, "/etc/nginx/secrets/ray.conf")


@contextmanager
def gateway_before(secrets: Path, host: str, key: str) -> Iterator[Gateway]:
    """The gateway before both hosts, at an address of loopback. It has copies of the keys in `secrets`; `key` is an
    admin's."""
    dns = Dns(host)
    files = {f"secrets/{path.name}": path.read_bytes() for path in (secrets / "gateway").glob("*.json")}
    files["secrets/ray.conf"] = key_file((secrets / "ray" / "token").read_text()).encode()
    try:
        with Gateway(Fronts(host, dns), files=files, key=key) as gateway:
            yield gateway
    finally:
        dns.close()
