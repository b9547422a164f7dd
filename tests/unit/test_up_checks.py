"""`make up` looks before it leaps: each check lets a good machine pass and names what is wrong with a bad one."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

import ray_front
import ray_image
import triton_image
import up
from stack import checks, docker, host, settings
from stack.console import Problem, one_line_for_mistakes
from stack.shell import ROOT

LOOPBACK = ip_address("127.0.0.1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20.10.24+dfsg1\n", (20, 10, 24)),
        ("Docker Compose version v2.40.3-3", (2, 40, 3)),
        ("github.com/docker/buildx 0.29.1+ds1 0.29.1+ds1-4", (0, 29, 1)),
        ("no version here", None),
    ],
)
def test_version_is_read_from_what_programs_print(text: str, expected: checks.Version | None) -> None:
    assert checks.version(text) == expected


@pytest.mark.parametrize("found", [(2, 24, 4), (2, 25), (3, 0)])
def test_recent_enough_versions_pass(found: checks.Version) -> None:
    checks.recent_enough("Compose", found, (2, 24, 4), "upgrade it")


def test_too_old_a_version_is_named_with_the_one_needed() -> None:
    with pytest.raises(Problem, match=r"Docker engine 19\.3 is too old: 20\.10 or newer is needed: upgrade it"):
        checks.recent_enough("Docker engine", (19, 3), checks.OLDEST_DOCKER, "upgrade it")


def test_no_rights_on_the_socket_are_told_from_an_engine_that_is_down() -> None:
    checks.docker_answers("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is it running?")
    with pytest.raises(Problem, match=r"no rights on the Docker socket: .*usermod -aG docker"):
        checks.docker_answers("permission denied while trying to connect to the Docker daemon socket")


@pytest.mark.parametrize(("systemd", "where"), [(True, "`journalctl -u docker`"), (False, "the end of .*dockerd.log")])
def test_an_engine_that_was_started_and_is_not_this_users_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, systemd: bool, where: str
) -> None:
    monkeypatch.setattr(docker, "SYSTEMD", tmp_path / ("" if systemd else "none"))
    monkeypatch.setattr(docker, "work", lambda *_, **__: None)
    monkeypatch.setattr(docker, "as_root", lambda *args: args)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: None)
    monkeypatch.setattr(docker, "docker_version", lambda: (None, "permission denied while trying to connect"))
    with pytest.raises(Problem, match="no rights on the Docker socket"):
        docker.start(print)
    monkeypatch.setattr(docker, "docker_version", lambda: (None, "Cannot connect to the Docker daemon"))
    clock = itertools.count(step=61)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.raises(Problem, match=f"does not answer a minute after its start: see {where}"):
        docker.start(print)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/x/up.lock"), "/x/up.lock: Permission denied\n.*chown"),
        (OSError(28, "No space left on device", "/x"), "/x: No space left on device"),
        (OSError("odd"), "odd"),
    ],
)
def test_a_file_that_is_refused_is_a_mistake_in_two_lines(
    capsys: pytest.CaptureFixture[str], error: OSError, said: str
) -> None:
    with pytest.raises(SystemExit) as end, one_line_for_mistakes():
        raise error
    assert end.value.code == 1
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("main", "argument"), [(ray_front.main, ["gpu-b"]), (ray_image.main, False), (triton_image.main, False)]
)
def test_what_a_program_reads_of_a_command_has_no_mistakes_in_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: Callable[..., None], argument: object
) -> None:
    def refuse(*_: object) -> str:
        raise Problem("wrong", "mend it")

    for command, function in ((ray_front, "checked"), (ray_image, "build"), (triton_image, "build")):
        monkeypatch.setattr(command, function, refuse)
    with pytest.raises(SystemExit) as end:
        main(argument)
    assert end.value.code == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "wrong\nWhat to do: mend it\n")


@pytest.mark.parametrize(("euid", "whose", "given"), [(0, 0, True), (0, 1, False), (1000, 0, False)])
def test_what_root_made_under_sudo_goes_back_to_the_user_whose_checkout_it_is(
    monkeypatch: pytest.MonkeyPatch, euid: int, whose: int, given: bool
) -> None:
    asked: list[tuple[str, ...]] = []
    owner = ROOT.stat().st_uid
    monkeypatch.setattr(up, "ask", lambda *args: asked.append(args))
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    monkeypatch.setenv("SUDO_UID", str(owner + whose))
    monkeypatch.setenv("SUDO_GID", "7")
    up.give_back()
    assert [(args[0], args[4], str(ROOT / "models") in args) for args in asked] == (
        [("chown", f"{owner}:7", True)] if given else []
    )


def test_too_little_memory_says_how_much_is_needed_and_there() -> None:
    replicas = [3 * checks.GIB, 4 * checks.GIB]
    checks.memory_suffices(8 * checks.GIB, 8 * checks.GIB, replicas)
    with pytest.raises(Problem, match=r"2 replicas and the rest need 7\.5 GiB, 4\.0 of 8\.0 GiB are free"):
        checks.memory_suffices(4 * checks.GIB, 8 * checks.GIB, replicas)


def test_too_little_disk_names_the_folder() -> None:
    checks.disk_suffices(11 * checks.GIB, checks.DISK["cpu"], Path("/var/lib/docker"))
    with pytest.raises(Problem, match=r"5\.0 GiB are free under /var/lib/docker, 11\.0 GiB are needed"):
        checks.disk_suffices(5 * checks.GIB, checks.DISK["cpu"], Path("/var/lib/docker"))


TAKEN = [
    ("127.0.0.1", 80),
    ("10.0.0.1", 8080),
    ("::", 9090),
    ("::1", 9091),
    ("::ffff:127.0.0.1", 9092),
    ("0.0.0.0", 9093),
]


@pytest.mark.parametrize(
    ("address", "port"),
    [("127.0.0.1", 80), ("0.0.0.0", 80), ("127.0.0.1", 9090), ("127.0.0.1", 9092)],
    ids=["same address", "all addresses wanted", "all addresses taken", "as IPv6 writes it"],
)
def test_a_taken_port_is_named_with_its_setting(address: str, port: int) -> None:
    with pytest.raises(Problem, match=rf"port {port} \(HTTP_PORT\) is taken.*set HTTP_PORT in \.env to a free port"):
        checks.port_is_free("HTTP_PORT", ip_address(address), port, TAKEN)


def test_a_port_on_another_address_is_free() -> None:
    checks.port_is_free("HTTP_PORT", LOOPBACK, 8080, TAKEN)
    checks.port_is_free("HTTP_PORT", LOOPBACK, 9091, TAKEN)
    checks.port_is_free("HTTP_PORT", ip_address("::1"), 9093, TAKEN)


@pytest.mark.parametrize(
    ("profiles", "there"), [("alerts", False), ("tokens", False), ("tokens, webui", True), ("*", True)]
)
def test_open_webuis_file_and_port_come_with_its_profile(
    monkeypatch: pytest.MonkeyPatch, profiles: str, there: bool
) -> None:
    monkeypatch.setenv("COMPOSE_PROFILES", profiles)
    wanted = settings.check({"HTTPS_PORT": "443", "WEBUI_PORT": "8085"})
    files = ["docker-compose.tls.yml", *["docker-compose.webui.yml"] * there]
    assert host.further_files(wanted, gpu=False) == files
    ports = host.check_ports(wanted, {80, 443, 8085, 3000, 9090}).split(", ")
    assert ("8085" in ports) == there
    assert wanted.at(wanted.webui_port) == "https://127.0.0.1:8085"
    assert wanted.url == "https://127.0.0.1"


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_program_that_listens_is_found_and_one_that_is_connected_is_not(address: str) -> None:
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        wanted = settings.check({"HTTP_PORT": str(port)})
        with pytest.raises(Problem, match=rf"port {port} \(HTTP_PORT\) is taken"):
            host.check_ports(wanted, set())
        # those of the stack itself are no hindrance
        host.check_ports(wanted, {port, 3000, 9090})
        with socket.create_connection(("127.0.0.1", port)) as client:
            own = settings.check({"HTTP_PORT": str(client.getsockname()[1])})
            host.check_ports(own, {3000, 9090})


@pytest.mark.parametrize(
    ("wanted", "gpus", "toolkit", "override", "expected", "words"),
    [
        ("off", 4, True, "none", False, "GPU=off"),
        ("off", 4, True, "cpu", False, "GPU=off"),
        ("auto", 0, False, "none", False, "run on the CPU"),
        ("auto", 2, True, "none", True, r"2 NVIDIA GPUs: docker-compose\.gpu\.yml is added"),
        ("auto", 2, False, "none", False, "install nvidia-container-toolkit"),
        ("auto", 2, True, "cpu", False, "override.*GPU=on"),
        ("auto", 0, False, "cpu", False, "override.*CPU$"),
        ("auto", 2, True, "gpu", False, "override"),
        ("auto", 2, True, "pins", True, "is added"),
        ("on", 2, True, "gpu", True, "is added"),
    ],
)
def test_the_gpu_file_is_taken_where_docker_can_use_gpus(
    wanted: checks.Choice, gpus: int, toolkit: bool, override: checks.Override, expected: bool, words: str
) -> None:
    taken, why = checks.gpu_choice(wanted, gpus, override, toolkit=toolkit)
    assert taken is expected
    assert re.search(words, why)


@pytest.mark.parametrize(
    ("wanted", "override", "who"),
    [
        ("on", "none", "GPU=on"),
        ("on", "cpu", "GPU=on"),
        ("auto", "gpu", r"docker-compose\.override\.yml"),
        ("auto", "pins", r"docker-compose\.override\.yml"),
    ],
)
@pytest.mark.parametrize(
    ("gpus", "toolkit", "words"),
    [(0, True, "no NVIDIA driver"), (2, False, "no NVIDIA container toolkit: install nvidia-container-toolkit")],
)
def test_gpus_that_were_asked_for_or_planned_and_cannot_be_had_are_a_problem(
    wanted: checks.Choice, override: checks.Override, who: str, gpus: int, toolkit: bool, words: str
) -> None:
    with pytest.raises(Problem, match=f"^{who}.*{words}"):
        checks.gpu_choice(wanted, gpus, override, toolkit=toolkit)


ONE_GPU = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a1)\n"
TWO_SLICES = f"{ONE_GPU}  MIG 3g.40gb     Device  0: (UUID: MIG-b1)\n  MIG 3g.40gb     Device  1: (UUID: MIG-b2)\n"


def test_slices_are_not_counted_as_gpus() -> None:
    assert [checks.gpus_listed(text) for text in ("", ONE_GPU, TWO_SLICES)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("pinned", "listed", "words"),
    [
        (["0", "1"], ONE_GPU, "pinned to GPU 1, but this host has 1"),
        (["0", "1"], TWO_SLICES, "pinned to GPU 1, but this host has 1"),
        (["0"], TWO_SLICES, "MIG has cut"),
    ],
)
def test_replicas_on_gpus_that_are_not_there_need_a_plan(pinned: list[str], listed: str, words: str) -> None:
    with pytest.raises(Problem, match=rf"{words}.*: plan .*`make plan ARGS=a/b`.* GPU=off"):
        checks.gpus_are_there(pinned, listed, "a/b")


def test_gpus_that_are_there_and_slices_by_name_will_do() -> None:
    checks.gpus_are_there(["0"], ONE_GPU, "a/b")
    checks.gpus_are_there(["MIG-b1", "MIG-b2"], TWO_SLICES, "a/b")


@pytest.mark.parametrize("override", ["gpu", "pins"])
def test_a_plan_for_gpus_is_not_started_where_gpus_were_refused(override: checks.Override) -> None:
    with pytest.raises(Problem, match=r"GPU=off, but docker-compose\.override\.yml puts the replicas on GPUs: remove"):
        checks.gpu_choice("off", 2, override, toolkit=True)


def test_a_program_that_is_asked_takes_nothing_of_the_standard_input() -> None:
    """`make up` in a script that a shell reads from its standard input must leave the lines after it."""
    script = "from stack.shell import ask; print(repr(ask('cat').stdout), input())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="the next line\n",
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "'' the next line\n"


def test_two_settings_with_the_same_port_are_named() -> None:
    values = {"HTTP_PORT": "8443", "HTTPS_PORT": "8443"}
    with pytest.raises(Problem, match="HTTP_PORT and HTTPS_PORT are both 8443"):
        host.check_ports(settings.check(values), {8443, 3000, 9090})
    with pytest.raises(Problem, match="HTTP_PORT and GRAFANA_PORT are both 3000"):
        host.check_ports(settings.check({"HTTP_PORT": "3000", "BIND_ADDRESS": "[::]"}), {3000, 9090})
    host.check_ports(settings.check({"HTTP_PORT": "3000", "BIND_ADDRESS": "192.0.2.7"}), {3000, 9090})


def test_traces_are_made_where_they_are_kept_and_only_there() -> None:
    checks.traces_have_a_store(wanted=True, there=True)
    checks.traces_have_a_store(wanted=False, there=False)
    with pytest.raises(Problem, match="nothing takes the traces: add traces to COMPOSE_PROFILES"):
        checks.traces_have_a_store(wanted=True, there=False)
    with pytest.raises(Problem, match=r"none are made: set TRACE_SAMPLE=0\.1"):
        checks.traces_have_a_store(wanted=False, there=True)


def test_a_profile_that_no_service_has_is_named() -> None:
    for right in ("", "tokens", " tokens,", "*"):
        checks.profiles_are_known(right, ["tokens"])
    with pytest.raises(Problem, match=r"COMPOSE_PROFILES names token, which no service has: .*tokens"):
        checks.profiles_are_known("tokens,token", ["tokens"])
