"""A planned fleet starts for real: the planner's files for a host without a GPU, one replica over three processes."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.stack import Stack
from stack.shell import ROOT

PROJECT = "vllm-fleet-test-planned"
PORT = "18081"


@pytest.fixture
def planned(stack: Stack, tmp_path: Path) -> Iterator[Path]:
    """A checkout of its own with a plan in it, under a project name and port of its own."""
    for name in ("scripts", "presets", "nginx", "vllm", "prometheus", "grafana"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "wheels"))
    for name in ("docker-compose.yml", "docker-compose.gpu.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "models" / stack.model, tmp_path / "models" / stack.model)
    command = [sys.executable, str(tmp_path / "scripts" / "plan.py"), stack.model, "--replicas", "1", "--tp", "3"]
    plan = subprocess.run([*command, "--context", "2048"], capture_output=True, text=True, timeout=60)
    assert not plan.returncode, plan.stdout + plan.stderr
    yield tmp_path
    compose(tmp_path, "down", "--volumes", "--timeout", "5")


def compose(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"COMPOSE_PROJECT_NAME": PROJECT, "HTTP_PORT": PORT}
    return subprocess.run(
        ["docker", "compose", *args], cwd=folder, env=env, capture_output=True, text=True, timeout=420
    )


@pytest.mark.timeout(500)
def test_the_planned_fleet_answers_through_its_gateway(planned: Path, stack: Stack) -> None:
    """The default model (9 heads, 3 KV heads), split over three processes, answers a chat."""
    assert set(compose(planned, "config", "--services").stdout.split()) >= {"gateway", "vllm-0"}
    assert "vllm-1" not in compose(planned, "config", "--services").stdout
    up = compose(planned, "up", "--detach", "--no-build", "--wait", "--wait-timeout", "400", "gateway", "vllm-0")
    assert not up.returncode, up.stderr + compose(planned, "logs", "--tail", "40", "vllm-0").stdout
    processes = compose(planned, "top", "vllm-0").stdout
    assert {rank for rank in range(3) if f"TP{rank}" in processes} == {0, 1, 2}
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ask = {"model": stack.model, "messages": messages, "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/chat/completions", json.dumps(ask).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.headers["X-Replica"] == "vllm-0"
        said = json.load(answer)
    assert said["usage"]["completion_tokens"] == 4
    assert said["choices"][0]["message"]["content"].strip()
