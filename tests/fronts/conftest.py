"""Gateways that ask for a key: one before the real replicas of the running stack, one before simulated ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from access.keys import KeyStore
from access.store import Secrets
from lab.bench.real import replica_addresses
from lab.ray.cluster import FREE_GB, Cluster, Serves, cluster, free_gb
from lab.sim.dns import Dns
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.stack import Stack, StackError, run
from stack.gateway import fleet_line

# the browser of the status page's tests
from tests.browser.conftest import browser, chromium, picture  # noqa: F401

# The gateway's and the DNS' own address: no test of another folder uses it.
HOST = "127.0.99.1"


@dataclass(frozen=True)
class Door:
    """A gateway, a key of a user that it takes, and a model that it serves."""

    gateway: Gateway
    key: str
    model: str


@dataclass
class RealFleet:
    """The running stack's replicas, by their addresses."""

    gateway_host: str
    dns: Dns
    addresses: dict[str, str]

    def upstreams(self, names: Sequence[str] | None = None) -> str:
        return "\n".join(fleet_line(name) for name in names or self.addresses)


def keys(folder: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Keys of a user and of an admin, and the gateway's file of them."""
    store = Secrets(folder)
    made = {role: KeyStore(store).create(role, role=role) for role in ("user", "admin")}
    return made, {"secrets/keys.json": store.keys.read_bytes()}


@pytest.fixture(scope="session")
def real(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """Before the real replicas."""
    addresses = replica_addresses(stack)
    del addresses["gateway"]
    made, files = keys(tmp_path_factory.mktemp("real") / "secrets")
    dns = Dns(HOST)
    dns.names |= addresses
    try:
        with Gateway(RealFleet(HOST, dns, addresses), files=files, key=made["admin"]) as gateway:
            gateway.wait_ready()
            yield Door(gateway, made["user"], stack.model)
    finally:
        dns.close()


@pytest.fixture(scope="session")
def simulated(gateway_image: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """Before simulated replicas with a long context: agents' own instructions do not fit into the small model's."""
    made, files = keys(tmp_path_factory.mktemp("simulated") / "secrets")
    shape = ("--max-model-len=200000", "--kv-blocks=65536", "--answer-tokens=40")
    with Replicas(2, *shape) as fleet, Gateway(fleet, files=files, key=made["admin"]) as gateway:
        gateway.wait_ready()
        yield Door(gateway, made["user"], fleet.model)


@pytest.fixture(scope="session")
def ray_image(request: pytest.FixtureRequest) -> None:
    """The image of a Ray node. `make ray` builds it over the replica's, within seconds where nothing has changed."""
    try:
        run("docker", "image", "inspect", run("docker", "compose", "config", "--images", "vllm-0").split()[0])
    except StackError:
        request.getfixturevalue("stack")
    run("make", "ray", timeout_s=900)


@pytest.fixture(scope="module")
def ray_hosts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Cluster, Path]]:
    """Two hosts of a Ray cluster that run what the module names in SERVES, and the folder of their secrets."""
    serves: Serves = request.module.SERVES
    folder = tmp_path_factory.mktemp("ray") / "secrets"
    if free_gb() < FREE_GB[serves]:
        pytest.skip(f"two hosts of Ray need {FREE_GB[serves]} GB of memory, and {free_gb():.1f} are free")
    request.getfixturevalue("ray_image")
    with cluster(serves, folder) as hosts:
        yield hosts, folder
