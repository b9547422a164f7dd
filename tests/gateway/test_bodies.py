"""Whatever a client sends: no crash, and no 5xx of the gateway's own making."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.http import get
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import chat, seen_by

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"]
BODIES = {
    "nothing": b"",
    "a NUL": b"\0",
    "no JSON": b"hello",
    "half of JSON": b'{"model":"sim","messages":[{"role":"us',
    "invalid UTF-8": b'{"model":"sim","messages":[{"role":"user","content":"\xff\xfe\xc3("}]}',
    "a lone surrogate": b'{"model":"sim","messages":[{"role":"user","content":"\\ud800"}]}',
    "a NUL inside": b'{"model":"sim","messages":[{"role":"user","content":"a\\u0000b\0"}]}',
    "deep arrays": b'{"model":"sim","messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a huge array": b'{"model":"sim","prompt":[' + b"1," * 500_000 + b"1]}",
    "many messages": json.dumps({"model": "sim", "messages": [{"role": "user", "content": "a"}] * 20_000}).encode(),
    "duplicate keys": b'{"model":"x","model":"sim","messages":[],"messages":[{"role":"user","content":"hi"}]}',
    "messages that are none": b'{"model":"sim","messages":[null,1,"a",{},{"content":{}},{"role":[]}]}',
    "parts of every kind": b'{"model":"sim","messages":[{"role":"user","content":[null,1,{},{"text":5},{"a":1}]}]}',
    "numbers for names": b'{"model":1e999,"messages":5,"prompt":{},"prompt_cache_key":[]}',
    "a number": b"17",
    "a prototype": b'{"__proto__":{"model":"x"},"constructor":1,"model":"__proto__"}',
    "a byte order mark": b'\xef\xbb\xbf{"model":"sim","prompt":"a"}',
}


def own_failure(answer: httpx.Response) -> bool:
    """Whether the gateway, rather than a replica, failed."""
    return answer.status_code >= 500 and "x-replica" not in answer.headers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", BODIES)
def test_odd_bodies_do_no_harm(client: httpx.Client, gateway: Gateway, name: str, path: str) -> None:
    answer = client.post(path, content=BODIES[name], headers={"Content-Type": "application/json"})
    assert not own_failure(answer), answer.text
    assert client.post("/v1/chat/completions", json=chat("still there?")).status_code == 200
    for sign in ("exited on signal", "js exception", "unhandled rejection", "choosing:"):
        assert sign not in gateway.log()


@pytest.mark.parametrize("name", ["nothing", "a huge array", "invalid UTF-8"])
def test_a_chunked_body_is_read_as_well(client: httpx.Client, name: str) -> None:
    def chunks() -> Iterator[bytes]:
        for at in range(0, len(BODIES[name]), 70_001):
            yield BODIES[name][at : at + 70_001]

    assert not own_failure(client.post("/v1/completions", content=chunks()))


def test_a_chunked_chat_is_routed_by_its_model(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", content=iter([json.dumps(chat("in", model="no-such")).encode()]))
    assert answer.status_code == 404
    answer = client.post(
        "/v1/chat/completions", content=iter([b'{"model":"si', b'm",', json.dumps(chat("x")).encode()[1:]])
    )
    assert answer.status_code == 200


def test_a_body_that_never_comes_whole_costs_nobody_else(client: httpx.Client, gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert client.post("/v1/chat/completions", json=chat("meanwhile")).status_code == 200
    until(lambda: all(replica["in_flight"] == 0 for replica in gateway.status()["replicas"]), "none in flight", 5)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=300)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["model", "messages", "role", "content", "prompt", "input", "text", "prompt_cache_key"])
                | st.text(),
                inner,
            )
        ),
        max_leaves=15,
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_body_makes_the_gateway_fail(client: httpx.Client, body: bytes) -> None:
    assert not own_failure(client.post("/v1/chat/completions", content=body))


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Session-Id": "a" * 8000},
        {"X-Session-Id": ""},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"X-Request-Id": "a" * 8000},
    ],
)
def test_odd_headers_do_no_harm(client: httpx.Client, headers: dict[str, str]) -> None:
    raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    assert client.post("/v1/chat/completions", json=chat("odd headers"), headers=raw).status_code == 200


def test_who_names_no_model_is_not_guessed_for_where_there_are_several() -> None:
    with Replicas(1, model="small") as small, Replicas(1, model="large") as large:
        small.dns.names["vllm-9"] = large["vllm-0"].host
        upstreams = small.upstreams() + large.upstreams().replace("vllm-0", "vllm-9")
        with Gateway(small, upstreams=upstreams) as gateway:
            gateway.wait_ready()
            for body in (b'{"prompt":"a"}', b"no JSON"):
                answer = httpx.post(gateway.url + "/v1/completions", content=body)
                assert answer.status_code == 400
                error = answer.json()["error"]
                assert (error["code"], error["param"]) == ("model_required", "model")
                assert "small" in error["message"]
                assert "large" in error["message"]


@pytest.mark.parametrize("length", ["-1e6", "1e308", '"a"', "null"])
def test_a_length_that_a_client_claims_counts_for_nothing(
    gateway: Gateway, client: httpx.Client, fleet: Replicas, length: str
) -> None:
    """A negative one once kept both workers in a loop for ever, one without end kept requests from a replica."""
    for path in ("/v1/completions", "/v1/embeddings"):
        for key in ("prompt", "input"):
            client.post(path, content=f'{{"model":"sim","{key}":["a",{{"length":{length}}}]}}')
    # A new prompt's replica is as good as drawn by lot: twelve leave one of three replicas out once in forty times.
    for n in range(100):
        assert client.post("/v1/chat/completions", json=chat(f"claimed {n} of {length}")).status_code == 200
        if all(seen_by(sim, f"of {json.dumps(length)[1:-1]}") for sim in fleet):
            return
    pytest.fail("a replica got none of a hundred requests")


@pytest.mark.parametrize("odd", [{"toString": 1, "valueOf": 1}, ["a"], 1, True])
def test_odd_roles_and_cache_keys_are_the_replicas_to_judge(client: httpx.Client, odd: object) -> None:
    for more in ({"prompt_cache_key": odd}, {"messages": [{"role": odd, "content": "x"}]}):
        assert client.post("/v1/chat/completions", json=chat("odd") | more).status_code < 500


def test_a_body_of_many_small_values_holds_nobody_up(gateway: Gateway, client: httpx.Client) -> None:
    """While a worker walks through it, every other request is answered as ever, by that worker too."""
    body = b'{"x":[' + b"{}," * 800_000 + b'{}],"model":"sim","prompt":"a","max_tokens":1}'
    with ThreadPoolExecutor(1) as pool:
        walked = pool.submit(client.post, "/v1/completions", content=body)
        longest = 0.0
        while not walked.done():
            began = time.monotonic()
            get(gateway.url + "/health")
            longest = max(longest, time.monotonic() - began)
        assert not own_failure(walked.result())
    assert longest < 0.25
