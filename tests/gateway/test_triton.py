"""Triton behind the gateway: keys, limits and counts, and what of it is open. A stand-in answers as Triton does."""

import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lab.sim.gateway import Gateway
from lab.sim.keys import keyed
from lab.sim.replicas import Replicas
from lab.waiting import until
from stack.shell import ROOT

WORDS = ["one", " two", " three", " four"]
GENERATE, STREAM = "/v2/models/vllm_model/generate", "/v2/models/vllm_model/generate_stream"
ASK = {"text_input": "Count.", "parameters": {"max_tokens": 4}}
MOST = 2**20


@dataclass
class Triton:
    """A stand-in: what it was sent, and whether it breaks off."""

    host: str
    seen: list[dict[str, Any]] = field(default_factory=list)
    breaks: bool = False
    connections: Callable[[], Iterable[Any]] = list

    def answer(self, asked: dict[str, Any], text: str, made: int) -> dict[str, Any]:
        told = {"num_input_tokens": 2, "num_output_tokens": made}
        counts = {name: value for name, value in told.items() if asked.get(f"return_{name}")}
        return {"model_name": "vllm_model", "model_version": "1", **counts, "text_output": text}

    async def generate(self, request: Request) -> Response:
        asked = await self.note(request)
        if self.breaks:
            for connection in list(self.connections()):
                connection.transport.abort()
        return JSONResponse(self.answer(asked, "".join(WORDS), len(WORDS)))

    async def stream(self, request: Request) -> Response:
        asked = await self.note(request)

        async def events() -> AsyncIterator[str]:
            for word in WORDS:
                yield f"data: {json.dumps(self.answer(asked, word, 1))}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream; charset=utf-8")

    async def index(self, _request: Request) -> Response:
        return JSONResponse([{"name": name, "version": "1", "state": "READY"} for name in ("vllm_model", "other")])

    async def rest(self, request: Request) -> Response:
        await self.note(request)
        return Response()

    async def note(self, request: Request) -> dict[str, Any]:
        body = await request.body()
        self.seen.append({"path": request.url.path, "headers": dict(request.headers), "body": body})
        return json.loads(body) if body else {}

    def app(self) -> Starlette:
        methods = ["GET", "POST"]
        model = "/v2/models/{model}"
        return Starlette(
            routes=[
                Route(f"{model}/generate", self.generate, methods=methods),
                Route(f"{model}/versions/1/generate", self.generate, methods=methods),
                Route(f"{model}/generate_stream", self.stream, methods=methods),
                Route("/v2/repository/index", self.index, methods=methods),
                Route("/{path:path}", self.rest, methods=methods),
            ]
        )


class Served(threading.Thread):
    """A stand-in's server."""

    def __init__(self, triton: Triton) -> None:
        super().__init__()
        triton.connections = lambda: self.server.server_state.connections
        self.server = uvicorn.Server(
            uvicorn.Config(triton.app(), triton.host, 8000, log_level="critical", access_log=False)
        )

    def run(self) -> None:
        self.server.run()

    def __enter__(self) -> None:
        self.start()
        until(lambda: self.server.started, "the stand-in", 30)

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.join(30)


KEYS, FILES = keyed(
    {
        "user": {"role": "user"},
        "admin": {"role": "admin"},
        "other": {"role": "user", "models": ["other"]},
        "little": {"role": "user", "limits": {"tokens_per_day": 100, "max_tokens": 16, "n": 1}},
        "once": {"role": "user", "limits": {"requests_per_minute": 1}},
    }
)


@pytest.fixture(scope="module")
def keyed_gateway() -> Iterator[Gateway]:
    with Replicas(1) as fleet, Gateway(fleet, files=FILES, key=KEYS["admin"]) as running:
        running.wait_ready()
        base = running.host.rpartition(".")[0]
        fleet.dns.names |= {"triton": f"{base}.201", "triton-canary": f"{base}.202"}
        yield running


@pytest.fixture
def triton(keyed_gateway: Gateway) -> Iterator[Triton]:
    stand_in = Triton(f"{keyed_gateway.host.rpartition('.')[0]}.201")
    with Served(stand_in):
        yield stand_in


@pytest.fixture
def canary(keyed_gateway: Gateway) -> Iterator[Triton]:
    stand_in = Triton(f"{keyed_gateway.host.rpartition('.')[0]}.202")
    with Served(stand_in):
        yield stand_in
    keyed_gateway.admin("DELETE", "/canary")


@dataclass
class Caller:
    """Asks the gateway with the key of this name."""

    gateway: Gateway
    name: str = "user"

    def __call__(self, method: str, path: str, name: str = "", **rest: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEYS[name or self.name]}", **rest.pop("headers", {})}
        return httpx.request(method, self.gateway.url + path, headers=headers, timeout=30, **rest)

    def metric(self, name: str, *labels: str) -> float:
        """The sum of the gateway's series of this name that have these labels."""
        lines = httpx.get(f"{self.gateway.metrics_url}/metrics").text.splitlines()
        mine = (line for line in lines if line.startswith(f"{name}{{") and all(label in line for label in labels))
        return sum(float(line.rsplit(" ", 1)[1]) for line in mine)


@pytest.fixture
def ask(keyed_gateway: Gateway) -> Caller:
    return Caller(keyed_gateway)


def data_of(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]


def test_a_whole_answer_is_metered_and_has_only_what_was_asked_for(ask: Caller, triton: Triton) -> None:
    before = ask.metric("gateway_tokens_total", 'key="user"', 'model="vllm_model"')
    plain = ask("POST", GENERATE, json=ASK)
    assert (plain.status_code, plain.headers["x-replica"]) == (200, "triton")
    assert plain.json() == {"model_name": "vllm_model", "model_version": "1", "text_output": "".join(WORDS)}
    some = ask("POST", GENERATE, json=ASK | {"return_num_output_tokens": True}).json()
    assert "num_input_tokens" not in some
    assert some["num_output_tokens"] == 4
    until(
        lambda: ask.metric("gateway_tokens_total", 'key="user"', 'model="vllm_model"') == before + 2 * (2 + 4),
        "both requests' tokens are counted",
    )
    assert ask.metric("gateway_requests_total", 'replica="triton"', 'model="vllm_model"', 'status="200"') >= 2
    assert ask.metric("gateway_time_to_first_byte_seconds_count", 'replica="triton"') >= 2


def test_what_triton_gets_is_what_was_checked(ask: Caller, triton: Triton) -> None:
    text = '{"text_input": "a", "text_input": "b", "parameters": {"max_tokens": 400, "max_tokens": 4}}'
    answer = ask("POST", GENERATE, content=text, headers={"Content-Type": "application/json", "X-Request-Id": "t-1"})
    assert answer.status_code == 200
    (seen,) = triton.seen
    counts = {"return_num_input_tokens": True, "return_num_output_tokens": True}
    assert json.loads(seen["body"]) == {"text_input": "b", "parameters": {"max_tokens": 4}, **counts}
    assert seen["body"].count(b"text_input") == 1
    assert seen["headers"]["x-request-id"] == "t-1"
    assert not {"authorization", "x-api-key", "cookie"} & seen["headers"].keys()


def test_a_stream_passes_event_by_event_and_is_metered(ask: Caller, triton: Triton) -> None:
    labels = ('key="user"', 'kind="completion"', 'model="vllm_model"')
    before = ask.metric("gateway_tokens_total", *labels)
    answer = ask("POST", STREAM, json=ASK | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    said = data_of(answer)
    assert [one["text_output"] for one in said] == WORDS
    assert all(one.keys() == {"model_name", "model_version", "text_output"} for one in said)
    until(lambda: ask.metric("gateway_tokens_total", *labels) == before + 4, "the stream's tokens are counted")
    counted = data_of(ask("POST", STREAM, json=ASK | {"stream": True, "return_num_input_tokens": True}))
    assert [one["num_input_tokens"] for one in counted] == [2] * 4


def test_nobody_comes_in_without_a_key(ask: Caller, triton: Triton) -> None:
    for method, path in [("POST", GENERATE), ("POST", STREAM), ("GET", "/v2/health/ready"), ("GET", "/v2"),
                         ("POST", "/v2/repository/index"), ("GET", "/v2/models/vllm_model")]:  # fmt: skip
        answer = httpx.request(method, ask.gateway.url + path, json=ASK if method == "POST" else None)
        assert answer.status_code == 401, path
        assert answer.headers["x-request-id"] in answer.json()["error"]
    assert not triton.seen


def test_a_key_reaches_its_models_only(ask: Caller, triton: Triton) -> None:
    assert ask("POST", GENERATE, "other", json=ASK).status_code == 404
    assert ask("GET", "/v2/models/vllm_model/ready", "other").status_code == 404
    assert ask("GET", "/v2/models/other/ready", "other").status_code == 200
    names = [[one["name"] for one in ask("POST", "/v2/repository/index", name).json()] for name in ("other", "user")]
    assert names == [["other"], ["vllm_model", "other"]]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"max_tokens": 17}, "answers of 16 tokens at most"),
        ({"max_tokens": 4, "n": 2}, "1 answers at once"),
        ({"max_tokens": "17"}, "answers of 16 tokens at most"),
        ({"max_tokens": 4.5}, "max_tokens is no whole number"),
        ({"max_tokens": None}, "max_tokens has to be"),
    ],
)
@pytest.mark.parametrize("in_text", [False, True])
def test_a_keys_limits_hold(ask: Caller, triton: Triton, parameters: dict[str, Any], said: str, in_text: bool) -> None:
    given = {"sampling_parameters": json.dumps(parameters)} if in_text else {"parameters": parameters}
    answer = ask("POST", GENERATE, "little", json={"text_input": "Count.", **given})
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert not triton.seen


def test_tokens_and_requests_are_charged(ask: Caller, triton: Triton) -> None:
    charged = ask("POST", GENERATE, "little", json=ASK)
    assert charged.status_code == 200
    assert charged.headers["x-ratelimit-limit-tokens"] == "100"
    until(
        lambda: ask("GET", "/v1/usage", "little").json()["limits"]["key"]["tokens_per_day"]["used"] == 6,
        "the day's tokens",
    )
    too_long = ask("POST", GENERATE, "little", json=ASK | {"text_input": "word " * 100})
    assert too_long.status_code == 429
    assert ask("POST", GENERATE, "once", json=ASK).status_code == 200
    assert ask("POST", GENERATE, "once", json=ASK).status_code == 429


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "no JSON object"),
        ("[]", "no JSON object"),
        ("{}", "text_input has to be a text"),
        ('{"text_input": ["a"]}', "text_input has to be a text"),
        ('{"text_input": "a", "embedding_request": "{}"}', "no field embedding_request"),
        ('{"text_input": "a", "temperature": 0}', "no field temperature"),
        ('{"text_input": "a", "stream": 1}', "stream has to be true or false"),
        ('{"text_input": "a", "stream": true}', "ask generate_stream"),
        ('{"text_input": "a", "parameters": {"stream": true}}', "ask generate_stream"),
        ('{"text_input": "a", "parameters": {"stream": 0}}', "stream has to be true or false"),
        ('{"text_input": "a", "parameters": {"stream": false}, "stream": false}', "leave one out"),
        ('{"text_input": "a", "parameters": []}', "parameters has to be a JSON object"),
        ('{"text_input": "a", "sampling_parameters": "[]"}', "sampling_parameters has to be a JSON object"),
        ('{"text_input": "a", "parameters": {}, "sampling_parameters": "{}"}', "only one"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(ask: Caller, triton: Triton, body: str, said: str) -> None:
    answer = ask("POST", GENERATE, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert not triton.seen


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FLAGS = {"stream", "exclude_input_in_output", "return_finish_reason", "return_num_input_tokens"}
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "text_input": st.text() | JSON,
        "parameters": st.dictionaries(st.text(), JSON, max_size=3) | JSON,
        "sampling_parameters": JSON.map(json.dumps) | JSON,
        "other": JSON,
        **dict.fromkeys(FLAGS, st.booleans() | JSON),
    },
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES)
def test_whatever_comes_triton_gets_what_it_takes_and_counts(ask: Caller, triton: Triton, body: dict[str, Any]) -> None:
    triton.seen.clear()
    answer = ask("POST", GENERATE, json=body)
    if answer.status_code == 400:
        assert answer.json()["error"]
        assert not triton.seen
        return
    assert answer.status_code == 200
    sent = json.loads(triton.seen[0]["body"])
    assert set(sent) <= FLAGS | {"text_input", "parameters", "sampling_parameters", "return_num_output_tokens"}
    assert isinstance(sent["text_input"], str)
    assert sent["return_num_input_tokens"] is sent["return_num_output_tokens"] is True
    assert all(isinstance(sent[name], bool) for name in FLAGS & set(sent))


def test_bodies_have_a_length_and_an_end(ask: Caller, triton: Triton) -> None:
    fits = ask("POST", GENERATE, json={"text_input": "a" * (MOST - 100)})
    assert fits.status_code == 200
    assert ask("POST", GENERATE, json={"text_input": "a" * MOST}).status_code == 413
    pieces = iter([b'{"text_input": "a"}'])
    assert ask("POST", GENERATE, content=pieces, headers={"Content-Type": "application/json"}).status_code == 411
    assert len(triton.seen) == 1


def test_http_2_without_tls_has_the_same_door(ask: Caller, triton: Triton) -> None:
    """It is there for gRPC, on the same port, and every path may be asked by it."""
    chat = {"model": "sim", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
    with httpx.Client(base_url=ask.gateway.url, http1=False, http2=True, timeout=30) as session:
        for path, body in ((GENERATE, ASK), ("/v1/chat/completions", chat)):
            assert session.post(path, json=body).status_code == 401
            answer = session.post(path, json=body, headers={"Authorization": f"Bearer {KEYS['user']}"})
            assert (answer.status_code, answer.http_version) == (200, "HTTP/2")
        assert session.get("/metrics").status_code == 401
        assert session.get("/fleet").status_code == 404


TABLE = re.findall(r"^\| (`[^|]+`) \| (open|closed) \| ", (ROOT / "docs/triton.md").read_text(), re.MULTILINE)
PATHS = [(path, fate) for paths, fate in TABLE for path in re.findall(r"`([^`]+)`", paths)]
CALLS = "/inference.GRPCInferenceService/"


@pytest.mark.parametrize(("path", "fate"), [(path, fate) for path, fate in PATHS if path.startswith("/")])
def test_the_docs_table_is_what_is_open(ask: Caller, triton: Triton, path: str, fate: str) -> None:
    path = path.replace("{model}", "vllm_model").replace("{version}", "1").replace("{name}", "x")
    answers = [ask(method, path, "admin", json=ASK if method == "POST" else None) for method in ("GET", "POST")]
    if fate == "open":
        assert 200 in {one.status_code for one in answers}
    else:
        assert {one.status_code for one in answers} == {404}
        assert not triton.seen


@pytest.mark.parametrize(("path", "fate"), [(path, fate) for path, fate in PATHS if not path.startswith("/")])
def test_a_call_of_grpc_is_open_as_the_table_says(ask: Caller, path: str, fate: str) -> None:
    """Where nobody listens an open one gets as far as that, and a closed one does not."""
    headers = {"Content-Type": "application/grpc", "TE": "trailers"}
    answer = ask("POST", CALLS + path, "admin", headers=headers, content=b"")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["grpc-status"] == ("14" if fate == "open" else "12")


@pytest.mark.parametrize(
    "path",
    [
        f"{GENERATE}%0a",
        f"{GENERATE}%0d%0aX:%20y",
        "/v2%0a",
        "/v2/health/live%0A",
        "/v2/models/stats%0a",
        "/v2/models/a%20b/ready",
        "/v2/models/a%2fconfig",
        "/v2/models/a/../../logging",
        "/v2/models/a;b/ready",
        "/v2/models",
        "/v2/",
        f"{CALLS}ModelInfer%0a",
        f"{CALLS}ServerLive/../RepositoryModelUnload",
    ],
)
def test_no_spelling_leads_past_the_table(ask: Caller, triton: Triton, path: str) -> None:
    host, port = ask.gateway.url.removeprefix("http://").split(":")
    for method in ("GET", "POST"):
        with socket.create_connection((host, int(port)), 10) as connection:
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS['admin']}\r\n"
            connection.sendall(f"{head}Content-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
            assert b" 404 " in connection.recv(65536).split(b"\r\n")[0]
    assert not triton.seen


@pytest.mark.parametrize("name", ["little", "once", "other"])
def test_who_has_a_limit_that_grpc_cannot_keep_is_told_so(ask: Caller, name: str) -> None:
    headers = {"Content-Type": "application/grpc", "TE": "trailers"}
    answer = ask("POST", f"{CALLS}ModelStreamInfer", name, headers=headers, content=b"")
    assert (answer.status_code, answer.headers["grpc-status"]) == (200, "7")
    assert "use%20HTTP" in answer.headers["grpc-message"]


def test_a_canary_gets_its_share_and_a_lost_one_none(ask: Caller, triton: Triton, canary: Triton) -> None:
    ask.gateway.admin("PUT", "/canary", {"replicas": ["triton-canary"], "share": 0.2})
    for _ in range(100):
        assert ask("POST", GENERATE, json=ASK).status_code == 200
    # beyond these one of two million runs fails
    assert 3 <= len(canary.seen) <= 42
    assert len(canary.seen) + len(triton.seen) == 100


def test_a_request_goes_to_the_other_where_one_is_away(ask: Caller, triton: Triton) -> None:
    ask.gateway.admin("PUT", "/canary", {"replicas": ["triton-canary"], "share": 1})
    try:
        answer = ask("POST", GENERATE, json=ASK)
        assert (answer.status_code, answer.headers["x-replica"]) == (200, "triton")
    finally:
        ask.gateway.admin("DELETE", "/canary")


def test_without_triton_one_line_says_so(ask: Caller) -> None:
    for method, path in [("POST", GENERATE), ("GET", "/v2/health/ready")]:
        answer = ask(method, path, json=ASK if method == "POST" else None)
        assert answer.status_code == 503
        assert "COMPOSE_PROFILES" in answer.json()["error"]


def test_what_failed_is_in_flight_no_more(ask: Caller) -> None:
    headers = {"Content-Type": "application/grpc", "TE": "trailers"}
    before = ask.metric("gateway_retries_total", 'replica="triton"')
    assert ask("POST", GENERATE, json=ASK).status_code == 503
    assert ask("POST", f"{CALLS}ModelStreamInfer", headers=headers, content=b"").headers["grpc-status"] == "14"
    assert ask.metric("gateway_requests_in_flight", 'replica="triton"') == 0
    assert ask.metric("gateway_retries_total", 'replica="triton"') == before + 1


def test_one_that_breaks_off_is_not_asked_again(ask: Caller, triton: Triton) -> None:
    """The request may be what ends an engine, so it goes nowhere else."""
    triton.breaks = True
    ask.gateway.admin("PUT", "/canary", {"replicas": ["triton-canary"], "share": 0})
    try:
        answer = ask("POST", GENERATE, json=ASK)
    finally:
        ask.gateway.admin("DELETE", "/canary")
    assert answer.status_code == 502
    assert "failed on triton" in answer.json()["error"]
    assert len(triton.seen) == 1


def test_the_fleets_own_canary_does_not_notice(ask: Caller, triton: Triton) -> None:
    ask.gateway.admin("PUT", "/canary", {"replicas": ["triton-canary"], "share": 1})
    try:
        chat = {"model": "sim", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
        assert ask("POST", "/v1/chat/completions", json=chat).headers["x-replica"] == "vllm-0"
    finally:
        ask.gateway.admin("DELETE", "/canary")
