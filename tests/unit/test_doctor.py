"""`make doctor` names what is wrong, since when, and what to do; it never hangs, and never takes silence for health."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import psutil
import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import doctor
from access.keys import KeyStore
from access.store import Secrets
from diagnosis import deaths, doors, fleet, gpus, looks, machine, seen, show, watch
from diagnosis.findings import MOST, Diagnosis, Exit, Finding, Found, Look, now
from stack import certificate, host, images, settings
from stack.compose import REPLICAS_FILE, Compose
from stack.console import Problem
from stack.gateway import Replica
from stack.prometheus import Prometheus
from stack.shell import ROOT
from tests.unit.fake_stack import FakeStack, before, container, fake_stack

NOTHING = {"settings", "docker", "files", "stack", "gateway", "prometheus"}


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[FakeStack]:
    with fake_stack(tmp_path) as one:
        yield one


def findings(told: dict[str, Any], look: str = "") -> dict[str, dict[str, Any]]:
    """What was found, in one look or in all, by its subject."""
    return {one["subject"]: one for each in told["looks"] if look in ("", each["name"]) for one in each["findings"]}


def test_a_stack_that_is_well_is_said_to_be_so(stack: FakeStack) -> None:
    """Exit status 0, and every look is made."""
    code, told = stack.doctor()
    assert findings(told) == {}
    assert {look["name"]: look["state"] for look in told["looks"]} == {task.name: "well" for task in looks.TASKS}
    assert (code, told["verdict"], told["version"]) == (Exit.WELL, "well", 1)


def test_what_the_autoscaler_has_stopped_is_no_fault(stack: FakeStack) -> None:
    """Neither its container, nor its state, nor that Prometheus cannot read it."""
    image = stack.images["vllm-1"]
    stack.containers["vllm-1"] = container("vllm-1", image, stack.folder, Status="exited", FinishedAt=before(hours=2))
    stack.status["replicas"] = [
        {"name": "vllm-0", "state": "ready"},
        {"name": "vllm-1", "state": "stopped", "reason": "stopped by the autoscaler"},
    ]
    stack.prometheus["targets"]["activeTargets"][-1] |= {"health": "down", "lastError": "no such host"}
    _, told = stack.doctor()
    assert "vllm-1" not in findings(told)
    (result,) = [look["result"] for look in told["looks"] if look["name"] == "replicas"]
    assert result == "1 of 1 ready, vllm-1 stopped by the autoscaler"


def test_each_fault_of_a_broken_stack_is_named_with_since_when_and_what_to_do(stack: FakeStack) -> None:
    """One replica was killed at its memory limit, the other hangs, an alert fires, and a port is another's."""
    died = before(minutes=12)
    image = stack.images["vllm-1"]
    stack.containers["vllm-1"] = container(
        "vllm-1", image, stack.folder, Status="restarting", ExitCode=137, OOMKilled=True, FinishedAt=died
    )
    stack.logs["vllm-1"] = ["launch: vllm serve /models/x", "INFO 11-30 05:43:16 [core.py:1] Loading weights"]
    stack.status["replicas"] = [
        {"name": "vllm-0", "state": "wedged", "reason": "no token for a one-token request in 10.0 s"},
        {"name": "vllm-1", "state": "unreachable", "reason": "connect failed"},
    ]
    ready = datetime(2026, 3, 1, 12, tzinfo=UTC)
    stack.prometheus["query"] = lambda form: {
        "result": [{"metric": {}, "value": [0, str(ready.timestamp())]}] if "vllm-0" in form["query"][0] else []
    }
    stack.prometheus["alerts"]["alerts"] = [
        {
            "state": "firing",
            "activeAt": "2026-03-01T12:00:01.5Z",
            "labels": {"alertname": "ReplicaDown", "severity": "critical", "replica": "vllm-1"},
            "annotations": {"summary": "vllm-1 is down", "runbook": "docs/alerts.md#replicadown"},
        },
        {"state": "pending", "labels": {"alertname": "QueueGrows"}, "activeAt": "2026-03-01T12:00:01Z"},
    ]
    target = stack.target("vllm-1", health="down", lastError="connection refused")
    stack.prometheus["targets"]["activeTargets"][2] = target
    code, told = stack.doctor()
    assert code == Exit.WRONG
    assert told["verdict"] == "wrong"
    replicas = findings(told, "replicas")
    assert "the kernel killed it at its memory limit" in replicas["vllm-1"]["what"]
    assert "Loading weights" in replicas["vllm-1"]["what"]
    assert "REPLICA_MEMORY" in replicas["vllm-1"]["fix"]
    assert replicas["vllm-1"]["since"] == f"{died[:19]}Z"
    assert replicas["vllm-0"]["what"] == "it is wedged: no token for a one-token request in 10.0 s"
    assert replicas["vllm-0"]["since"] == "2026-03-01T12:00:00Z"
    assert "every request is refused" in findings(told, "gateway")["gateway"]["what"]
    alert = findings(told, "alerts")["ReplicaDown (vllm-1)"]
    assert (alert["what"], alert["since"]) == ("vllm-1 is down", "2026-03-01T12:00:01Z")
    assert alert["fix"] == "see docs/alerts.md#replicadown"
    assert "connection refused" in findings(told, "targets")["vllm-1"]["what"]
    assert all(one["fix"] for one in findings(told).values())
    assert next(look["result"] for look in told["looks"] if look["name"] == "alerts") == (
        "1 fire, 1 may soon, of 0 that are watched for"
    )


def test_without_docker_it_says_so_and_looks_at_the_rest(stack: FakeStack) -> None:
    stack.at_free_ports()
    code, told = stack.doctor(path="/nowhere")
    assert code == Exit.WRONG
    assert findings(told)["Docker"]["what"] == "the engine does not answer: docker is not installed"
    states = {look["name"]: look["state"] for look in told["looks"]}
    assert {name for name, state in states.items() if state == "not looked"} == {
        *("files", "ports", "images", "models", "services", "gateway", "replicas", "targets", "alerts", "tokens")
    }
    assert states["disk"] == states["keys"] == "well"
    why = {look["result"] for look in told["looks"] if look["state"] == "not looked"}
    assert why == {"Docker does not answer", "Prometheus does not answer"}


def test_while_docker_does_not_answer_prometheus_is_asked_and_ports_are_nobodys_fault(stack: FakeStack) -> None:
    """The stack goes on without the engine's answers."""
    alert = {"state": "firing", "labels": {"alertname": "GatewayDown"}, "activeAt": ""}
    stack.prometheus["alerts"]["alerts"] = [alert]
    _, told = stack.doctor(path="/nowhere")
    assert findings(told).keys() == {"Docker", "GatewayDown"}


def test_no_rights_on_docker_are_told_as_make_up_tells_them(stack: FakeStack) -> None:
    stack.docker = {"^version": ("", "permission denied while trying to connect to the Docker daemon socket", 1, 0)}
    _, told = stack.doctor()
    assert findings(told)["Docker"]["what"] == "no rights on the Docker socket"


def test_mistakes_in_env_are_all_named_and_do_not_hide_what_runs(stack: FakeStack) -> None:
    (stack.folder / ".env").write_text("HTTP_PROT=8080\nGATEWAY_BODIES_MB=5\nthis is none\nROUTE_POLICY=best\n")
    stack.containers["vllm-1"]["State"] |= {"Status": "exited", "ExitCode": 0, "FinishedAt": before(hours=2)}
    _, told = stack.doctor()
    said = [one["what"] for one in told["looks"][0]["findings"]]
    begins = (
        ".env, line 1: nothing",
        ".env, line 3: this is not",
        "ROUTE_POLICY=best will",
        "GATEWAY_BODIES_MB=5 will",
    )
    assert [one for one, begin in zip(said, begins, strict=True) if not one.startswith(begin)] == []
    assert next(look["state"] for look in told["looks"] if look["name"] == "replicas") == "wrong"
    assert "somebody stopped it" in findings(told, "replicas")["vllm-1"]["what"]


def test_a_stack_that_is_down_is_one_finding(stack: FakeStack) -> None:
    stack.containers.clear()
    stack.status, stack.prometheus = None, {}
    stack.docker = {"^ps .*Ports": ("", "", 0, 0)}
    stack.at_free_ports()
    code, told = stack.doctor()
    assert code == Exit.WRONG
    assert {name: one["fix"] for name, one in findings(told).items() if one["level"] == "wrong"} == {
        "stack": "`make up` starts it"
    }


def test_what_is_newer_than_what_runs_is_a_note(stack: FakeStack) -> None:
    """Another pin, another image, other settings, and another engine.yaml: none of it harms anybody now."""
    old = {"gateway": "vllm-fleet/gateway:1.30.5"}
    stack.containers["gateway"] = container("gateway", old["gateway"], stack.folder)
    stack.containers["vllm-0"]["Image"] = "sha256:older"
    stack.containers["prometheus"]["Config"]["Labels"]["com.docker.compose.config-hash"] = "other"
    code, told = stack.doctor()
    assert (code, [one for one in findings(told).values() if one["level"] == "wrong"]) == (Exit.WELL, [])
    assert {name: one["level"] for name, one in findings(told).items()} == {
        "gateway": "note", "vllm-0": "note", "prometheus": "note",
    }  # fmt: skip
    assert "1.30.5 runs, and this checkout pins vllm-fleet/gateway:1.30.6" in findings(told)["gateway"]["what"]
    assert findings(told)["vllm-0"]["fix"].startswith("`make roll`")


def test_a_service_without_a_container_or_with_files_that_nginx_refuses_is_wrong(stack: FakeStack) -> None:
    del stack.containers["prometheus"]
    stack.prometheus.clear()
    said = "nginx: [emerg] unknown directive 'sever' in /etc/nginx/fleet/default.conf:1"
    stack.docker = {"exec -T gateway nginx": ("", said, 1, 0)}
    _, told = stack.doctor()
    services = next(look for look in told["looks"] if look["name"] == "services")
    assert [one["what"] for one in services["findings"]] == ["it has no container"]
    assert "unknown directive 'sever'" in findings(told, "gateway")["gateway"]["what"]


# ---- looks, one by one


def seen_with(**more: Any) -> seen.Seen:
    return seen.Seen(has=set(NOTHING), **more)


def of(state: dict[str, Any], restarts: int = 0, service: str = "vllm-0") -> seen.Seen:
    """What was seen of a stack with this one container."""
    one = seen.Container.model_validate(container(service, "image", Path("/x"), restarts, **state))
    return seen_with(containers={service: one})


def log(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """What every container logged."""
    text = "".join(f"2026-03-01T12:00:{n:02}.000000000Z {line}\n" for n, line in enumerate(lines))
    monkeypatch.setattr(seen, "ask", lambda *_, **__: subprocess.CompletedProcess([], 0, text, ""))


def test_a_replica_that_starts_again_and_again_is_wrong_though_it_runs_just_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log(monkeypatch, "launch: .env: DTYPE is 'x'; it must be auto", "some later line")
    for restarts, started, level in ((7, before(minutes=1), "wrong"), (7, before(days=2), "note"), (0, before(), None)):
        found = Found()
        fleet.look_at_container("vllm-0", of({"StartedAt": started}, restarts), found)
        assert [one.level for one in found.all] == ([level] if level else [])
        if level:
            assert "its settings are refused. Its log says: launch: .env: DTYPE is 'x'" in found.all[0].what


def test_a_failing_health_check_is_told_since_its_first_failure() -> None:
    began = before(minutes=3)
    runs = [{"Start": before(minutes=4), "ExitCode": 0, "Output": ""}]
    runs += [{"Start": start, "ExitCode": 1, "Output": "not healthy: timed out"} for start in (began, before())]
    found = Found()
    fleet.look_at_container("vllm-0", of({"Health": {"Status": "unhealthy", "Log": runs}}), found)
    (one,) = found.all
    assert one.what == "it runs, but its health check fails: not healthy: timed out"
    assert one.since == datetime.fromisoformat(began).replace(microsecond=0)


def test_what_docker_cannot_start_is_told_in_dockers_words(monkeypatch: pytest.MonkeyPatch) -> None:
    log(monkeypatch)
    found = Found()
    error = 'could not select device driver "nvidia" with capabilities: [[gpu]]'
    fleet.look_at_container("vllm-0", of({"Status": "created", "Error": error}), found)
    assert f"Docker cannot start it ({error})" in found.all[0].what


@pytest.mark.parametrize(
    ("status", "fix"), [("paused", "docker compose unpause vllm-0"), ("created", "`make up` starts it")]
)
def test_a_container_that_has_not_ended_is_not_said_to_have_died(status: str, fix: str) -> None:
    found = Found()
    fleet.look_at_container("vllm-0", of({"Status": status}), found)
    (one,) = found.all
    assert ("ended" in one.what, one.fix) == (False, fix)


def test_a_replica_that_has_just_begun_to_load_is_no_fault() -> None:
    for minutes, level in ((2, "note"), (45, "wrong")):
        one = of({"StartedAt": before(minutes=minutes)})
        one.fleet = {"vllm-0": Replica(name="vllm-0", state="loading")}
        one.has -= {"prometheus"}
        found = Found()
        fleet.look_at_replicas(one, found)
        assert [each.level for each in found.all] == [level]


def test_a_replica_on_another_host_is_looked_at_too() -> None:
    """It has no container here; the gateway knows it."""
    one = of({})
    one.fleet = {"vllm-0": Replica(name="vllm-0", state="ready"), "vllm-far": Replica(name="vllm-far", state="wedged")}
    one.fleet["vllm-far"].on = "gpu-b"
    one.has -= {"prometheus"}
    found = Found()
    assert fleet.look_at_replicas(one, found) == "1 of 2 ready"
    (far,) = found.all
    assert (far.subject, far.fix.partition("so: ")[2]) == ("vllm-far", "on gpu-b, docker compose restart vllm-far")


def test_a_command_to_paste_has_the_files_that_the_stack_was_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain one finds neither replicas that --replicas added, nor links."""
    log(monkeypatch)
    for state in ({"Status": "paused"}, {"Status": "restarting", "ExitCode": 1}):
        one = of(state, service="vllm-2")
        one.compose = Compose(REPLICAS_FILE)
        found = Found()
        fleet.look_at_container("vllm-2", one, found)
        assert "docker compose -f docker-compose.yml" in found.all[0].fix
        assert f"-f {REPLICAS_FILE} " in found.all[0].fix


def test_a_fleet_that_sleeps_is_well() -> None:
    one = of({})
    one.fleet = {f"vllm-{n}": Replica(name=f"vllm-{n}", state="asleep") for n in range(2)}
    one.has -= {"prometheus"}
    found = Found()
    assert fleet.look_at_replicas(one, found) == "0 of 2 ready, 2 asleep"
    assert found.all == []


@pytest.mark.parametrize("apart_s", [0, 4, -4, 60, -60])
def test_a_clock_that_is_apart_is_named(monkeypatch: pytest.MonkeyPatch, apart_s: int) -> None:
    monkeypatch.setattr(fleet, "apart_by", lambda _: {"gateway": 0.0, "vllm-0": float(apart_s)})
    monkeypatch.setattr(fleet, "ask", lambda *_, **__: subprocess.CompletedProcess([], 127, "", ""))
    found = Found()
    fleet.look_at_clocks(seen_with(), found)
    assert [one.subject for one in found.all] == (["vllm-0"] if abs(apart_s) > 5 else [])
    if found.all:
        assert ("ahead of" if apart_s > 0 else "behind") in found.all[0].what


def test_each_clock_is_read_when_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that take their time, one after the other, make no clock wrong."""
    clock = [1_800_000_000.0]

    def date_of(*_: object) -> str:
        clock[0] += 4
        return formatdate(clock[0], usegmt=True)

    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(fleet, "date_of", date_of)
    monkeypatch.setattr(httpx, "get", lambda *_, **__: httpx.Response(200, headers={"Date": date_of()}))
    one = seen_with(fleet={f"vllm-{n}": Replica(name=f"vllm-{n}", state="ready") for n in range(8)})
    assert set(fleet.apart_by(one).values()) == {0.0}
    assert len(fleet.apart_by(one)) == 10


def test_a_disk_that_the_limits_let_overflow_is_a_note_and_one_that_is_full_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(images, "without_base", lambda *_: {})
    monkeypatch.setattr(host, "docker_folder", lambda: tmp_path)
    flags = {"storage.tsdb.retention.size": "5GB"}
    monkeypatch.setattr(Prometheus, "ask", lambda *_, **__: flags)
    monkeypatch.setattr(Prometheus, "vector", lambda *_: [({}, 1 * 2**30)])
    needed = 4 * 2**30 + 1024 * 2**20 + 100 * 10**6
    for free, level in ((needed, None), (needed - 1, "note"), (2**30, "wrong")):
        usage = type("Usage", (), {"free": free, "total": 10**12})
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        found = Found()
        machine.look_at_disks(of({}), found)
        assert {one.level for one in found.all} == ({level} if level else set())


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 2**30), ("512MiB", 2**29), ("0B", 0), ("", 0), ("lots", 0)])
def test_sizes_are_read_as_prometheus_writes_them(text: str, size: int) -> None:
    assert machine.size(text) == size


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Secrets:
    folder = Secrets(tmp_path / "secrets")
    folder.prepare()
    monkeypatch.setattr(doors, "SECRETS", folder)
    monkeypatch.setattr(doors, "asks_for_keys", lambda _: folder.keys.exists())
    monkeypatch.setattr(settings, "value_of", lambda _: None)
    return folder


def keys_found(**wanted: str) -> dict[str, str]:
    found = Found()
    doors.look_at_keys(seen_with(wanted=settings.check(wanted)), found)
    return {one.subject: f"{one.level}: {one.what}" for one in found.all}


def test_keys_that_ended_are_notes_and_files_that_others_may_read_are_wrong(secrets: Secrets) -> None:
    store = KeyStore(secrets, clock=lambda: time.time() - 1000)
    store.create("alice")
    store.create("bob", expires=int(time.time()) - 10)
    assert keys_found() == {"bob": "note: this key has expired"}
    secrets.folder.chmod(0o755)
    secrets.audit.chmod(0o644)
    secrets.keys.chmod(0o600)
    assert keys_found().keys() == {"bob", "secrets/", "secrets/audit.jsonl", "secrets/gateway/keys.json"}
    secrets.keys.write_text("{")
    assert keys_found()["keys"].startswith("wrong: ")


def test_a_gateway_that_asks_nobody_is_wrong_only_where_the_internet_is(
    secrets: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert keys_found(GATEWAY_AUTH="off") == {}
    assert keys_found(GATEWAY_AUTH="off", BIND_ADDRESS="192.168.1.5")["gateway"].startswith("note: ")
    assert "the internet reaches as 8.8.8.8" in keys_found(GATEWAY_AUTH="off", BIND_ADDRESS="8.8.8.8")["gateway"]
    own = [type("A", (), {"address": a, "family": socket.AF_INET}) for a in ("10.0.0.1", "9.9.9.9")]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": own})
    assert doors.public_addresses(ip_address("0.0.0.0")) == ["9.9.9.9"]


@pytest.mark.parametrize(
    ("days", "by_authority", "level"),
    [(90, False, None), (20, False, "note"), (5, False, "wrong"), (-1, False, "wrong"),
     (25, True, None), (20, True, "wrong")],
)  # fmt: skip
def test_a_certificate_is_named_before_it_ends(
    monkeypatch: pytest.MonkeyPatch, days: int, by_authority: bool, level: str | None
) -> None:
    """One of an authority is renewed a month before its end: three weeks before it says that this does not work."""
    end = now() + timedelta(days=days)
    monkeypatch.setattr(doors, "handshake", lambda _: type("C", (), {"not_valid_after_utc": end}))
    monkeypatch.setattr(certificate, "check", lambda: "fine")
    monkeypatch.setattr(certificate, "names", lambda _: ["a.example"])
    values = {"HTTPS_PORT": "443", "BIND_ADDRESS": "0.0.0.0"}
    values |= {"HTTPS_DOMAIN": "a.example", "ACME_EMAIL": "a@b.example"} if by_authority else {}
    found = Found()
    doors.look_at_certificate(seen_with(wanted=settings.check(values)), found)
    assert [one.level for one in found.all] == ([level] if level else [])


def test_a_gpu_that_is_hot_or_failing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetCurrentClocksThrottleReasons": pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "nvmlDeviceGetTemperature": 91,
        "nvmlDeviceGetTotalEccErrors": 3,
        "nvmlDeviceGetRemappedRows": (0, 2, 1, 0),
    }
    for name, value in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, value=value: value)
    log = "2026-03-01T12:00:00,123456+00:00 NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus.\n"
    monkeypatch.setattr(gpus, "ask", lambda *_, **__: subprocess.CompletedProcess([], 0, log * 2, ""))
    found = Found()
    gpus.look(found)
    said = [f"{one.level} {one.subject}: {one.what}" for one in found.all]
    assert said == [
        "wrong GPU 0: it runs slower than it could: it is too hot (91 °C)",
        "wrong GPU 0: its memory had 3 errors since the driver was loaded that could not be corrected",
        "note GPU 0: a bad row of its memory is replaced at the next reset",
        "wrong GPU 0000:01:00: the driver logged XID 79: it has fallen off the bus",
    ]
    assert found.all[-1].since == datetime(2026, 3, 1, 12, tzinfo=UTC)
    error = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    def lost(*_: object) -> None:
        raise error

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lost)
    found = Found()
    gpus.look(found)
    assert "the driver does not reach it" in found.all[0].what


def test_rules_that_cannot_be_evaluated_and_alerts_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    alert = {"state": "firing", "labels": {"alertname": "Watchdog", "severity": "info"}, "activeAt": ""}
    rule = {"name": "r", "type": "recording", "health": "err", "lastError": "many-to-many"}
    told = {"alerts": {"alerts": [alert]}, "rules": {"groups": [{"rules": [rule]}]}}
    monkeypatch.setattr(seen.Seen, "prometheus", type("P", (), {"ask": staticmethod(told.__getitem__)}))
    found = Found()
    watch.look_at_alerts(seen_with(), found)
    assert [(one.level, one.subject) for one in found.all] == [("note", "Watchdog"), ("wrong", "r")]


# ---- what a death means


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("launch: MODEL is 'x': neither a folder below models/ nor a hub name", "its settings are refused"),
        ("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", "KV cache"),
        ("ValueError: 8.0 GiB is needed, which is larger than the available KV cache memory (2.1 GiB).", "KV cache"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB", "the GPU's memory is full"),
        ("ValueError: Free memory on device cuda:0 (3.0/24.0 GiB) is less than desired GPU memory utilization",
         "another program holds"),
        ("RuntimeError: CUDA error: no kernel image is available for execution on the device", "do not go together"),
        ("RuntimeError: The NVIDIA driver on your system is too old (found version 12020)", "do not go together"),
        ("RuntimeError: No CUDA GPUs are available", "sees no GPU"),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", "the GPU failed"),
        ("RuntimeError: NCCL error: unhandled system error", "do not reach each other"),
        ("ValueError: Model architectures ['NewForCausalLM'] are not supported for now.", "architecture"),
        ("safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer", "damaged"),
        ("RuntimeError: Cannot find any model weights with `/models/a/b`", "no model in that folder"),
        ("OSError: [Errno 28] No space left on device", "a disk is full"),
        ("health: the replica lives but makes no token; ended, to start anew", "it hung"),
        ("nginx: [emerg] host not found in upstream \"vllm-9\"", "the gateway's files have a mistake"),
    ],
)  # fmt: skip
def test_a_last_word_is_explained(line: str, why: str) -> None:
    """Whatever stands around it: the engine's own last line only says that something was wrong above."""
    lines = [
        "launch: vllm serve /models/a/b --port 8000",
        f"(EngineCore pid=39) ERROR 11-30 05:43:16 [core.py:1] {line}" if not line.startswith("launch") else line,
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    death = deaths.cause(lines, 1)
    assert why in death.why
    assert death.line == line
    assert death.fix


def test_a_death_without_a_word_is_told_by_its_exit_status() -> None:
    assert "137" in deaths.cause(["loading"], 137).why
    assert deaths.cause([], 0) == deaths.Death("it ended by itself", "it logged nothing", deaths.cause([], 0).fix)
    assert "memory limit" in deaths.cause(["CUDA out of memory"], 137, oom_killed=True).why


@given(st.lists(st.text(max_size=400), max_size=5), st.integers(0, 255), st.booleans())
def test_any_last_words_are_told_in_a_bounded_line(lines: list[str], code: int, oom: bool) -> None:
    death = deaths.cause(lines, code, oom_killed=oom)
    assert len(death.line) <= deaths.LONGEST
    assert death.why
    assert death.fix


# ---- how looks are made


def hangs(_: seen.Seen, __: Found) -> str:
    time.sleep(30)
    return ""


def test_a_look_that_hangs_is_left_behind_and_the_others_are_made() -> None:
    def leaves_a_child(_: seen.Seen, __: Found) -> str:
        subprocess.run([sys.executable, "-c", "import time; time.sleep(60)  # left-by-a-look"])
        return ""

    tasks = [looks.task(name, name, look) for name, look in
             (("a", hangs), ("child", leaves_a_child), ("b", lambda *_: "fine"))]  # fmt: skip
    began = time.monotonic()
    diagnosis, _ = looks.diagnose(lambda _: None, tasks, look_s=0.3)
    assert time.monotonic() - began < 10
    assert [(one.state, one.result) for one in diagnosis.looks] == [
        ("not looked", "no answer within 0 s"), ("not looked", "no answer within 0 s"), ("well", "fine"),
    ]  # fmt: skip
    assert diagnosis.exit is Exit.NOT_LOOKED
    children = [" ".join(child.cmdline()) for child in psutil.Process().children() if child.is_running()
                and child.status() != psutil.STATUS_ZOMBIE]  # fmt: skip
    assert not [words for words in children if "left-by-a-look" in words]


def test_all_looks_together_have_a_limit_too() -> None:
    tasks = [looks.task(str(number), "", hangs) for number in range(5)]
    began = time.monotonic()
    diagnosis, _ = looks.diagnose(lambda _: None, tasks, look_s=0.4, all_s=0.6)
    assert time.monotonic() - began < 3
    assert {one.result for one in diagnosis.looks[2:]} == {"all looks together took too long"}


def test_a_look_that_fails_is_not_taken_for_health_and_a_problem_is_wrong() -> None:
    def fails(_: seen.Seen, __: Found) -> str:
        raise RuntimeError("odd")

    def refuses(_: seen.Seen, __: Found) -> str:
        raise Problem("it is so", "do that")

    diagnosis, _ = looks.diagnose(lambda _: None, [looks.task("a", "A", fails)])
    assert (diagnosis.exit, diagnosis.looks[0].result) == (Exit.NOT_LOOKED, "the look itself failed: RuntimeError: odd")
    diagnosis, _ = looks.diagnose(lambda _: None, [looks.task("a", "A", fails), looks.task("b", "B", refuses)])
    assert diagnosis.exit is Exit.WRONG
    assert diagnosis.looks[1].findings[0].fix == "do that"


def test_what_is_needed_by_a_look_is_learned_by_one_before_it() -> None:
    """Each need is one that a message explains."""
    assert {need for task in looks.TASKS for need in task.needs} <= looks.MISSING.keys()


def test_many_findings_are_bounded_and_the_wrong_ones_kept() -> None:
    found = Found()
    for number in range(300):
        found.note(str(number), "n", "f")
    found.wrong("worst", "w", "f")
    kept = found.bounded()
    assert len(kept) == MOST + 1
    assert kept[0].subject == "worst"
    assert kept[-1].what == f"{301 - MOST} further findings"


# ---- how it is shown

DIAGNOSIS = Diagnosis(
    at=datetime(2026, 3, 1, 12, 30, tzinfo=UTC),
    looks=[
        Look(name="a", title="Settings", state="well", result="[/] .env"),
        Look(name="b", title="Replicas", state="wrong", findings=[
            Finding(level="wrong", subject="vllm-1", what="[red]dead", fix="do [it]",
                    since=datetime(2026, 3, 1, 12, 18, tzinfo=UTC))]),
    ],
)  # fmt: skip


def shown(diagnosis: Diagnosis, width: int) -> str:
    paper = Console(record=True, width=width, file=io.StringIO())
    paper.print(show.table(diagnosis))
    return paper.export_text()


@pytest.mark.parametrize("width", [60, 200])
def test_the_table_shows_what_since_and_what_to_do_as_it_is_written(width: int) -> None:
    text = " ".join(shown(DIAGNOSIS, width).split())
    for part in (
        "vllm-1: [red]dead",
        "12:18 UTC, 12 minutes ago)",
        "What to do: do [it]",
        "[/] .env",
        "1 thing is wrong",
    ):
        assert part in text


def test_the_json_form_is_read_back_and_drawn(tmp_path: Path) -> None:
    """A diagnosis from a bug report can be shown; another file is refused in a line."""
    file, picture = tmp_path / "d.json", tmp_path / "d.svg"
    file.write_text(DIAGNOSIS.model_dump_json())
    assert doctor.read(file) == DIAGNOSIS
    doctor.draw(DIAGNOSIS, picture)
    assert "vllm-1" in picture.read_text()
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", picture.read_text())
    file.write_text('{"version": 2}')
    with pytest.raises(Problem, match="is no diagnosis"):
        doctor.read(file)


def test_the_picture_in_the_docs_is_drawn_from_the_diagnosis_beside_it(tmp_path: Path) -> None:
    """After a change of the table draw it again: doctor.py --show docs/pictures/doctor.json --svg …/doctor.svg."""
    pictures = ROOT / "docs" / "pictures"
    doctor.draw(doctor.read(pictures / "doctor.json"), tmp_path / "doctor.svg")
    assert (tmp_path / "doctor.svg").read_text() == (pictures / "doctor.svg").read_text()


def test_the_json_form_is_the_one_that_programs_were_promised() -> None:
    """Another name or meaning needs another version."""
    told = json.loads(DIAGNOSIS.model_dump_json())
    assert set(told) == {"version", "at", "looks", "verdict"}
    assert set(told["looks"][0]) == {"name", "title", "state", "result", "seconds", "findings"}
    assert set(told["looks"][1]["findings"][0]) == {"level", "subject", "what", "fix", "since"}
    assert [task.name for task in looks.TASKS] == [
        *("settings", "docker", "files", "ports", "memory", "disk", "gpus", "images", "models", "services", "gateway"),
        *("replicas", "targets", "alerts", "certificate", "clock", "keys", "tokens"),
    ]
