"""The running stack from outside: the fleet's state, the wait until it is ready, the reload, a first answer.

The gateway is on this host, so it is asked without the proxy that the environment may name (`trust_env`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from pydantic import BaseModel

from stack.compose import Compose, Config, Container, crash_loops, is_replica
from stack.console import Problem
from stack.shell import CACHE, Say, ask

# its time is when the gateway was last told to read its files again
RELOADED = CACHE / "gateway-reloaded"
# A first answer on a busy machine without a GPU.
ANSWER_SECONDS = 120
# What vLLM says to a request that a model cannot answer: an embedding model to a chat, one without a chat template too.
NOT_THIS_WAY = {httpx.codes.BAD_REQUEST, httpx.codes.NOT_FOUND, httpx.codes.NOT_IMPLEMENTED}


class Way(NamedTuple):
    """A way to put a question to a model."""

    path: str
    body: Callable[[str], dict[str, Any]]
    said: Callable[[Any, str], str]  # of the answer and the model's name


WAYS = (
    Way(
        "/v1/chat/completions",
        lambda question: {"messages": [{"role": "user", "content": question}], "max_tokens": 32, "temperature": 0},
        lambda answer, _: str(answer["choices"][0]["message"]["content"]).strip(),
    ),
    Way(
        "/v1/completions",
        lambda question: {"prompt": question, "max_tokens": 32, "temperature": 0},
        lambda answer, _: str(answer["choices"][0]["text"]).strip(),
    ),
    Way(
        "/v1/embeddings",
        lambda question: {"input": question},
        lambda answer, model: f"a vector of {len(answer['data'][0]['embedding'])} numbers from {model}",
    ),
    Way(
        "/v1/rerank",
        lambda question: {"query": question, "documents": [question]},
        lambda answer, model: f"a score of {answer['results'][0]['relevance_score']:.2f} from {model}",
    ),
)


class ReplicaStatus(BaseModel):
    """What the gateway shows of one replica."""

    name: str
    state: str
    reason: str | None = None
    models: list[str] = []
    weight: float | None = None
    in_flight: int | None = None
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None


class FleetStatus(BaseModel):
    """The gateway's /status.json, as far as the operator commands show it."""

    replicas: list[ReplicaStatus]


def fleet_status(url: str) -> FleetStatus | None:
    """The fleet as the gateway sees it; None where the gateway does not answer."""
    try:
        answer = httpx.get(f"{url}/status.json", timeout=5, trust_env=False).raise_for_status()
    except httpx.HTTPError:
        return None
    return FleetStatus.model_validate_json(answer.content)


def mounted(config: Config) -> dict[str, Path]:
    """The folders of this host that the gateway reads, by where it sees them."""
    return {volume.target: Path(volume.source) for volume in config.services["gateway"].volumes}


def check_named(config: Config) -> None:
    """A Problem where the gateway's fleet files do not name a replica: it would start and get no request."""
    folders = mounted(config)
    folder = folders.get("/etc/nginx/fleet", folders["/etc/nginx"] / "fleet")
    lines = "".join(file.read_text() for file in folder.glob("*.conf"))
    for name in sorted(set(config.replicas) - set(re.findall(r"^\s*upstream\s+(\S+)", lines, re.MULTILINE))):
        line = f"upstream {name} {{ zone {name} 64k; server {name}:8000 resolve; keepalive 64; }}"
        raise Problem(
            f"{folder}/ does not name {name}, so it would get no request",
            f"add this line there, or plan the fleet again (`make plan`): {line}",
        )


def not_ready(
    services: list[str], containers: dict[str, Container], states: dict[str, str], began: Mapping[str, Container]
) -> list[str]:
    """What is still missing, in words; empty when every service is healthy and every replica ready.

    `states` are those that the gateway gives its replicas, `began` the containers at the beginning of the wait. A
    service that waiting will not bring up is a Problem.
    """
    missing = []
    for service in services:
        container = containers.get(service)
        if (
            container is None
            or container.state in {"exited", "dead", "restarting"}
            or crash_loops(container, began.get(service))
        ):
            what = "stops instead of starting" if container else "was removed"
            raise Problem(
                f"{service} {what}", f"see why (docker compose logs {service}), correct it, and run `make up` again"
            )
        if container.health == "unhealthy":
            raise Problem(f"{service} runs but is unwell", f"see why: docker compose logs {service}")
        state = states.get(service, "not in the route yet") if is_replica(service) else "ready"
        if not container.well:
            missing.append(f"{service} {states.get(service) or container.health or container.state}")
        elif state != "ready":
            missing.append(f"{service} {state}")
    return missing


def wait_until_ready(compose: Compose, services: list[str], url: str, say: Say) -> None:
    """Returns when every service is healthy and every replica ready; a Problem has the last words of its service."""
    began = compose.containers()
    while True:
        status = fleet_status(url)
        states = {replica.name: replica.state for replica in status.replicas} if status else {}
        try:
            missing = not_ready(services, compose.containers(), states, began)
        except Problem as problem:
            service = problem.what.split()[0]
            raise Problem(f"{problem.what}: {compose.last_words(service)}", problem.fix) from None
        if status and not missing:
            return
        say(", ".join(missing) or "the gateway does not answer yet")
        time.sleep(1)


def reload_if_changed(compose: Compose, config: Config) -> str:
    """Makes the running gateway read its files again if one of them is newer than what it last read."""
    container = compose.containers()["gateway"].id
    began = ask("docker", "inspect", "--format", "{{.State.StartedAt}}", container).stdout.strip()
    read = max(datetime.fromisoformat(began).timestamp(), RELOADED.stat().st_mtime if RELOADED.exists() else 0)
    # a folder's own time tells of files that went
    files = [path for folder in mounted(config).values() for path in (folder, *folder.rglob("*"))]
    if max(path.stat().st_mtime for path in files) <= read:
        return "unchanged"
    check = ask(*compose.command("exec", "-T", "gateway", "nginx", "-p", "/etc/nginx/", "-t"))
    if check.returncode:
        error = next((line for line in check.stderr.splitlines() if "[emerg]" in line), check.stderr.strip())
        raise Problem(
            f"the gateway's files have a mistake, so it keeps its old configuration: {error}",
            "correct it and run `make up` again",
        )
    compose.ask("exec", "-T", "gateway", "nginx", "-p", "/etc/nginx/", "-s", "reload")
    RELOADED.touch()
    return "read again, as its files changed"


def first_answer(url: str, question: str) -> str:
    """What the fleet says to one question, asked the way users do: as a chat where a model chats; none is a Problem."""
    fix = "see `make status` and `docker compose logs gateway`"
    said = f"{url}/v1/models lists no model"
    try:
        models = httpx.get(f"{url}/v1/models", timeout=10, trust_env=False).raise_for_status().json()["data"]
        for way in WAYS:
            for model in models:
                asked = {"model": model["id"], **way.body(question)}
                answer = httpx.post(url + way.path, json=asked, timeout=ANSWER_SECONDS, trust_env=False)
                if answer.status_code == httpx.codes.OK:
                    return way.said(answer.json(), model["id"])
                said = f"{url}{way.path} answered {answer.status_code}: {answer.text.strip()[:300]}"
                if answer.status_code not in NOT_THIS_WAY:
                    raise Problem(said, fix)
    except (httpx.HTTPError, LookupError) as error:
        raise Problem(f"{url} does not answer: {error}", fix) from None
    raise Problem(said, fix)
