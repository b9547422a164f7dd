"""What tests of more than one folder share: the running stack."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests

from lab.waiting import until

ROOT = Path(__file__).resolve().parent.parent
# How long an example takes is the host's business: with a deadline, a busy one would fail what is right.
hypothesis.settings.register_profile("fleet", deadline=None)
hypothesis.settings.load_profile("fleet")


def run(*command: str, timeout_s: float = 120) -> str:
    """Run a command in the repository, return its standard output, and fail with what it said where it fails."""
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=timeout_s, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr)[-4000:]
        raise AssertionError(f"{' '.join(command)}: exit status {done.returncode}\n{said}")
    return done.stdout


@dataclass(frozen=True)
class Stack:
    """A running stack as its users see it."""

    url: str  # of the gateway
    prometheus_url: str
    model: str  # that every request may ask for

    def compose(self, *arguments: str, timeout_s: float = 120) -> str:
        """Standard output of `docker compose ARGUMENTS`."""
        return run("docker", "compose", *arguments, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """What /status.json says."""
        # A host on which a replica loads may stand still for seconds.
        status: dict[str, Any] = requests.get(f"{self.url}/status.json", timeout=30).json()
        return status

    def replicas(self) -> dict[str, dict[str, Any]]:
        """Each replica in /status.json, by name."""
        return {replica["name"]: replica for replica in self.status()["replicas"]}

    def all_ready(self) -> bool:
        return all(replica["state"] == "ready" for replica in self.replicas().values())

    def wait_until_all_ready(self, within_s: float = 240) -> None:
        """Return when every replica answers one-token requests and is in the route."""
        until(self.all_ready, within_s, "every replica ready")


def published(service: str, port: int) -> str:
    """The address on this host of a service's port."""
    address = run("docker", "compose", "port", service, str(port)).strip()
    return "http://" + address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "127.0.0.1")


def is_up() -> bool:
    """Whether the gateway runs already. Without an engine it cannot."""
    try:
        return bool(run("docker", "compose", "ps", "--status", "running", "--quiet", "gateway").strip())
    except (AssertionError, FileNotFoundError):
        return False


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The real stack. One that is up is used and stays up; else it is started by `make up` and stopped at the end."""
    found_up = is_up()
    if not found_up:
        run("make", "up", timeout_s=1800)
    url = published("gateway", 80)
    model = requests.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
    running = Stack(url=url, prometheus_url=published("prometheus", 9090), model=model)
    running.wait_until_all_ready()
    yield running
    if not found_up:
        run("make", "down", timeout_s=300)


@pytest.fixture(scope="session")
def gateway_image(request: pytest.FixtureRequest) -> None:
    """The gateway's image, for tests that start gateways of their own: where it is missing, `make up` makes it."""
    try:
        image = run("docker", "compose", "config", "--images", "gateway").split()[0]
        run("docker", "image", "inspect", image)
    except (AssertionError, FileNotFoundError):
        request.getfixturevalue("stack")
