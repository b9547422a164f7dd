"""Real Nginx on this project's configuration over simulated replicas, for a module; faults are cleared each time."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import argon2
import httpx
import pytest
import uvicorn

from access import service
from access.store import Secrets
from access.tokens import TokenStore
from access.users import User, Users
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas, Sim
from lab.waiting import until
from stack.shell import ROOT

PASSWORD = "four words that fit together"


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


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    """The folder secrets/ with the users alice and root, an administrator, who both sign in with PASSWORD."""
    folder = Secrets(tmp_path_factory.mktemp("fleet") / "secrets")
    password = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1).hash(PASSWORD)
    with folder.locked():
        users = Users(users=[User(name="alice", password=password), User(name="root", password=password, role="admin")])
        folder.replace(folder.written(folder.users, users), folder.users)
    TokenStore(folder).take(None, 30)
    return folder


@contextmanager
def token_service(gateway: Gateway, secrets: Secrets) -> Iterator[None]:
    """The token service, where the gateway looks for it. The clock of its waits stands: who has to wait still has to at
    the next try, however long that takes here."""
    app = service.build(secrets.users.parent, lambda: 0.0)
    server = uvicorn.Server(uvicorn.Config(app, gateway.host, 8000, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started, "the token service", 30)
        yield
    finally:
        server.should_exit = True
        thread.join(30)


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


def agent(*turns: str, **more: Any) -> dict[str, Any]:
    """A request as Codex makes it: tools, long instructions, and messages in parts of which some are long."""

    def says(role: str, *texts: str) -> dict[str, Any]:
        parts = [{"type": "input_text", "text": text} for text in texts]
        return {"type": "message", "role": role, "content": parts}

    tool = {"type": "function", "name": "exec_command", "description": "Runs a command. " * 60, "strict": False}
    context = [
        says("developer", "You are a coding agent. " * 700),
        says("developer", "<skills_instructions> " * 100, "<permissions instructions> read-only"),
        says("user", "<environment_context> /work"),
    ]
    return {"model": "sim", "tools": [tool] * 18, "input": [*context, *(says("user", turn) for turn in turns)], **more}
