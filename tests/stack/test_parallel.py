"""Tensor parallelism for real: one replica of three processes, on the CPU."""

import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT, Stack, run
from tests.waiting import until

NAME = "vllm-fleet-test-tp3"
ASK = """
import json, sys, urllib.request
messages = [{"role": "user", "content": "What is the capital of France?"}]
body = json.dumps({"model": sys.argv[1], "messages": messages, "max_tokens": 8, "temperature": 0}).encode()
url = "http://127.0.0.1:8000/v1/chat/completions"
request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


@pytest.fixture
def replica_over_three() -> Iterator[str]:
    """A further replica, not in the route, with the settings of vllm-0 but tensor-parallel size 3."""
    subprocess.run(["docker", "rm", "--force", NAME], capture_output=True, check=False)
    command = ["docker", "compose", "run", "--detach", "--no-deps", "--name", NAME, "--env", "TENSOR_PARALLEL_SIZE=3"]
    settings = os.environ | {"REPLICA_MEMORY": "12g"}
    subprocess.run([*command, "vllm-0"], cwd=ROOT, env=settings, capture_output=True, check=True)
    yield NAME
    subprocess.run(["docker", "rm", "--force", NAME], capture_output=True, check=True)


@pytest.mark.timeout(400)
def test_tensor_parallel_replica_answers(stack: Stack, replica_over_three: str) -> None:
    """The default model (9 heads, 3 KV heads) split over three processes answers a chat."""

    def healthy() -> bool:
        state = json.loads(run("docker", "inspect", "--format", "{{json .State}}", replica_over_three))
        if not state["Running"]:
            raise AssertionError(logs(replica_over_three))
        return bool(state["Health"]["Status"] == "healthy")

    until(healthy, 300, "the replica of three processes healthy")
    answer = json.loads(run("docker", "exec", replica_over_three, "python3", "-c", ASK, stack.model))
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["choices"][0]["message"]["content"].strip()
    networks = json.loads(
        run("docker", "inspect", "--format", "{{json .NetworkSettings.Networks}}", replica_over_three)
    )
    names = {name for network in networks.values() for name in network["Aliases"]}
    assert NAME in names
    assert not names & set(stack.replicas()), "it would get requests from the gateway"
    workers = run("docker", "top", replica_over_three, "-eo", "pid,args")
    assert {rank for rank in range(3) if f"TP{rank}" in workers} == {0, 1, 2}


def logs(container: str) -> str:
    """The end of what a container wrote."""
    told = subprocess.run(["docker", "logs", "--tail", "40", container], capture_output=True, text=True, check=False)
    return told.stdout + told.stderr
