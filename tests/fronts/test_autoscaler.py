"""The autoscaler over real replicas, in a project of its own: two become one, two, and one again.

It takes 8 GB of memory, and two loads of the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Self

import httpx
import psutil
import pytest

from stack import images
from stack.compose import Config
from stack.shell import ROOT, wait_for

PROJECT = "vllm-fleet-autoscaler-test"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FREE_GB = 8
TOKENS = 24
# A replica loads for minutes where other programs compute too.
LOAD_S, QUIET_S = 900, 400
SERVICES = ("gateway", "vllm-0", "vllm-1", "prometheus", "switch", "autoscaler")


def until(condition: Callable[[], bool], what: str, within_s: float) -> None:
    """Returns when the condition holds; it is asked seldom, as the replicas need what this host can compute."""
    assert wait_for(condition, within_s, every_s=2), f"{what}: not within {within_s:.0f} s"


def compose(*arguments: str, timeout_s: float = 200) -> str:
    """Standard output of `docker compose ARGUMENTS` for the test's own project."""
    env = {name: os.environ[name] for name in ("PATH", "HOME")}
    env |= {"COMPOSE_PROFILES": "autoscaler", "MAX_NUM_SEQS": "2", "KV_CACHE_GB": "0.5", "DRAIN_SECONDS": "60"}
    files = ["--file=docker-compose.yml", "--file=tests/fronts/test_autoscaler.yml"]
    command = ["docker", "compose", f"--project-name={PROJECT}", "--env-file=/dev/null", *files, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@dataclass
class Load:
    """Clients that ask one request after the other, some of them only when told to; `wrong` is what was not whole."""

    url: str
    answered: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    heavy: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Starts a client that always asks, and seven that do so while `heavy` is set."""
        self.threads = [threading.Thread(target=self.client, args=(number,), daemon=True) for number in range(8)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.heavy.set()
        for thread in self.threads:
            thread.join(120)

    def client(self, number: int) -> None:
        turn = 0
        while not self.over.is_set():
            turn += 1
            if number == 0:
                self.ask(f"{number} {turn}")
                # so that a replica alone is far from full
                self.over.wait(2)
            elif self.heavy.wait(1) and not self.over.is_set():
                self.ask(f"{number} {turn}")

    def ask(self, text: str) -> None:
        """One stream, which has to end with as many tokens as were asked for."""
        messages = [{"role": "user", "content": f"Tell me a story about {text}."}]
        body = {"model": MODEL, "messages": messages, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        tokens, done, replica = 0, False, ""
        try:
            with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=300) as answer:
                replica = answer.headers.get("x-replica", "")
                for line in answer.iter_lines():
                    done = done or line == "data: [DONE]"
                    if line.startswith("data: {") and (usage := json.loads(line[6:]).get("usage")):
                        tokens = usage["completion_tokens"]
                if (answer.status_code, done, tokens) != (200, True, TOKENS):
                    self.wrong.append(f"{answer.status_code} from {replica}, {tokens} tokens, done: {done}")
        except httpx.HTTPError as error:
            self.wrong.append(f"{error!r} from {replica}")
        self.answered[replica] += 1


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The gateway of a stack of two replicas with the autoscaler."""
    free = psutil.virtual_memory().available / 2**30
    if free < FREE_GB:
        pytest.skip(f"two further replicas need {FREE_GB} GB of memory, and {free:.1f} are free")
    config = Config.model_validate_json(compose("config", "--format", "json"))
    config.services = {name: config.services[name] for name in SERVICES}
    images.bring(config, "auto", lambda _: None)
    try:
        compose("up", "--detach", *SERVICES)
        address = "http://" + compose("port", "gateway", "80").strip()
        until(lambda: set(states(address).values()) == {"ready"}, "two replicas are ready", LOAD_S)
        yield address
    finally:
        print(compose("logs", "--no-color", "autoscaler", "switch")[-6000:])
        compose("down", "--volumes", "--timeout=5")


def states(address: str) -> dict[str, str]:
    """The state of each replica; none while the gateway does not answer."""
    try:
        found = httpx.get(f"{address}/status.json", timeout=20).json()["replicas"]
    except (httpx.HTTPError, ValueError):
        return {"gateway": "away"}
    return {replica["name"]: replica["state"] for replica in found}


def containers() -> dict[str, str]:
    """The state of each replica's container."""
    rows = [json.loads(line) for line in compose("ps", "--all", "--format", "json").splitlines()]
    return {row["Service"]: row["State"] for row in rows if row["Service"].startswith("vllm-")}


def actions() -> list[str]:
    """What the autoscaler has done, by its audit log."""
    log = compose("exec", "-T", "autoscaler", "cat", "/var/lib/autoscaler/audit.jsonl")
    return [json.loads(line)["action"] for line in log.splitlines()]


@pytest.mark.timeout(2400)
def test_two_become_one_and_two_and_one_again_and_every_answer_is_whole(url: str) -> None:
    """Under requests all the time: an idle replica is drained and stopped, a queue starts it, and quiet stops one."""
    one_of_two = [{"vllm-0": "ready", "vllm-1": "stopped"}, {"vllm-0": "stopped", "vllm-1": "ready"}]
    with Load(url) as load:
        until(lambda: states(url) in one_of_two, "one is stopped, as one is enough", QUIET_S)
        until(lambda: sorted(containers().values()) == ["exited", "running"], "its container has ended", 90)
        before = load.answered.total()
        load.heavy.set()
        until(lambda: set(states(url).values()) == {"ready"}, "a queue starts it again", LOAD_S)
        until(lambda: load.answered.total() > before + 20, "both answer", 200)
        load.heavy.clear()
        until(lambda: states(url) in one_of_two, "it is quiet again", QUIET_S)
    assert load.wrong == []
    assert set(load.answered) == {"vllm-0", "vllm-1"}
    # a replica that gets nothing more counts as stopped; then its container is ended
    wanted = ["drain", "stop", "stopped", "start", "drain", "stop", "stopped"]
    until(lambda: actions() == wanted, "the last container has ended", 90)
    print(f"{load.answered.total()} answers, all whole: {dict(load.answered)}")
