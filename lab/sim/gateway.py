"""The one way to start real Nginx over simulated replicas; tests/gateway, `make chaos` and `make bench` all use it.

    with Replicas(4, "--kv-blocks", "2000") as fleet, Gateway(fleet) as gateway:
        httpx.post(gateway.url + "/v1/chat/completions", json=...)
        fleet["vllm-0"].kill()

Each fleet lives on its own part of the loopback network, 127.A.B.0/24: the gateway on .1, replica N on .(10 + N). Names
are answered by a small DNS server, so that the gateway runs on its production configuration (`server vllm-0:PORT
resolve`) and a replica can come back under a new address. Nginx is the gateway's image on the host's network, or, where
$NGINX names a binary (with its modules in $NGINX_MODULES), that one: a host without Docker can run the same tests.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import yaml

from lab.http import answers, get
from lab.sim.dns import Dns
from lab.waiting import START_SECONDS, until
from stack.shell import ROOT


class Fleet(Protocol):
    """What a gateway stands in front of: an address for it, names for the replicas, and their lines."""

    gateway_host: str
    dns: Dns

    def upstreams(self, names: Sequence[str] | None = None) -> str:
        """The fleet file: one line a replica, for all replicas or those of `names`."""
        ...


def end(process: subprocess.Popen[bytes], container: str = "") -> None:
    """Ends a program; where it is `docker run`, with its container."""
    # SIGTERM reaches it through `docker run` too.
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        if container:
            subprocess.run(["docker", "kill", container], capture_output=True)
        process.kill()
        process.wait()


class Nginx:
    """One Nginx: its folder, process and workers. `configure` writes what it runs on; `cpus` pins it ("0", "0-3")."""

    start_seconds = START_SECONDS

    def __init__(self, url: str, env: Mapping[str, str] | None = None, cpus: str | None = None) -> None:
        self.url = url
        self.folder = Path(tempfile.mkdtemp(prefix="nginx-"))
        # The image's own user reads what this user wrote, and a bare Nginx started by root drops its workers' rights.
        self.folder.chmod(0o755)
        self.conf = self.folder / "nginx"
        self.binary = os.environ.get("NGINX")
        # As Nginx itself sees them.
        self.conf_seen = str(self.conf) if self.binary else "/etc/nginx"
        self.state_seen = f"{self.folder}/state" if self.binary else "/var/lib/fleet"
        self.tmp_seen = f"{self.folder}/tmp" if self.binary else "/tmp"  # noqa: S108
        self.env = {name: value.replace("{conf}", self.conf_seen) for name, value in (env or {}).items()}
        self._cpus = cpus
        self._process: subprocess.Popen[bytes] | None = None
        self._log = self.folder / "log"

    def configure(self) -> None:
        """Writes `conf`."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        for name in ("tmp", "state"):
            (self.folder / name).mkdir()
            (self.folder / name).chmod(0o777)
        self.configure()
        self.start()
        return self

    def start(self) -> None:
        """Starts Nginx on what is configured; returns when it answers."""
        # Nginx itself takes a variable NGINX for sockets to inherit.
        env = {name: value for name, value in {**os.environ, **self.env}.items() if name != "NGINX"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log, env=env)

        def up() -> bool:
            assert self._process
            if self._process.poll() is not None:
                raise RuntimeError(f"Nginx ended:\n{self.log()[-4000:]}")
            return answers(self.url + "/health")

        try:
            until(up, f"Nginx answers at {self.url}", self.start_seconds)
        except BaseException:
            self.__exit__()
            raise

    def restart(self) -> None:
        """Ends Nginx as Compose does, and starts it again; what it keeps in files stays."""
        assert self._process
        os.kill(self.master(), signal.SIGQUIT)
        self._process.wait(20)
        self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _command(self) -> list[str]:
        start = [f"{self.conf_seen}/start.sh", self.binary or "nginx", self.conf_seen]
        if self.binary:
            return [*(["taskset", "-c", self._cpus] if self._cpus else []), "sh", *start]
        options = f"--rm --name {self.folder.name} --network host --user 101:101 --read-only --tmpfs /tmp:mode=1777"
        mounts = ["--volume", f"{self.conf}:/etc/nginx:ro", "--volume", f"{self.folder}/state:{self.state_seen}"]
        pin = ["--cpuset-cpus", self._cpus] if self._cpus else []
        env = [item for name, value in self.env.items() for item in ("--env", f"{name}={value}")]
        docker = ["docker", "run", *options.split(), "--pull", "never", *pin]
        return [*docker, *mounts, *env, "--entrypoint", "sh", image(), *start]

    def stop(self) -> None:
        """Ends Nginx at once, and what runs with it."""
        assert self._process
        end(self._process, "" if self.binary else self.folder.name)

    def master(self) -> int:
        """The master's process id."""
        if self.binary:
            assert self._process
            return self._process.pid
        command = ["docker", "inspect", "--format", "{{.State.Pid}}", self.folder.name]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def workers(self) -> list[int]:
        """The workers' process ids, old ones that still drain included."""
        master = self.master()
        return [int(pid) for pid in Path(f"/proc/{master}/task/{master}/children").read_text().split()]

    def serving_workers(self) -> list[int]:
        """Those of `workers` that take new requests; Nginx writes into an old one's title that it does not."""

        def serves(pid: int) -> bool:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
                return bool(title) and b"shutting down" not in title  # one that has ended has none
            return False

        return [pid for pid in self.workers() if serves(pid)]

    def log(self) -> str:
        """All that Nginx wrote: errors and the access log."""
        return self._log.read_text(errors="replace")


class Gateway(Nginx):
    """Real Nginx on the project's configuration, on the fleet's addresses.

    `upstreams` is the fleet file, all replicas by default; `env` the gateway's environment; `files` lie beside its
    configuration, whose folder is `{conf}` in `env`; `key` is what `status` and its like show where keys are asked for;
    `source` is the configuration's folder, by default this checkout's.
    """

    def __init__(
        self,
        fleet: Fleet,
        upstreams: str | None = None,
        env: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        cpus: str | None = None,
        key: str = "",
        source: Path = ROOT / "nginx",
    ) -> None:
        self.host = fleet.gateway_host
        self._source = source
        given = {"BIND_ADDRESS": "127.0.0.1", "SECRETS_FOLDER": "{conf}/secrets", **(env or {})}
        super().__init__(f"http://{self.host}:8080", given, cpus)
        self.metrics_url = f"http://{self.host}:9113"
        self.admin_url = f"http://{self.host}:8081"
        self._dns = fleet.dns.address
        self._upstreams = fleet.upstreams() if upstreams is None else upstreams
        self._files = dict(files or {})
        self.key = key

    def configure(self) -> None:
        """Writes the project's configuration with this gateway's addresses and fleet file."""
        shutil.copytree(self._source, self.conf)
        shutil.copy(ROOT / "nginx" / "start.sh", self.conf)
        shutil.rmtree(self.conf / "fleet", ignore_errors=True)
        (self.conf / "fleet").mkdir()
        self.write_fleet(self._upstreams)
        for name, content in self._files.items():
            (self.conf / name).parent.mkdir(exist_ok=True)
            (self.conf / name).write_bytes(content)
        swaps = [
            (r"listen 80\b", f"listen {self.host}:8080"),
            (r"listen 443\b", f"listen {self.host}:8443"),
            (r"listen 8080\b", f"listen {self.host}:8079"),
            (r"listen 8090\b", f"listen {self.host}:8090"),
            (r"listen 18090\b", f"listen {self.host}:18090"),
            (r"listen 9113\b", f"listen {self.host}:9113"),
            (r"listen 127\.0\.0\.1:8081\b", f"listen {self.host}:8081"),
            (r"resolver 127\.0\.0\.11\b", f"resolver {self._dns}"),
            (r"tokens:8000\b", f"{self.host}:8000"),
            (r"webui:8080\b", f"{self.host}:8088"),
            (r"/etc/fleet/tls\b", f"{self.conf_seen}/tls"),
            (r"/tmp\b", self.tmp_seen),  # noqa: S108
            (r"/var/lib/fleet\b", self.state_seen),
            (r"/var/cache/bodies\b", f"{self.tmp_seen}/bodies"),
        ]
        if modules := os.environ.get("NGINX_MODULES"):
            swaps.append((r"/usr/lib/nginx/modules\b", modules))
        missing = {pattern for pattern, _ in swaps}
        for path in (self.conf / "host").glob("*.conf"):
            text = path.read_text()
            for pattern, new in swaps:
                text, found = re.subn(pattern, new, text)
                missing -= {pattern} if found else set()
            path.write_text(text)
        # A test that quietly ran on the real ports would be worse than none. An older configuration has fewer of them.
        if missing and self._source == ROOT / "nginx":
            raise RuntimeError(f"nothing in nginx/host matches {missing}: it and lab/sim/gateway.py are out of step")

    def write_fleet(self, upstreams: str) -> None:
        """Replaces the fleet file; `reload()` makes it count."""
        (self.conf / "fleet" / "default.conf").write_text(upstreams)

    def write_secret(self, name: str, text: str) -> None:
        """Replaces a file of `secrets/` as `make key` does, by renaming; the gateway sees it within a second."""
        (self.conf / "secrets").mkdir(exist_ok=True)
        new = self.conf / "secrets" / f".{name}.new"
        new.write_text(text)
        new.rename(self.conf / "secrets" / name)

    def reload(self) -> None:
        """Reads the configuration anew; returns when new workers are there and no old one takes a request any more."""
        before = set(self.workers())
        os.kill(self.master(), signal.SIGHUP)

        def over() -> bool:
            return bool(set(self.workers()) - before) and not before & set(self.serving_workers())

        until(over, "new workers, and only those, serve after a reload", self.start_seconds)

    def kill_worker(self) -> None:
        """SIGKILL to one worker that takes requests; returns when the master has replaced it."""
        before = self.serving_workers()
        os.kill(before[0], signal.SIGKILL)
        until(lambda: before[0] not in (now := self.serving_workers()) and len(now) >= len(before), "a new worker")

    def status(self) -> dict[str, Any]:
        """GET /status.json."""
        status: dict[str, Any] = json.loads(get(self.url + "/status.json", headers=self._headers()))
        return status

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def states(self) -> dict[str, str]:
        """Each replica's state by name."""
        return {replica["name"]: replica["state"] for replica in self.status()["replicas"]}

    def wait_states(self, wanted: Mapping[str, str], within_s: float = START_SECONDS) -> float:
        """Waits until the replicas named have the states given; returns the seconds it took."""
        start = time.monotonic()
        until(lambda: wanted.items() <= self.states().items(), f"states {wanted}", within_s)
        return time.monotonic() - start

    def wait_ready(self, within_s: float = START_SECONDS) -> None:
        """Waits until every replica of the fleet is ready."""
        until(lambda: set(self.states().values()) == {"ready"}, "all replicas ready", within_s)

    def admin(self, method: str, path: str, body: object = None) -> Any:  # whatever JSON it answers
        """A call of the admin interface; its JSON answer, or None where it has no body."""
        data = None if body is None else json.dumps(body).encode()
        answer = get(self.admin_url + path, data, method)
        return json.loads(answer) if answer else None


def image(service: str = "gateway") -> str:
    """A service's image as docker-compose.yml names it."""
    name: str = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][service]["image"]
    return name


def nginx_version() -> str:
    """The version of the Nginx that `Nginx` runs, as "nginx/1.2.3"."""
    binary = os.environ.get("NGINX")
    docker = ["docker", "run", "--rm", "--pull", "never", "--network", "none", "--entrypoint", "nginx", image(), "-v"]
    run = subprocess.run([binary, "-v"] if binary else docker, capture_output=True, text=True)
    found = re.search(r"nginx/\S+", run.stderr)
    return found[0] if found else "nginx of unknown version"
