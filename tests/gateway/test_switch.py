"""The one container that has Docker's socket: three things can be asked of it, and nothing else reaches Docker."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import yaml

from lab.http import answers
from lab.sim.gateway import image
from lab.waiting import until
from stack.shell import ROOT

ADDRESS = "127.0.0.77:8123"
URL = f"http://{ADDRESS}"


@dataclass
class Docker:
    """A socket that notes what Docker would be asked, and the switch's log."""

    log: Path
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    """The switch as docker-compose.yml has it, before a socket that is not Docker's."""
    folder = tmp_path_factory.mktemp("switch")
    path, conf, seen = folder / "docker.sock", folder / "switch.conf", Docker(folder / "log")

    class Engine(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.asked.append((self.command, self.path, dict(self.headers.items()), body))
            self.send_response(204)
            self.end_headers()

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

        def address_string(self) -> str:
            return ""

    server = ThreadingUnixStreamServer(str(path), Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    text = (ROOT / "autoscaler" / "switch.conf").read_text()
    assert text.count("listen 8000;") == 1
    conf.write_text(text.replace("listen 8000;", f"listen {ADDRESS};"))
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["switch"]
    command = [word.replace("$$", "$") for word in service["command"]]
    options = "run --rm --init --network host --read-only --cap-drop ALL --security-opt no-new-privileges:true"
    mounts = ["-v", f"{conf}:/etc/switch.conf:ro", "-v", f"{path}:/var/run/docker.sock", "--tmpfs", "/tmp:mode=1777"]  # noqa: S108
    name = ["--name", folder.name + str(folder.stat().st_ino), "--user", service["user"], "--env", "PROJECT=my-fleet"]
    start = [
        "docker",
        *options.split(),
        "--pull",
        "never",
        *mounts,
        *name,
        "--entrypoint",
        command[0],
        image(),
        *command[1:],
    ]
    with seen.log.open("w") as log, subprocess.Popen(start, stdout=log, stderr=log) as process:
        try:
            until(lambda: answers(f"{URL}/health"), f"the switch: {shlex.join(start)}")
            yield seen
        finally:
            process.terminate()
            process.wait(20)
            server.shutdown()
            server.server_close()


@pytest.fixture(autouse=True)
def nothing_asked(docker: Docker) -> None:
    docker.asked.clear()


def test_each_of_the_three_is_exactly_one_request_to_docker(docker: Docker) -> None:
    """Neither the caller's headers, nor its body, nor its query get there."""
    httpx.get(f"{URL}/replicas?all=0&filters=%7B%7D")
    for verb in ("start", "stop"):
        httpx.post(f"{URL}/{verb}/vllm-12?signal=KILL&t=0", content=b'{"Binds": ["/:/host"]}', headers={"X-Mine": "1"})
    asked = [(method, path) for method, path, _, _ in docker.asked]
    (listing,) = [urlsplit(path) for method, path in asked if method == "GET"]
    assert listing.path == "/containers/json"
    query = parse_qs(listing.query)
    assert query.pop("all") == ["1"]
    assert json.loads(query.pop("filters")[0]) == {"name": ["^/my-fleet-vllm-[0-9]+-1$"]}
    assert not query
    assert asked[1:] == [
        ("POST", "/containers/my-fleet-vllm-12-1/start"),
        ("POST", "/containers/my-fleet-vllm-12-1/stop"),
    ]
    for _, _, headers, body in docker.asked:
        assert body == b""
        assert "X-Mine" not in headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/containers/json"),
        ("POST", "/containers/create"),
        ("POST", "/containers/my-fleet-vllm-0-1/exec"),
        ("GET", "/info"),
        ("POST", "/start/gateway"),
        ("POST", "/stop/autoscaler"),
        ("POST", "/start/vllm-0-1"),
        ("POST", "/start/vllm-"),
        ("POST", "/start/vllm-0000"),
        ("POST", "/start/vllm-0/../gateway"),
        ("POST", "/start/vllm-0%2f..%2fgateway"),
        ("POST", "/start/..%2f..%2fimages"),
        ("POST", "/start/vllm-0%00"),
        ("POST", "/start/vllm-0%0d%0aX:1"),
        ("POST", "//start/vllm-0/kill"),
        ("POST", "/kill/vllm-0"),
        ("POST", "/START/vllm-0"),
        ("POST", "/start/my-fleet-vllm-0-1"),
        ("GET", "/start/vllm-0"),
        ("PUT", "/start/vllm-0"),
        ("DELETE", "/stop/vllm-0"),
        ("POST", "/replicas"),
        ("DELETE", "/replicas"),
        ("GET", "/replicas/"),
        ("GET", "/"),
    ],
)
def test_the_switch_passes_nothing_else_on(docker: Docker, method: str, path: str) -> None:
    host, _, port = ADDRESS.partition(":")
    # as it stands: a client's library would tidy it up
    request = f"{method} {path} HTTP/1.1\r\nHost: switch\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    with socket.create_connection((host, int(port)), 5) as connection:
        connection.sendall(request.encode())
        status = int(connection.makefile("rb").readline().split()[1])
    assert status in (400, 403, 404, 405)
    assert docker.asked == []


def test_a_change_leaves_a_line(docker: Docker) -> None:
    httpx.post(f"{URL}/stop/vllm-33")
    httpx.get(f"{URL}/replicas")

    def line() -> str:
        lines = docker.log.read_text().splitlines()
        return next((one for one in lines if "vllm-33" in one), "")

    assert json.loads(until(line, "a line of the audit"))["action"] == "POST /stop/vllm-33"


def test_only_the_switch_has_the_socket_and_only_the_autoscaler_reaches_it() -> None:
    """In docker-compose.yml: no other service mounts anything of Docker's, and their network leads nowhere else."""
    stack = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    with_socket = {name for name, one in stack["services"].items() if "docker.sock" in str(one.get("volumes"))}
    assert with_socket == {"switch"}
    beside = {name for name, one in stack["services"].items() if "switch" in (one.get("networks") or ())}
    assert beside == {"switch", "autoscaler"}
    assert stack["services"]["switch"]["networks"] == ["switch"]
    assert stack["networks"]["switch"] == {"internal": True}
