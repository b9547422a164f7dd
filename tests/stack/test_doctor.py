"""`make doctor` finds the running stack well and names what is not; `make report` packs it."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import httpx

from lab.stack import Stack
from lab.waiting import until
from stack.shell import ROOT


def doctor() -> tuple[int, dict[str, Any]]:
    """The exit status of `make doctor` and its JSON."""
    # within `make test` it would tell its folder first, into the JSON
    command = ["make", "--no-print-directory", "doctor", "ARGS=--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    return done.returncode, json.loads(done.stdout)


def findings(told: dict[str, Any], level: str) -> list[str]:
    """What was found of this level, a line each."""
    every = [one for look in told["looks"] for one in look["findings"] if one["level"] == level]
    return [f"{one['subject']}: {one['what']}" for one in every]


def test_the_running_stack_is_well_and_every_look_is_made(stack: Stack) -> None:
    """Exit status 0, and no look that could not be made. An alert that an earlier test caused has time to end."""
    last: list[Any] = []

    def well() -> bool:
        last[:] = doctor()
        return bool(last[0] == 0)

    try:
        until(well, "make doctor finds nothing wrong", 180)
    except TimeoutError:
        raise AssertionError(findings(last[1], "wrong")) from None
    told = last[1]
    assert told["verdict"] == "well"
    assert [look["name"] for look in told["looks"] if look["state"] == "not looked"] == []
    results = {look["name"]: look["result"] for look in told["looks"]}
    count = len(stack.replicas())
    assert results["replicas"] == f"{count} of {count} ready"
    # the gateway, Prometheus and each replica say what time it is
    assert results["clock"].startswith(f"{count + 2} parts within")


def test_a_replica_that_is_drained_is_named(stack: Stack) -> None:
    """By the gateway's word, whatever Docker says of it."""
    victim = max(stack.replicas())
    url = f"http://127.0.0.1:8081/replicas/{victim}/drain"
    stack.compose("exec", "-T", "gateway", "curl", "--silent", "--fail", "--request", "PUT", url)
    try:
        until(lambda: stack.states()[victim] == "draining", "the gateway drains it")
        assert f"{victim}: it is draining" in "\n".join(findings(doctor()[1], "note"))
    finally:
        stack.compose("exec", "-T", "gateway", "curl", "--silent", "--fail", "--request", "DELETE", url)
        stack.wait_ready()


def test_the_report_has_all_parts_and_nothing_that_was_asked(stack: Stack, tmp_path: Path) -> None:
    """Logs and metrics of every replica, within its limit; a prompt and a key that were sent are in none of it, though
    a stack that asks for keys refuses one that it does not know."""
    prompt, key = "the planted prompt of this test", "sk-fleet-planted0123456789"
    body = {"model": stack.model, "max_tokens": 2, "messages": [{"role": "user", "content": prompt}]}
    for headers in (stack.headers, {"Authorization": f"Bearer {key}"}):
        answer = httpx.post(f"{stack.url}/v1/chat/completions", json=body, headers=headers, timeout=120)
        assert answer.status_code == 200 or headers != stack.headers
    made = subprocess.run(
        ["make", "report", f"ARGS=--out {tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.stat().st_size < 20 * 2**20
    with tarfile.open(archive) as tar:
        files = {one.name.partition("/")[2]: tar.extractfile(one) for one in tar.getmembers()}
        texts = {name: file.read().decode() for name, file in files.items() if file}
    for replica in stack.replicas():
        assert "launch: vllm serve" in texts[f"logs/{replica}.log"] or texts[f"logs/{replica}.log"]
        assert f'"replica":"{replica}"' in texts["metrics.jsonl"]
    assert json.loads(texts["status.json"])["replicas"]
    assert json.loads(texts["doctor.json"])["version"] == 1
    hidden = [prompt, key, *(value.removeprefix("Bearer ") for value in stack.headers.values())]
    assert [name for name, text in texts.items() if any(one in text for one in hidden)] == []
