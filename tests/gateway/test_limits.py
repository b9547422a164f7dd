"""What a key may use: each limit is reached at its value, by all workers together, and only admitted requests count."""

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from stack.shell import ROOT
from tests.gateway.conftest import chat, resized, seen_by
from tests.gateway.test_access import CHAT, bearer, entry, keys_file, new_key
from tests.gateway.test_public import error_of

WORKERS = 4


def workers(count: int) -> dict[str, bytes]:
    text = (ROOT / "nginx/nginx.conf").read_text()
    text = re.sub(r"worker_processes \d+", f"worker_processes {count}", text)
    return {"nginx.conf": text.replace("worker_affinity=10", "worker_affinity=1" + "0" * (count - 1)).encode()}


class Keys:
    """A gateway of four workers, and keys as tests ask for them."""

    strict = ""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.entries: list[dict[str, Any]] = []
        self.more: dict[str, Any] = {}

    def make(self, **more: Any) -> str:
        """A new key, in force when this returns; keywords as in keys.json."""
        key = new_key()
        self.entries.append(entry(f"k{len(self.entries)}", key, **more))
        self.write()
        until(
            lambda: httpx.get(self.gateway.url + "/v1/models", headers=bearer(key)).status_code == 200,
            "the key is in force",
        )
        return key

    def write(self) -> None:
        self.gateway.write_secret("keys.json", keys_file(*self.entries, **self.more))


@pytest.fixture(scope="module")
def fleet() -> Iterator[Replicas]:
    with Replicas(2) as replicas:
        yield replicas


@pytest.fixture(scope="module")
def keys(fleet: Replicas) -> Iterator[Keys]:
    # Without a file the gateway would be open until the first key is in force.
    files = {"secrets/keys.json": keys_file().encode(), **workers(WORKERS)}
    with Gateway(fleet, files=files) as gateway:
        until(lambda: httpx.get(gateway.url + "/ready").status_code == 200, "ready")
        yield Keys(gateway)


@pytest.fixture
def client(keys: Keys) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=keys.gateway.url, timeout=30) as session:
        yield session


def early_in_a_minute() -> None:
    """Windows are the clock's minutes: waits for one that has time for a test."""
    until(lambda: time.time() % 60 < 45, "a minute begins", 20)


def many(gateway: Gateway, key: str, count: int, body: Any = None, **headers: str) -> list[httpx.Response]:
    """The answers to as many requests at once, each on a connection of its own."""

    def one(_: int) -> httpx.Response:
        return httpx.post(gateway.url + CHAT, json=body or chat("many"), headers={**bearer(key), **headers}, timeout=60)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def admitted(answers: list[httpx.Response]) -> int:
    assert {answer.status_code for answer in answers} <= {200, 429}
    return sum(answer.status_code == 200 for answer in answers)


def test_of_two_hundred_at_once_four_workers_admit_exactly_the_limit(keys: Keys) -> None:
    key = keys.make(limits={"requests_per_minute": 37})
    early_in_a_minute()
    answers = many(keys.gateway, key, 200)
    assert admitted(answers) == 37
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert error_of(refused)["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert "x-should-retry" not in refused.headers
    assert admitted(many(keys.gateway, key, 5)) == 0


def test_a_reload_in_the_midst_of_them_admits_none_more(keys: Keys) -> None:
    key = keys.make(limits={"requests_per_minute": 41, "tokens_per_minute": 10**6})
    early_in_a_minute()
    with ThreadPoolExecutor(3) as pool:
        waves = [pool.submit(many, keys.gateway, key, 60) for _ in range(2)]
        keys.gateway.reload()
        waves.append(pool.submit(many, keys.gateway, key, 80))
        answers = [answer for wave in waves for answer in wave.result()]
    assert len(answers) == 200
    assert admitted(answers) == 41


def test_tokens_are_reserved_so_that_no_burst_overshoots(keys: Keys) -> None:
    """Each may need its prompt and its max_tokens; what it did not need is given back when its usage is known."""
    key = keys.make(limits={"tokens_per_minute": 1000})
    early_in_a_minute()
    answers = many(keys.gateway, key, 100, chat("x", max_tokens=80))
    used = sum(answer.json()["usage"]["total_tokens"] for answer in answers if answer.status_code == 200)
    assert 500 < used <= 1000
    last = httpx.post(keys.gateway.url + CHAT, json=chat("x", max_tokens=200), headers=bearer(key))
    assert last.status_code == (200 if used < 700 else 429)
    assert int(last.headers["x-ratelimit-remaining-tokens"]) <= 1000 - used


def test_requests_at_once(keys: Keys, client: httpx.Client) -> None:
    key = keys.make(limits={"parallel_requests": 5})
    assert admitted(many(keys.gateway, key, 60, chat("slow", max_tokens=1500))) == 5
    # However they end, places are free again at once: here streams that are dropped.
    for _ in range(3):
        streams = [
            client.stream("POST", CHAT, json=chat("drop", stream=True, max_tokens=2000), headers=bearer(key))
            for _ in range(5)
        ]
        answers = [stream.__enter__() for stream in streams]
        assert [answer.status_code for answer in answers] == [200] * 5
        refused = client.post(CHAT, json=chat("sixth"), headers=bearer(key))
        assert refused.status_code == 429
        assert "parallel_requests" in refused.text
        for stream in streams:
            stream.__exit__(None, None, None)
        until(
            lambda: client.post(CHAT, json=chat("free"), headers=bearer(key)).status_code == 200, "a place is free", 2
        )


def test_a_slow_upload_is_a_request_at_once(keys: Keys, client: httpx.Client) -> None:
    """Its place is taken before its body is read, which lies in memory or on disk, and free again when it ends."""
    key = keys.make(limits={"parallel_requests": 2})
    body = json.dumps(chat("slow")).encode()
    host, port = keys.gateway.url.removeprefix("http://").split(":")

    def upload(length: int) -> socket.socket:
        connection = socket.create_connection((host, int(port)), 5)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode() + body[:9])
        return connection

    def taken(count: int) -> bool:
        """Whether so many places are taken: a request would take one, if only for a moment."""
        shown = client.get("/v1/usage", headers=bearer(key)).json()["limits"]["key"]
        return bool(shown["parallel_requests"]["used"] == count)

    for length in (len(body), 3 << 20):
        with upload(length) as one, upload(length):
            until(lambda: taken(2), "both have a place")
            refused = client.post(CHAT, json=chat("third"), headers=bearer(key))
            assert (refused.status_code, "parallel_requests" in refused.text) == (429, True)
            one.sendall(body[9:] + b" " * (length - len(body)))
            assert one.recv(65536).startswith(b"HTTP/1.1 200")
            until(lambda: taken(1), "the one that is over has none")
            assert client.post(CHAT, json=chat("third"), headers=bearer(key)).status_code == 200
        until(lambda: taken(0), "all places are free", 5)


def test_a_body_that_says_it_is_too_long_is_refused_before_it_comes(keys: Keys) -> None:
    key = keys.make(limits={"body_bytes": 1000})
    host, port = keys.gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\nContent-Length: {32 << 20}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_killed_worker_gives_its_places_back(keys: Keys) -> None:
    key = keys.make(limits={"parallel_requests": 3})
    with httpx.Client(base_url=keys.gateway.url) as client:
        for _ in range(3):
            client.send(
                client.build_request("POST", CHAT, json=chat("x", stream=True, max_tokens=3000), headers=bearer(key)),
                stream=True,
            )
        for _ in range(WORKERS):
            keys.gateway.kill_worker()
    until(lambda: admitted(many(keys.gateway, key, 3, chat("slow", max_tokens=30))) == 3, "all places are free", 5)


def test_what_was_only_reserved_ends_with_its_worker_and_with_its_gateway() -> None:
    key = new_key()
    file = keys_file(entry("a", key, limits={"tokens_per_month": 100_000}))
    with Replicas(1) as replicas, Gateway(replicas, files={"secrets/keys.json": file.encode()}) as gateway:

        def quota() -> dict[str, int]:
            found: dict[str, int] = httpx.get(gateway.url + "/v1/usage", headers=bearer(key)).json()["limits"]["key"][
                "tokens_per_month"
            ]
            return found

        def stream() -> None:
            body = chat("x", stream=True, max_tokens=30_000)
            with httpx.Client(base_url=gateway.url) as client:
                client.send(client.build_request("POST", CHAT, json=body, headers=bearer(key)), stream=True)
                assert quota()["remaining"] < 70_000
                for _ in gateway.serving_workers():
                    gateway.kill_worker()

        until(lambda: httpx.get(gateway.url + "/ready").status_code == 200, "ready")
        stream()
        until(lambda: quota()["remaining"] > 99_000, "the room is free again", 5)
        until(lambda: httpx.post(gateway.url + CHAT, json=chat("x"), headers=bearer(key)).status_code == 200, "ready")
        with httpx.Client(base_url=gateway.url) as client:
            body = chat("x", stream=True, max_tokens=30_000)
            client.send(client.build_request("POST", CHAT, json=body, headers=bearer(key)), stream=True)
            assert quota()["remaining"] < 70_000
            time.sleep(1.2)  # longer than a write of the state file waits: what it holds is what this is about
            # The workers first: each would give back in order what it sees the end of.
            master, workers = gateway.master(), gateway.workers()
            for pid in (*workers, master):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        state = json.loads((gateway.folder / "state" / "limits.json").read_text())
        assert 0 < max(one["value"] if isinstance(one, dict) else one for one in state.values()) < 1000


def test_room_that_is_only_reserved_is_no_spent_quota(keys: Keys, client: httpx.Client) -> None:
    for name in ("tokens_per_minute", "tokens_per_day", "tokens_per_month"):
        early_in_a_minute()
        headers = bearer(keys.make(limits={name: 5000}))
        with client.stream("POST", CHAT, json=chat("x", stream=True, max_tokens=4000), headers=headers) as stream:
            assert stream.status_code == 200
            with httpx.Client(base_url=keys.gateway.url) as other:
                answer = other.post(CHAT, json=chat("x", max_tokens=2000), headers=headers)
            assert (answer.status_code, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
            assert answer.headers["retry-after"] == "1"
            assert "x-should-retry" not in answer.headers

        def again(headers: dict[str, str] = headers) -> bool:
            body = chat("x", stream=True, max_tokens=2000)
            with client.stream("POST", CHAT, json=body, headers=headers) as stream:
                return stream.status_code == 200

        until(again, "room again", 5)


def test_many_end_users_take_no_place_of_other_keys() -> None:
    front, one, plain = new_key(), new_key(), new_key()
    entries = [
        entry("front", front, end_users=True),
        entry("one", one, limits={"parallel_requests": 1}),
        entry("plain", plain),
    ]
    file = keys_file(*entries, end_users={"limits": {"parallel_requests": 5, "tokens_per_minute": 10**6}})
    fleet = (ROOT / "nginx" / "njs" / "fleet.js").read_text()
    assert "GONE = 1000;" in fleet
    files = {
        "secrets/keys.json": file.encode(),
        "njs/fleet.js": fleet.replace("GONE = 1000;", "GONE = 100;").encode(),
        **resized(slots="32k", user_slots="32k"),
    }
    with (
        Replicas(1) as replicas,
        Gateway(replicas, files=files) as gateway,
        httpx.Client(base_url=gateway.url, timeout=30) as client,
    ):
        until(lambda: client.get("/ready").status_code == 200, "ready")

        def lost() -> str:
            metrics = httpx.get(gateway.metrics_url + "/metrics").text
            return str(re.findall(r'gateway_writes_lost_total\{zone="user_slots"\} (\d+)', metrics)[0])

        def users(first: int, last: int) -> None:
            for n in range(first, last):
                headers = {**bearer(front), "X-End-User": f"{n:0120}"}
                assert client.post(CHAT, json=chat("x", max_tokens=1), headers=headers).status_code == 200

        # In turns of few at once far more come than have room: who has left takes none.
        for first in range(0, 240, 20):
            users(first, first + 20)
            time.sleep(0.15)  # who has left is kept for a while
        assert lost() == "0"
        body = chat("x", stream=True, max_tokens=2000)
        with client.stream("POST", CHAT, json=body, headers=bearer(plain)):
            assert httpx.post(gateway.url + CHAT, json=chat("x"), headers=bearer(one)).status_code == 200


def test_only_what_is_admitted_counts(keys: Keys, fleet: Replicas, client: httpx.Client) -> None:
    """Not what another limit refuses, nor an unknown model, a bad request, or a replica that fails."""
    early_in_a_minute()
    key = keys.make(
        limits={"requests_per_minute": 5, "tokens_per_minute": 500, "max_tokens": 100, "n": 2, "body_bytes": 4000}
    )
    headers = bearer(key)

    def remaining() -> tuple[str, str]:
        answer = client.post(CHAT, json=chat("hi", max_tokens=101), headers=headers)
        assert answer.status_code == 400
        return answer.headers["x-ratelimit-remaining-requests"], answer.headers["x-ratelimit-remaining-tokens"]

    assert remaining() == ("5", "500")
    bodies: list[tuple[int, dict[str, Any]]] = [
        (404, chat("hi", model="none")),
        (400, chat("hi", n=3)),
        (413, chat("x" * 5000)),
        (400, chat("hi", max_tokens=-5)),
        (429, chat("x" * 3000, max_tokens=100)),
        (400, {"model": "sim", "messages": 5, "max_tokens": 5}),
    ]
    for status, body in bodies:
        assert client.post(CHAT, json=body, headers=headers).status_code == status, body
    for sim in fleet:
        sim.fault("status", status=500)
    assert client.post(CHAT, json=chat("hi"), headers=headers).status_code >= 500
    for sim in fleet:
        sim.fault()
    until(lambda: remaining() == ("5", "500"), "nothing was counted", 5)
    until(lambda: client.post(CHAT, json=chat("hi"), headers=headers).status_code == 200, "an answer", 20)
    assert remaining()[0] == "4"


def test_the_largest_request_of_each_kind(keys: Keys, client: httpx.Client) -> None:
    key = keys.make(limits={"prompt_tokens": 100, "max_tokens": 10, "n": 2, "body_bytes": 2000})
    rows = [
        (200, chat("hi", max_tokens=10)),
        (400, chat("hi", max_tokens=11)),
        (400, chat("hi", max_completion_tokens=11, max_tokens=1)),
        (400, {key: value for key, value in chat("hi").items() if key != "max_tokens"}),
        (400, chat("hi", max_tokens="11")),
        (200, chat("hi", n=2)),
        (400, chat("hi", n=3)),
        (400, chat("word " * 100)),
        (413, chat("word " * 500)),
    ]
    for status, body in rows:
        answer = client.post(CHAT, json=body, headers=bearer(key))
        assert answer.status_code == status, (body, answer.text)
        if status != 200:
            assert error_of(answer)["code"] == "limit_exceeded"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {**chat("word " * 2000), "prompt": [1]}),
        (CHAT, {**chat("word " * 2000), "input": ["a"]}),
        ("/v1/messages", {**chat("word " * 2000), "prompt": [1]}),
        ("/v1/completions", {"model": "sim", "max_tokens": 2, "prompt": "word " * 2000, "input": [1]}),
        ("/v1/completions", {"model": "sim", "max_tokens": 2, "prompt": [[1], "word " * 2000]}),
        ("/v1/completions", {"model": "sim", "max_tokens": 2, "prompt": [7] * 2500}),
        ("/v1/embeddings", {"model": "sim", "input": "word " * 2000, "prompt": [1]}),
    ],
)
def test_no_further_field_makes_a_prompt_seem_short(
    keys: Keys, client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    answer = client.post(path, json=body, headers=bearer(keys.make(limits={"prompt_tokens": 100})))
    assert (answer.status_code, "prompts of 100 tokens" in answer.text) == (400, True), answer.text


def test_a_prompt_of_token_numbers_has_as_many(keys: Keys, client: httpx.Client) -> None:
    headers = bearer(keys.make(limits={"prompt_tokens": 100}))
    body = {"model": "sim", "max_tokens": 2, "prompt": [50_000] * 80}
    assert client.post("/v1/completions", json=body, headers=headers).status_code == 200


LONG = {"pad": [[1]] * 60_000}


@pytest.mark.parametrize("more", [{}, LONG], ids=["short", "long"])
@pytest.mark.parametrize("field", ["n", "max_tokens", "max_completion_tokens", "best_of"])
@pytest.mark.parametrize(
    "value", ["2_0", "+20", "20.0", "x", "", [20], {"toString": 1, "valueOf": 1}, " " * 99, 2.5, 10**400]
)
def test_a_number_that_cannot_be_read_for_certain_is_refused(
    keys: Keys, client: httpx.Client, field: str, value: object, more: dict[str, Any]
) -> None:
    if not keys.strict:
        keys.strict = keys.make(limits={"n": 2, "max_tokens": 10})
    answer = client.post(CHAT, json={**chat("hi"), field: value, **more}, headers=bearer(keys.strict))
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("invalid_number", field)


@pytest.mark.parametrize("more", [{}, LONG], ids=["short", "long"])
def test_a_number_written_as_text_counts(keys: Keys, client: httpx.Client, more: dict[str, Any]) -> None:
    headers = bearer(keys.make(limits={"n": 2, "max_tokens": 10}))
    rows: list[tuple[bool, dict[str, object]]] = [
        (True, {"n": "20"}),
        (False, {"n": " 2 "}),
        (False, {"n": None}),
        (True, {"max_tokens": "11"}),
        (False, {"max_tokens": "10"}),
    ]
    for refused, field in rows:
        answer = client.post(CHAT, json={**chat("hi"), **field, **more}, headers=headers)
        # The replica may refuse it in its own words.
        assert ("limit_exceeded" in answer.text, "invalid_number" in answer.text) == (refused, False), (
            field,
            answer.text,
        )


def test_without_limits_no_value_of_n_makes_the_gateway_fail(keys: Keys, client: httpx.Client) -> None:
    headers = bearer(keys.make())
    values: list[object] = [{"toString": 1, "valueOf": 1}, "2_0", [[]], True]
    for value in values:
        assert client.post(CHAT, json=chat("hi", n=value), headers=headers).status_code != 503


def test_a_key_goes_later_the_more_it_has_in_flight(keys: Keys, fleet: Replicas, client: httpx.Client) -> None:
    """And in its lane, whatever the client says of its priority."""

    def priority(text: str, key: str) -> int:
        headers = {**bearer(key), "X-Vllm-Priority": "-5"}
        assert client.post(CHAT, json=chat(text, priority=-5), headers=headers).status_code == 200
        (seen,) = (request for sim in fleet for request in seen_by(sim, text))
        return int(re.findall(r"(?im)^x-vllm-priority: (-?\d+)\r?$", seen["head"])[0])

    flood, other, batch = keys.make(), keys.make(), keys.make(priority=10)
    assert priority("alone", flood) == 1
    with httpx.Client(base_url=keys.gateway.url) as more:
        for _ in range(8):
            body = chat("flood", stream=True, max_tokens=3000)
            more.send(more.build_request("POST", CHAT, json=body, headers=bearer(flood)), stream=True)
        assert priority("ninth", flood) == 9
        assert priority("first", other) == 1
        assert priority("a batch", batch) == 10_001


def test_an_upload_keeps_its_limits_too(keys: Keys, client: httpx.Client) -> None:
    """Its fields are a form's; a sound has no tokens by the engine's word, so what it may have made is counted."""
    headers = bearer(keys.make(limits={"max_tokens": 10, "n": 1, "tokens_per_day": 100}))

    def ask(**fields: str) -> httpx.Response:
        return client.post(
            "/v1/audio/transcriptions",
            data={"model": "sim", **fields},
            files={"file": ("a.wav", b"RIFF" * 1000)},
            headers=headers,
        )

    assert "set max_tokens" in ask().text
    assert [ask(max_completion_tokens=value).status_code for value in ("10", "11", "1_0")] == [200, 400, 400]
    assert ask(max_completion_tokens="10", n="2").status_code == 400

    def spent() -> int:
        quota = client.get("/v1/usage", headers=headers).json()["limits"]["key"]["tokens_per_day"]
        return int(quota["used"])

    # what is over is counted a moment after its answer
    until(spent, "the tokens of the sound", 10)
    assert spent() <= 10


def test_zero_is_zero(keys: Keys, client: httpx.Client) -> None:
    for name in ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "parallel_requests"):
        assert client.post(CHAT, json=chat("hi"), headers=bearer(keys.make(limits={name: 0}))).status_code == 429


def test_a_spent_quota_says_so_and_asks_nobody_to_try_again(keys: Keys, client: httpx.Client) -> None:
    def spent(headers: dict[str, str]) -> httpx.Response | None:
        answer = client.post(CHAT, json=chat("hi", max_tokens=5), headers=headers)
        return answer if answer.status_code == 429 else None

    for name in ("tokens_per_day", "tokens_per_month"):
        headers = bearer(keys.make(limits={name: 60}))
        answer = until(partial(spent, headers), "the quota is spent")
        assert answer is not None
        error = error_of(answer)
        assert (error["code"], error["type"]) == ("insufficient_quota", "insufficient_quota")
        assert answer.headers["x-should-retry"] == "false"
        body = {"model": "sim", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
        assert client.post("/v1/messages", json=body, headers=headers).json()["error"]["type"] == "rate_limit_error"


def test_a_stream_that_crosses_a_limit_ends_normally(keys: Keys, client: httpx.Client) -> None:
    """It did not say how long it gets, so it was let in with what was left."""
    headers = bearer(keys.make(limits={"tokens_per_day": 50}))
    body = chat("x", stream=True)
    del body["max_tokens"]
    answer = client.post(CHAT, json=body, headers=headers)
    assert answer.status_code == 200
    assert answer.text.rstrip().endswith("[DONE]")
    assert answer.text.count('"content":" ') >= 60

    def refused() -> httpx.Response | None:
        again = client.post(CHAT, json=chat("x"), headers=headers)
        return again if again.status_code == 429 else None

    assert error_of(until(refused, "the quota is spent"))["code"] == "insufficient_quota"  # type: ignore[arg-type]


def test_requests_and_tokens_are_counted_apart(keys: Keys, client: httpx.Client) -> None:
    early_in_a_minute()
    headers = bearer(keys.make(limits={"requests_per_minute": 3, "tokens_per_minute": 10**6}))
    answers = [client.post(CHAT, json=chat("x"), headers=headers) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert "requests_per_minute" in answers[-1].text
    assert answers[-1].headers["x-ratelimit-remaining-requests"] == "0"
    assert int(answers[-1].headers["x-ratelimit-remaining-tokens"]) > 900_000


def test_a_request_that_never_fits_says_so(keys: Keys, client: httpx.Client) -> None:
    answer = client.post(
        CHAT, json=chat("hi", max_tokens=500), headers=bearer(keys.make(limits={"tokens_per_minute": 100}))
    )
    assert (answer.status_code, answer.headers["x-should-retry"]) == (429, "false")
    assert "max_tokens" in answer.text
    assert "retry-after" not in answer.headers


def test_headers_tell_what_is_left_on_streams_too(keys: Keys, client: httpx.Client) -> None:
    early_in_a_minute()
    headers = bearer(keys.make(limits={"requests_per_minute": 10, "tokens_per_minute": 5000}))
    for n, stream in enumerate((False, True)):
        with client.stream("POST", CHAT, json=chat("hi", max_tokens=5, stream=stream), headers=headers) as answer:
            answer.read()
        assert answer.headers["x-ratelimit-limit-requests"] == "10"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(9 - n)
        assert answer.headers["x-ratelimit-limit-tokens"] == "5000"
        assert 4000 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 5000
        for kind in ("requests", "tokens"):
            assert re.fullmatch(r"\d+ms|(\d+h)?(\d+m)?\d+s", answer.headers[f"x-ratelimit-reset-{kind}"])
    assert "x-ratelimit-limit-requests" not in client.post(CHAT, json=chat("hi"), headers=bearer(keys.make())).headers


def test_roles_and_end_users_have_limits_of_their_own(keys: Keys) -> None:
    early_in_a_minute()
    keys.more = {
        "roles": {"user": {"limits": {"requests_per_minute": 8}}},
        "end_users": {"limits": {"requests_per_minute": 3}},
    }
    one, two = keys.make(), keys.make(limits={"requests_per_minute": 10})
    front = keys.make(end_users=True)
    # Each holder has the role's limit, unless its own says else.
    assert [admitted(many(keys.gateway, key, 12)) for key in (one, two)] == [8, 10]
    assert [admitted(many(keys.gateway, front, 6, **{"X-End-User": user})) for user in ("ann", "bob")] == [3, 3]
    assert admitted(many(keys.gateway, front, 6, **{"X-End-User": "cy"})) == 2
    keys.more = {}
    keys.write()


def test_counts_outlast_a_reload_and_a_restart() -> None:
    key = new_key()
    file = keys_file(entry("a", key, limits={"tokens_per_month": 100_000, "parallel_requests": 2}))
    with Replicas(1) as replicas, Gateway(replicas, files={"secrets/keys.json": file.encode()}) as gateway:

        def ask() -> int:
            answer = httpx.post(gateway.url + CHAT, json=chat("hi", max_tokens=5), headers=bearer(key))
            assert answer.status_code == 200, answer.text
            return 100_000 - int(answer.headers["x-ratelimit-remaining-tokens"])

        until(lambda: httpx.get(gateway.url + "/ready").status_code == 200, "ready")
        for _ in range(5):
            ask()
        before = ask()
        gateway.reload()
        after = ask()
        assert after > before
        gateway.restart()
        until(lambda: httpx.get(gateway.url + "/ready").status_code == 200, "ready")
        assert ask() > after


def test_a_zone_without_room_neither_opens_nor_locks_the_gateway() -> None:
    """Those who find no room share one count; the log and a metric say so."""
    key = new_key()
    file = keys_file(entry("front", key, end_users=True), end_users={"limits": {"requests_per_minute": 2}})
    http = (ROOT / "nginx/host/http.conf").read_text().replace("zone=end_users:8m", "zone=end_users:32k")
    files = {"secrets/keys.json": file.encode(), "host/http.conf": http.encode()}
    with (
        Replicas(1) as replicas,
        Gateway(replicas, files=files) as gateway,
        httpx.Client(base_url=gateway.url) as client,
    ):
        until(lambda: client.get("/ready").status_code == 200, "ready")
        early_in_a_minute()
        statuses = [
            client.post(
                CHAT, json=chat("hi", max_tokens=1), headers={**bearer(key), "X-End-User": f"{n:0120}"}
            ).status_code
            for n in range(300)
        ]
        assert 0 < statuses.count(200) < 300
        assert set(statuses) == {200, 429}
        assert "the zone end_users is full" in gateway.log()
        assert 'gateway_writes_lost_total{zone="end_users"} 0' not in httpx.get(gateway.metrics_url + "/metrics").text


def test_a_folder_that_cannot_be_written_stops_nobody() -> None:
    key = new_key()
    files = {"secrets/keys.json": keys_file(entry("a", key, limits={"requests_per_minute": 3})).encode()}
    with Replicas(1) as replicas, Gateway(replicas, files=files) as gateway:
        until(lambda: httpx.get(gateway.url + "/ready").status_code == 200, "ready")
        (gateway.folder / "state").chmod(0o555)
        early_in_a_minute()
        assert admitted(many(gateway, key, 10)) == 3
        until(lambda: "limits.json" in gateway.log(), "the log complains")


def test_a_damaged_file_of_counts_is_set_aside() -> None:
    with Replicas(1) as replicas, Gateway(replicas, files={"secrets/keys.json": keys_file().encode()}) as gateway:
        (gateway.folder / "state" / "limits.json").write_text('{"M1|a": 5')
        gateway.restart()
        assert httpx.get(gateway.url + "/health").status_code == 200
        assert (gateway.folder / "state" / "limits.json.damaged").exists()
        assert "limits.json is damaged" in gateway.log()
