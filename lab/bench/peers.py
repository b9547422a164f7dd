"""The gateways that are measured side by side. Each starts in front of the same replicas and gives the URL to ask.

All are pinned to the CPUs given, started as their own documentation starts them, and write no access log, except this
gateway, which runs as it is shipped.
"""

import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.bench.plain import write_plain
from lab.http import answers, get
from lab.sim.gateway import Fleet, Gateway, Nginx, end
from lab.stack import StackError
from lab.waiting import until
from stack.shell import ROOT

VENV = ROOT / ".cache" / "bench-venv"
REQUIREMENTS = Path(__file__).with_name("peers.requirements.txt")


@dataclass(frozen=True)
class Target:
    """What a peer stands in front of: replica URLs that serve `model`, the CPUs for it, and how many clients ask."""

    urls: Sequence[str]
    model: str
    cpus: str
    fleet: Fleet | None = None
    clients: int = 0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def install() -> None:
    """Makes the peers' virtual environment; does nothing when it is in step with its pins."""
    stamp = VENV / "installed.txt"
    wanted = REQUIREMENTS.read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    subprocess.run([str(VENV / "bin" / "pip"), "install", "--quiet", "--requirement", str(REQUIREMENTS)], check=True)
    stamp.write_text(wanted)


@contextmanager
def process(
    command: Sequence[str], cpus: str, url: str, up: Callable[[], bool], env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Runs a peer pinned to `cpus` until the block ends; gives `url` once `up()` holds."""
    with tempfile.TemporaryFile() as log:
        pinned = ["taskset", "-c", cpus, *command]
        started = subprocess.Popen(pinned, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        try:

            def ready() -> bool:
                if started.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} ended: {log.read()[-2000:].decode(errors='replace')}")
                return up()

            until(ready, f"{Path(command[0]).name} answers", 90)
            yield url
        finally:
            end(started)


@contextmanager
def direct(target: Target) -> Iterator[str]:
    """No gateway: the first replica itself."""
    yield target.urls[0]


class PlainNginx(Nginx):
    """Nginx as vLLM's own page has it, with what a benchmark would stumble over mended (buffering, keepalive).

    `options` are each server's, with {} where its address goes; `keyed`: key.js reads what `method` goes by and
    is told what was chosen.
    """

    def __init__(self, target: Target, method: str, options: str = "", keyed: bool = False) -> None:
        self._port = free_port()
        super().__init__(f"http://127.0.0.1:{self._port}", cpus=target.cpus)
        self._target = target
        self._method = method
        self._options = options
        self._keyed = keyed

    def configure(self) -> None:
        """Writes one server over the replicas."""
        addresses = [url.removeprefix("http://") for url in self._target.urls]
        servers = " ".join(f"server {address} {self._options.format(address)};" for address in addresses)
        modules = os.environ.get("NGINX_MODULES", "/usr/lib/nginx/modules")
        keys = f"""
  js_engine qjs;
  js_path {self.conf_seen};
  js_import key from key.js;
  js_shared_dict_zone zone=routes:16m timeout=1h evict;
  js_var $key;
  js_set $route key.route;"""
        write_plain(
            self,
            f"""{keys if self._keyed else ""}
  upstream replicas {{ {self._method} {servers} keepalive 64; }}
  server {{
    listen 127.0.0.1:{self._port} backlog=4096;
    location = /health {{ return 200; }}
    location / {{
      {"js_access key.read; js_header_filter key.remember;" if self._keyed else ""}
      proxy_pass http://replicas;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 1h;
    }}
  }}
""",
            f"load_module {modules}/ngx_http_js_module.so;" if self._keyed else "",
        )
        if self._keyed:
            shutil.copy(Path(__file__).with_name("key.js"), self.conf)


@contextmanager
def nginx(target: Target, method: str, options: str = "", keyed: bool = False) -> Iterator[str]:
    """Stock Nginx, its upstream by `method`; PlainNginx says what the others mean."""
    with PlainNginx(target, method, options, keyed) as plain:
        yield plain.url


def bounded_hash(target: Target) -> AbstractContextManager[str]:
    """A consistent hash that goes on to the next replica where one has a quarter more than the mean."""
    most = math.ceil(1.25 * target.clients / len(target.urls))
    return nginx(target, "hash $key consistent;", f"max_conns={most}", keyed=True)


@contextmanager
def gateway(target: Target, source: Path = ROOT / "nginx") -> Iterator[str]:
    """This gateway as it is shipped, or as another folder has it."""
    assert target.fleet, "this gateway is measured over a fleet of its own"
    with Gateway(target.fleet, cpus=target.cpus, source=source) as ours:
        ours.wait_ready()
        yield ours.url


@contextmanager
def gateway_at(commit: str) -> Iterator[Path]:
    """The folder with the gateway's configuration at another commit of this project."""
    with tempfile.TemporaryDirectory(prefix="nginx-at-") as folder:
        tar = subprocess.run(["git", "archive", commit, "nginx"], cwd=ROOT, capture_output=True)
        if tar.returncode:
            raise StackError(f"--against {commit}: {tar.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=tar.stdout, check=True)
        yield Path(folder) / "nginx"


@contextmanager
def router(target: Target, module: str, policy: str) -> Iterator[str]:
    """vllm-router and sglang-router, which have the same ancestor and the same options."""
    port, metrics = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics), "--policy", policy]
    # A host without a network has them beside this project's own packages.
    python = str(VENV / "bin" / "python") if VENV.exists() else sys.executable
    command = [python, "-m", module, *options, "--worker-urls", *target.urls]
    with process(command, target.cpus, url, lambda: chats(url, target.model)) as found:
        yield found


@contextmanager
def litellm(target: Target) -> Iterator[str]:
    """LiteLLM's proxy with one worker."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    models = "".join(
        f"""
  - model_name: {target.model}
    litellm_params: {{model: "hosted_vllm/{target.model}", api_base: "{replica}/v1", api_key: none}}"""
        for replica in target.urls
    )
    folder = Path(tempfile.mkdtemp(prefix="litellm-"))
    try:
        config = folder / "config.yaml"
        config.write_text(f"model_list:{models}\nlitellm_settings: {{num_retries: 0, telemetry: false}}\n")
        command = [str(VENV / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        env = {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true", "LITELLM_LOG": "ERROR"}
        env |= {"LITELLM_LOCAL_MODEL_COST_MAP": "true", "NO_DOCS": "true"}
        with process(
            [*command, "--num_workers", "1"], target.cpus, url, lambda: chats(url, target.model), env
        ) as found:
            yield found
    finally:
        shutil.rmtree(folder)


@contextmanager
def haproxy(target: Target) -> Iterator[str]:
    """HAProxy with one thread, by leastconn."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    servers = "\n".join(f"  server r{n} {replica.removeprefix('http://')}" for n, replica in enumerate(target.urls))
    folder = Path(tempfile.mkdtemp(prefix="haproxy-"))
    try:
        config = folder / "haproxy.cfg"
        config.write_text(f"""
global
  maxconn 4096
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  http-reuse always
  option http-no-delay
frontend all
  bind 127.0.0.1:{port}
  default_backend replicas
backend replicas
  balance leastconn
{servers}
""")
        binary = shutil.which("haproxy") or "/usr/sbin/haproxy"
        with process([binary, "-db", "-f", str(config)], target.cpus, url, lambda: answers(url + "/health")) as found:
            yield found
    finally:
        shutil.rmtree(folder)


def chats(url: str, model: str) -> bool:
    """Whether a chat request is answered."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "hi"}}], "max_tokens": 1}}'
    try:
        request = body.encode()
        return bool(
            get(url + "/v1/chat/completions", request, timeout=10, headers={"content-type": "application/json"})
        )
    except OSError:
        return False


Start = Callable[[Target], AbstractContextManager[str]]

VLLM_ROUTER = "vllm_router.launch_router"
SGLANG_ROUTER = "sglang_router.launch_router"

OURS = "this gateway"

PEERS: dict[str, Start] = {
    "direct": direct,
    "Nginx, round robin": lambda target: nginx(target, ""),
    "Nginx, least_conn": lambda target: nginx(target, "least_conn;"),
    OURS: gateway,
    "vllm-router, cache_aware": lambda target: router(target, VLLM_ROUTER, "cache_aware"),
    "sglang-router, cache_aware": lambda target: router(target, SGLANG_ROUTER, "cache_aware"),
    "HAProxy, leastconn": haproxy,
    "LiteLLM": litellm,
}

# Two other designs for this gateway's affinity, with what stock Nginx has: `make bench` compares their workloads.
DESIGNS: dict[str, Start] = {
    "Nginx, sticky route": lambda target: nginx(target, "least_conn; sticky route $route;", "route={}", keyed=True),
    "Nginx, bounded hash": bounded_hash,
}

# From which `make bench` picks vllm-router's best other policy (kv_aware needs the engine's own event stream).
OTHER_POLICIES = ("round_robin", "power_of_two", "consistent_hash", "sticky_least_loaded")


def versions() -> list[str]:
    """The peers' versions as their own programs or packages tell them."""
    pins = [line for line in REQUIREMENTS.read_text().splitlines() if "==" in line]
    binary = shutil.which("haproxy") or "/usr/sbin/haproxy"
    haproxy_says = subprocess.run([binary, "-v"], capture_output=True, text=True).stdout.split()
    return [*(pin.replace("[proxy]", "").replace("==", " ") for pin in pins), f"HAProxy {haproxy_says[2]}"]
