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


@pytest.fixture(scope="module")
def planned(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout of its own whose plan has been started, under a project name and port of its own."""
    tmp_path = tmp_path_factory.mktemp("checkout")
    for name in ("scripts", "presets", "nginx", "vllm", "prometheus", "grafana"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "wheels"))
    for name in ("docker-compose.yml", "docker-compose.gpu.yml", ".env.example"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "models" / stack.model, tmp_path / "models" / stack.model)
    command = [sys.executable, str(tmp_path / "scripts" / "plan.py"), stack.model, "--replicas", "1", "--tp", "3"]
    plan = subprocess.run([*command, "--context", "2048"], capture_output=True, text=True, timeout=60)
    assert not plan.returncode, plan.stdout + plan.stderr
    before = check(tmp_path)
    assert before.returncode == 1, before.stdout
    assert "no replica runs" in before.stderr
    up = compose(tmp_path, "up", "--detach", "--no-build", "--wait", "--wait-timeout", "400", "gateway", "vllm-0")
    try:
        assert not up.returncode, up.stderr + compose(tmp_path, "logs", "--tail", "40", "vllm-0").stdout
        yield tmp_path
    finally:
        compose(tmp_path, "down", "--volumes", "--timeout", "5")


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"COMPOSE_PROJECT_NAME": PROJECT, "HTTP_PORT": PORT}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=420)


def compose(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "docker", "compose", *args)


def check(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, str(folder / "scripts" / "plan.py"), "--check", *args)


@pytest.mark.timeout(500)
def test_the_planned_fleet_answers_through_its_gateway(planned: Path, stack: Stack) -> None:
    """The default model (9 heads, 3 KV heads), split over three processes, answers a chat."""
    assert set(compose(planned, "config", "--services").stdout.split()) >= {"gateway", "vllm-0"}
    assert "vllm-1" not in compose(planned, "config", "--services").stdout
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


def test_the_running_fleet_is_as_planned(planned: Path) -> None:
    """Its engine reports the KV cache and the length that the plan says; on a CPU it does not tell its weights."""
    shown = check(planned)
    assert not shown.returncode, shown.stdout + shown.stderr
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["replica", "vllm-0", "planned"], shown.stdout
    (replica,) = json.loads(check(planned, "--json").stdout)["replicas"]
    assert set(replica["apart"]) == {"kv", "kv_tokens", "max_model_len"}
    assert replica["far"] == []
    assert replica["reported"]["max_model_len"] == 2048
