"""A checkout of its own with a stack that is not there: Docker, the gateway and Prometheus answer what a test says."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from stack.shell import ROOT

NEVER = "0001-01-01T00:00:00Z"
MODEL = "org/model"
DOCKER = """\
#!{python} -IS
import json, re, sys, time
words = " ".join(sys.argv[1:])
for pattern, out, err, code, pause in json.load(open({answers!r})):
    if re.search(pattern, words):
        time.sleep(pause)
        sys.stdout.write(out.replace("@now", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())))
        sys.stderr.write(err)
        sys.exit(code)
sys.exit(f"nobody told what to say to: docker {{words}}")
"""


def before(**span: float) -> str:
    """A time so long ago, as Docker writes it."""
    return (datetime.now(UTC) - timedelta(**span)).strftime("%Y-%m-%dT%H:%M:%S.123456789Z")


def container(service: str, image: str, folder: Path, restarts: int = 0, **state: Any) -> dict[str, Any]:
    """What `docker inspect` says of a container, which is well unless `state` says otherwise."""
    labels = {
        "com.docker.compose.service": service,
        "com.docker.compose.project.working_dir": str(folder),
        "com.docker.compose.config-hash": f"hash-of-{service}",
    }
    well = {
        "Status": "running",
        "ExitCode": 0,
        "OOMKilled": False,
        "Error": "",
        "StartedAt": before(hours=5),
        "FinishedAt": NEVER,
        "Health": {"Status": "healthy", "Log": [{"Start": before(seconds=5), "ExitCode": 0, "Output": ""}]},
    }
    return {
        "Id": f"id-of-{service}",
        "Created": before(hours=6),
        "Image": "sha256:same",
        "RestartCount": restarts,
        "State": well | state,
        "Config": {"Image": image, "Labels": labels, "Env": []},
        "HostConfig": {"RestartPolicy": {"Name": "unless-stopped"}},
    }


def free_port() -> str:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class FakeStack:
    """The stack: change `containers`, `docker`, `status` or `prometheus` before `doctor` looks."""

    def __init__(self, folder: Path, port: int, prometheus_port: int) -> None:
        self.folder = folder / "checkout"
        self.ports = (port, prometheus_port)
        for name in ("scripts", "access", "autoscaler", "nginx", "vllm", "prometheus", "images"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("wheels", "__pycache__"))
        for name in (".env.example", "docker-compose.yml", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder / name)
        (self.folder / "models" / MODEL).mkdir(parents=True)
        (self.folder / "models" / MODEL / "config.json").touch()
        self.env = {"HTTP_PORT": str(port), "PROMETHEUS_PORT": str(prometheus_port), "GRAFANA_PORT": free_port()}
        self.images = {
            "gateway": "vllm-fleet/gateway:1.30.6",
            "prometheus": "vllm-fleet/prometheus:3.5.3",
            "vllm-0": "vllm-fleet/replica:0.32.0",
            "vllm-1": "vllm-fleet/replica:0.32.0",
        }
        self.containers = {name: container(name, image, self.folder) for name, image in self.images.items()}
        self.logs: dict[str, list[str]] = {}
        # patterns of commands that get another answer: (out, err, exit status, seconds)
        self.docker: dict[str, tuple[str, str, int, float]] = {}
        self.status: Any = {"replicas": [{"name": name, "state": "ready"} for name in ("vllm-0", "vllm-1")]}
        self.prometheus: dict[str, Any] = {
            "status/buildinfo": {},
            "status/flags": {"storage.tsdb.retention.size": "5GB"},
            "targets": {"activeTargets": [self.target("gateway"), *(self.target(f"vllm-{n}") for n in (0, 1))]},
            "alerts": {"alerts": []},
            "rules": {"groups": []},
            "query": {"result": []},
            "query_range": {"result": []},
            "label/__name__/values": [],
        }

    def at_free_ports(self) -> None:
        """Nothing answers for the gateway and Prometheus any more."""
        self.env |= {"HTTP_PORT": free_port(), "PROMETHEUS_PORT": free_port()}

    @staticmethod
    def target(name: str, **more: Any) -> dict[str, Any]:
        """A target as Prometheus has it, read and well."""
        labels = {"job": "replicas", "replica": name} if name.startswith("vllm-") else {"job": name}
        return {
            "labels": {**labels, "instance": f"{name}:9464"},
            "health": "up",
            "lastScrape": before(seconds=3),
        } | more

    def config(self) -> dict[str, Any]:
        """What `docker compose config` says."""
        services: dict[str, Any] = {}
        for name, image in self.images.items():
            services[name] = {"image": image, "environment": {}, "volumes": []}
        services["gateway"]["volumes"] = [{"source": str(self.folder / "nginx"), "target": "/etc/nginx"}]
        for name in ("vllm-0", "vllm-1"):
            services[name]["environment"] = {"MODEL": MODEL}
        return {"name": "vllm-fleet", "services": services, "x-pins": {}}

    def answers(self) -> list[tuple[str, str, str, int, float]]:
        """What Docker's command says, by a pattern of the command's words."""
        listed = "\n".join(one["Id"] for one in self.containers.values())
        published = "\n".join(f"127.0.0.1:{port}->80/tcp" for port in self.ports)
        rows = [
            json.dumps({"ID": one["Id"], "Service": name, "State": one["State"]["Status"], "Health": "", "Status": ""})
            for name, one in self.containers.items()
        ]
        hashes = "\n".join(f"{name} hash-of-{name}" for name in self.images)
        said: dict[str, str] = {
            r"^version": "28.0.1",
            r"^(compose|buildx) version": "v2.40.3",
            r"^info": "null",
            r"^ps .*--quiet": listed,
            r"^ps .*Ports": published,
            r"^ps ": "",
            r"^inspect .*StartedAt": before(hours=5),
            r"^inspect ": json.dumps(list(self.containers.values())),
            r"^image inspect .*Id": "sha256:same",
            r"^image inspect ": "docker.io/library/nginx:1.30.6",
            r"config --format json": json.dumps(self.config()),
            r"config --profiles": "tokens",
            r"config --hash": hashes,
            r"^compose .*config$": json.dumps(self.config()),
            r"^compose .*ps --all": "\n".join(rows),
            r"exec -T gateway nginx": "",
            r"exec -T gateway curl": "HTTP/1.1 200 OK\r\ndate: @now",
        }
        own = [(pattern, *answer) for pattern, answer in self.docker.items()]
        logs = [
            (rf"^logs .*id-of-{name}$", "\n".join(f"{before(minutes=1)} {line}" for line in lines), "", 0, 0.0)
            for name, lines in self.logs.items()
        ]
        rest = [(pattern, out, "", 0, 0.0) for pattern, out in (said | {"^logs": ""}).items()]
        return [*own, *logs, *rest]

    def install_docker(self) -> Path:
        """Writes the command `docker` that gives the answers, and gives its folder."""
        folder = self.folder.parent / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "answers.json").write_text(json.dumps(self.answers()))
        docker = folder / "docker"
        docker.write_text(DOCKER.format(python=sys.executable, answers=str(folder / "answers.json")))
        docker.chmod(0o755)
        return folder

    def run(self, script: str, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs one of the checkout's scripts, which finds no program but this Docker, or what `path` has."""
        bin_folder = self.install_docker()
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        return subprocess.run(
            [sys.executable, str(self.folder / "scripts" / script), *arguments],
            cwd=self.folder,
            env={
                **kept,
                "PATH": str(bin_folder) if path is None else path,
                "PYTHONPATH": str(self.folder),
                "COLUMNS": "200",
                **self.env,
            },
            capture_output=True,
            text=True,
            timeout=120,
        )

    def doctor(self, path: str | None = None) -> tuple[int, dict[str, Any]]:
        """The doctor's exit status and its JSON."""
        done = self.run("doctor.py", "--json", path=path)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)


@contextmanager
def fake_stack(folder: Path) -> Iterator[FakeStack]:
    """A stack that is well, at ports of its own."""
    stack: FakeStack

    class Handler(BaseHTTPRequestHandler):
        def answer(self, told: Any) -> None:
            body = json.dumps(told).encode() if not isinstance(told, str) else told.encode()
            self.send_response(200 if told is not None else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path.startswith("/api/v1/"):
                self.api(path.removeprefix("/api/v1/"), {})
            else:
                self.answer({"/status.json": stack.status, "/health": "", "/-/healthy": ""}.get(path))

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.api(urlsplit(self.path).path.removeprefix("/api/v1/"), form)

        def api(self, what: str, form: Mapping[str, list[str]]) -> None:
            told = stack.prometheus.get(what)
            told = told(form) if callable(told) else told
            self.answer(None if told is None else {"status": "success", "data": told})

        def log_message(self, *_: object) -> None:
            pass

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    stack = FakeStack(folder, *(server.server_address[1] for server in servers))
    try:
        yield stack
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
