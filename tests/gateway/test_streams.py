"""Streams of large events and to clients that do not read: they cost the gateway no more time or memory than others."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import chat
from tests.gateway.test_metrics import exposed

MIB = 2**20


def seconds_of(gateway: Gateway, fleet: Replicas, size: int) -> float:
    """How long a stream takes whose one event has so many bytes, all of which arrive."""
    for sim in fleet:
        sim.fault(wide=size)
    began = time.monotonic()
    answer = httpx.post(
        gateway.url + "/v1/chat/completions", json=chat(f"a wide one {began}", stream=True, max_tokens=1), timeout=60
    )
    taken = time.monotonic() - began
    assert answer.text.count("x") >= size
    assert answer.text.endswith("data: [DONE]\n\n")
    return taken


def test_an_event_of_16_mib_takes_as_long_as_its_bytes(gateway: Gateway, fleet: Replicas) -> None:
    """Four times the bytes take two to four times as long; where each piece is joined to all before, over 20 times."""

    def ratio() -> float:
        quarter = min(seconds_of(gateway, fleet, 4 * MIB) for _ in range(3))
        return seconds_of(gateway, fleet, 16 * MIB) / quarter

    until(lambda: ratio() < 8, "16 MiB take less than 8 times as long as 4 MiB", 60)


def test_others_go_on_beside_an_event_of_16_mib(gateway: Gateway, fleet: Replicas) -> None:
    for sim in fleet:
        sim.fault(wide=16 * MIB)

    def longest_wait_s() -> float:
        waits = []
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(httpx.Client(base_url=gateway.url, timeout=60)) for _ in range(4)]
            body = chat(f"a wide one {time.monotonic()}", stream=True, max_tokens=1)
            answer = stack.enter_context(clients[0].stream("POST", "/v1/chat/completions", json=body))
            for _ in answer.iter_bytes(MIB):
                for client in clients[1:]:
                    began = time.monotonic()
                    client.get("/health")
                    waits.append(time.monotonic() - began)
        return max(waits)

    until(lambda: longest_wait_s() < 0.2, "nobody waits for it", 60)


def resident(gateway: Gateway) -> int:
    """Bytes of memory that all workers hold."""
    texts = [Path(f"/proc/{pid}/status").read_text() for pid in gateway.serving_workers()]
    return 1024 * sum(int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) for text in texts)


def made_by(fleet: Replicas) -> int:
    """Tokens that the replicas have made for clients: the gateway's probes take some too."""
    return sum(sim.state()["tokens"] for sim in fleet)


def completions(gateway: Gateway) -> float:
    """Tokens of answers that the gateway has counted."""
    return sum(value for series, value in exposed(gateway).items() if 'kind="completion"' in series)


@contextlib.contextmanager
def deaf_client(gateway: Gateway, events: int) -> Iterator[socket.socket]:
    """A client that asks for a stream of so many tokens and reads nothing of it."""
    host, port = gateway.url.removeprefix("http://").split(":")
    body = json.dumps(chat("I do not listen", stream=True, max_tokens=events)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(head.encode() + body)
        yield connection


def test_a_client_that_reads_nothing_costs_little_memory(gateway: Gateway, fleet: Replicas) -> None:
    """The gateway takes no more from the replica than the client reads, and gives all of it when it does."""
    for sim in fleet:
        sim.fault(wide=64 * 1024)
    httpx.post(gateway.url + "/v1/chat/completions", json=chat("warm", stream=True, max_tokens=64), timeout=60)
    before = resident(gateway)
    counted = completions(gateway)
    made = made_by(fleet)
    count = 640  # 40 MiB
    with deaf_client(gateway, count) as connection:
        until(lambda: made_by(fleet) == made + count, "the replica has made all of it")
        most = max(resident(gateway) for _ in range(50))
        assert most - before < 8 * MIB
        got = bytearray()
        while not got.endswith(b"\r\n0\r\n\r\n"):
            piece = connection.recv(MIB)
            assert piece, "it broke off"
            got += piece
        assert got.count(b"x") >= count * 64 * 1024
    # Most of it passed without the meter.
    until(lambda: 0.9 * count <= completions(gateway) - counted <= 1.1 * count, "its tokens are counted", 5)


def test_a_client_that_reads_late_gets_no_usage_that_it_did_not_ask_for(gateway: Gateway, fleet: Replicas) -> None:
    for sim in fleet:
        sim.fault(wide=4000)
    made = made_by(fleet)
    count = 600  # 2.4 MiB
    with deaf_client(gateway, count) as connection:
        until(lambda: made_by(fleet) == made + count, "the replica has made all of it")
        got = bytearray()
        while not got.endswith(b"\r\n0\r\n\r\n"):
            piece = connection.recv(MIB)
            assert piece, "it broke off"
            got += piece
    assert got.count(b"data: {") >= count
    assert b"usage" not in got
    until(lambda: 'memory"} 0' in httpx.get(gateway.metrics_url + "/metrics").text, "its room is free again", 5)


def test_a_connection_that_is_to_be_closed_is_not_in_flight_for_long(gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    body = json.dumps(chat("close it", max_tokens=2)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)
        while connection.recv(MIB):
            pass
        # The client keeps its side open.
        until(lambda: not any(one["in_flight"] for one in gateway.status()["replicas"]), "it is over", 3)
