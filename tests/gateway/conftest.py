"""Real Nginx on this project's configuration over simulated replicas, for a module; faults are cleared each time."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas, Sim
from stack.shell import ROOT


@pytest.fixture(scope="module")
def fleet() -> Iterator[Replicas]:
    with Replicas(3) as replicas:
        yield replicas


@pytest.fixture(scope="module")
def shared_gateway(fleet: Replicas) -> Iterator[Gateway]:
    with Gateway(fleet) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def gateway(shared_gateway: Gateway, fleet: Replicas) -> Iterator[Gateway]:
    """The module's gateway, all of its replicas ready, before and after the test."""
    yield shared_gateway
    for sim in fleet:
        sim.resume()
        sim.fault()
    for replica in shared_gateway.status()["replicas"]:
        shared_gateway.admin("DELETE", f"/replicas/{replica['name']}/drain")
    shared_gateway.wait_ready()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=30) as session:
        yield session


def resized(**zones: str) -> dict[str, bytes]:
    """A gateway's `files` in which shared dictionaries have other sizes: `resized(counters="64k")`."""
    text = (ROOT / "nginx" / "conf.d" / "njs.conf").read_text()
    for name, size in zones.items():
        text, found = re.subn(rf"(zone={name}):\w+", rf"\1:{size}", text)
        assert found == 1, name
    return {"conf.d/njs.conf": text.encode()}


def chat(*messages: str, **more: Any) -> dict[str, Any]:
    """A chat request: user and assistant take turns."""
    turns = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(messages)]
    return {"model": "sim", "max_tokens": 2, "messages": turns, **more}


def seen_by(sim: Sim, text: str) -> list[dict[str, str]]:
    """The requests that this replica was sent with `text` in their body: head and body."""
    return [request for request in sim.state()["seen"] if text in request["body"]]
