"""A fleet over several hosts: real Nginx at both ends of each link, on the files that the product uses, and simulated
replicas on each host."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Self

from access.store import Secrets
from lab.hosts.network import Loopback, Namespace
from lab.sim.dns import Dns
from lab.sim.gateway import Nginx, image
from lab.sim.replicas import Replicas, Sim
from lab.waiting import until
from stack import hosts
from stack import hosts_certificates as certificates
from stack.gateway import fleet_line
from stack.shell import CACHE, ROOT

LINK = ROOT / "nginx" / "link"


def bare_nginx() -> None:
    """Makes $NGINX a binary that runs in any network: the gateway's image, unpacked. One that is set already stays."""
    if "NGINX" in os.environ:
        return
    found = subprocess.run(["docker", "image", "inspect", "-f", "{{.Id}}", image()], capture_output=True, text=True)
    if found.returncode:
        raise FileNotFoundError(f"the image {image()} is not here: run `make up` once, or set $NGINX to a binary")
    folder = CACHE / f"nginx-{found.stdout.strip().removeprefix('sha256:')[:12]}"
    if not folder.exists():
        new = folder.with_name(f".{folder.name}")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        pack = ["docker", "run", "--rm", "--pull", "never", "--network", "none", "--entrypoint", "sh", image(), "-c"]
        files = "cd / && exec tar -chf - usr/sbin/nginx usr/lib/nginx usr/lib/*-linux-gnu*"
        with subprocess.Popen([*pack, files], stdout=subprocess.PIPE) as packed:
            subprocess.run(["tar", "-xf", "-", "-C", str(new)], stdin=packed.stdout, check=True)
        if packed.returncode:
            raise OSError(f"{image()} could not be unpacked")
        (loader,) = new.glob("usr/lib/*-linux-gnu*/ld-linux*.so.*")
        place = folder / loader.parent.relative_to(new)
        binary = new / "nginx"
        binary.write_text(
            f'#!/bin/sh\nexec {place}/{loader.name} --library-path {place} {folder}/usr/sbin/nginx "$@"\n'
        )
        binary.chmod(0o755)
        new.rename(folder)
    os.environ["NGINX"] = str(folder / "nginx")
    os.environ["NGINX_MODULES"] = str(folder / "usr/lib/nginx/modules")


class End(Nginx):
    """One end of a link, from the files of nginx/link. `at` is the address that it listens on in place of a container's
    own, '' for all; `secrets` what it reads."""

    def __init__(self, end: str, secrets: Path, dns: str, at: str = "", enter: Sequence[str] = ()) -> None:
        super().__init__(f"http://{at}:9001")
        self.end = end
        self.at = at
        self.secrets = secrets
        self._dns = dns
        self._enter = list(enter)

    def configure(self) -> None:
        """Makes the folder that `start` writes to."""
        self.conf.mkdir(exist_ok=True)

    def write(self) -> None:
        """Takes over what lies in its folder now; `reload` or a new start makes it count."""
        swaps = [
            (r"/tmp\b", self.tmp_seen),  # noqa: S108
            (r"/etc/nginx/link\b", self.conf_seen),
            (r"/etc/fleet/link\b", self.conf_seen),
            (r"resolver 127\.0\.0\.11\b", f"resolver {self._dns}"),
            (r"/usr/lib/nginx/modules\b", os.environ.get("NGINX_MODULES", "/usr/lib/nginx/modules")),
        ]
        if self.at:
            swaps += [
                (r"listen (?:127\.0\.0\.1:)?(\d+)\b", rf"listen {self.at}:\1"),
                (r"server 127\.0\.0\.1:9000", f"server {self.at}:9000"),
            ]
        for path in (*LINK.iterdir(), *self.secrets.glob("[!.]*")):
            text = path.read_text()
            for pattern, new in swaps if path.suffix in (".conf", ".sh") else ():
                text = re.sub(pattern, new, text)
            (self.conf / path.name).write_text(text)

    def _command(self) -> list[str]:
        return [*self._enter, "sh", f"{self.conf}/start.sh", self.end, str(self.binary)]

    def start(self) -> None:
        """Starts it on what lies in its folder now."""
        self.write()
        if self.at:
            super().start()
            return
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(self._command(), stdout=log, stderr=log)

    def reload(self) -> None:
        """Reads its files anew."""
        self.write()
        os.kill(self.master(), signal.SIGHUP)

    def kill(self) -> None:
        """SIGKILL to all of it, as `docker compose kill`."""
        assert self._process
        if self._process.poll() is None:
            # the master first: it would start another worker in the place of one that has ended
            for pid in (self.master(), *self.workers()):
                os.kill(pid, signal.SIGKILL)
            self._process.wait()


class FarSim(Sim):
    """A simulated replica on another host."""


class Far:
    """Another host with its link and its replicas, as it is after `make up ARGS='--join FILE'`."""

    def __init__(self, space: Namespace | Loopback, host: hosts.Host, args: Sequence[str]) -> None:
        self.space = space
        self.host = host
        self.dns = Dns(space.outside)
        self.folder = Path(tempfile.mkdtemp(prefix="host-"))
        self.folder.chmod(0o755)
        self.sims: list[FarSim] = []
        for number, replica in enumerate(host.replicas):
            sim = FarSim(replica.name, space.own(10 + number), 8000, args, self.dns)
            sim.enter = space.enter
            self.sims.append(sim)
        self.link = End("host", self.folder, self.dns.address, space.at, space.enter)

    def give(self, ca: str, own: certificates.Pair) -> None:
        """What the file brings that `make host` wrote."""
        names = [sim.name for sim in self.sims]
        hosts.write_end(self.folder, ca, own, hosts.host_end(self.host.membership, names))

    def listening(self) -> bool:
        """Whether its port is open."""
        try:
            socket.create_connection((self.space.inside, self.host.port), 1).close()
        except OSError:
            return False
        return True


class HostFleet(Replicas):
    """Replicas on the gateway's host, and on others behind their links."""

    def __init__(
        self, here: int, far: Mapping[str, tuple[Namespace | Loopback, int]], *args: str, model: str = "sim"
    ) -> None:
        super().__init__(here, *args, model=model)
        self.net = self.gateway_host.rsplit(".", 1)[0]
        self.folder = Path(tempfile.mkdtemp(prefix="fleet-"))
        self.secrets = Secrets(self.folder / "secrets")
        self.far: dict[str, Far] = {}
        self.links: dict[str, End] = {}
        self._args = ["--model", model, *args]
        for name, (space, count) in far.items():
            self.add(name, space, count)

    def add(self, name: str, space: Namespace | Loopback, count: int, life: timedelta = certificates.LIFE) -> Far:
        """`make host ARGS='add NAME ADDRESS'` and what follows it on the other host, but for starting its parts."""
        here = [sim.name for sim in self.all if not isinstance(sim, FarSim)]
        taken = [*here, *(one.name for host in hosts.load(self.secrets).hosts for one in host.replicas)]
        host = hosts.Host(
            name=name,
            address=space.address,
            port=hosts.PORT,
            membership=hosts.new_membership(name),
            replicas=hosts.next_names(taken, count),
            expires=0,
        )
        own = hosts.add(self.secrets, host, here, life)
        far = Far(space, host, self._args)
        far.give(self.ca, own)
        self.far[name] = far
        self.all += far.sims
        at = f"{self.net}.{200 + len(self.links)}"
        self.dns.names[f"link-{name}"] = at
        self.links[name] = End("gateway", hosts.folder(self.secrets) / name, self.dns.address, at)
        return far

    @property
    def ca(self) -> str:
        """The authority's certificate."""
        return (hosts.folder(self.secrets) / "ca.pem").read_text()

    def __enter__(self) -> Self:
        try:
            super().__enter__()
            for link in self.links.values():
                link.__enter__()
            for far in self.far.values():
                far.link.__enter__()
                until(far.listening, f"{far.host.name} listens")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for far in self.far.values():
            if far.link._process:  # noqa: SLF001
                far.link.__exit__()
            far.dns.close()
            shutil.rmtree(far.folder, ignore_errors=True)
        for link in self.links.values():
            if link._process:  # noqa: SLF001
                link.__exit__()
        super().__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    def on(self, name: str) -> list[str]:
        """The names of a host's replicas."""
        return [sim.name for sim in self.far[name].sims]

    def upstreams(self, names: Sequence[str] | None = None) -> str:
        """The fleet file: the lines of the replicas here, and those that `make host` writes for the others."""
        here = [sim for sim in self.all if not isinstance(sim, FarSim) and (names is None or sim.name in names)]
        lines = "".join(fleet_line(sim.name, sim.port) + "\n" for sim in here)
        return lines + "".join(
            line
            for host in hosts.load(self.secrets).hosts
            for line in hosts.fleet_lines(host).splitlines(keepends=True)
            if names is None or line.split()[1] in names
        )
