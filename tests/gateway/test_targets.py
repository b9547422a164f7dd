"""What was checked is what is sent, and what is no HTTP gets an answer that a client can read."""

import http.client
import json
import re
import socket

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from stack.shell import ROOT
from tests.gateway.test_public import error_of

LISTED = set(
    re.findall(
        r"location = (\S+)\s+\{ include conf\.d/generate\.conf; \}", (ROOT / "nginx/conf.d/public.conf").read_text()
    )
)
INSIDE = ["/metrics", "/version", "/health", "/v1/models", "/_sim", "/pause", "/v1/load_lora_adapter"]


def send(gateway: Gateway, request: bytes) -> tuple[int, httpx.Response]:
    """What the gateway answers to these bytes: the whole answer."""
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        body = answer.read()
        return answer.status, httpx.Response(answer.status, headers=answer.getheaders(), content=body)


def seen(fleet: Replicas) -> list[str]:
    """The targets that the replicas were sent through the gateway."""
    return [request["head"].split(" ", 2)[1] for sim in fleet for request in sim.state()["seen"]]


def spelled(path: str) -> st.SearchStrategy[str]:
    """Ways to write a path that a normalisation may bring back to it."""
    odd = st.sampled_from(
        ["/", "//", "/./", "/x/../", "/%2e/", "/x/%2e%2e/", "/x/.%2E/", "/%2F", "%2f", "/x/..;/", "/;/"]
    )
    letters = [st.sampled_from([c, f"%{ord(c):02x}", f"%{ord(c):02X}", c.upper()]) if c != "/" else odd for c in path]
    usual = [st.sampled_from([c] * 30 + [f"%{ord(c):02x}"]) if c != "/" else st.just("/") | odd for c in path]
    return (st.tuples(*usual) | st.tuples(*letters)).map("".join)


TARGETS = st.tuples(
    st.sampled_from(["", "", "", "http://localhost", "HTTP://localhost:1", "//localhost"]),
    st.sampled_from(["", "", "/..", "/metrics/..", "/metrics/%2e%2e", "/_sim/%2E./", "/version/x/../..", "/%2e%2e"]),
    st.sampled_from([*sorted(LISTED), *INSIDE]).flatmap(spelled),
    st.sampled_from(
        ["", "", "/", "/..", "/../metrics", "/..;/metrics", ";/../version", "%3f", "%23", "%00", "#x", "%20", "."]
    ),
    st.sampled_from(["", "", "?a=/../metrics", "?", "?%2e%2e", "?a b"]),
).map("".join)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TARGETS, st.sampled_from(["POST", "POST", "GET"]))
@example("/metrics/../v1/chat/completions", "POST")
@example("/metrics/%2e%2e/v1/chat/completions", "POST")
@example("/v1//chat/completions?x=1", "POST")
@example("http://localhost/metrics/../v1/completions", "POST")
def test_a_replica_sees_listed_paths_only(gateway: Gateway, fleet: Replicas, target: str, method: str) -> None:
    body = b'{"model":"sim","max_tokens":1,"prompt":"a","messages":[]}'
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    send(gateway, f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    assert {path.split("?")[0] for path in seen(fleet)} <= LISTED


def test_another_spelling_of_a_listed_path_works_with_its_query(client: httpx.Client, fleet: Replicas) -> None:
    answer = client.post("/metrics/%2e%2e/v1//chat/%63ompletions?a=%2F&b", json={"model": "sim", "messages": []})
    assert answer.status_code == 200, answer.text
    assert "/v1/chat/completions?a=%2F&b" in seen(fleet)


def test_the_next_replica_gets_the_listed_path_too(client: httpx.Client, gateway: Gateway, fleet: Replicas) -> None:
    for name in ("vllm-0", "vllm-1"):
        fleet[name].fault("status", status=503)
    for n in range(3):
        body = {"model": "sim", "messages": [{"role": "user", "content": f"moved {n}"}]}
        answer = client.post("/metrics/%2e%2e/v1/chat/completions?moved=1", json=body)
        assert answer.headers["x-replica"] == "vllm-2"
    assert {path.split("?")[0] for path in seen(fleet)} <= LISTED
    assert "/v1/chat/completions?moved=1" in seen(fleet)


HOST = b"Host: localhost\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST
MALFORMED = {
    "a NUL in the path": (b"GET /v1/%00 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no hexadecimal": (b"GET /v1/%zz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "above the root": (b"GET /../../x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a space in the path": (b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no method": (b"hello there\r\n\r\n", 400),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "CONNECT": (b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n", 405),
    "TRACE": (b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "a TLS hello": (bytes.fromhex("16030100c8010000c40303") + b"\x01" * 190, 400),
    "half an HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", 400),
    "HTTP/3.0": (b"GET / HTTP/3.0\r\n" + HOST + b"\r\n", 505),
    "20 KB of address": (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "20 KB in one header": (b"GET / HTTP/1.1\r\n" + HOST + b"X-A: " + b"a" * 20_000 + b"\r\n\r\n", 431),
    "100 KB of headers": (b"GET / HTTP/1.1\r\n" + HOST + (b"X-A: " + b"a" * 900 + b"\r\n") * 110 + b"\r\n", 431),
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    "a NUL in a header": (b"GET / HTTP/1.1\r\n" + HOST + b"X-A: a\0b\r\n\r\n", 400),
    "a length that is none": (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: x\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "an encoding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    "a bad chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n", 400),
    "a bad second chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\nzz\r\n", 400),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_http_is_refused_in_json_that_names_the_request(gateway: Gateway, name: str) -> None:
    request, expected = MALFORMED[name]
    status, answer = send(gateway, request)
    assert status == expected
    error_of(answer)


MESSAGES = b"POST /v1/messages HTTP/1.1\r\n" + HOST
REFUSED_MESSAGES = {
    "no Host": (b"POST /v1/messages HTTP/1.1\r\n\r\n", 400),
    "an absolute form": (b"POST http://localhost/v1/messages HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    "a bad chunk": (MESSAGES + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n", 400),
    "20 KB of address": (b"POST /v1/messages?" + b"a" * 20_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "20 KB in one header": (MESSAGES + b"X-A: " + b"a" * 20_000 + b"\r\n\r\n", 431),
    "an encoding": (MESSAGES + b"Transfer-Encoding: gzip\r\n\r\n", 501),
}


@pytest.mark.parametrize("name", REFUSED_MESSAGES)
def test_what_nginx_itself_refuses_has_anthropics_shape_where_that_was_asked(gateway: Gateway, name: str) -> None:
    request, expected = REFUSED_MESSAGES[name]
    status, answer = send(gateway, request)
    assert status == expected
    said = answer.json()
    assert (said["type"], set(said["error"])) == ("error", {"type", "message"})
    assert f"(request id {said['request_id']})" in said["error"]["message"]


def test_the_log_stays_utf_8_and_has_the_path_of_what_was_refused(gateway: Gateway) -> None:
    for path in (b"/v1/%ff/logged", b"/v1/\xff\xfe", b"/v1/%zz"):
        send(gateway, b"GET " + path + b"?secret=1 HTTP/1.0\r\nX-Request-Id: utf-8\r\n\r\n")

    def logged() -> list[str]:
        lines = [json.loads(line) for line in gateway.log().splitlines() if line.startswith("{")]
        return sorted(line["path"] for line in lines if line["id"] == "utf-8")

    until(lambda: len(logged()) == 2, "what has an id is in the log", 5)
    assert logged() == ["/v1/", "/v1/%ff/logged"]
    assert "\ufffd" not in gateway.log()


def test_the_docs_say_why_each_path_is_open() -> None:
    rows = re.findall(r"^\| (`/.*`) \| (open|closed) \| .+ \|$", (ROOT / "docs/design.md").read_text(), re.MULTILINE)
    of = {path: fate for paths, fate in rows for path in re.findall(r"`([^`]+)`", paths)}
    assert sum(len(re.findall(r"`([^`]+)`", paths)) for paths, _ in rows) == len(of), "a path is there twice"
    assert {path for path, fate in of.items() if fate == "open"} == LISTED
