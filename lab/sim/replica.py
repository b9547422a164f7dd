"""A simulated replica: vLLM's HTTP face over the simulated engine of `engine.py`, with faults on command.

    python -m lab.sim.replica --host 127.0.0.1 --port 8000 --model sim

It answers /health, /v1/models, what generates in the dialects of `dialects.py` (streamed and whole), /tokenize, with
fixed words all other paths of vLLM that the gateway opens,
/metrics with vLLM's own metric names, and on `/_sim` its own control: GET gives what it saw, POST a JSON object sets
faults:

    {"fault": null | "hang" | "reset" | "garbage" | "status" | "cut" | "crash",
     "status": 503,        the answer of fault `status`
     "refusal": "",        what its 503 says beside: "draining" (vllm/drain.py)
     "comment": false,     streams begin with a comment, as STREAM_KEEPALIVE_SECONDS makes them
     "after_tokens": 5,    how far a stream gets under fault `cut`
     "wide": 0,            bytes of each token's text in a stream, if not its own
     "slow": 1.0,          factor on every time
     "health": 200,        the answer of /health
     "metrics": 200,       the answer of /metrics
     "preempting": false,  what finds no room in the cache counts as a preemption
     "models": null,       the body of /v1/models, if it is not the list of its models
     "deadly": "text",     a request with this text in its body ends the replica
     "waking": ""}         what happens when it is to wake: "fail", "hang" or "crash"

With `--sleeps` it has sleep mode, by the code that puts a real replica to sleep (vllm/sleeper.py): it begins asleep,
and what shares a GPU of `--gpus` with one that is awake has no memory to wake.

A stream's headers come with its first token, as this project's replica sends them (vllm/begin.py); vLLM alone sends
them at once. Answers depend on the prompt alone: the same prompt gets the same text. HTTP is done by hand on asyncio,
since a test of a gateway needs replicas that are faster than it.
"""

import argparse
import asyncio
import fcntl
import json
import os
import re
import signal
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, cast

import uvloop

from lab.sim.dialects import DIALECTS, FIXED, Dialect
from lab.sim.engine import BLOCK, TOKEN_BYTES, Engine, QueueFullError, Request, Shape
from vllm.sleeper import Naps

WORDS = b"the and for are but not you all any can had her was one our out day get has him his how man new now".split()
# Bounds of vLLM's histograms, in seconds.
SECONDS = (0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, *SECONDS)
ITL_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, *SECONDS)
REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    429: "Too Many Requests",
}
# Where a request has its prompt, if not in `messages`.
FIELDS = {"/v1/completions": "prompt", "/v1/responses": "input"}
# Seconds that falling asleep and waking take, as measured on a GPU (docs/benchmarks/gpu.md).
NAP_S, WAKE_S = 0.4, 0.9
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass
class Faults:
    """What is wrong with this replica just now."""

    fault: str | None = None
    status: int = 503
    refusal: str = ""
    comment: bool = False
    wide: int = 0
    after_tokens: int = 5
    slow: float = 1.0
    health: int = 200
    metrics: int = 200
    preempting: bool = False
    models: str | None = None
    deadly: str = ""
    waking: str = ""


@dataclass
class Histogram:
    """One Prometheus histogram."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Counts one value."""
        index = next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))
        self.counts[index] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> list[str]:
        """The histogram in Prometheus' text format."""
        lines, sum_so_far = [f"# TYPE {name} histogram"], 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            sum_so_far += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {sum_so_far}')
        return [*lines, f"{name}_count{{{labels}}} {sum_so_far}", f"{name}_sum{{{labels}}} {self.total}"]


class Replica:
    """All state of one simulated replica."""

    def __init__(self, model: str, shape: Shape, instant: bool, adapters: int = 0) -> None:
        # As SERVED_MODEL_NAME: several names of one model have commas between.
        self.aliases = model.split(",")
        self.model = self.aliases[0]
        self.names = [*self.aliases, *(f"{self.model}-adapter-{n}" for n in range(adapters))]
        self.shape = shape
        self.instant = instant
        self.engine = Engine(shape)
        self.faults = Faults()
        self.seen: deque[tuple[bytes, bytes]] = deque(maxlen=100)
        self.generations = 0
        self.tokens = 0
        self.started = time.time()
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "abort": 0}
        self.ttft = Histogram(TTFT_BUCKETS)
        self.itl = Histogram(ITL_BUCKETS)
        self.e2e = Histogram(TTFT_BUCKETS)
        self.naps: Naps | None = None
        # What it holds of the memory of GPUs: a file each, which one process has at a time.
        self.memory: list[IO[bytes]] = []

    def sleeps(self, wake_s: float, gpus: list[Path]) -> None:
        """Gives it sleep mode, and lets it begin asleep. A request waits for `wake_s` seconds; `gpus` are the files
        that stand for the memory that it shares."""

        def free() -> None:
            while self.memory:
                self.memory.pop().close()

        async def nap() -> None:
            await asyncio.sleep(NAP_S * self.faults.slow)
            free()

        async def wake() -> None:
            if self.faults.waking == "crash":
                os._exit(1)
            if self.faults.waking == "hang":
                await asyncio.Event().wait()
            await asyncio.sleep(WAKE_S * self.faults.slow)
            if self.faults.waking == "fail":
                raise RuntimeError("CUDA error: out of memory")
            try:
                for gpu in gpus:
                    self.memory.append(gpu.open("ab"))
                    fcntl.flock(self.memory[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                free()
                raise RuntimeError("CUDA error: out of memory") from None

        self.naps = Naps(nap, wake, wake_s, [gpu.name for gpu in gpus])
        self.naps.sleep()

    def set_faults(self, wanted: dict[str, Any]) -> None:
        """Replaces all faults; ValueError where one is unknown."""
        unknown = set(wanted) - {f.name for f in fields(Faults)}
        if unknown:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        self.faults = Faults(**wanted)
        if self.faults.fault == "crash":
            os._exit(1)
        self.engine.slow = self.faults.slow
        self.engine.hung = self.faults.fault == "hang"
        self.engine.preempting = self.faults.preempting
        self.engine.wake()

    def metrics(self) -> str:
        """Its metrics in Prometheus' text format, under vLLM's names."""
        engine = self.engine
        labels = f'engine="0",model_name="{self.model}"'
        gauges = {
            "vllm:num_requests_running": len(engine.running),
            "vllm:num_requests_waiting": len(engine.waiting),
            "vllm:kv_cache_usage_perc": engine.blocks.used / engine.blocks.size,
        }
        counters = {
            "vllm:prefix_cache_queries": engine.prefix_queries,
            "vllm:prefix_cache_hits": engine.prefix_hits,
            "vllm:prompt_tokens": engine.prompt_tokens,
            "vllm:generation_tokens": engine.generation_tokens,
            "vllm:num_preemptions": engine.preemptions,
        }
        lines = ["# TYPE process_start_time_seconds gauge", f"process_start_time_seconds {self.started}"]
        for name, value in gauges.items():
            lines += [f"# TYPE {name} gauge", f"{name}{{{labels}}} {float(value)}"]
        for name, value in counters.items():
            lines += [f"# TYPE {name}_total counter", f"{name}_total{{{labels}}} {float(value)}"]
        lines.append("# TYPE vllm:request_success_total counter")
        for reason, count in self.finished.items():
            lines.append(f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {float(count)}')
        lines.append("# TYPE vllm:cache_config_info gauge")
        size = f'block_size="{BLOCK}",engine="0",num_gpu_blocks="{self.shape.kv_blocks}"'
        lines.append(f"vllm:cache_config_info{{{size}}} 1.0")
        lines += self.ttft.lines("vllm:time_to_first_token_seconds", labels)
        lines += self.itl.lines("vllm:inter_token_latency_seconds", labels)
        lines += self.e2e.lines("vllm:e2e_request_latency_seconds", labels)
        return "\n".join(lines) + "\n"

    def models(self) -> dict[str, Any]:
        """The answer to /v1/models."""
        card = {
            "object": "model",
            "created": int(time.time()),  # of the answer, as vLLM has it
            "owned_by": "vllm",
            "root": self.model,
            "parent": None,
            "max_model_len": self.shape.max_model_len,
        }
        adapter = {**card, "parent": self.model, "max_model_len": None}
        cards = [{"id": name, **(card if name in self.aliases else adapter)} for name in self.names]
        return {"object": "list", "data": cards}


def error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """An error in the shape that vLLM gives it."""
    kind = {400: "BadRequestError", 404: "NotFoundError"}.get(
        status, "ServiceUnavailableError" if status == 503 else "Error"
    )
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


def text_of(content: object) -> str:
    """A message's text, whether a string or a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def prompt_of(body: object, field: str) -> bytes:
    """The prompt's text; a conversation's next turn begins with all of this one and its answer."""
    if not isinstance(body, dict):
        raise TypeError("the body must be a JSON object")
    if field != "messages" and not (field == "input" and isinstance(body.get(field), list)):
        prompt = body.get(field, "")
        return (prompt if isinstance(prompt, str) else json.dumps(prompt)).encode()
    messages = body.get(field)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise TypeError(f"{field}: a list of objects is required")
    turns = "".join(f"<|{message.get('role')}|>{text_of(message.get('content'))}" for message in messages)
    return f"{turns}<|assistant|>".encode()


def priority_of(head: bytes, body: dict[str, Any]) -> int:
    """A request's priority: the header's before the body's, as vLLM has it."""
    found = re.search(rb"(?im)^x-vllm-priority: *(-?\d+)\r?$", head)
    said = int(found[1]) if found else body.get("priority")
    return said if isinstance(said, int) else 0


def answer_to(prompt: bytes, tokens: int) -> bytes:
    """Text of `tokens` tokens that depends on the prompt alone."""
    state, words = zlib.crc32(prompt), []
    for _ in range(tokens):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        words.append(b" " + WORDS[(state >> 16) % len(WORDS)])
    return b"".join(words)


class Connection(asyncio.Protocol):
    """One client connection: reads requests one after the other, writes answers."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set before anything else happens
        self.buffer = bytearray()
        self.request: Request | None = None
        self.passed_on = False
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, _: Exception | None) -> None:
        if self.task:
            self.task.cancel()
        if self.request:
            self.replica.engine.abort(self.request)
            self.replica.finished["abort"] += 1

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.task is None:
            self._next()

    def _next(self) -> None:
        """Handles the requests that lie complete in the buffer, until one takes time."""
        while self.task is None and not self.transport.is_closing():
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.buffer[:end])
            lower = head.lower()
            if b"\r\ntransfer-encoding:" in lower:
                whole = dechunk(self.buffer, end + 4)
                if whole is None:
                    return
                body, used = whole
            else:
                at = lower.find(b"\r\ncontent-length:")
                length = int(lower[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
                used = end + 4 + length
                if len(self.buffer) < used:
                    if b"\r\nexpect: 100-continue" in lower and len(self.buffer) == end + 4:
                        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    return
                body = bytes(self.buffer[end + 4 : used])
            del self.buffer[:used]
            start = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
            if len(start) != 3 or start[0] == "PRI":
                # Some gateways try HTTP/2 first.
                self.transport.close()
                return
            self._handle(start[0], start[1].split("?", 1)[0], head, body)

    def _handle(self, method: str, path: str, head: bytes, body: bytes) -> None:
        replica = self.replica
        generates = path in DIALECTS
        # A gateway names each request that it passes on; what it asks for itself has no id.
        self.passed_on = b"\r\nx-request-id:" in head.lower()
        if generates or self.passed_on:
            replica.seen.append((head, body))
        if generates:
            replica.generations += 1
            self._begin(method, path, head, body)
        elif path in ("/health", "/ping"):
            told = f"x-sleep: {json.dumps(asdict(replica.naps.told()))}\r\n" if replica.naps else ""
            self._send(replica.faults.health, b"", more=told)
        elif replica.naps and (method, path) in (("GET", "/is_sleeping"), ("POST", "/sleep"), ("POST", "/wake_up")):
            if path == "/sleep":
                replica.naps.sleep()
            elif path == "/wake_up":
                replica.naps.wake_up()
            self._send_json(200, asdict(replica.naps.told()))
        elif path == "/v1/models":
            text = replica.faults.models
            self._send(200, (json.dumps(replica.models()) if text is None else text).encode())
        elif path == "/metrics":
            self._send(replica.faults.metrics, replica.metrics().encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif path == "/version":
            self._send_json(200, {"version": "0.32.0"})
        elif path == "/tokenize":
            self._tokenize(body)
        elif path == "/_sim":
            self._control(method, body)
        elif path in FIXED:
            self._fixed(path, body)
        else:
            self._send_json(404, {"detail": "Not Found"})

    def _fixed(self, path: str, body: bytes) -> None:
        """Answers where no text is generated."""
        if b"bytes" in body:
            # vectors as bytes
            said = json.dumps({"data": [], "usage": FIXED[path]["usage"]})
            self._send(200, b"\0" * 4, "application/octet-stream", f"metadata: {said}\r\n")
        elif b"verbose_json" in body:
            self._send_json(200, {"duration": 3.2, "language": "en", "text": "hello", "segments": []})
        else:
            self._send_json(200, FIXED[path])

    def _control(self, method: str, body: bytes) -> None:
        replica = self.replica
        if method == "POST":
            try:
                replica.set_faults(json.loads(body))
            except (ValueError, TypeError) as why:
                self._send_json(*error(400, str(why)))
                return
            self._send(200, b"")
            return
        seen = [
            {"head": head.decode("latin-1"), "body": text.decode("utf-8", "replace")} for head, text in replica.seen
        ]
        faults = {f.name: getattr(replica.faults, f.name) for f in fields(Faults)}
        counts = {"generations": replica.generations, "tokens": replica.tokens, "finished": replica.finished}
        self._send_json(200, {**counts, "faults": faults, "seen": seen})

    def _tokenize(self, body: bytes) -> None:
        try:
            wanted = json.loads(body)
            prompt = prompt_of(wanted, "messages" if "messages" in wanted else "prompt")
        except (ValueError, TypeError, RecursionError) as why:
            self._send_json(*error(400, str(why)))
            return
        ids = [int.from_bytes(prompt[at : at + TOKEN_BYTES], "big") for at in range(0, len(prompt), TOKEN_BYTES)]
        self._send_json(200, {"count": len(ids), "max_model_len": self.replica.shape.max_model_len, "tokens": ids})

    def _begin(self, method: str, path: str, head: bytes, body: bytes) -> None:
        """Generates, if the replica has sleep mode as soon as it is awake; as vllm/sleeper.py has it."""
        naps = self.replica.naps
        if naps and self.passed_on:
            self.task = asyncio.create_task(self._in_turn(naps, method, path, head, body))
        elif naps and naps.told().is_sleeping:
            self._send_json(*error(503, "it sleeps"), more="x-refusal: asleep\r\n")
        else:
            self._generate(method, path, head, body)

    async def _in_turn(self, naps: Naps, method: str, path: str, head: bytes, body: bytes) -> None:
        # One whose client hangs up is cancelled.
        why = await naps.enter(asyncio.get_running_loop().create_future())
        self.task = None
        if why:
            self._send_json(*error(503, why), more=f"x-refusal: asleep\r\nx-failure: {why}\r\n")
            self._next()
            return
        try:
            self._generate(method, path, head, body)
            if self.task:
                await self.task
        finally:
            naps.leave()
        if self.task is None:
            self._next()

    def _generate(self, method: str, path: str, head: bytes, body: bytes) -> None:
        replica, faults = self.replica, self.replica.faults
        if faults.deadly and faults.deadly.encode() in body:
            os._exit(1)
        if faults.fault == "reset":
            self.transport.abort()
            return
        if faults.fault == "garbage":
            self.transport.write(b"HTTP/1.1 200 OK\r\n\x00 garbage \xff\r\n\r\n")
            self.transport.close()
            return
        if faults.fault == "status":
            status, body_of = error(faults.status, "simulated fault")
            # As vllm/begin.py says of an engine that failed.
            failure = "x-failure: simulated fault\r\n" if status >= 500 else ""
            refusal = f"x-refusal: {faults.refusal}\r\n" if faults.refusal else ""
            self._send(status, json.dumps(body_of).encode(), more=failure + refusal)
            return
        if method != "POST":
            self._send_json(405, {"detail": "Method Not Allowed"})
            return
        dialect = DIALECTS[path](replica.model, uuid.uuid4().hex)
        if replica.instant:
            stream = b'"stream":true' in body or b'"stream": true' in body
            self._write_instant(dialect, stream)
            return
        try:
            wanted = json.loads(body)
            prompt = prompt_of(wanted, FIELDS.get(path, "messages"))
        except (ValueError, TypeError, RecursionError) as why:
            self._send_json(*error(400, str(why)))
            return
        if wanted.get("model", replica.model) not in replica.names:
            self._send_json(*error(404, f"The model `{wanted['model']}` does not exist."))
            return
        limits = ("max_completion_tokens", "max_output_tokens", "max_tokens")
        max_tokens = next((wanted[name] for name in limits if wanted.get(name)), 64)
        if not isinstance(max_tokens, int) or max_tokens < 1:
            self._send_json(*error(400, "max_tokens must be at least 1"))
            return
        priority = priority_of(head, wanted)
        request = Request(prompt, max_tokens, b"", asyncio.get_running_loop().time(), priority)
        limit = min(replica.shape.max_model_len, replica.shape.kv_blocks * BLOCK)
        if request.prompt_tokens + max_tokens > limit:
            self._send_json(*error(400, f"This model's maximum context length is {limit} tokens."))
            return
        request.max_tokens = min(max_tokens, replica.shape.answer_tokens)
        request.answer = answer_to(prompt, request.max_tokens)
        try:
            replica.engine.submit(request)
        except QueueFullError:
            self._send_json(*error(503, "The waiting queue is full."))
            return
        self.request = request
        self.task = asyncio.create_task(
            self._stream(request, dialect) if wanted.get("stream") else self._whole(request, dialect)
        )
        self.task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled():
            task.result()
        self.task = None
        self._next()

    async def _follow(self, request: Request, each: Callable[[int], None]) -> bool:
        """Calls `each` for every token; False when the stream was cut on command."""
        loop, replica = asyncio.get_running_loop(), self.replica
        last = request.arrived
        while (index := await request.tokens.get()) is not None:
            now = loop.time()
            (replica.itl if index else replica.ttft).observe(now - last)
            last = now
            if replica.faults.fault == "cut" and index >= replica.faults.after_tokens:
                self.transport.abort()
                return False
            each(index)
            replica.tokens += self.passed_on
        replica.e2e.observe(last - request.arrived)
        replica.finished["length"] += 1
        self.request = None
        return True

    async def _whole(self, request: Request, dialect: Dialect) -> None:
        if await self._follow(request, lambda _: None):
            self._send_json(200, dialect.whole(request.answer.decode(), usage_of(request)))

    async def _stream(self, request: Request, dialect: Dialect) -> None:
        write = self.transport.write

        def chunk(events: str) -> None:
            if events:
                data = events.encode()
                write(b"%x\r\n%b\r\n" % (len(data), data))

        commented = self.replica.faults.comment
        if commented:
            write(STREAM_HEAD)
            chunk(": wait\n\n")

        def token(index: int) -> None:
            if index == 0:
                if not commented:
                    write(STREAM_HEAD)
                chunk(dialect.begin())
            text = request.answer[index * TOKEN_BYTES : (index + 1) * TOKEN_BYTES].decode()
            if wide := self.replica.faults.wide:
                text = "x" * wide
            chunk(dialect.token(text, index == request.max_tokens - 1, usage_of(request, index + 1)))

        if await self._follow(request, token):
            chunk(dialect.end(request.answer.decode(), usage_of(request)))
            write(b"0\r\n\r\n")

    def _write_instant(self, dialect: Dialect, stream: bool) -> None:
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = dialect.whole(" the", usage)
        if stream:
            self._send(200, b"data: " + json.dumps(answer).encode() + b"\n\ndata: [DONE]\n\n", "text/event-stream")
        else:
            self._send_json(200, answer)

    def _send_json(self, status: int, data: object, more: str = "") -> None:
        self._send(status, json.dumps(data, separators=(",", ":")).encode(), more=more)

    def _send(self, status: int, body: bytes, kind: str = "application/json", more: str = "") -> None:
        reason = REASONS.get(status, "Error")
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: {kind}\r\n{more}content-length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)


def usage_of(request: Request, tokens: int | None = None) -> dict[str, Any]:
    """The usage object, with the part of the prompt that came from the cache; up to so many tokens of the answer."""
    made = request.made if tokens is None else tokens
    return {
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": request.prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": request.cached_tokens},
    }


def dechunk(buffer: bytearray, at: int) -> tuple[bytes, int] | None:
    """A chunked body that starts at `at`: its bytes and where it ends, or None while it is not all there."""
    parts: list[bytes] = []
    while True:
        line = buffer.find(b"\r\n", at)
        if line < 0:
            return None
        size = int(bytes(buffer[at:line]).split(b";", 1)[0], 16)
        at = line + 2 + size + 2
        if len(buffer) < at:
            return None
        if size == 0:
            return b"".join(parts), at
        parts.append(bytes(buffer[line + 2 : line + 2 + size]))


async def serve(replica: Replica, host: str, port: int) -> None:
    """Serves until SIGTERM, then finishes what runs, as `vllm serve --shutdown-timeout` does."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(replica), host, port, backlog=4096)
    engine = asyncio.create_task(replica.engine.run())
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([engine, stopped], return_when=asyncio.FIRST_COMPLETED)
    if engine.done():
        engine.result()
    server.close()
    while replica.engine.running or replica.engine.waiting:
        await asyncio.sleep(0.01)
    # The loop ends only after the last answer's bytes have gone to the socket.
    await asyncio.sleep(0.05)


def main() -> None:
    shape = Shape()
    parser = argparse.ArgumentParser(description="A simulated vLLM replica.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="sim")
    parser.add_argument("--adapters", type=int, default=0, help="how many adapters it serves beside the model")
    parser.add_argument("--instant", action="store_true", help="answer at once, without an engine")
    parser.add_argument(
        "--load-seconds", type=float, default=0.0, help="time before the port opens, as a model that loads"
    )
    parser.add_argument("--fault", help="the fault to begin with")
    parser.add_argument("--sleeps", action="store_true", help="it has sleep mode, and begins asleep")
    parser.add_argument("--wake-seconds", type=float, default=60.0, help="how long a request waits for it to wake")
    parser.add_argument("--gpus", type=Path, nargs="*", default=[], help="files that stand for GPUs that it shares")
    for item in fields(Shape):
        default = getattr(shape, item.name)
        parser.add_argument("--" + item.name.replace("_", "-"), type=type(default), default=default)
    args = parser.parse_args()
    time.sleep(args.load_seconds)
    values = {item.name: getattr(args, item.name) for item in fields(Shape)}

    async def start() -> None:
        replica = Replica(args.model, Shape(**values), args.instant, args.adapters)
        replica.set_faults({"fault": args.fault})
        if args.sleeps:
            replica.sleeps(args.wake_seconds, args.gpus)
        await serve(replica, args.host, args.port)

    uvloop.run(start())


if __name__ == "__main__":
    main()
