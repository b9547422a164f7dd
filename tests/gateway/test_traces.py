"""One span a request, as a store gets it: of the right trace, with what the gateway knows, without what was said."""

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import chat, resized, seen_by
from tests.gateway.test_access import CHAT, bearer, entry, keys_file, new_key
from tests.gateway.test_metrics import exposed

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
LATE = "0af7651916cd43dd84ffffffffffffff"  # the ids whose end is highest are those that are kept
ALICE, BOSS = new_key(), new_key()


class Store:
    """A store of traces that keeps what it is sent. It is `traces` in the replicas' network."""

    def __init__(self, fleet: Replicas) -> None:
        self.messages: list[ExportTraceServiceRequest] = []
        self._dns = fleet.dns
        self._host = fleet.gateway_host

    def __enter__(self) -> Self:
        messages = self.messages

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                assert (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
                body = self.rfile.read(int(self.headers["Content-Length"]))
                messages.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((self._host, 4318), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._dns.names["traces"] = self._host
        return self

    def __exit__(self, *_: object) -> None:
        del self._dns.names["traces"]
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> list[Span]:
        """All spans so far."""
        scopes = [scope for message in self.messages for one in message.resource_spans for scope in one.scope_spans]
        return [span for scope in scopes for span in scope.spans]

    def of(self, request_id: str) -> Span:
        """The one span of this request, when it is there."""

        def found() -> list[Span]:
            return [span for span in self.spans() if attributes(span).get("gateway.request_id") == request_id]

        until(found, f"the span of {request_id}", 10)
        (span,) = found()
        return span


def attributes(of: Any) -> dict[str, Any]:
    """The attributes of a span or an event."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in of.attributes}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Replicas]:
    with Replicas(2) as replicas:
        yield replicas


@pytest.fixture(scope="module")
def store(fleet: Replicas) -> Iterator[Store]:
    with Store(fleet) as running:
        yield running


@pytest.fixture(scope="module")
def traced(fleet: Replicas, store: Store) -> Iterator[Gateway]:
    """A gateway that keeps half of all traces."""
    keys = keys_file(entry("alice", ALICE), entry("boss", BOSS, role="admin")).encode()
    env = {"TRACE_SAMPLE": "0.5"}
    with Gateway(fleet, env=env, files={"secrets/keys.json": keys}, key=BOSS) as gateway:
        gateway.wait_ready()
        yield gateway


class Asking:
    """Sends requests that can be found again."""

    number: ClassVar[int] = 0

    def __init__(self, gateway: Gateway, fleet: Replicas) -> None:
        self.gateway = gateway
        self.fleet = fleet

    def __call__(self, key: str = ALICE, path: str = CHAT, **more: Any) -> tuple[str, httpx.Response]:
        """A request's id, and its answer. `traceparent` and `tracestate` are headers, the rest is its body's."""
        Asking.number += 1
        request_id = f"r-{Asking.number}-"
        headers = {**bearer(key), "X-Request-Id": request_id}
        headers |= {name: more.pop(name) for name in ("traceparent", "tracestate") if name in more}
        answer = httpx.post(self.gateway.url + path, json=chat(request_id, **more), headers=headers, timeout=30)
        return request_id, answer

    def sent(self, request_id: str) -> dict[str, str]:
        """The headers with which a replica got the request at last."""
        (request,) = [request for sim in self.fleet for request in seen_by(sim, f'"{request_id}"')]
        lines = request["head"].split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


@pytest.fixture
def ask(traced: Gateway, fleet: Replicas) -> Iterator[Asking]:
    yield Asking(traced, fleet)
    for sim in fleet:
        sim.fault()
    traced.wait_ready()


def test_a_span_has_the_clients_trace_and_is_the_replicas_parent(ask: Asking, store: Store) -> None:
    request_id, answer = ask(BOSS, traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="a=b", stream=True, max_tokens=5)
    assert answer.status_code == 200
    span = store.of(request_id)
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.kind) == (TRACE, PARENT, Span.SPAN_KIND_SERVER)
    assert ask.sent(request_id)["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01"
    assert ask.sent(request_id)["tracestate"] == "a=b"
    told = attributes(span)
    expected = {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "sim",
        "gen_ai.request.stream": True,
        "gen_ai.usage.output_tokens": 5,
        "gateway.key": "boss",
        "gateway.replica": answer.headers["x-replica"],
        "gateway.tries": 1,
    }
    assert expected.items() <= told.items()
    assert told["gateway.reason"]
    assert told["gen_ai.usage.input_tokens"] > 0
    assert 0 <= told["gateway.time_to_replica"] <= told["gen_ai.response.time_to_first_chunk"]
    took_ns = span.end_time_unix_nano - span.start_time_unix_nano
    assert told["gen_ai.response.time_to_first_chunk"] * 1e9 <= took_ns < 30e9
    resource = store.messages[-1].resource_spans[0].resource
    assert attributes(resource) == {"service.name": "gateway"}


def test_a_trace_begins_here_where_the_client_has_none(ask: Asking) -> None:
    """About half are kept: each one's id decides, and the replica is told."""
    flags = []
    for _ in range(30):
        request_id, _ = ask(max_tokens=1)
        version, trace, span, flag = ask.sent(request_id)["traceparent"].split("-")
        assert (version, len(trace), len(span)) == ("00", 32, 16)
        assert flag == ("01" if trace[-14:] >= "8" + 13 * "0" else "00")
        flags.append(flag)
    assert {"00", "01"} == set(flags)


def test_only_an_administrator_can_have_a_trace_kept(ask: Asking) -> None:
    """Others could fill the store. Whoever does not want it kept is heard."""
    for key, trace, flag, kept in [
        (BOSS, TRACE, "01", "01"),
        (ALICE, TRACE, "01", "00"),
        (ALICE, LATE, "01", "01"),
        (ALICE, LATE, "00", "00"),
        (BOSS, LATE, "00", "00"),
    ]:
        request_id, _ = ask(key, traceparent=f"00-{trace}-{PARENT}-{flag}")
        version, same, _, said = ask.sent(request_id)["traceparent"].split("-")
        assert (version, same, said) == ("00", trace, kept), (key, trace, flag)


HEX = "0123456789abcdef"


@given(
    st.one_of(
        st.text(alphabet=HEX + "-gG,; ", max_size=80).map(str.strip),
        st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{31,33}-[0-9a-f]{15,17}-[0-9a-f]{1,3}(-[0-9a-f]*)?", fullmatch=True),
    )
)
@example(f"00-{TRACE}-{PARENT}-01-extra")
@example(f"01-{TRACE}-{PARENT}-01-extra")
@example(f"ff-{TRACE}-{PARENT}-01")
@example(f"00-{'0' * 32}-{PARENT}-01")
@example(f"00-{TRACE}-{'0' * 16}-01")
@example(f"00-{TRACE.upper()}-{PARENT}-01")
@example(f"00-{TRACE}-{PARENT}-01, 00-{TRACE}-{PARENT}-01")
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_malformed_parent_is_replaced_and_its_state_dropped(ask: Asking, header: str) -> None:
    request_id, answer = ask(traceparent=header, tracestate="a=b")
    assert answer.status_code == 200
    sent = ask.sent(request_id)
    version, trace, span, flag = sent["traceparent"].split("-")
    assert (version, len(trace), len(span), flag in ("00", "01")) == ("00", 32, 16, True)
    assert set(trace + span) <= set(HEX)
    if valid(header):
        assert (trace, sent["tracestate"]) == (header.split("-")[1], "a=b")
    else:
        assert trace not in header
        assert "tracestate" not in sent


def valid(header: str) -> bool:
    """Whether a header is a parent by the letter of W3C's trace context."""
    parts = header.split("-")
    if [len(part) for part in parts[:4]] != [2, 32, 16, 2] or set("".join(parts[:4])) - set(HEX):
        return False
    zero = not parts[1].strip("0") or not parts[2].strip("0")
    return not zero and parts[0] != "ff" and (len(parts) == 4 or parts[0] != "00")


def test_failed_tries_are_in_the_span(ask: Asking, store: Store, fleet: Replicas) -> None:
    fleet["vllm-0"].fault("reset")
    fleet["vllm-1"].fault("reset")
    request_id, answer = ask(traceparent=f"00-{TRACE}-{PARENT}-01")
    assert answer.status_code == 502
    span = store.of(request_id)  # though its trace is none of those that are kept
    assert (span.trace_id.hex(), span.status.code) == (TRACE, Status.STATUS_CODE_ERROR)
    assert [event.name for event in span.events] == ["retry", "retry"]
    tries = [attributes(event) for event in span.events]
    assert {one["gateway.replica"] for one in tries} == {"vllm-0", "vllm-1"}
    assert {one["gateway.cause"] for one in tries} == {"reset"}
    times = [event.time_unix_nano for event in span.events]
    assert span.start_time_unix_nano <= times[0] <= times[1] <= span.end_time_unix_nano
    assert (attributes(span)["gateway.tries"], attributes(span)["error.type"]) == (2, "502")


def test_a_stream_that_breaks_off_is_kept_and_logged(ask: Asking, store: Store, fleet: Replicas) -> None:
    for sim in fleet:
        sim.fault("cut", after_tokens=3)
    request_id = "cut-off"
    headers = {**bearer(ALICE), "X-Request-Id": request_id, "traceparent": f"00-{TRACE}-{PARENT}-00"}
    body, lines = chat(request_id, stream=True, max_tokens=40), []
    with (
        contextlib.suppress(httpx.RemoteProtocolError),
        httpx.stream("POST", ask.gateway.url + CHAT, json=body, headers=headers) as answer,
    ):
        for line in answer.iter_lines():
            lines.append(line)  # noqa: PERF402 - the end of the stream raises
    assert any("stream_lost" in line for line in lines)
    span = store.of(request_id)
    assert (span.status.code, attributes(span)["error.type"]) == (Status.STATUS_CODE_ERROR, "stream_lost")
    assert line_of(ask.gateway, request_id)["cut"] is True


def line_of(gateway: Gateway, request_id: str) -> dict[str, Any]:
    """The line of this request in the gateway's log."""
    until(lambda: f'"id":"{request_id}"' in gateway.log(), "its line in the log", 5)
    (line,) = [line for line in gateway.log().splitlines() if f'"id":"{request_id}"' in line]
    found: dict[str, Any] = json.loads(line)
    return found


def test_the_log_has_a_line_with_what_the_request_took(ask: Asking) -> None:
    request_id, answer = ask(BOSS, traceparent=f"00-{TRACE}-{PARENT}-01", stream=True, max_tokens=5)
    line = line_of(ask.gateway, request_id)
    told = {name: line[name] for name in ("key", "model", "replica", "completion_tokens", "cut", "trace")}
    replica = answer.headers["x-replica"]
    assert told == {
        "key": "boss",
        "model": "sim",
        "replica": replica,
        "completion_tokens": 5,
        "cut": False,
        "trace": TRACE,
    }
    assert line["prompt_tokens"] > 0
    assert line["cached_tokens"] >= 0
    assert 0 < line["ttft"] <= line["seconds"]
    refused = line_of(ask.gateway, ask("sk-fleet-nobodys")[0])
    assert (refused["status"], refused["ttft"], refused["prompt_tokens"]) == (401, None, None)


def test_a_refused_request_has_a_span_too(ask: Asking, store: Store) -> None:
    request_id, answer = ask(model="nobody's", traceparent=f"00-{LATE}-{PARENT}-01")
    assert answer.status_code == 404
    told = attributes(store.of(request_id))
    assert (told["gateway.reason"], told["gateway.tries"], told["http.response.status_code"]) == ("refused", 0, 404)
    assert "gateway.replica" not in told


def test_no_span_and_no_line_has_what_was_said_or_a_key(ask: Asking, store: Store) -> None:
    planted = "planted-7c1e"
    answers = []
    for more in ({"stream": True}, {}, {"model": planted}, {"user": planted}, {"stop": planted}):
        request_id, answer = ask(BOSS, traceparent=f"00-{LATE}-{PARENT}-01", tracestate=f"x={planted}", **more)
        answers.append(answer)
    assert store.of(request_id)
    line_of(ask.gateway, request_id)
    said = answers[1].json()["choices"][0]["message"]["content"]
    assert len(said) > 5
    shown = b"".join(message.SerializeToString() for message in store.messages).decode("latin-1") + ask.gateway.log()
    assert [text for text in (planted, said, BOSS, ALICE) if text in shown] == []


def test_a_dead_store_costs_spans_and_nothing_else() -> None:
    """5,000 requests: each is answered, what waits is bounded, what is lost is counted, and the rest goes on later."""
    body = json.dumps(chat("a dead store", model="nobody's"))

    def some(host: str) -> int:
        right = 0
        with contextlib.closing(http.client.HTTPConnection(host, 8080, timeout=30)) as server:
            for _ in range(1250):
                server.request("POST", CHAT, body, {"Content-Type": "application/json"})
                answer = server.getresponse()
                answer.read()
                right += answer.status == 404
        return right

    with Replicas(1) as fleet, Gateway(fleet, env={"TRACE_SAMPLE": "1"}) as gateway:
        gateway.wait_ready()

        def spans(result: str) -> float:
            return exposed(gateway)[f'gateway_spans_total{{result="{result}"}}']

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(some, [gateway.host] * 4)) == 5000
        assert (spans("sent"), spans("lost") >= 3000) == (0, True)
        with Store(fleet) as store:
            until(lambda: spans("sent") + spans("lost") == 5000, "every span is sent or counted", 20)
            assert 0 < spans("sent") == len(store.spans()) <= 2000


def test_spans_that_find_no_room_are_counted_and_nothing_else_happens() -> None:
    with Replicas(1) as fleet, Gateway(fleet, env={"TRACE_SAMPLE": "1"}, files=resized(spans="32k")) as gateway:
        gateway.wait_ready()
        ask = Asking(gateway, fleet)
        assert {ask(model="nobody's")[1].status_code for _ in range(100)} == {404}
        assert exposed(gateway)['gateway_spans_total{result="lost"}'] > 0
        assert "[error]" not in gateway.log()


def test_without_the_setting_what_the_client_sent_passes_as_it_came() -> None:
    with Replicas(1) as fleet, Gateway(fleet) as gateway:
        gateway.wait_ready()
        ask = Asking(gateway, fleet)
        request_id, _ = ask(traceparent="whatever", tracestate="a=b")
        assert (ask.sent(request_id)["traceparent"], ask.sent(request_id)["tracestate"]) == ("whatever", "a=b")
        request_id, _ = ask()
        assert "traceparent" not in ask.sent(request_id)
        assert line_of(gateway, request_id)["trace"] == ""
        assert [value for series, value in exposed(gateway).items() if "gateway_spans" in series] == [0, 0]


def test_a_share_that_is_none_is_named() -> None:
    with Replicas(1) as fleet, Gateway(fleet, env={"TRACE_SAMPLE": "1.5"}) as gateway:
        until(lambda: "TRACE_SAMPLE=1.5 is no share from 0 to 1" in gateway.log(), "the complaint", 5)
