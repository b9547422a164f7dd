"""Simulated replicas as processes of this host, each with an address and a name of its own."""

import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import urllib.error
from collections.abc import Iterator, Sequence
from typing import Any, Self

from lab.http import answers, get
from lab.sim.dns import Dns
from lab.waiting import until
from stack.gateway import fleet_line
from stack.shell import ROOT


class Sim:
    """One simulated replica and its process."""

    # what a command begins with that is to run where the replica is
    enter: Sequence[str] = ()

    def __init__(self, name: str, host: str, port: int, args: Sequence[str], dns: Dns) -> None:
        self.name = name
        self.host = host
        self.port = port
        self.args = list(args)
        self.process: subprocess.Popen[bytes] | None = None
        self._dns = dns

    @property
    def url(self) -> str:
        """Where it is now."""
        return f"http://{self.host}:{self.port}"

    def start(self, wait: bool = True) -> None:
        """Starts the process under the present address and gives it its name."""
        command = [sys.executable, "-m", "lab.sim.replica", "--host", self.host, "--port", str(self.port), *self.args]
        self.process = subprocess.Popen([*self.enter, *command], cwd=ROOT)
        self._dns.names[self.name] = self.host
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the process answers."""
        until(lambda: answers(self.url + "/version"), f"{self.name} answers at {self.url}")

    def kill(self, forget: bool = True) -> None:
        """SIGKILL. The name leaves the DNS too, as with a container, unless `forget` is False."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None
        if forget:
            self._dns.names.pop(self.name, None)

    def terminate(self) -> None:
        """SIGTERM: the replica finishes what runs, then ends."""
        assert self.process
        self.process.terminate()

    def ended(self) -> bool:
        """Whether no process runs."""
        return self.process is None or self.process.poll() is not None

    def pause(self) -> None:
        """SIGSTOP: its connections stay, nothing moves."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process
        self.process.send_signal(signal.SIGCONT)

    def move(self) -> None:
        """Ends the replica if it runs, and brings it up under a new address, as a recreated container."""
        self.kill()
        net, last = self.host.rsplit(".", 1)
        self.host = f"{net}.{int(last) % 200 + 50}"
        self.start()

    def fault(self, fault: str | None = None, **values: float | str) -> None:
        """Sets the replica's faults (replica.py lists them); no argument clears them."""
        with contextlib.suppress(ConnectionError, urllib.error.URLError):  # fault "crash" leaves no one to answer
            get(self.url + "/_sim", json.dumps({"fault": fault, **values}).encode())

    def state(self) -> dict[str, Any]:
        """What the replica saw: `generations`, `finished`, `faults`, of the last requests `seen` head and body, and the
        `tokens` that it made for requests that a gateway passed on."""
        state: dict[str, Any] = json.loads(get(self.url + "/_sim"))
        return state

    def metrics(self) -> dict[str, float]:
        """The replica's metrics by name, without labels (histograms' buckets left out)."""
        lines = get(self.url + "/metrics").decode().splitlines()
        found = (re.match(r"([a-z_:]+)(?:\{[^}]*\})? (\S+)$", line) for line in lines if "_bucket{" not in line)
        return {match[1]: float(match[2]) for match in found if match}


class Replicas:
    """N simulated replicas, vllm-0 …, each with the arguments `args` of replica.py."""

    def __init__(self, count: int, *args: str, model: str = "sim") -> None:
        self.model = model
        net = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        self.gateway_host = f"{net}.1"
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.port = int(probe.getsockname()[1])
        self.dns = Dns(self.gateway_host)
        options = ["--model", model, *args]
        self.all = [Sim(f"vllm-{n}", f"{net}.{10 + n}", self.port, options, self.dns) for n in range(count)]

    def __enter__(self) -> Self:
        try:
            for sim in self.all:
                sim.start(wait=False)
            for sim in self.all:
                sim.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for sim in self.all:
            sim.kill()
        self.dns.close()

    def __getitem__(self, name: str) -> Sim:
        return next(sim for sim in self.all if sim.name == name)

    def __iter__(self) -> Iterator[Sim]:
        return iter(self.all)

    def upstreams(self, names: Sequence[str] | None = None) -> str:
        """The fleet file: one line a replica, for all replicas or those of `names`."""
        return "".join(fleet_line(sim.name, sim.port) + "\n" for sim in self.all if names is None or sim.name in names)
