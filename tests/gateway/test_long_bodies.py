"""Long bodies hold up nobody: not by their shape, and not by their sum."""

import contextlib
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from lab.http import get
from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from stack.shell import ROOT
from tests.gateway.conftest import chat
from tests.gateway.test_access import entry, keys_file, new_key

MIB = 1 << 20
PATH = "/v1/chat/completions"

# ---- shapes


@pytest.fixture(scope="module")
def one_worker() -> Iterator[Gateway]:
    """A gateway whose only worker does everything, over a replica of one model."""
    text = (ROOT / "nginx" / "nginx.conf").read_text()
    assert "worker_processes 2;" in text
    text = text.replace("worker_processes 2;", "worker_processes 1;")
    with Replicas(1) as replicas, Gateway(replicas, files={"nginx.conf": text.encode()}) as gateway:
        gateway.wait_ready()
        yield gateway


def worked_ms(worker: int) -> float:
    """The time that a worker has run so far: what other programs take of the machine does not count."""
    return int(Path(f"/proc/{worker}/schedstat").read_text().split()[0]) / 1e6


@contextmanager
def first_in_line() -> Iterator[None]:
    """This thread runs as soon as it can, where that is allowed: else a busy machine would let its answers lie."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def upload(*parts: bytes) -> bytes:
    return b"".join(b"--b\r\nContent-Disposition: form-data; name=" + part + b"\r\n" for part in parts) + b"--b--\r\n"


MODEL = b'"model":"no-such"'
SHAPES: dict[str, Callable[[], bytes]] = {
    "objects": lambda: b'{"x":[' + b"{}," * (20 * MIB // 3) + b"{}]," + MODEL + b',"y":[' + b"{}," * MIB + b"{}]}",
    "brackets": lambda: b'{"x":' + b"[" * (6 * MIB) + b"]" * (6 * MIB) + b"," + MODEL + b"}",
    "a string": lambda: b'{"x":"' + b"y" * (63 * MIB) + b'",' + MODEL + b"}",
    "escapes": lambda: b"{" + MODEL + b',"x":"' + b'\\"' * (31 * MIB) + b'"}',
    "keys": lambda: b"{" + b'"model":1,' * (2 * MIB) + MODEL + b"}",
    "UTF-16": lambda: ('{"x":[' + "{}," * (4 * MIB) + "{}]," + MODEL.decode() + "}").encode("utf-16"),
    "a file": lambda: upload(b"file\r\n\r\n" + b"y" * (63 * MIB), b"model\r\n\r\nno-such"),
    "almost boundaries": lambda: upload(b"file\r\n\r\n" + b"\r\n--a" * (12 * MIB), b"model\r\n\r\nno-such"),
    "boundaries": lambda: upload(*[b"x\r\n\r\n"] * MIB, b"model\r\n\r\nno-such"),
    "objects in memory": lambda: b'{"x":[' + b"{}," * (MIB // 3 - 99) + b"{}]," + MODEL + b"}",
    "objects that are parsed": lambda: b'{"x":[' + b"{}," * (MIB // 24 - 99) + b"{}]," + MODEL + b"}",
}


def sent_beside(gateway: Gateway, path: str, kind: str, body: bytes) -> tuple[httpx.Response, float]:
    """The answer to this body, and for how many milliseconds at most the only worker ran while a question waited."""
    [worker] = gateway.serving_workers()
    longest = 0.0
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=120) as asker:
        asker.get(gateway.url + "/health")
        sent = pool.submit(httpx.post, gateway.url + path, content=body, headers={"Content-Type": kind}, timeout=120)
        with first_in_line():
            while not sent.done():
                before = worked_ms(worker)
                asker.get(gateway.url + "/health")
                longest = max(longest, worked_ms(worker) - before)
        return sent.result(), longest


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_holds_the_worker_for_long(one_worker: Gateway, shape: str) -> None:
    """While a question waits, the worker never works for 50 ms on a body; and it finds the model."""
    body = SHAPES[shape]()
    path, kind = PATH, "application/json"
    if body.startswith(b"--"):
        path, kind = "/v1/audio/transcriptions", "multipart/form-data; boundary=b"
    longest = []
    # On a busy machine this program may itself be held up with a question: then the worker seems to be. Not each time.
    for _ in range(4):
        answer, most = sent_beside(one_worker, path, kind, body)
        if shape == "boundaries":
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_unreadable")
        else:
            assert (answer.status_code, "'no-such'" in answer.text) == (404, True)
        longest.append(most)
        if most < 50:
            break
    print(f"{shape}: {len(body) / MIB:.0f} MiB, {longest} ms")
    assert min(longest) < 50


# ---- strangers

ADMIN = new_key()
CONF = ROOT / "nginx" / "conf.d"
LOCATIONS = re.findall(
    r"^location (?:= )?(/\S*)",
    "".join((CONF / f"{name}.conf").read_text() for name in ("public", "status")),
    re.MULTILINE,
)
JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def locked() -> Iterator[Gateway]:
    """A gateway that asks for keys."""
    secrets = keys_file(entry("admin", ADMIN, role="admin")).encode()
    with Replicas(1) as replicas, Gateway(replicas, files={"secrets/keys.json": secrets}, key=ADMIN) as gateway:
        gateway.wait_ready()
        yield gateway


def memory(gateway: Gateway) -> int:
    """The bytes that the workers hold."""
    status = [Path(f"/proc/{worker}/status").read_text() for worker in gateway.serving_workers()]
    return sum(int(text.split("RssAnon:")[1].split()[0]) << 10 for text in status)


def answered_early(host: str, port: int, head: str, sent: int) -> str:
    """The answer to a request whose body stops after `sent` bytes, well before a body's time is over."""
    with socket.create_connection((host, port), 5) as connection:
        connection.sendall(f"{head}\r\nHost: localhost\r\n\r\n".encode())
        # It may have answered already, and closed.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(b"x" * sent)
        return connection.recv(65536).decode()


@pytest.mark.parametrize("more", [JSON, "Content-Type: text/plain", "Connection: X-Own", "Referer: /?api_key=a"])
@pytest.mark.parametrize(("length", "sent"), [(10**10, MIB), (50 * MIB, MIB), (MIB, MIB - 1)])
def test_no_body_of_a_stranger_is_read_on_any_path(locked: Gateway, length: int, sent: int, more: str) -> None:
    host, port = locked.url.removeprefix("http://").split(":")
    assert len(LOCATIONS) > 30
    for path in [*LOCATIONS, "/nothing", "/replicas/vllm-0/drain"]:
        for method in ("POST", "PUT", "GET"):
            head = f"{method} {path} HTTP/1.1\r\n{more}\r\nContent-Length: {length}"
            answer = answered_early(host, int(port), head, sent)
            assert re.match(r"HTTP/1.1 (200|40[01345]|413|415|503) ", answer), (head, answer)
            assert files(locked) == 0, head


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/canary", "/nothing"])
def test_strangers_bodies_take_no_memory(locked: Gateway, path: str) -> None:
    """Many at once, each as long as may lie in memory, but for the last byte, take what those without bytes take."""

    def held_back(sent: int) -> int:
        with ExitStack() as stack:
            for _ in range(60):
                connection = stack.enter_context(begun(locked, f"Content-Length: {MIB}", b"x" * sent, path))
                assert connection.recv(65536).startswith(b"HTTP/1.1 4")
            assert files(locked) == 0
            return memory(locked)

    # Each request has an njs context, which is kept for the next.
    few = max(held_back(1) for _ in range(3))
    assert held_back(MIB - 1) - few < 20 * MIB


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_no_body_is_read_where_clients_should_use_https(locked: Gateway, method: str) -> None:
    head = f"{method} /v1/models HTTP/1.1\r\nContent-Length: {50 * MIB}"
    answer = answered_early(locked.host, 8079, head, MIB)
    assert answer.startswith("HTTP/1.1 403" if method == "POST" else "HTTP/1.1 308")
    assert files(locked) == 0


def test_an_admins_body_has_a_limit_where_none_is_asked_for(locked: Gateway) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    for path in ("/metrics", "/canary"):
        assert httpx.put(locked.url + path, content=b"x" * 20_000, headers=headers).status_code == 413
    assert "gateway_body_bytes" in httpx.get(locked.url + "/metrics", headers=headers).text
    assert httpx.get(locked.url + "/metrics").status_code == 401


def test_a_body_may_come_slowly_but_not_stop() -> None:
    text = (CONF / "http.conf").read_text()
    assert "\nclient_body_timeout 15s;\n" in text
    text = text.replace("client_body_timeout 15s;", "client_body_timeout 1s;")
    body = json.dumps(chat("slow")).encode()
    with Replicas(1) as replicas, Gateway(replicas, files={"conf.d/http.conf": text.encode()}) as gateway:
        gateway.wait_ready()
        with begun(gateway, f"Content-Length: {len(body)}", body[:1]) as slow:
            for byte in body[1:6]:
                time.sleep(0.4)  # a slow client's pace
                slow.sendall(bytes([byte]))
            slow.sendall(body[6:])
            assert slow.recv(65536).startswith(b"HTTP/1.1 200")
        with begun(gateway, f"Content-Length: {len(body)}", body[:1]) as stopped:
            assert stopped.recv(65536) == b""


# ---- sums


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    with Replicas(2) as fleet:
        yield fleet


@pytest.fixture
def small(replicas: Replicas) -> Iterator[Gateway]:
    """A gateway with the smallest budget, 64 MiB."""
    with Gateway(replicas, env={"GATEWAY_BODIES_MB": "64"}) as gateway:
        gateway.wait_ready()
        yield gateway
    for sim in replicas:
        sim.fault()


def held(gateway: Gateway, place: str) -> int:
    """The bytes of bodies that the gateway says lie in this place."""
    lines = get(gateway.metrics_url + "/metrics").decode().splitlines()
    [line] = [line for line in lines if line.startswith(f'gateway_body_bytes{{place="{place}"}}')]
    return int(line.split()[1])


def refused(gateway: Gateway) -> int:
    """How many requests were refused because there was no room for their body."""
    lines = get(gateway.metrics_url + "/metrics").decode().splitlines()
    [line] = [line for line in lines if line.startswith('gateway_refusals_total{cause="bodies"}')]
    return int(line.split()[1])


def files(gateway: Gateway) -> int:
    """The bytes that the workers' files of bodies have."""
    size = 0
    for worker in gateway.workers():
        for fd in Path(f"/proc/{worker}/fd").iterdir():
            try:
                if "/bodies/" in str(fd.readlink()):
                    size += fd.stat().st_size
            except FileNotFoundError:
                pass
    return size


CLIENTS = (f"127.{net}.{host // 250}.{host % 250 + 1}" for net in itertools.count(200) for host in range(10_000))


@contextmanager
def begun(
    gateway: Gateway, length: str, sent: bytes = b"{", path: str = PATH, client: str = ""
) -> Iterator[socket.socket]:
    """A request whose body never comes whole; `length` is the header that says how long it is. `client`: from which
    address it comes, if not from one of its own."""
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5, (client or next(CLIENTS), 0)) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode() + sent)
        yield connection


def test_who_comes_when_there_is_no_room_is_refused_before_the_body_is_read(small: Gateway) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(begun(small, f"Content-Length: {20 * MIB}"))
        until(lambda: held(small, "disk") == 60 * MIB, "three bodies have room")
        with begun(small, f"Content-Length: {20 * MIB}") as fourth:
            answer = fourth.recv(65536).decode()
        assert answer.startswith("HTTP/1.1 429")
        assert "Retry-After: 1" in answer
        assert "bodies_full" in answer
        assert refused(small) == 1
        # Others go on, and what is small enough still finds room.
        assert httpx.post(small.url + PATH, json=chat("hi")).status_code == 200
        assert httpx.post(small.url + PATH, json=chat("hi", x="y" * 2 * MIB)).status_code == 200
    # All three hung up.
    until(lambda: held(small, "disk") == 0, "their room is free")
    assert httpx.post(small.url + PATH, json=chat("hi", x="y" * 40 * MIB)).status_code == 200
    assert held(small, "memory") == held(small, "disk") == 0


def test_a_body_of_unknown_length_takes_the_room_of_the_longest_until_it_is_there(
    small: Gateway, replicas: Replicas
) -> None:
    body = json.dumps(chat("hi")).encode()
    chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n"
    with begun(small, "Transfer-Encoding: chunked", chunk) as connection:
        until(lambda: held(small, "disk") == 64 * MIB, "the body has room")
        assert httpx.post(small.url + PATH, content=iter([body])).status_code == 429
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    for sim in replicas:
        sim.fault(slow=20.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.post, small.url + PATH, content=iter([body]), timeout=30)
        until(lambda: held(small, "disk") == len(body), "the body takes what it is long")
        assert waiting.result().status_code == 200
    assert held(small, "disk") == 0


def test_bodies_in_memory_have_a_limit_and_go_to_disk_beyond_it(small: Gateway) -> None:
    with ExitStack() as stack:
        for _ in range(310):
            stack.enter_context(begun(small, f"Content-Length: {MIB}"))
        until(lambda: held(small, "disk") == 54 * MIB, "310 bodies have room")
        assert held(small, "memory") == 256 * MIB
        # Too short to be worth a file, and too small to be counted.
        assert httpx.post(small.url + PATH, json=chat("hi", x="y" * 20_000)).status_code == 429
        assert httpx.post(small.url + PATH, json=chat("hi")).status_code == 200
    until(lambda: held(small, "disk") == held(small, "memory") == 0, "their room is free")


def test_the_room_is_free_again_when_the_answer_begins(small: Gateway, replicas: Replicas) -> None:
    body = chat("long", stream=True, max_tokens=400, x="y" * 30 * MIB)
    for sim in replicas:
        sim.fault(slow=20.0)
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", small.url + PATH, json=body) as answer,
    ):
        # The header comes with the first token.
        assert answer.status_code == 200
        until(lambda: files(small) == 0, "its file is closed", 1)
        assert held(small, "disk") == 0
        assert any(replica["in_flight"] for replica in small.status()["replicas"])


def test_a_replica_that_fails_is_followed_by_one_that_gets_the_same_long_body(
    small: Gateway, replicas: Replicas
) -> None:
    replicas["vllm-0"].fault("refuse")
    replicas["vllm-1"].fault()
    for _ in range(4):
        answer = httpx.post(small.url + PATH, json=chat("again", x="y" * 3 * MIB), timeout=30)
        assert (answer.status_code, answer.headers["x-replica"]) == (200, "vllm-1")
    assert held(small, "disk") == 0


def test_the_room_of_a_killed_worker_is_free_again(small: Gateway) -> None:
    with ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(begun(small, f"Content-Length: {4 * MIB}"))
            stack.enter_context(begun(small, f"Content-Length: {MIB // 2}"))
        until(lambda: (held(small, "disk"), held(small, "memory")) == (48 * MIB, 6 * MIB), "all have room")
        small.kill_worker()
        small.kill_worker()
        until(lambda: held(small, "disk") == held(small, "memory") == 0, "their room is free")
    until(lambda: held(small, "disk") == held(small, "memory") == 0, "and nothing is counted out twice")


def test_without_keys_an_address_has_half_of_the_room_and_keeps_nobody_out(small: Gateway) -> None:
    one = "127.0.0.77"
    with ExitStack() as stack:
        for _ in range(180):
            stack.enter_context(begun(small, f"Content-Length: {MIB}", client=one))
        until(
            lambda: (held(small, "memory"), held(small, "disk")) == (128 * MIB, 32 * MIB),
            "half of each",
        )
        with begun(small, f"Content-Length: {MIB}", client=one) as more:
            answer = more.recv(65536).decode()
        assert answer.startswith("HTTP/1.1 429")
        assert "Too many bytes of this address's other requests" in answer
        # Little ones go on, and so do others.
        body = json.dumps(chat("hi")).encode()
        with begun(small, f"Content-Length: {len(body)}", body, client=one) as little:
            assert little.recv(65536).startswith(b"HTTP/1.1 200")
        assert httpx.post(small.url + PATH, json=chat("hi", x="y" * 20 * MIB)).status_code == 200
    until(lambda: held(small, "disk") == held(small, "memory") == 0, "their room is free")
    # One body may be longer than the half.
    assert httpx.post(small.url + PATH, json=chat("hi", x="y" * 40 * MIB)).status_code == 200


def test_one_key_has_a_quarter_of_the_room_and_keeps_nobody_out(replicas: Replicas) -> None:
    """It may have its bodies again when they are over, and when the worker that read them was killed."""
    greedy, other = new_key(), new_key()
    secrets = keys_file(entry("greedy", greedy), entry("other", other, role="admin")).encode()
    env = {"GATEWAY_BODIES_MB": "64"}

    def post(gateway: Gateway, key: str, size: int) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(gateway.url + PATH, json=chat("hi", x="y" * size), headers=headers, timeout=30)

    with Gateway(replicas, env=env, files={"secrets/keys.json": secrets}, key=other) as gateway:
        gateway.wait_ready()
        for end in ("hung up", "killed"):
            with ExitStack() as stack:
                head = f"Authorization: Bearer {greedy}\r\nContent-Length: {MIB}"
                for _ in range(90):
                    stack.enter_context(begun(gateway, head))
                until(
                    lambda: (held(gateway, "memory"), held(gateway, "disk")) == (64 * MIB, 16 * MIB),
                    "a quarter of each",
                )
                refused = post(gateway, greedy, 20_000)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "bodies_full")
                assert "the key greedy's other requests" in refused.text
                assert post(gateway, other, 1).status_code == post(gateway, other, 2 * MIB).status_code == 200
                if end == "killed":
                    gateway.kill_worker()
                    gateway.kill_worker()
            until(lambda: held(gateway, "disk") == held(gateway, "memory") == 0, "their room is free")
            # One body may be longer than the quarter.
            assert post(gateway, greedy, 40 * MIB).status_code == 200


def test_sixty_uploads_at_once_cost_no_stream_and_no_worker(replicas: Replicas) -> None:
    """Streams of others go on while 60 × 20 MB come; some are refused, and the workers' memory hardly grows."""
    # All come from one address, which has half of it.
    with Gateway(replicas, env={"GATEWAY_BODIES_MB": "2048"}) as gateway:
        gateway.wait_ready()
        workers = gateway.serving_workers()
        body = json.dumps(chat("upload", x="y" * 20_000_000)).encode()
        over = threading.Event()
        gaps = []

        def stream() -> bool:
            """Whether the stream came whole; notes the longest silence in it."""
            with (
                httpx.Client(timeout=60) as client,
                client.stream("POST", gateway.url + PATH, json=chat("tell", stream=True, max_tokens=40)) as answer,
            ):
                last, text = time.monotonic(), ""
                for part in answer.iter_text():
                    gaps.append(time.monotonic() - last)
                    last, text = time.monotonic(), text + part
                return text.rstrip().endswith("[DONE]")

        def streams() -> list[bool]:
            whole = []
            while not over.is_set():
                whole.append(stream())
            return whole

        before = memory(gateway)
        most = 0
        with ThreadPoolExecutor(64) as pool:
            others = [pool.submit(streams) for _ in range(3)]
            uploads = [pool.submit(httpx.post, gateway.url + PATH, content=body, timeout=100) for _ in range(60)]
            while not all(one.done() for one in uploads):
                most = max(most, memory(gateway))
                time.sleep(0.01)
            over.set()
        statuses = [one.result().status_code for one in uploads]
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= 50
        assert all(whole for one in others for whole in one.result())
        assert gateway.serving_workers() == workers
        assert most - before < 250 * MIB
        assert held(gateway, "disk") == 0
        print(f"{statuses.count(429)} refused, silence {max(gaps):.3f} s, memory {(most - before) / MIB:.0f} MiB")
