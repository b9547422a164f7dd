"""What was checked is what is sent, and what is no HTTP gets an answer that a client can read."""

import http.client
import re
import socket

import httpx
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lab.sim.fleet import ROOT, Gateway, Replicas

LISTED = set(
    re.findall(r"location = (\S+)\s+\{ include conf\.d/generate\.conf; \}", (ROOT / "nginx/nginx.conf").read_text())
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
