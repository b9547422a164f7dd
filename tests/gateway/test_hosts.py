"""Replicas on other hosts: what goes through the link between two real Nginx, who is let in, and what is shown."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from lab.hosts.fleet import HostFleet, bare_nginx
from lab.hosts.network import Loopback
from lab.http import get
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas, Sim
from lab.waiting import until
from stack import hosts
from stack import hosts_certificates as certificates
from stack.gateway import fleet_line
from tests.gateway.conftest import chat, seen_by
from tests.gateway.test_routing import counted

FAR = ("vllm-1", "vllm-2", "vllm-3")


@pytest.fixture(scope="module", autouse=True)
def bare() -> Iterator[None]:
    """The image's Nginx outside of a container: the other host's end has to be started like the gateway's."""
    with pytest.MonkeyPatch.context() as patch:
        if "NGINX" not in os.environ:
            # as it is found, it is taken back at the end
            patch.setenv("NGINX", "")
            patch.setenv("NGINX_MODULES", "")
            del os.environ["NGINX"]
        bare_nginx()
        yield


@pytest.fixture(scope="module")
def fleet(bare: None) -> Iterator[HostFleet]:
    """A replica here, and three on gpu-b."""
    with HostFleet(1, {"gpu-b": (Loopback("127.222.17"), 3)}) as replicas:
        yield replicas


@pytest.fixture(scope="module")
def shared_gateway(fleet: HostFleet) -> Iterator[Gateway]:
    with Gateway(fleet) as running:
        running.wait_ready()
        yield running


def served_by(gateway: Gateway, text: str, **headers: str) -> str:
    """The replica that answered."""
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=chat(text), headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-replica"]


def drained(gateway: Gateway, *names: str) -> None:
    """Leaves only the other replicas in the route."""
    for name in names:
        gateway.admin("PUT", f"/replicas/{name}/drain")


def log_lines(gateway: Gateway, request: str) -> list[dict[str, object]]:
    """What the gateway logged of a request."""
    lines = [json.loads(line) for line in gateway.log().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("id") == request]


def test_a_request_goes_to_the_replica_that_was_chosen_and_the_log_says_on_which_host(
    gateway: Gateway, fleet: HostFleet
) -> None:
    for name in FAR:
        drained(gateway, *({"vllm-0", *FAR} - {name}))
        assert served_by(gateway, f"only {name}", **{"X-Request-Id": f"to-{name}"}) == name
        assert len(seen_by(fleet[name], f"only {name}")) == 1
        (line,) = until(partial(log_lines, gateway, f"to-{name}"), "the line is in the log", 5)
        assert (line["replica"], line["host"]) == (name, "gpu-b")
        for other in ("vllm-0", *FAR):
            gateway.admin("DELETE", f"/replicas/{other}/drain")


def test_status_and_targets_say_on_which_host_a_replica_is(gateway: Gateway, fleet: HostFleet) -> None:
    status = gateway.status()
    assert {one["name"]: one["host"] for one in status["replicas"]} == {"vllm-0": "", **dict.fromkeys(FAR, "gpu-b")}
    assert status["differences"] == []
    targets = json.loads(get(f"{gateway.metrics_url}/fleet"))
    assert targets[0] == {"targets": ["vllm-0:9464"], "labels": {"replica": "vllm-0"}}
    assert targets[1:] == [
        {"targets": [f"link-gpu-b:{9464 + number}"], "labels": {"replica": name, "host": "gpu-b"}}
        for number, name in enumerate(FAR)
    ]


def test_prometheus_reaches_the_metrics_of_each_replica_through_the_link(gateway: Gateway, fleet: HostFleet) -> None:
    far = fleet["vllm-2"]
    metrics = Sim("metrics", far.host, 9464, ["--model", "sim"], fleet.dns)
    metrics.start()
    try:
        assert b"vllm:num_requests_running" in get(f"http://{fleet.links['gpu-b'].at}:9465/metrics")
    finally:
        metrics.kill()


def answer_to(
    fleet: HostFleet, own: certificates.Pair | None, name: str, folder: Path
) -> tuple[int, str | None, bytes] | None:
    """What gpu-b's port answers to whoever comes with this certificate and asks for this name: status, X-Refusal and
    body; None if it closes."""
    context = ssl.create_default_context(cadata=fleet.ca)
    context.check_hostname = False
    if own:
        (folder / "own.pem").write_text(own.certificate + own.key)
        context.load_cert_chain(folder / "own.pem")
    far = fleet.far["gpu-b"].space
    try:
        with (
            socket.create_connection((far.address, hosts.PORT), 5) as plain,
            context.wrap_socket(plain, server_hostname=name) as secure,
        ):
            secure.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = http.client.HTTPResponse(secure)
            answer.begin()
            return answer.status, answer.headers["X-Refusal"], answer.read()
    except (ssl.SSLError, ConnectionError):
        return None


def test_only_the_gateways_certificate_opens_the_port(fleet: HostFleet, tmp_path: Path) -> None:
    ca = certificates.read(hosts.folder(fleet.secrets))
    assert ca
    membership = fleet.far["gpu-b"].host.membership
    asked = f"vllm-1.{membership}.fleet"
    late = timedelta(seconds=-1)
    answer = answer_to(fleet, certificates.for_gateway(ca, membership), asked, tmp_path)
    assert answer == (200, None, b'{"version":"0.32.0"}')
    assert answer_to(fleet, None, asked, tmp_path) is None, "a stranger"
    assert answer_to(fleet, certificates.for_host(ca, "gpu-c-00000000"), asked, tmp_path) is None, "another host"
    assert answer_to(fleet, certificates.for_gateway(certificates.authority(), membership), asked, tmp_path) is None
    assert answer_to(fleet, certificates.for_gateway(ca, membership, late), asked, tmp_path) is None, "one that ended"


def test_a_name_that_is_no_replica_leads_nowhere(fleet: HostFleet, tmp_path: Path) -> None:
    ca = certificates.read(hosts.folder(fleet.secrets))
    assert ca
    membership = fleet.far["gpu-b"].host.membership
    own = certificates.for_gateway(ca, membership)
    for name in (f"vllm-9.{membership}.fleet", "vllm-1.gpu-b-00000000.fleet", "localhost", "127.0.0.1"):
        assert answer_to(fleet, own, name, tmp_path) == (503, "unreachable", b"connect failed")


def retries(gateway: Gateway, cause: str) -> float:
    """How often a request went on from a replica of gpu-b, for this cause."""
    return sum(counted(gateway, f'gateway_retries_total{{replica="{name}",cause="{cause}"}}') for name in FAR)


def test_a_host_that_is_gone_costs_no_request_however_many_replicas_it_had(gateway: Gateway, fleet: HostFleet) -> None:
    """Three replicas that cannot be reached are not three that a request may have broken."""
    before = {cause: retries(gateway, cause) for cause in ("connect", "refused")}
    fleet.far["gpu-b"].link.kill()
    try:
        with ThreadPoolExecutor(8) as pool:
            served = list(pool.map(lambda number: served_by(gateway, f"gone {number}"), range(24)))
        assert set(served) == {"vllm-0"}
        gateway.wait_states(dict.fromkeys(FAR, "unreachable"), 5)
        reasons = {one["reason"] for one in gateway.status()["replicas"] if one["name"] in FAR}
        assert reasons <= {"no connection to its host", "a connection failed"}
    finally:
        fleet.far["gpu-b"].link.start()
        gateway.wait_ready()
    assert retries(gateway, "connect") > before["connect"]
    assert retries(gateway, "refused") == before["refused"], "nobody was there who could refuse"


def kept(fleet: HostFleet) -> http.client.HTTPConnection:
    """A connection to the metrics of gpu-b's second replica, kept open as Prometheus keeps its own."""
    return http.client.HTTPConnection(fleet.links["gpu-b"].at, 9465, timeout=5)


def status_of(connection: http.client.HTTPConnection) -> int:
    """What it answers; 0 where it is closed instead. The next call then connects anew."""
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        return 0
    return answer.status


def test_who_keeps_connections_reaches_the_replica_once_it_is_there(gateway: Gateway, fleet: HostFleet) -> None:
    """What answers in place of a host, or of a replica, ends the connection: else it would answer there for ever."""
    far = fleet["vllm-2"]
    metrics = Sim("metrics", far.host, 9464, ["--model", "sim"], fleet.dns)
    try:
        with closing(kept(fleet)) as connection:
            until(lambda: status_of(connection) == 503, "the replica's metrics are not there yet", 5)
            metrics.start()
            until(lambda: status_of(connection) == 200, "they are there", 5)
        fleet.far["gpu-b"].link.kill()
        with closing(kept(fleet)) as connection:
            until(lambda: status_of(connection) == 503, "the host is gone", 5)
            fleet.far["gpu-b"].link.start()
            until(lambda: status_of(connection) == 200, "the host is back", 5)
    finally:
        metrics.kill()
        if not fleet.far["gpu-b"].listening():
            fleet.far["gpu-b"].link.start()
        gateway.wait_ready()


def test_a_replica_that_does_not_run_is_told_from_a_host_that_does_not_answer(
    gateway: Gateway, fleet: HostFleet
) -> None:
    fleet["vllm-2"].kill()
    try:
        gateway.wait_states({"vllm-1": "ready", "vllm-2": "unreachable", "vllm-3": "ready"}, 10)
        (reason,) = {one["reason"] for one in gateway.status()["replicas"] if one["name"] == "vllm-2"}
        assert reason in ("connect failed", "a connection failed")
    finally:
        fleet["vllm-2"].start()
        gateway.wait_ready()


def test_a_retry_after_a_broken_connection_prefers_another_host(gateway: Gateway, fleet: HostFleet) -> None:
    for name in FAR:
        fleet[name].fault("reset")
    for number in range(6):
        assert served_by(gateway, f"reset {number}") == "vllm-0"


class Odd(BaseHTTPRequestHandler):
    """A replica whose host's clock is ahead, of another version, and with another model under the same name."""

    def do_GET(self) -> None:
        answers = {
            "/health": b"",
            "/metrics": b"vllm:num_requests_running 0\n",
            "/version": b'{"version": "0.31.0"}',
            "/v1/models": b'{"data": [{"id": "sim", "root": "/models/other", "parent": null, "max_model_len": 1024}]}',
        }
        self._answer(answers[self.path])

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(b"{}")

    def _answer(self, body: bytes) -> None:
        self.send_response_only(200)
        self.send_header("Date", format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_what_differs_between_hosts_is_told_plainly() -> None:
    with Replicas(1) as fleet:
        address = fleet.gateway_host.rsplit(".", 1)[0] + ".77"
        server = ThreadingHTTPServer((address, 0), Odd)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fleet.dns.names["link-gpu-x"] = address
        lines = fleet.upstreams() + fleet_line("vllm-9", server.server_address[1], at="link-gpu-x") + "\n"
        try:
            with Gateway(fleet, lines) as gateway:
                gateway.wait_ready()
                until(lambda: len(gateway.status()["differences"]) == 3, "differences are told", 20)
                clock, version, model = gateway.status()["differences"]
        finally:
            server.shutdown()
            server.server_close()
    assert clock in {f"The clock of gpu-x is {seconds} s ahead." for seconds in (99, 100)}
    assert version == "Replicas run different versions of vLLM: vllm-0: 0.32.0; vllm-9: 0.31.0."
    assert model.startswith("Replicas serve different models as sim: vllm-0: sim with ")
    assert model.endswith("vllm-9: /models/other with 1024 tokens.")
