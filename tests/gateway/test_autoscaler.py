"""What the gateway makes of the autoscaler's word: its file is there, old, broken, or away."""

import json
import os
import re
import time
from collections.abc import Iterator

import httpx
import pytest

from lab.http import get
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from stack.gateway import fleet_line
from tests.gateway.conftest import chat


@pytest.fixture(scope="module")
def shared_gateway(fleet: Replicas) -> Iterator[Gateway]:
    with Gateway(fleet, env={"AUTOSCALER_FOLDER": "{conf}/autoscaler"}) as running:
        (running.conf / "autoscaler").mkdir()
        running.wait_ready()
        yield running


@pytest.fixture
def gateway(shared_gateway: Gateway, fleet: Replicas) -> Iterator[Gateway]:
    yield shared_gateway
    (shared_gateway.conf / "autoscaler" / "stopped.json").unlink(missing_ok=True)
    for sim in fleet:
        if sim.ended():
            sim.start()
    shared_gateway.wait_ready()


def say(gateway: Gateway, *names: str, age_s: float = 0) -> None:
    """The autoscaler's word, so many seconds old."""
    path = gateway.conf / "autoscaler" / "stopped.json"
    new = path.with_suffix(".new")
    new.write_text(json.dumps(names))
    os.utime(new, (time.time() - age_s,) * 2)
    new.rename(path)


def answering(gateway: Gateway) -> set[str]:
    """The replicas that answer twelve requests."""
    answers = [httpx.post(f"{gateway.url}/v1/chat/completions", json=chat(f"hello {n}")) for n in range(12)]
    assert {answer.status_code for answer in answers} == {200}
    return {answer.headers["x-replica"] for answer in answers}


def reason(gateway: Gateway, name: str) -> str:
    found: str = next(one for one in gateway.status()["replicas"] if one["name"] == name)["reason"]
    return found


def test_what_the_autoscaler_names_drains_then_is_stopped_and_comes_back(gateway: Gateway, fleet: Replicas) -> None:
    """Nothing new goes to it while it drains; dead it is stopped on purpose, not down; and it loads when it is taken
    back."""
    say(gateway, "vllm-1")
    gateway.wait_states({"vllm-0": "ready", "vllm-1": "draining", "vllm-2": "ready"}, 3)
    assert reason(gateway, "vllm-1") == "drained by the autoscaler"
    assert "vllm-1" not in answering(gateway)
    fleet["vllm-1"].kill()
    gateway.wait_states({"vllm-1": "stopped"})
    assert reason(gateway, "vllm-1") == "stopped by the autoscaler"
    metrics = get(f"{gateway.metrics_url}/metrics").decode()
    shown = dict(re.findall(r'gateway_replica_state\{replica="vllm-1",state="(\w+)"\} (\d)', metrics))
    assert [state for state, value in shown.items() if value == "1"] == ["stopped"]
    # its container has an address again, and opens no port before its model is there
    say(gateway)
    fleet.dns.names["vllm-1"] = fleet["vllm-1"].host
    gateway.wait_states({"vllm-1": "loading"}, 5)
    fleet["vllm-1"].start()
    gateway.wait_ready()


def test_the_word_of_an_autoscaler_that_is_gone_keeps_nothing_out(gateway: Gateway, fleet: Replicas) -> None:
    say(gateway, "vllm-1")
    gateway.wait_states({"vllm-1": "draining"}, 3)
    say(gateway, "vllm-1", age_s=121)
    gateway.wait_states({"vllm-1": "ready"}, 3)
    fleet["vllm-1"].kill()
    gateway.wait_states({"vllm-1": "unreachable"})


@pytest.mark.parametrize("text", ["", "{", "7", '{"vllm-1": 1}', "null", '[["vllm-1"], 7]'])
def test_a_broken_word_takes_nothing_out(gateway: Gateway, text: str) -> None:
    (gateway.conf / "autoscaler" / "stopped.json").write_text(text)
    before = gateway.status()["gateway"]["uptime_s"]
    until(lambda: gateway.status()["gateway"]["uptime_s"] > before + 2, "two looks")
    assert set(gateway.states().values()) == {"ready"}


def test_an_operators_drain_outlasts_the_autoscalers(gateway: Gateway) -> None:
    say(gateway, "vllm-1")
    gateway.wait_states({"vllm-1": "draining"}, 3)
    gateway.admin("PUT", "/replicas/vllm-1/drain")
    say(gateway)
    until(lambda: reason(gateway, "vllm-1") == "drained by the operator", "the operator's word")
    gateway.admin("DELETE", "/replicas/vllm-1/drain")


def test_replicas_come_and_go_without_a_stream_that_breaks(gateway: Gateway, fleet: Replicas) -> None:
    """A file with a further replica, and one that leaves out others, count after a reload; a stream runs through all
    of it."""
    lines = []
    body = chat("a long story", stream=True, max_tokens=400)
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, timeout=60) as stream:
        rows = stream.iter_lines()
        lines.append(next(rows))
        (gateway.conf / "fleet" / "replicas.conf").write_text(fleet_line("vllm-3", fleet.port) + "\n")
        gateway.reload()
        until(lambda: "vllm-3" in gateway.states(), "the further replica")
        (gateway.conf / "fleet" / "replicas.conf").unlink()
        (gateway.conf / "fleet" / "left-out").write_text("vllm-2\n")
        gateway.reload()
        until(lambda: set(gateway.states()) == {"vllm-0", "vllm-1"}, "two replicas")
        assert answering(gateway) <= {"vllm-0", "vllm-1"}
        (gateway.conf / "fleet" / "left-out").unlink()
        gateway.reload()
        lines += rows
    assert "data: [DONE]" in lines
    gateway.wait_ready()
