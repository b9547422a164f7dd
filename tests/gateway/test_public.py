"""What clients reach, and what they do not."""

import contextlib
import datetime
import http.client
import itertools
import json
import re
import socket
import time

import anthropic
import httpx
import openai
import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import chat, seen_by


def error_of(answer: httpx.Response) -> dict[str, object]:
    """The error of an answer, whose shape and request id are checked."""
    assert answer.headers["content-type"].startswith("application/json"), answer.text
    error: dict[str, object] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"] in str(error["message"])
    return error


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/metrics",
        "/v1",
        "/v1/",
        "/v1/load_lora_adapter",
        "/pause",
        "/invocations",
        "/version",
        "/docs",
        "/fleet",
        "/replicas",
        "/v1/chat/completions/",
        "/v1/chat/completions/../../metrics",
        "/_sim",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_not_listed_is_not_there(client: httpx.Client, path: str, method: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "not_found"


@pytest.mark.parametrize(("method", "path", "allowed"), [
    ("GET", "/v1/chat/completions", "POST"), ("DELETE", "/v1/completions", "POST"), ("POST", "/v1/models", "GET"),
])  # fmt: skip
def test_the_wrong_method_is_named(client: httpx.Client, method: str, path: str, allowed: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    error_of(answer)


@pytest.mark.parametrize("length", [f"Content-Length: {65 * 2**20}", "Transfer-Encoding: chunked"])
def test_too_large_a_body_is_refused_whether_announced_or_not(gateway: Gateway, length: str) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode())
        if "chunked" in length:
            connection.sendall(b"%x\r\n " % (65 * 2**20))
        answer = http.client.HTTPResponse(connection)
        with contextlib.closing(answer):
            answer.begin()
            body = answer.read()
    assert answer.status == 413
    error_of(httpx.Response(answer.status, headers=answer.getheaders(), content=body))


def test_bytes_that_are_no_http_get_a_plain_400(gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n")
        assert b" 400 " in connection.recv(65536).split(b"\r\n")[0]


def test_an_error_of_the_replica_passes_untouched(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", content=b"{not json")
    assert answer.status_code == 400
    assert answer.headers["x-replica"].startswith("vllm-")


def test_an_unknown_model_is_refused_with_the_names_there_are(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json=chat("hi", model="gpt-9"))
    assert answer.status_code == 404
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "gpt-9" in str(error["message"])
    assert "sim" in str(error["message"])


def test_a_request_id_is_made_kept_returned_logged_and_passed_on(
    client: httpx.Client, gateway: Gateway, fleet: Replicas
) -> None:
    mine = client.post("/v1/chat/completions", json=chat("id one"), headers={"X-Request-Id": "my-id.1"})
    assert mine.headers.get_list("x-request-id") == ["my-id.1"]
    made = client.post("/v1/chat/completions", json=chat("id two")).headers["x-request-id"]
    bad = client.post("/v1/chat/completions", json=chat("id three"), headers={"X-Request-Id": 'x"y z'})
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert re.fullmatch("[0-9a-f]{32}", bad.headers["x-request-id"])
    heads = [request["head"] for sim in fleet for request in seen_by(sim, "id one")]
    assert len(heads) == 1
    assert "X-Request-Id: my-id.1" in heads[0]
    until(lambda: "my-id.1" in gateway.log(), "the request is in the log")


def test_the_log_tells_of_each_request_where_it_went_and_why(client: httpx.Client, gateway: Gateway) -> None:
    answer = client.post("/v1/chat/completions", json=chat("log me"))
    until(lambda: answer.headers["x-request-id"] in gateway.log(), "the request is in the log")
    lines = [json.loads(line) for line in gateway.log().splitlines() if line.startswith("{")]
    line = next(line for line in lines if line["id"] == answer.headers["x-request-id"])
    assert line["status"] == 200
    assert line["path"] == "/v1/chat/completions"
    assert line["model"] == "sim"
    assert line["replica"] == answer.headers["x-replica"]
    assert line["reason"] == "load"
    assert line["upstream_status"] == "200"
    assert float(line["ttfb"]) > 0


def test_headers_reach_the_replica_and_come_back(client: httpx.Client, fleet: Replicas) -> None:
    answer = client.post("/v1/chat/completions", json=chat("headers"), headers={"Anthropic-Version": "2023-06-01"})
    head = next(request["head"] for sim in fleet for request in seen_by(sim, "headers"))
    assert "Anthropic-Version: 2023-06-01" in head
    assert "X-Forwarded-For: 127." in head
    assert answer.headers["server"] == "nginx"


def test_tokens_come_one_by_one(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/chat/completions", json=chat("stream", stream=True, max_tokens=200)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        times = [time.monotonic() for line in answer.iter_lines() if line.startswith("data: {")]
    assert len(times) >= 200
    # 200 steps of 10 ms: held back, they would all come at the end.
    assert times[-1] - times[0] > 1
    assert sum(later - earlier > 0.003 for earlier, later in itertools.pairwise(times)) > 100


def test_a_client_that_hangs_up_stops_the_generation(client: httpx.Client, gateway: Gateway, fleet: Replicas) -> None:
    def aborted() -> int:
        return sum(sim.state()["finished"]["abort"] for sim in fleet)

    before = aborted()
    with client.stream("POST", "/v1/chat/completions", json=chat("bye", stream=True, max_tokens=5000)) as answer:
        next(answer.iter_lines())
    until(lambda: aborted() == before + 1, "the replica stopped", 3)
    until(lambda: all(replica["in_flight"] == 0 for replica in gateway.status()["replicas"]), "none in flight", 3)


def test_models_are_those_of_all_replicas(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["sim"]
    assert client.get("/v1/models/sim").json()["id"] == "sim"
    missing = client.get("/v1/models/gpt-9")
    assert missing.status_code == 404
    error_of(missing)


ALIASES = ["sim", "claude-sim", "openai/sim"]


def test_a_model_under_several_names_is_listed_and_answers_under_each() -> None:
    with Replicas(2, "--adapters", "1", model=",".join(ALIASES)) as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        with httpx.Client(base_url=gateway.url, timeout=30) as client:
            listed = client.get("/v1/models?limit=1000").json()
            assert [card["id"] for card in listed["data"]] == [*ALIASES, "sim-adapter-0"]
            assert gateway.status()["models"] == [*ALIASES, "sim-adapter-0"]
            homes = set()
            # A conversation goes on under another name: the engine has one cache for all.
            for name in ALIASES * 3:
                answer = client.post("/v1/chat/completions", json=chat("one and the same " * 20, model=name))
                assert answer.status_code == 200
                homes.add(answer.headers["x-replica"])
            assert len(homes) == 1
            assert client.post("/v1/chat/completions", json=chat("hi", model="sim2")).status_code == 404
            # An adapter is another model, with a cache of its own, as long as its base.
            adapter = client.get("/v1/models/sim-adapter-0").json()
            assert (adapter["parent"], adapter["max_model_len"]) == ("sim", 32768)


def test_the_list_of_models_serves_clients_of_both_apis(client: httpx.Client) -> None:
    """Open WebUI and Continue read OpenAI's fields, Claude Code Anthropic's."""
    listed = client.get("/v1/models?limit=1000").json()
    [card] = listed["data"]
    assert (listed["object"], card["object"], card["owned_by"]) == ("list", "model", "vllm")
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, "sim", "sim")
    assert (card["type"], card["display_name"]) == ("model", "sim")
    assert card["max_model_len"] == card["max_input_tokens"] == 32768
    made = datetime.datetime.fromisoformat(card["created_at"])
    assert made.timestamp() == card["created"]
    assert client.get("/v1/models/sim").json() == card
    common = {"api_key": "none", "max_retries": 0}
    with anthropic.Anthropic(base_url=str(client.base_url), **common) as theirs:  # type: ignore[arg-type]
        assert [(model.id, model.created_at) for model in theirs.models.list(limit=1000)] == [("sim", made)]
    with openai.OpenAI(base_url=f"{client.base_url}/v1", **common) as other:  # type: ignore[arg-type]
        assert [model.id for model in other.models.list()] == ["sim"]


def test_health_ready_and_status_answer(client: httpx.Client) -> None:
    health = client.get("/health")
    assert (health.text, health.headers["content-type"]) == ("ok\n", "text/plain")
    assert client.get("/ready").json() == {"ready": 3, "asleep": 0, "replicas": 3}
    status = client.get("/status.json").json()
    assert status["models"] == ["sim"]
    assert status["gateway"]["policy"] == "prefix"
    assert set(status["replicas"][0]) == {
        "name", "host", "state", "reason", "models", "weight", "in_flight", "running", "waiting", "kv_usage",
        "prefix_hit_rate", "tokens_per_s", "ttft_ms",
    }  # fmt: skip


def test_the_status_page_is_served_and_locked_down(client: httpx.Client) -> None:
    page = client.get("/status")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in ("/status/status.js", "/status/status.css"):
        assert client.get(path).status_code == 200
    assert client.get("/status/../nginx.conf").status_code == 404
    assert client.get("/status/%2e%2e/nginx.conf").status_code == 404


@pytest.mark.parametrize(("settings", "status"), [
    ({"BIND_ADDRESS": "0.0.0.0"}, 401), ({"BIND_ADDRESS": "0.0.0.0", "GATEWAY_AUTH": "off"}, 200),
    ({"BIND_ADDRESS": "127.0.0.1"}, 200), ({"BIND_ADDRESS": "[::1]"}, 200), ({"BIND_ADDRESS": "[::]"}, 401),
])  # fmt: skip
def test_beyond_loopback_nobody_is_let_in_without_keys_unless_told_so(settings: dict[str, str], status: int) -> None:
    with Replicas(1) as replicas, Gateway(replicas, env=settings) as gateway:
        # The status needs a key too.
        until(lambda: httpx.get(gateway.url + "/ready").status_code == 200, "the replica is ready")
        answer = httpx.post(gateway.url + "/v1/chat/completions", json=chat("hi"))
        assert answer.status_code == status
        if status == 401:
            assert "GATEWAY_AUTH=off" in str(error_of(answer)["message"])
