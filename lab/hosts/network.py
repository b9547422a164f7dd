"""Hosts as network namespaces. This process is the gateway's host: it leaves the machine's network for its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000
NET = "10.77.0"
# What docker-compose.yml says of the gateway and the links.
SYSCTLS = {"tcp_keepalive_time": 5, "tcp_keepalive_intvl": 2, "tcp_keepalive_probes": 3, "tcp_retries2": 5}


class NoNamespacesError(Exception):
    """This machine does not let this user make network namespaces; the message says why."""


def run(*args: str) -> None:
    """Runs a command; its failure is an OSError with its words."""
    done = subprocess.run(args, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(args)}: {done.stderr.strip()}")


class Cable:
    """A host's cable to the switch, which is on the gateway's host."""

    def __init__(self, name: str) -> None:
        self.name = name

    def cut(self) -> None:
        """Nothing passes, and neither side is told."""
        run("ip", "link", "set", self.name, "down")

    def mend(self) -> None:
        """It is as it was."""
        run("ip", "link", "set", self.name, "up")

    def gone(self) -> bool:
        """Whether it was taken away, as it is soon after its host ended with all that ran there."""
        return not Path(f"/proc/sys/net/ipv4/conf/{self.name}").exists()


class Loopback:
    """Another host that is no more than addresses of the loopback network 127.A.B.0/24: for tests without a cable."""

    def __init__(self, net: str) -> None:
        self.net = net
        self.address = self.inside = self.outside = self.at = f"{net}.1"
        self.enter: list[str] = []

    def own(self, number: int) -> str:
        """A further address."""
        return f"{self.net}.{number}"


class Namespace:
    """Another host: a network of its own, with a cable to the switch, and another way in for who watches it.

    `address` is its own on the switch; `inside` reaches it whatever the cable does, and `outside` is this process's
    address on that way.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.address = f"{NET}.{number}"
        self.number = number
        # Nginx listens on all addresses there, as in a container
        self.at = ""
        self.inside, self.outside = f"10.78.{number}.2", f"10.78.{number}.1"
        self.cable = Cable(f"cable{number}")
        self._watch = f"watch{number}"
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self._wait()
        pid = str(self._holder.pid)
        # a host has the same card after its next boot
        for card, here, there in ((1, self.cable.name, "eth0"), (2, self._watch, "eth1")):
            own = ["address", f"02:00:00:00:{card:02x}:{number:02x}"]
            run("ip", "link", "add", here, "type", "veth", "peer", "name", there, *own, "netns", pid)
            run("ip", "link", "set", here, "up")
        run("ip", "link", "set", self.cable.name, "master", "switch")
        run("ip", "address", "add", f"{self.outside}/30", "dev", self._watch)
        run("ip", "route", "add", f"10.79.{number}.0/24", "via", self.inside)
        self.do("ip", "link", "set", "lo", "up")
        self.do("ip", "address", "add", f"{self.inside}/30", "dev", "eth1")
        self.do("ip", "link", "set", "eth1", "up")
        self.take(self.address)
        self.do("sysctl", "-qw", *(f"net.ipv4.{name}={value}" for name, value in SYSCTLS.items()))

    def _wait(self) -> None:
        own = Path("/proc/self/ns/net").readlink()
        while self._holder.poll() is None and Path(f"/proc/{self._holder.pid}/ns/net").readlink() == own:
            os.sched_yield()

    def take(self, address: str) -> None:
        """Gives the host this address on the switch, and no other."""
        self.do("ip", "address", "flush", "dev", "eth0")
        self.do("ip", "address", "add", f"{address}/24", "dev", "eth0")
        self.do("ip", "link", "set", "eth0", "up")

    def own(self, number: int) -> str:
        """A further address, which is nobody's on the switch: a container's, as it were."""
        address = f"10.79.{self.number}.{number}"
        self.do("ip", "address", "replace", f"{address}/32", "dev", "lo")
        return address

    @property
    def enter(self) -> list[str]:
        """What a command begins with that is to run there."""
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]

    def do(self, *args: str) -> None:
        """Runs a command there."""
        run(*self.enter, *args)

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._holder.poll() is not None

    def end(self) -> None:
        """Ends the host; what still runs there is its starter's business."""
        self._holder.kill()
        self._holder.wait()


@contextmanager
def network(names: Sequence[str]) -> Iterator[dict[str, Namespace]]:
    """These hosts, each with its cable to the switch. NoNamespacesError where this machine does not let us.

    This process and all that it starts stay in the network of the gateway's host, also afterwards.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise NoNamespacesError(f"no network namespaces here ({os.strerror(ctypes.get_errno())}): run it as root")
    hosts: dict[str, Namespace] = {}
    try:
        try:
            run("ip", "link", "set", "lo", "up")
            run("ip", "link", "add", "switch", "type", "bridge")
            run("ip", "address", "add", f"{NET}.1/24", "dev", "switch")
            run("ip", "link", "set", "switch", "up")
            for name, value in SYSCTLS.items():
                Path(f"/proc/sys/net/ipv4/{name}").write_text(str(value))
            for number, name in enumerate(names, 2):
                hosts[name] = Namespace(name, number)
        except OSError as why:
            raise NoNamespacesError(f"no network between namespaces here: {why}") from why
        yield hosts
    finally:
        for host in hosts.values():
            host.end()
